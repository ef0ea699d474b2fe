"""The running service over HTTP: the requests that it accepts and refuses, and how it stops."""

from __future__ import annotations

import asyncio
import gzip
import http.client
import json
import re
import signal
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from savings_exporter import SavingsTracker
from savings_exporter.service.app import Service as Application
from savings_exporter.service.intake import IntakeLimits
from savings_exporter.telemetry.metrics import SavingsCollector
from savings_exporter.tracking.receipt import Receipt
from tests.support.asgi import chunks, exchange
from tests.support.faults import failing_directory_fsync
from tests.support.service import Service, run_cli, running
from tests.support.wait import eventually

RECORD = {"model": "claude-sonnet-4-5", "tokens_saved": 4096}

REFUSED = [
    (b"", 400, None),
    (b"{", 400, None),
    (b'{"model": "\xff", "tokens_saved": 1}', 400, None),
    (b'{"model": "a", "tokens_saved": NaN}', 400, None),
    (b"[" * 200_000, 400, None),
    (b"[]", 422, "$"),
    (b'{"model": "a"}', 422, "tokens_saved"),
    (b'{"model": 5, "tokens_saved": 1}', 422, "model"),
    (b'{"model": "a", "tokens_saved": "1"}', 422, "tokens_saved"),
    (b'{"model": "a", "tokens_saved": true}', 422, "tokens_saved"),
    (b'{"model": "a", "tokens_saved": -1}', 422, "tokens_saved"),
    (b'{"model": "a", "tokens_saved": 1e30}', 422, "tokens_saved"),
    (b'{"model": "a", "tokens_saved": 1, "savings_usd": 1e400}', 422, "savings_usd"),
    (b'{"model": "a", "tokens_saved": 1, "colour": "red"}', 422, "colour"),
    (b'{"records": []}', 422, "records"),
    (
        b'{"records": [{"model": "a", "tokens_saved": 1}, {"model": "a", "tokens_saved": -1}]}',
        422,
        "records[1].tokens_saved",
    ),
]


def test_repeat_of_a_key_counts_once(store_path: Path) -> None:
    """Also after a kill: the answer identifies the first record, and says that this one is a duplicate."""
    key = {"Idempotency-Key": "8e03978e-40d5-43dd-bc93-6894a57f9324"}
    batch = {"records": [RECORD] * 3}
    with running("serve", "--store", str(store_path)) as service:
        status, first = service.post(batch, headers=key)
        writer = first["writer"]
        assert (status, first) == (200, {"sequence": 3, "writer": writer, "accepted": 3, "durable": True})
        assert re.fullmatch("[0-9a-f]{16}", writer)
        assert service.post(RECORD) == (200, {"sequence": 4, "writer": writer, "accepted": 1, "durable": True})
        repeated = (200, {**first, "duplicate": True})
        assert service.post(batch, headers=key) == repeated
        service.process.kill()
        service.process.wait()
    with running("serve", "--store", str(store_path)) as service:
        assert service.post(batch, headers=key) == repeated
        assert service.post(RECORD)[1]["writer"] != writer
        assert json.loads(service.get("/v1/savings")[1])["lifetime"]["requests"] == 5


def test_key_with_other_content_is_refused(store_path: Path) -> None:
    """Also while the first one is pending, and by another service on the store."""
    with (
        running("serve", "--store", str(store_path), faulty=True) as service,
        running("serve", "--store", str(store_path)) as other,
    ):
        durable, pending = {"Idempotency-Key": "durable"}, {"Idempotency-Key": "pending"}
        assert service.post(RECORD, headers=durable)[0] == 200
        service.tell("fail fsync_journal")
        assert service.post(RECORD, headers=pending)[0] == 202
        assert service.post(RECORD, headers=pending)[1]["duplicate"] is True
        for asked, key in ((service, durable), (service, pending), (other, durable)):
            answered, problem = asked.post({**RECORD, "tokens_saved": 1}, headers=key)
            assert (answered, problem["field"], problem["status"]) == (422, "Idempotency-Key", 422)
            assert "other content" in problem["detail"]
        service.tell("mend")
        eventually(lambda: service.post(RECORD, headers=pending)[0] == 200, "the pending record to be durable")
        assert other.post({**RECORD, "tokens_saved": 1}, headers=pending)[0] == 422
        assert json.loads(other.get("/v1/savings")[1])["lifetime"]["requests"] == 2


