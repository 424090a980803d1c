"""DPO on the selection with the stored scores."""
