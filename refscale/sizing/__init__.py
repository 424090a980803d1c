"""What a run will cost, before any GPU is taken."""