def test_wrong_savings_are_refused(store_path: Path) -> None:
    with running("serve", "--store", str(store_path)) as service:
        for body, status, field in REFUSED:
            answered, problem = service.post(body)
            assert (answered, problem["status"], problem.get("field")) == (status, status, field), body[:80]
            assert problem["title"]
            assert problem["detail"]
            assert not re.search(r"`|\b(int|str|float|object of|NoneType|Value error)\b", problem["detail"])
        assert service.post(RECORD, headers={"Content-Type": "text/plain"})[0] == 415
        assert service.post(RECORD, headers={"Idempotency-Key": "k" * 256})[1]["field"] == "Idempotency-Key"
        assert service.post({"records": [RECORD] * 10_001})[1]["field"] == "records"
        assert service.post(b" " * 100_000_000)[0] == 413
        nowhere = json.loads(service.get("/nowhere")[1])
        assert nowhere["status"] == 404
        assert "/v1/savings" in nowhere["detail"]
        assert json.loads(service.get("/v1/savings")[1])["sequence"] == 0
        _, both = service.post({"records": [RECORD, RECORD]})
        assert (both["sequence"], both["accepted"], both["durable"]) == (2, 2, True)
        assert service.metrics()["savings_requests_total" + '{model="claude-sonnet-4-5",provider="unknown"}'] == 2


@pytest.mark.parametrize(
    "key",
    [
        " - at `$" * 500_000 + "\nx",
        "x` - at `$" + "a" * 60_000 + "]",
        "x` - at `$" + "[0" * 30_000,
        "x` - at `$.foo",
        "x` - at `$.model",
        "x` - at `$[0].foo",
    ],
    ids=lambda key: key[:16],
)
def test_key_that_looks_like_a_path(store_path: Path, key: str) -> None:
    """It is an unknown field like any other, and takes no time to be refused."""
    with running("serve", "--store", str(store_path)) as service:
        for body in ({**RECORD, key: 1}, {"records": [{**RECORD, key: 1}]}, {key: 1}):
            status, problem = service.post(json.dumps(body).encode())
            assert status == 422
            assert len(json.dumps(problem)) < 5_000
            assert len(key) > 100 or re.search("the fields are (model, tokens_saved|records)", problem["detail"])
        assert service.post(RECORD)[0] == 200
        assert service.stop()[0] == 0


@pytest.mark.parametrize("accept", ["application/openmetrics-text; version=abc", "text/plain;version=1.x", ",;,=;="])
def test_strange_accept_header(store_path: Path, accept: str) -> None:
    with running("serve", "--store", str(store_path)) as service:
        status, text = service.get("/metrics", {"Accept": accept})
        assert (status, "savings_tokens_saved_total" in text) == (200, True)


def test_answered_saving_survives_a_kill(store_path: Path) -> None:
    with running("serve", "--store", str(store_path)) as service:
        assert service.post(RECORD)[1]["durable"] is True
        service.stop(signal.SIGKILL)
    with SavingsTracker(store_path) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == 4096


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_request_in_flight_at_the_stop(store_path: Path, number: int) -> None:
    with running("serve", "--store", str(store_path)) as service:
        body = json.dumps(RECORD).encode()
        connection = in_flight(service, len(body))
        service.process.send_signal(number)
        eventually(lambda: _refuses_connections(service), "the listening socket to close")
        connection.sendall(body)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert (answer.status, json.loads(answer.read())["durable"]) == (200, True)
        connection.close()
        service.process.communicate(timeout=30)
        assert service.process.returncode == 0
    with SavingsTracker(store_path) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == 4096


