"""Flask: gunicorn --workers 4 flask_app:application, with --preload or without."""

import os

from flask import Flask

from savings_exporter import SavingsTracker
from savings_exporter.embedding import mount_wsgi

# With --preload this runs once, before the workers are forked. Each worker then continues with its own journal.
tracker = SavingsTracker(os.environ.get("SAVINGS_STORE", "proxy_savings.json"))
app = Flask(__name__)


@app.post("/complete")
def complete() -> dict[str, bool]:
    receipt = tracker.record_request(model="gpt-5", provider="openai", input_tokens=12_000, tokens_saved=4_096)
    return {"durable": receipt.durable}


application = mount_wsgi(app, tracker, "/savings")
