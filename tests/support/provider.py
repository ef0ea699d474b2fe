"""A provider of models on the loopback address, with the API of OpenAI. Each response has the same usage."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PROMPT_TOKENS = 1_000
CACHED_TOKENS = 900
COMPLETION_TOKENS = 7

FAILING_MODEL = "gpt-4-turbo"
"""The model for which the provider answers with an error."""

_USAGE = {
    "prompt_tokens": PROMPT_TOKENS,
    "completion_tokens": COMPLETION_TOKENS,
    "total_tokens": PROMPT_TOKENS + COMPLETION_TOKENS,
    "prompt_tokens_details": {"cached_tokens": CACHED_TOKENS},
}


@contextmanager
def provider() -> Iterator[str]:
    """Run a provider. The value is its base URL, without ``/v1``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if request["model"] == FAILING_MODEL:
            self._send(
                400, "application/json", json.dumps({"error": {"message": "no", "type": "invalid_request_error"}})
            )
        elif request.get("stream"):
            parts = [_part(request, {"role": "assistant", "content": "yes"}, None), _part(request, {}, "stop")]
            parts.append({**_part(request, {}, None), "choices": [], "usage": _USAGE})
            lines = [*map(json.dumps, parts), "[DONE]"]
            self._send(200, "text/event-stream", "".join(f"data: {line}\n\n" for line in lines))
        else:
            choice = {"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}
            self._send(
                200, "application/json", json.dumps({**_head(request, ""), "choices": [choice], "usage": _USAGE})
            )

    def log_message(self, format: str, *arguments: Any) -> None:
        """Print nothing."""

    def _send(self, status: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _head(request: dict[str, Any], part: str) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "object": f"chat.completion{part}", "created": 1, "model": request["model"]}


def _part(request: dict[str, Any], delta: dict[str, Any], finish: str | None) -> dict[str, Any]:
    return {**_head(request, ".chunk"), "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