@pytest.mark.parametrize("step", ["fsync_journal", "fsync_file"])
def test_second_sigterm_waits_for_the_end(store_path: Path, step: str) -> None:
    """Of the last commit, or of the last save."""
    with running("serve", "--store", str(store_path), faulty=True) as service:
        assert service.post(RECORD)[0] == 200
        if step == "fsync_journal":
            service.tell("fail fsync_journal")
            assert service.post(RECORD)[0] == 202
        else:
            assert service.post(RECORD)[0] == 200
        service.tell(f"hang {step}")
        service.process.send_signal(signal.SIGTERM)
        service.tell("closing")
        service.process.send_signal(signal.SIGTERM)
        service.tell("mend")
        service.process.communicate(timeout=30)
        assert service.process.returncode == 0
    with SavingsTracker(store_path) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == 2 * 4096


@pytest.mark.parametrize(
    ("is_failing", "status", "said"),
    [
        (True, 202, "; 1 records (4096 tokens saved) were not durable and may be lost"),
        (False, 200, "; nothing is lost"),
    ],
)
def test_second_ctrl_c_ends_at_once(store_path: Path, is_failing: bool, status: int, said: str) -> None:
    """The stop does not wait for a last commit or save that hangs, and reports the records that are lost."""
    with running("serve", "--store", str(store_path), faulty=True) as service:
        if is_failing:
            service.tell("fail fsync_journal")
        assert service.post(RECORD)[0] == status
        service.tell("hang fsync_journal" if is_failing else "hang fsync_file")
        service.process.send_signal(signal.SIGINT)
        service.tell("closing")
        ended, _, err = service.stop(signal.SIGINT)
    assert ended == 130
    last = err.splitlines()[-1]
    assert last.startswith(f"savings-exporter: {store_path}: interrupted")
    assert said in last
    assert "None" not in err
    assert "Traceback" not in err
    if status == 200:
        with SavingsTracker(store_path) as tracker:
            assert tracker.snapshot().lifetime.tokens_saved == 4096


def test_status_page_escapes_names(store_path: Path) -> None:
    with running("serve", "--store", str(store_path)) as service:
        service.post({**RECORD, "model": "<script>alert(1)</script>"})
        status, page = service.get("/")
        assert status == 200
        assert "&lt;script&gt;" in page
        assert "<script>" not in page


