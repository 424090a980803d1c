"""From raw preference data to shards of encoded pairs."""
