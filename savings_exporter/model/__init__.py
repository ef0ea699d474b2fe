"""Records, totals, history and idempotency keys as plain values. These modules use no files and no locks."""
