"""The exact global top-k over the scores."""
