"""Where a run lives: files published whole, stage folders, locks, fingerprints."""
