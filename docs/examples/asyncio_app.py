"""asyncio: recording never blocks the event loop. Opening and closing wait for the disk, so run them in a thread."""

import asyncio
import os

from savings_exporter import SavingsTracker


async def handle(tracker: SavingsTracker, number: int) -> bool:
    """Handle a request and record its saving. When this returns, the record is durable or pending."""
    receipt = await tracker.record_request_async(
        model="claude-sonnet-4-5", provider="anthropic", input_tokens=1_200, tokens_saved=400, project=f"p{number % 3}"
    )
    return receipt.durable


async def main() -> None:
    tracker = await asyncio.to_thread(SavingsTracker, os.environ.get("SAVINGS_STORE", "proxy_savings.json"))
    try:
        # Records that wait at the same moment share one write to the disk.
        durable = await asyncio.gather(*(handle(tracker, number) for number in range(20)))
        print(f"{sum(durable)} durable")
    finally:
        await asyncio.to_thread(tracker.close)


asyncio.run(main())
