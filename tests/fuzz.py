"""Sends hostile requests to a running service, and compares what it recorded with what it acknowledged.

    make fuzz ARGS="--requests 100000 --seed 7"

The requests of each client follow from the seed, which is printed. Clients run at the same time, so the order in which
the service sees their requests is another one each time.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import socket
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.service import running
from tests.support.wait import WAIT_SECONDS

CLIENTS = 8
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW")
PATHS = (
    *("/", "/metrics", "/v1/savings", "/v1/history", "/v1/metrics", "/-/healthy", "/-/ready", "/openapi.json"),
    *("/docs/", "/docs/runbook", "/docs/../../etc/passwd", "/docs/%2e%2e%2fREADME", "/docs/%00", "//", "/%", "/%zz"),
    *("/v1/savings/", "/V1/SAVINGS", "/v1//savings", "/v1/savings%3f", "/static/x", "/favicon.ico"),
)
QUERIES = ("from", "to", "by", "format", "x", "")
TEXTS = (
    "",
    "a",
    "é",
    "\x00",
    "\x1b]0;title\x07",
    "\u202e",
    "😀",
    "%41%2525",
    "other",
    "=1+1",
    "NaN",
    "2026-01-31",
    "x" * 999,
)
NUMBERS = (
    "0",
    "-1",
    "1.0",
    "1e400",
    "1e12",
    "10" * 50,
    "NaN",
    "-0",
    "true",
    "null",
    '"1"',
    "1000000000001",
    "[]",
    "{}",
)
FIELDS = ("model", "tokens_saved", "input_tokens", "provider", "project", "agent", "source", "timestamp", "savings_usd")
HEADERS = ("Accept", "Accept-Encoding", "Content-Encoding", "Content-Type", "Host", "Origin", "Range", "Expect", "X-Y")
VALUES = ("", "*/*", "gzip", "br;q=x", "application/json", "text/plain; version=9.9.9", "100-continue", "é", "a" * 5000)

_ACKNOWLEDGED = re.compile(rb'"accepted":(\d+),"durable":(?:true|false)(,"duplicate":true)?')
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3})")


class Found(NamedTuple):
    """The result of a run: what was acknowledged and what the service holds, and what is wrong."""

    statuses: Counter[int]
    acknowledged: tuple[int, int]
    recorded: tuple[int, int]
    problems: list[str]


class Client(threading.Thread):
    """Sends a number of requests. ``records`` and ``tokens`` are those that were acknowledged."""

    def __init__(self, port: int, requests: int, seed: str) -> None:
        super().__init__()
        self.statuses: Counter[int] = Counter()
        self.records = self.tokens = 0
        self.problems: list[str] = []
        self._port, self._requests, self._seed = port, requests, seed
        self._random = random.Random(seed)
        self._connection = self._connected()

    def run(self) -> None:
        kinds: list[Callable[[str], None]] = [self._record, self._retried, self._hostile_body, self._route, self._raw]
        for number in range(self._requests):
            kind = self._random.choice(kinds)
            try:
                kind(f"{self._seed}-{number}")
            except Exception as error:
                self.problems.append(f"request {number}, {kind.__name__}: {error!r}")
                self._connection.close()

    def _connected(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self._port, timeout=WAIT_SECONDS)

    def _record(self, key: str) -> None:
        """Valid records, as one or as a batch, with or without a key."""
        headers = {"Idempotency-Key": key} if self._random.random() < 0.5 else {}
        self._send("POST", "/v1/savings", self._valid(), headers)

    def _retried(self, key: str) -> None:
        """A client that does not wait for its answer, and sends the same request again."""
        body, headers = self._valid(), {"Idempotency-Key": key}
        with socket.create_connection(("127.0.0.1", self._port), WAIT_SECONDS) as connection:
            connection.sendall(_request(body, f"Idempotency-Key: {key}\r\n"))
        self._send("POST", "/v1/savings", body, headers, counts_duplicate=True)
        self._send("POST", "/v1/savings", body, headers)
        # The same key with other content is refused.
        self._send("POST", "/v1/savings", b'{"model":"another","tokens_saved":123456789}', headers)

    def _hostile_body(self, key: str) -> None:
        """A body with a wrong field, changed bytes, or a structure of its own."""
        choose = self._random.random()
        if choose < 0.4:
            body = self._body_of_fields()
        elif choose < 0.8:
            changed = bytearray(self._valid())
            for _ in range(self._random.randint(1, 4)):
                changed[self._random.randrange(len(changed))] = self._random.randrange(256)
            body = bytes(changed[: self._random.randint(0, len(changed))] if choose < 0.5 else changed)
        else:
            depth = self._random.choice((1, 100, 100_000))
            body = self._random.choice(
                (b"[" * depth, b'{"records":' * depth, b"\xff\xfe", b"", b"null", b'""', b"[{}]")
            )
        headers = {"Idempotency-Key": self._text()} if self._random.random() < 0.1 else {}
        path = "/v1/metrics" if self._random.random() < 0.1 else "/v1/savings"
        self._send("POST", path, body, headers)

    def _route(self, key: str) -> None:
        """Any method, path, query and headers, without a body."""
        method = self._random.choice(METHODS)
        query = "&".join(
            f"{self._random.choice(QUERIES)}={self._random.choice(('json', 'csv', 'day', '%00', '2026-02-30', 'é%ff'))}"
            for _ in range(self._random.choice((0, 0, 1, 3)))
        )
        path = self._random.choice(PATHS) + (f"?{query}" if query else "")
        lines = "".join(
            f"{self._random.choice(HEADERS)}: {self._random.choice(VALUES)}\r\n"
            for _ in range(self._random.randint(0, 4))
        )
        self._exchange(
            f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n{lines}\r\n".encode(
                "latin-1", "replace"
            )
        )

    def _raw(self, key: str) -> None:
        """What is no proper HTTP. All records in it save one token."""
        body = b'{"model":"raw","tokens_saved":1}'
        whole = _request(body)
        kind = self._random.randrange(7)
        if kind == 0:
            self._exchange(self._random.randbytes(self._random.randint(1, 300)) + b"\r\n\r\n")
        elif kind == 1:  # another request in the body, for a server that takes the wrong one of two lengths
            hidden = body + whole
            lines = self._random.choice(("Transfer-Encoding: chunked\r\n", f"Content-Length: {len(hidden)}\r\n"))
            self._exchange(_request(body, lines)[: -len(body)] + hidden)
        elif kind == 2:  # cut off
            with socket.create_connection(("127.0.0.1", self._port), WAIT_SECONDS) as connection:
                connection.sendall(whole[: self._random.randrange(len(whole))])
        elif kind == 3:
            size = self._random.choice(("-1", "x", "99999999999999999999", "0x10", "+5", ""))
            self._exchange(
                f"POST /v1/savings HTTP/1.1\r\nHost: a\r\nContent-Length: {size}\r\n\r\n".encode(), is_cut=True
            )
        elif kind == 4:
            chunks = self._random.choice((b"zz\r\n", b"-5\r\nabc\r\n", b"5;x=y\r\n{}   \r\n0\r\n\r\n", b"0\r\n\r\n"))
            head = b"POST /v1/savings HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: application/json\r\n"
            self._exchange(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
        elif kind == 5:
            line = self._random.choice((b"GET", b"GET / HTTP/9.9", b"GET / HTTP/1.0", b"\x16\x03\x01", b" / HTTP/1.1"))
            self._exchange(line + b"\r\nConnection: close\r\n\r\n")
        else:  # two requests at once
            self._exchange(whole.replace(b"Connection: close\r\n", b"") + whole)

    def _exchange(self, data: bytes, *, is_cut: bool = False) -> None:
        """Send bytes, and read what is answered until the service closes the connection."""
        received = b""
        with socket.create_connection(("127.0.0.1", self._port), WAIT_SECONDS) as connection:
            # What is no whole request may be answered only after the service has waited for the rest.
            connection.settimeout(0.05 if is_cut else WAIT_SECONDS)
            try:
                connection.sendall(data)
                while piece := connection.recv(65536):
                    received += piece
            except (TimeoutError, ConnectionError):
                pass
        for status in _STATUS.findall(received):
            self._note(int(status), data)
        for accepted, duplicate in _ACKNOWLEDGED.findall(received):
            if not duplicate:
                self.records += int(accepted)
                self.tokens += int(accepted)

    def _send(
        self, method: str, path: str, body: bytes, headers: dict[str, str], *, counts_duplicate: bool = False
    ) -> None:
        headers = {"Content-Type": "application/json", **headers}
        try:
            self._connection.request(method, path, body, headers)
        except ValueError:  # a header that the client library refuses; the connection keeps a part of the request
            self._connection = self._connected()
            return
        response = self._connection.getresponse()
        answer = response.read()
        self._note(response.status, body)
        if path == "/v1/savings" and response.status in (200, 202):
            receipt = json.loads(answer)
            if counts_duplicate or not receipt.get("duplicate"):
                self.records += receipt["accepted"]
                self.tokens += _tokens(body)

    def _note(self, status: int, sent: bytes) -> None:
        self.statuses[status] += 1
        if status >= 500 and status != 503:
            self.problems.append(f"answered with {status}: {sent[:500]!r}")

    def _valid(self) -> bytes:
        records = [
            {"model": f"m{self._random.randrange(5)}", "tokens_saved": self._random.randrange(10_000)}
            for _ in range(self._random.choice((1, 1, 3)))
        ]
        return json.dumps({"records": records} if len(records) > 1 else records[0]).encode()

    def _body_of_fields(self) -> bytes:
        fields = ['"model":"m"', '"tokens_saved":7']
        for _ in range(self._random.randint(1, 3)):
            value = self._random.choice(NUMBERS) if self._random.random() < 0.6 else json.dumps(self._text())
            fields.append(f"{json.dumps(self._random.choice((*FIELDS, 'x')))}:{value}")
        self._random.shuffle(fields)
        return f"{{{','.join(fields)}}}".encode()

    def _text(self) -> str:
        return "".join(self._random.choice(TEXTS) for _ in range(self._random.randint(1, 3)))


def _request(body: bytes, lines: str = "") -> bytes:
    head = (
        "POST /v1/savings HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
        f"{lines}Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _tokens(body: bytes) -> int:
    """The tokens saved by a body that the service has accepted. Of a repeated field the last one counts."""
    content: Any = json.loads(body)
    return sum(int(record["tokens_saved"]) for record in content.get("records", [content]))


def fuzz(store: Path, requests: int, seed: int) -> Found:
    """Send requests to a new service, and stop it."""
    with running("serve", "--store", str(store), "--log.level", "warning") as service:
        port = int(service.url.rpartition(":")[2])
        clients = [Client(port, requests // CLIENTS, f"{seed}-{number}") for number in range(CLIENTS)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        problems = [problem for client in clients for problem in client.problems]
        lifetime = json.loads(service.get("/v1/savings")[1])["lifetime"]
        status, _, log = service.stop()
    if status != 0:
        problems.append(f"the service ended with status {status}")
    if "Traceback" in log:
        problems.append(f"the log has a traceback: {log[log.index('Traceback') :][:3000]}")
    acknowledged = sum(client.records for client in clients), sum(client.tokens for client in clients)
    recorded = lifetime["requests"], lifetime["tokens_saved"]
    if acknowledged != recorded:
        problems.append(f"acknowledged (records, tokens): {acknowledged}, recorded: {recorded}")
    return Found(sum((client.statuses for client in clients), Counter()), acknowledged, recorded, problems)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description="Send hostile requests to a service.")
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        found = fuzz(Path(directory) / "proxy_savings.json", given.requests, given.seed)
    print(f"answers by status: {dict(sorted(found.statuses.items()))}")
    print(f"acknowledged (records, tokens): {found.acknowledged}, recorded: {found.recorded}")
    for problem in found.problems[:20]:
        print(f"problem: {problem}")
    return bool(found.problems)


if __name__ == "__main__":
    sys.exit(main())
