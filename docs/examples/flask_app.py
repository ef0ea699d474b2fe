"""Flask: gunicorn --workers 4 flask_app:app, with --preload or without."""

import os

from flask import Flask, Response
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from savings_exporter import SavingsCollector, SavingsTracker

# With --preload this runs once, before the workers are forked. Each worker then continues with its own journal.
tracker = SavingsTracker(os.environ.get("SAVINGS_STORE", "proxy_savings.json"))
registry = CollectorRegistry()
registry.register(SavingsCollector(tracker))
app = Flask(__name__)


@app.post("/complete")
def complete() -> dict[str, bool]:
    receipt = tracker.record_request(model="gpt-5", provider="openai", input_tokens=12_000, tokens_saved=4_096)
    return {"durable": receipt.durable}


@app.get("/metrics")
def metrics() -> Response:
    return Response(generate_latest(registry), content_type=CONTENT_TYPE_LATEST)
