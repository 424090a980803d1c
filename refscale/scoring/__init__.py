"""The reference model's log-probs of packed pairs."""
