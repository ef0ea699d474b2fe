"""What the store costs, as ratios against peers that do the same durable work in the same run: ``make bench``."""
