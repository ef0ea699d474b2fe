"""FastAPI: uvicorn fastapi_app:app --workers 4. All workers share the store; each serves the metrics of all."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, make_asgi_app

from savings_exporter import SavingsCollector, SavingsTracker

registry = CollectorRegistry()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    tracker = await asyncio.to_thread(SavingsTracker, os.environ.get("SAVINGS_STORE", "proxy_savings.json"))
    collector = SavingsCollector(tracker)
    registry.register(collector)
    app.state.tracker = tracker
    try:
        yield
    finally:
        registry.unregister(collector)
        await asyncio.to_thread(tracker.close)


app = FastAPI(lifespan=lifespan)
app.mount("/metrics", make_asgi_app(registry))


@app.post("/complete")
async def complete() -> dict[str, bool]:
    # The proxy calls the model here, and records the saving when it has the answer.
    receipt = await app.state.tracker.record_request_async(
        model="claude-sonnet-4-5", provider="anthropic", input_tokens=12_000, tokens_saved=4_096
    )
    return {"durable": receipt.durable}
