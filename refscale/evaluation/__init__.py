"""What the policy does on held-out pairs, and what a judge says of its answers."""