def test_token_is_asked_for(tmp_path: Path, store_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    (tmp_path / "web.yml").write_text("authorization:\n  credentials_file: token\n")
    with running("serve", "--store", str(store_path), "--web.config.file", str(tmp_path / "web.yml")) as service:
        for path in ("/", "/metrics", "/v1/savings"):
            assert service.get(path)[0] == 401
            assert service.get(path, {"Authorization": "Bearer wrong"})[0] == 401
            assert service.get(path, {"Authorization": "Bearer s3cret"})[0] == 200
        assert service.post(RECORD)[0] == 401
        assert service.get("/-/healthy")[0] == service.get("/-/ready")[0] == 200


def test_record_beside_a_service(store_path: Path) -> None:
    with running("serve", "--store", str(store_path)) as service:
        service.post(RECORD)
        done = run_cli("record", "--store", str(store_path), "--model", "gpt-5", "--tokens-saved", "4")
        assert (done.returncode, done.stderr) == (0, "")
        service.post(RECORD)
        assert json.loads(service.get("/v1/savings")[1])["lifetime"]["tokens_saved"] == 2 * 4096 + 4


def test_demo_leaves_nothing(tmp_path: Path) -> None:
    with running("serve", "--demo", env={"TMPDIR": str(tmp_path)}) as service:
        eventually(lambda: json.loads(service.get("/v1/savings")[1])["sequence"] > 2, "made-up savings")
        assert "made-up" in service.announcement
        assert service.stop()[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_demo_beside_a_store(store_path: Path) -> None:
    with SavingsTracker(store_path) as tracker:
        tracker.record_request(model="a", tokens_saved=1)
    before = store_path.read_bytes()
    done = run_cli("serve", "--demo", "--store", str(store_path), "--web.listen-address", "127.0.0.1:0")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert store_path.read_bytes() == before


@pytest.mark.needs("strace")
def test_savings_while_the_disk_fails(store_path: Path) -> None:
    """The records are accepted, and the health says why they are pending."""
    with running("serve", "--store", str(store_path)) as service:
        with failing_directory_fsync(service, store_path.parent):
            # The first commit makes a segment, whose name has to be durable.
            pending = {"sequence": None, "writer": None, "accepted": 1, "durable": False}
            assert service.post(RECORD) == (202, pending)
            status, problem = service.get("/-/healthy")
            assert status == 503
            assert "fsync_dir failed: Input/output error (EIO)" in json.loads(problem)["detail"]
            assert service.get("/-/ready")[0] == 200
            assert service.metrics()["savings_store_healthy"] == 0
            assert service.metrics()["savings_tokens_pending"] == 4096
            assert 'role="alert"' in service.get("/")[1]
        eventually(lambda: service.get("/-/healthy")[0] == 200, "the next good commit")
        assert json.loads(service.get("/v1/savings")[1])["sequence"] == 1


@pytest.mark.needs("strace")
def test_savings_while_only_saves_fail(store_path: Path) -> None:
    """The records are durable in the journal, and the health names the failure."""
    with running("serve", "--store", str(store_path)) as service:
        assert service.post(RECORD)[0] == 200
        with failing_directory_fsync(service, store_path.parent):
            eventually(lambda: service.get("/-/healthy")[0] == 503, "a save that fails")
            problem = json.loads(service.get("/-/healthy")[1])
            assert "the document could not be saved: fsync_dir failed: Input/output error (EIO)" in problem["detail"]
            assert service.post(RECORD)[1]["durable"] is True
            assert service.metrics()["savings_tokens_pending"] == 0
            assert service.metrics()["savings_store_healthy"] == 0
            assert service.metrics()['savings_fsync_failures_total{target="directory"}'] >= 1
        eventually(lambda: service.get("/-/healthy")[0] == 200, "the next good save")
        assert json.loads(service.get("/v1/savings")[1])["sequence"] == 2


def test_too_many_requests_are_refused(tracker: SavingsTracker) -> None:
    service = Application(tracker, SavingsCollector(tracker), limits=IntakeLimits(posts_in_flight=0))
    assert answer(service, "POST", "/v1/savings") == (503, "5")
    assert answer(service, "GET", "/-/ready")[0] == 200
    assert tracker.snapshot().sequence == 0


class BecomesDurable:
    """What a receipt asks, whose records become durable after it was looked at a number of times."""

    def __init__(self, looks: int) -> None:
        self._looks = looks

    @property
    def durable(self) -> bool:
        self._looks -= 1
        return self._looks < 0

    is_over = durable

    @property
    def first(self) -> int | None:
        return 7 if self.durable else None

    @property
    def writer(self) -> str:
        return "0123456789abcdef" if self.durable else ""

    def wait(self, _timeout: float | None) -> bool:
        return self.durable


@pytest.mark.parametrize("looks", range(8))
def test_records_become_durable_during_the_answer(
    tracker: SavingsTracker, monkeypatch: pytest.MonkeyPatch, looks: int
) -> None:
    """A refusal, or an answer with the number of another record, would let clients send savings twice."""

    async def recorded(records: Sequence[object]) -> Receipt:
        return Receipt(BecomesDurable(looks), len(records))

    monkeypatch.setattr(tracker, "record_many_async", recorded)
    service = Application(tracker, SavingsCollector(tracker))

    async def both() -> list[tuple[int, dict[str, str], bytes]]:
        body = json.dumps(RECORD).encode()
        return await asyncio.gather(*(exchange(service, "POST", "/v1/savings", chunks(body)) for _ in range(2)))

    for number, (status, _, body) in enumerate(asyncio.run(both())):
        answer = json.loads(body)
        assert (status, answer["durable"], answer["sequence"], answer["writer"]) in (
            (202, False, None, None),
            (200, True, 7 + number, "0123456789abcdef"),
        )


def test_requests_during_the_stop(tracker: SavingsTracker) -> None:
    service = Application(tracker, SavingsCollector(tracker))
    service.stopping = True
    assert answer(service, "POST", "/v1/savings") == (503, "5")
    assert answer(service, "GET", "/-/ready") == (503, "5")
    assert answer(service, "GET", "/metrics")[0] == 200
    assert tracker.snapshot().sequence == 0


def answer(service: Application, method: str, path: str) -> tuple[int, str | None]:
    """What the application answers to a request without a body: the status, and when to try again."""
    status, headers, _ = asyncio.run(exchange(service, method, path, chunks(b"")))
    return status, headers.get("retry-after")


def test_too_large_bodies_are_refused(tracker: SavingsTracker) -> None:
    body = json.dumps(RECORD).encode()
    limits = IntakeLimits(body_bytes=len(body), body_bytes_in_flight=len(body) * 3 // 2)
    service = Application(tracker, SavingsCollector(tracker), limits=limits)

    async def post(*data: bytes) -> tuple[int, str | None]:
        status, headers, _ = await exchange(service, "POST", "/v1/savings", chunks(*data))
        return status, headers.get("retry-after")

    async def both_at_once() -> None:
        others_turn, go_on = asyncio.Event(), asyncio.Event()

        async def in_two_pieces() -> AsyncIterator[bytes]:
            yield body[:-1]
            others_turn.set()
            await go_on.wait()
            yield body[-1:]

        first = asyncio.create_task(exchange(service, "POST", "/v1/savings", in_two_pieces()))
        await others_turn.wait()
        assert await post(body) == (503, "5")
        assert await post(body[:9], body[9:]) == (503, "5")
        go_on.set()
        assert (await first)[0] == 200
        assert await post(body) == (200, None)
        # None of these keeps any of the memory.
        for refused in ([body, b" "], [b"{" * len(body)], [body[:-1]]):
            assert (await post(*refused))[0] in (400, 413)
        assert await post(body) == (200, None)

    asyncio.run(both_at_once())
    assert tracker.snapshot().sequence == 3


def test_body_that_does_not_come(tracker: SavingsTracker) -> None:
    limits = IntakeLimits(posts_in_flight=1, body_seconds=0.01)
    service = Application(tracker, SavingsCollector(tracker), limits=limits)

    async def never_whole() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    status, headers, problem = asyncio.run(exchange(service, "POST", "/v1/savings", never_whole()))
    assert (status, headers["content-type"], headers["connection"]) == (408, "application/problem+json", "close")
    assert "did not arrive in time" in json.loads(problem)["detail"]
    # A body that is there at once is read without waiting for anything.
    body = json.dumps(RECORD).encode()
    assert asyncio.run(exchange(service, "POST", "/v1/savings", chunks(body)))[0] == 200
    assert tracker.snapshot().sequence == 1


@pytest.mark.parametrize("how", ["closed", "reset"])
def test_client_goes_away_in_its_body(store_path: Path, how: str) -> None:
    with running("serve", "--store", str(store_path)) as service:
        for sent in (b"{", json.dumps(RECORD).encode(), b" " * 200_000, b" " * 9_000_000):
            connection = in_flight(service, len(sent) + 1)
            connection.sendall(sent)
            if how == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
        assert service.post(RECORD)[0] == 200
        # Stopping waits for every request, so that whatever would be logged about one is there.
        status, printed, log = service.stop()
    assert (status, printed) == (0, "")
    # Two lines for four requests, one for the end, and no traceback.
    *refused, _ = [line.rpartition(": ")[2] for line in log.splitlines()]
    assert refused == ['the client closed the connection before its request was complete"'] * 2
    assert "refused 3 requests with status 400" in log
    with SavingsTracker(store_path) as tracker:
        assert tracker.snapshot().sequence == 1


def in_flight(service: Service, size: int) -> socket.socket:
    """A connection on which the application has begun to read a body of so many bytes."""
    address = urlsplit(service.url)
    connection = socket.create_connection((address.hostname or "", address.port or 0), timeout=30)
    head = f"POST /v1/savings HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n"
    connection.sendall(f"{head}Content-Type: application/json\r\nExpect: 100-continue\r\n\r\n".encode())
    assert connection.recv(12, socket.MSG_WAITALL) == b"HTTP/1.1 100"
    while not connection.recv(1, socket.MSG_PEEK).startswith(b"\n"):
        connection.recv(1)
    connection.recv(3, socket.MSG_WAITALL)
    return connection


def test_collector_never_answers(store_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        env = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        with running("serve", "--store", str(store_path), env=env) as service:
            assert service.post(RECORD)[0] == 200
            status, _, err = service.stop()
    assert status == 0
    assert "Traceback" not in err


def _refuses_connections(service: Service) -> bool:
    address = urlsplit(service.url)
    try:
        socket.create_connection((address.hostname or "", address.port or 0), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


def test_answers_end_with_a_newline(store_path: Path) -> None:
    """The prompt of the shell follows on a separate line."""
    with running("serve", "--store", str(store_path)) as service:
        for content in (RECORD, {**RECORD, "tokens_saved": "1"}):
            connection = http.client.HTTPConnection(urlsplit(service.url).netloc)
            connection.request("POST", "/v1/savings", json.dumps(content), {"Content-Type": "application/json"})
            assert connection.getresponse().read().endswith(b"}\n")
            connection.close()


def test_answers_are_compressed(store_path: Path) -> None:
    """For clients that accept it."""
    with running("serve", "--store", str(store_path)) as service:
        service.post({"records": [{"model": f"m{number}", "tokens_saved": number} for number in range(20)]})
        for path in ("/metrics", "/", "/v1/savings"):
            for accepted, encoding in (("gzip, deflate", "gzip"), ("identity", None)):
                connection = http.client.HTTPConnection(urlsplit(service.url).netloc)
                connection.request("GET", path, headers={"Accept-Encoding": accepted})
                answer = connection.getresponse()
                assert answer.headers["Content-Encoding"] == encoding
                body = answer.read()
                assert "m19" in (gzip.decompress(body) if encoding else body).decode()
                connection.close()


def test_killed_services_savings_reach_the_document_without_a_request(store_path: Path) -> None:
    """A copy of the document is a backup: it holds them soon after the next start."""
    with running("serve", "--store", str(store_path)) as service:
        assert service.post(RECORD)[0] == 200
        service.process.kill()
        service.process.wait()
    with running("serve", "--store", str(store_path)):

        def is_saved() -> bool:
            return store_path.exists() and json.loads(store_path.read_text())["lifetime"]["tokens_saved"] == 4096

        eventually(is_saved, "the document to be saved")


@pytest.mark.parametrize("coding", ["gzip", "br"])
def test_compressed_body_is_refused(store_path: Path, coding: str) -> None:
    with running("serve", "--store", str(store_path)) as service:
        body = gzip.compress(json.dumps(RECORD).encode())
        status, problem = service.post(body, headers={"Content-Encoding": coding})
        assert (status, problem["detail"]) == (415, "the body must be sent without Content-Encoding")
        assert service.post(b"")[1]["detail"] == "the body is empty"
        assert service.post(RECORD, headers={"Content-Encoding": "identity"})[0] == 200
