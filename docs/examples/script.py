"""A script, or a job that cron starts: the store is open as long as the block."""

import os

from savings_exporter import SavingsTracker

with SavingsTracker(os.environ.get("SAVINGS_STORE", "proxy_savings.json")) as tracker:
    receipt = tracker.record_request(model="gpt-5", provider="openai", input_tokens=900, tokens_saved=2_100)
    print("durable" if receipt.durable else f"pending: {tracker.health().reason}")
