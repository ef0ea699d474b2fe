"""The empty ASGI application, and the empty Starlette route, that the service is compared with.

``python -m benchmarks.peers.empty_asgi plain|starlette`` serves one on a free loopback port, and prints its address.
"""

from __future__ import annotations

import socket
import sys

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

_BODY = b'{"sequence":123456,"writer":"0123456789abcdef","accepted":1,"durable":true}\n'
_HEADERS = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(_BODY))]


async def _plain(_scope: Scope, _receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
    await send({"type": "http.response.body", "body": _BODY})


async def _answer(_request: Request) -> Response:
    return Response(_BODY, media_type="application/json")


def _serve(kind: str) -> None:
    """``plain`` has the parser and the event loop of the service, ``starlette`` those that are always there."""
    if kind == "plain":
        config = uvicorn.Config(_plain, http="httptools", loop="uvloop", lifespan="off", log_config=None)
    else:
        app = Starlette(routes=[Route("/v1/savings", _answer, methods=["POST"])])
        config = uvicorn.Config(app, http="h11", loop="asyncio", lifespan="off", log_config=None)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(2048)
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    _serve(sys.argv[1])
