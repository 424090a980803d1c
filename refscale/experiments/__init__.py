"""Does the selection help: comparisons of arms, and the audit of labels."""
