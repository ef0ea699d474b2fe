"""A script or a cron job: the store is open inside the ``with`` block."""

import os

from savings_exporter import SavingsTracker

with SavingsTracker(os.environ.get("SAVINGS_STORE", "proxy_savings.json")) as tracker:
    receipt = tracker.record_request(model="gpt-5", provider="openai", input_tokens=900, tokens_saved=2_100)
    print("durable" if receipt.durable else f"pending: {tracker.health().reason}")
