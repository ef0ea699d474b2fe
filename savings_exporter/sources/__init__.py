"""Sources of savings: what other programs have recorded."""
