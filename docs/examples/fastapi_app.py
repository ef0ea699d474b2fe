"""FastAPI: uvicorn fastapi_app:app --workers 4. All workers share the store; each serves the metrics of all."""

import os

from fastapi import FastAPI

from savings_exporter import SavingsTracker
from savings_exporter.embedding import mount

tracker = SavingsTracker(os.environ.get("SAVINGS_STORE", "proxy_savings.json"))
app = FastAPI()
mount(app, tracker, "/savings")


@app.post("/complete")
async def complete() -> dict[str, bool]:
    # The proxy calls the model here, and records the saving when it has the answer.
    receipt = await tracker.record_request_async(
        model="claude-sonnet-4-5", provider="anthropic", input_tokens=12_000, tokens_saved=4_096
    )
    return {"durable": receipt.durable}
