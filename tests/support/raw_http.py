"""Requests as bytes, for headers that no HTTP client sends."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterable
from typing import NamedTuple

from tests.support.service import Service
from tests.support.wait import WAIT_SECONDS

Lines = Iterable["tuple[str, str | bytes]"]


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: str


def sent(
    service: Service, method: str, path: str, headers: Lines, body: bytes = b"", *, version: str = "1.1"
) -> Answer:
    """Send a request with these headers and a Content-Length, and nothing else."""
    host, _, port = service.url.partition("://")[2].partition(":")
    lines = [f"{method} {path} HTTP/{version}".encode()]
    for name, value in (*headers, ("Content-Length", str(len(body))), ("Connection", "close")):
        lines.append(name.encode() + b": " + (value if isinstance(value, bytes) else value.encode()))
    with socket.create_connection((host, int(port)), WAIT_SECONDS) as connection:
        connection.sendall(b"\r\n".join(lines) + b"\r\n\r\n" + body)
        answer = http.client.HTTPResponse(connection, method=method)
        answer.begin()
        return Answer(answer.status, answer.headers, answer.read().decode())
