"""Records, totals, history and idempotency keys as values: no file, no clock, no lock."""
