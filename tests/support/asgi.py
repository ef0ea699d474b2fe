"""Requests to the application in this process, without a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.types import ASGIApp

from savings_exporter.service.app import Service


async def exchange(
    service: Service | ASGIApp, method: str, path: str, body: AsyncIterator[bytes]
) -> tuple[int, dict[str, str], bytes]:
    """What the application answers to a request whose body comes in pieces: the status, the headers, the body."""
    sent: list[dict[str, Any]] = []
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": headers}

    is_complete = False

    async def receive() -> dict[str, Any]:
        nonlocal is_complete
        if is_complete:
            await asyncio.Event().wait()  # for the client to go away
        try:
            return {"type": "http.request", "body": await anext(body), "more_body": True}
        except StopAsyncIteration:
            is_complete = True
            return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await (service.app if isinstance(service, Service) else service)(scope, receive, send)
    answered = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], answered, sent[1]["body"]


async def chunks(*data: bytes) -> AsyncIterator[bytes]:
    for chunk in data:
        yield chunk
