"""A saving that arrives whole is answered like one that arrives in parts, although the server does it another way."""

from __future__ import annotations

import json
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.support.service import Service, running
from tests.support.wait import WAIT_SECONDS, eventually

RECORD = b'{"model":"m","tokens_saved":7}'
GET = b"GET /-/ready HTTP/1.1\r\nHost: localhost\r\n\r\n"


def post(body: bytes = RECORD, headers: str = "", version: str = "1.1", host: str = "localhost") -> bytes:
    lines = f"POST /v1/savings HTTP/{version}\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n"
    kind = "" if "Content-Type" in headers else "Content-Type: application/json\r\n"
    return (lines + kind + headers + "\r\n").encode() + body


class Client:
    """A connection that is sent raw bytes."""

    def __init__(self, service: Service) -> None:
        address, self._service = urlsplit(service.url), service
        assert address.port is not None
        self.socket = socket.create_connection(("127.0.0.1", address.port), WAIT_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self.socket.makefile("rb")

    def send(self, *parts: bytes) -> None:
        """Send parts that arrive one after the other."""
        for number, part in enumerate(parts):
            if number:
                # When another client has its answer, the part before has been read.
                assert self._service.get("/-/ready")[0] == 200
            self.socket.sendall(part)

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        """The status, the headers and the body of the next answer that is not 100."""
        status = int(self._file.readline().split()[1])
        headers = {}
        while (line := self._file.readline().strip()) and b":" in line:
            name, _, value = line.decode("latin-1").partition(": ")
            headers[name] = value
        if status == 100:
            return self.answer()
        return status, headers, self._file.read(int(headers["content-length"]))

    def ends(self) -> bool:
        """Whether the service ends the connection now."""
        return self._file.read() == b""

    def close(self) -> None:
        self._file.close()
        self.socket.close()


@contextmanager
def connected(service: Service) -> Iterator[Client]:
    client = Client(service)
    try:
        yield client
    finally:
        client.close()


def tokens_saved(service: Service) -> int:
    lifetime: dict[str, int] = json.loads(service.get("/v1/savings")[1])["lifetime"]
    return lifetime["tokens_saved"]


@pytest.fixture
def service(store_path: Path) -> Iterator[Service]:
    with running("serve", "--store", str(store_path), faulty=True) as service:
        yield service


@pytest.fixture(scope="module")
def working(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One for all requests that each have an answer of their own."""
    with running("serve", "--store", str(tmp_path_factory.mktemp("store") / "proxy_savings.json")) as service:
        yield service


@pytest.fixture
def guarded(store_path: Path, tmp_path: Path) -> Iterator[Service]:
    token, config = tmp_path / "token", tmp_path / "web.yml"
    token.write_text("secret\n")
    headers = "http_server_config:\n  headers:\n    X-Frame-Options: sameorigin\n"
    config.write_text(f"authorization:\n  credentials_file: {token}\n{headers}")
    with running("serve", "--store", str(store_path), "--web.config.file", str(config)) as service:
        yield service


REQUESTS = {
    "record": post(),
    "record of more words": post(b' { "tokens_saved" : 7 , "model" : "\\u00e9" } '),
    "batch": post(b'{"records":[' + RECORD + b"," + RECORD + b"]}"),
    "batch with spaces": post(b" " * 40 + b'{"records":[' + RECORD + b"]}"),
    "key": post(headers="Idempotency-Key: k\r\n"),
    "charset": post(headers="Content-Type: application/json; charset=utf-8\r\n"),
    "other type": post(headers="Content-Type: text/plain\r\n"),
    "gzip": post(headers="Content-Encoding: gzip\r\n"),
    "identity": post(headers="Content-Encoding: identity\r\n"),
    "wrong field": post(b'{"model":"m","tokens_saved":-1}'),
    "no JSON": post(b"{"),
    "not UTF-8": post(b'{"model":"\xff"}'),
    "empty": post(b""),
    "deep": post(b"[" * 30_000),
    "large": post(b'{"model":"' + b"m" * 300_000 + b'","tokens_saved":7}'),
    "chunked": post(headers="Transfer-Encoding: chunked\r\n")
    .replace(b"Content-Length: 30\r\n", b"")
    .replace(RECORD, b"1e\r\n" + RECORD + b"\r\n0\r\n\r\n"),
    "close": post(headers="Connection: close\r\n"),
    "HTTP/1.0": post(version="1.0"),
    "continue": post(headers="Expect: 100-continue\r\n"),
    "upgrade": post(headers="Connection: upgrade\r\nUpgrade: h2c\r\n"),
    "other site": post(headers="Origin: https://example.org\r\n"),
    "other host": post(host="example.org"),
    "no host": post().replace(b"Host: localhost\r\n", b""),
    "two hosts": post(headers="Host: localhost\r\n"),
    "query": post().replace(b"/savings ", b"/savings?x=1 "),
    "whole address": post().replace(b" /v1", b" http://localhost/v1"),
}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_answer_is_that_of_parts(working: Service, request_: bytes) -> None:
    """What arrives in two parts goes through the application."""
    middle = request_.index(b"\r\n\r\n") + 4
    middle += (len(request_) - middle) // 2
    answers = []
    for parts in ((request_,), (request_[:middle], request_[middle:])):
        with connected(working) as client:
            client.send(*parts)
            status, headers, body = client.answer()
            # The two are counted under different numbers, and the second use of a key is told.
            counted = re.sub(rb'"sequence":\d+', b'"sequence":0', body).replace(b',"duplicate":true', b"")
            answers.append((status, {**headers, "date": bool(headers["date"]), "content-length": ""}, counted))
            is_last = headers.get("connection") == "close" or b"HTTP/1.0" in request_
            if is_last:
                assert client.ends()
            else:
                client.send(GET)
                assert client.answer()[2] == b"ready\n"
    assert answers[0] == answers[1]


@pytest.mark.parametrize("authorization", ["", "Bearer secret", "Bearer wrong"])
def test_credentials_and_headers_are_those_of_parts(guarded: Service, authorization: str) -> None:
    request = post(headers=f"Authorization: {authorization}\r\n" if authorization else "")
    answers = []
    for parts in ((request,), (request[:-3], request[-3:])):
        with connected(guarded) as client:
            client.send(*parts)
            status, headers, _ = client.answer()
            answers.append((status, {name: headers[name] for name in headers if name != "date"}))
    assert answers[0] == answers[1]
    assert answers[0][0] == (200 if authorization == "Bearer secret" else 401)
    assert answers[0][1]["x-frame-options"] == "sameorigin"


def test_requests_of_one_write_are_answered_in_order(service: Service) -> None:
    batch = post(b'{"records":[' + RECORD + b"]}")
    requests = [post(), GET, post(), post(headers="Idempotency-Key: k\r\n"), batch, post(b"{"), post(), GET]
    with connected(service) as client:
        client.send(b"".join(requests) + post()[:-5], post()[-5:])
        answers = [client.answer() for _ in range(len(requests) + 1)]
    assert [status for status, _, _ in answers] == [200, 200, 200, 200, 200, 400, 200, 200, 200]
    numbers = [json.loads(body)["sequence"] for status, _, body in answers if status == 200 and body != b"ready\n"]
    assert numbers == [1, 2, 3, 4, 5, 6]
    assert tokens_saved(service) == 6 * 7


@pytest.mark.parametrize("rest", [b"\0\0\r\n\r\n", b"GET\r\n\r\n", b"POST / HTTP/1.1\r\nHost: \0\r\n\r\n"])
def test_savings_are_answered_before_what_is_no_request(service: Service, rest: bytes) -> None:
    """A saving that is recorded is not answered with the error of what follows it."""
    with connected(service) as client:
        client.send(post() + post(headers="Idempotency-Key: k\r\n") + rest + post())
        answers = [client.answer() for _ in range(2)]
        assert client.ends()
    assert [status for status, _, _ in answers] == [200, 200]
    assert answers[1][1]["connection"] == "close"
    assert tokens_saved(service) == 2 * 7
    with connected(service) as client:
        client.send(rest)
        assert client.answer()[0] == 400
        assert client.ends()


def test_each_request_counts_once(service: Service) -> None:
    with connected(service) as client:
        for _ in range(20):
            client.send(post())
            assert client.answer()[0] == 200
    series = 'savings_http_requests_total{code="200",method="POST",route="/v1/savings"}'
    assert service.metrics()[series] == 20


def test_savings_while_the_disk_fails(service: Service) -> None:
    with connected(service) as client:
        service.tell("fail fsync_journal")
        client.send(post())
        status, _, body = client.answer()
        assert (status, json.loads(body)["durable"]) == (202, False)
        client.send(post() + post())
        assert [client.answer()[0] for _ in range(2)] == [202, 202]
        service.tell("mend")
        eventually(lambda: service.get("/-/healthy")[0] == 200, "the disk to work")
        client.send(post())
        assert json.loads(client.answer()[2])["sequence"] == 4


def test_stop_while_a_saving_waits_for_the_disk(store_path: Path) -> None:
    """It is answered, and its connection then ends."""
    with running("serve", "--store", str(store_path), faulty=True) as service, connected(service) as client:
        client.send(post())
        assert client.answer()[0] == 200
        idle = Client(service)
        service.tell("hang fsync_journal")
        client.send(post())
        eventually(lambda: service.metrics()["savings_records_pending"] == 1, "the saving to be accepted")
        service.process.send_signal(signal.SIGTERM)
        assert idle.ends()
        idle.close()
        service.tell("mend")
        status, headers, body = client.answer()
        assert (status, headers["connection"], json.loads(body)["sequence"]) == (200, "close", 2)
        assert client.ends()
        assert service.process.wait(WAIT_SECONDS) == 0


def test_client_that_goes_away_while_its_saving_waits(service: Service) -> None:
    with connected(service) as client:
        client.send(post())
        assert client.answer()[0] == 200
        service.tell("hang fsync_journal")
        client.send(post(), post())
    service.tell("mend")
    eventually(lambda: tokens_saved(service) >= 14, "the saving to be durable")
    with connected(service) as client:
        client.send(post())
        assert client.answer()[0] == 200
