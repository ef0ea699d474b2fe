"""Refused and failed requests are visible in the metrics and in the log."""

from __future__ import annotations

import asyncio
import re
import socket
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

import pytest
from prometheus_client import CollectorRegistry

from savings_exporter import SavingsTracker
from savings_exporter.service import app, requests
from savings_exporter.service.app import Service as Application
from savings_exporter.service.requests import RequestLog
from savings_exporter.telemetry.metrics import SavingsCollector
from tests.support.asgi import chunks, exchange
from tests.support.paths import DATA
from tests.support.service import Service, running
from tests.support.wait import eventually

SAVING = {"model": "m", "tokens_saved": 1}
HEADROOM = DATA / "headroom" / "v6-latest" / "proxy_savings.json"


def answered(service: Service, method: str, route: str, code: int, headers: dict[str, str] | None = None) -> float:
    name = f'savings_http_requests_total{{code="{code}",method="{method}",route="{route}"}}'
    found = re.search(rf"^{re.escape(name)} (\S+)$", service.get("/metrics", headers)[1], re.MULTILINE)
    return float(found[1]) if found else -1


def test_refused_savings_are_counted_by_their_status(store_path: Path) -> None:
    with running("serve", "--store", str(store_path)) as service:
        refused = {400: 1, 401: 0, 408: 0, 413: 1, 415: 1, 422: 2, 500: 0, 503: 0}
        assert all(answered(service, "POST", "/v1/savings", code) == 0 for code in refused)
        assert service.post(b"{")[0] == 400
        assert service.post(b" " * 9_000_000)[0] == 413
        assert service.post(SAVING, headers={"Content-Type": "text/plain"})[0] == 415
        for _ in range(2):
            assert service.post({"model": "m"})[0] == 422
        for _ in range(3):
            assert service.post(SAVING)[0] == 200
        assert {code: answered(service, "POST", "/v1/savings", code) for code in refused} == refused
        assert answered(service, "POST", "/v1/savings", 200) == 3
        metrics = service.metrics()
        assert metrics['savings_http_request_duration_seconds_count{method="POST",route="/v1/savings"}'] == 8


def test_saving_without_its_token_is_counted(store_path: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    config = tmp_path / "web.yml"
    config.write_text("authorization: {credentials_file: token}")
    token = {"Authorization": "Bearer secret"}
    with running("serve", "--store", str(store_path), "--web.config.file", str(config)) as service:
        assert service.post(SAVING)[0] == 401
        assert answered(service, "POST", "/v1/savings", 401, token) == 1
        assert service.get("/metrics")[0] == 401
        assert answered(service, "GET", "/metrics", 401, token) == 1


def test_saving_sent_to_a_watcher_is_counted() -> None:
    with running("watch", str(HEADROOM)) as service:
        assert service.post(SAVING)[0] == 405
        assert answered(service, "POST", "/v1/savings", 405) == 1


def test_client_that_goes_away_is_counted_and_logged(store_path: Path) -> None:
    with running("serve", "--store", str(store_path)) as service:
        with socket.create_connection((str(urlsplit(service.url).hostname), urlsplit(service.url).port or 0)) as client:
            client.sendall(b"POST /v1/savings HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        eventually(lambda: answered(service, "POST", "/v1/savings", 400) == 1, "the broken request to be counted")
        _, _, log = service.stop()
    assert "the client closed the connection before its request was complete" in log


def test_request_that_fails_is_counted_and_logged(
    tracker: SavingsTracker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error of the program answers 500."""
    service = Application(tracker, SavingsCollector(tracker))

    def fail(*_arguments: object) -> NoReturn:
        raise RuntimeError("a defect")

    monkeypatch.setattr(app, "as_json", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        asyncio.run(exchange(service, "GET", "/v1/savings", chunks(b"")))
    metrics = asyncio.run(exchange(service, "GET", "/metrics", chunks(b"")))[2].decode()
    assert 'savings_http_requests_total{code="500",method="GET",route="/v1/savings"} 1.0' in metrics
    assert "GET /v1/savings: refused a request with status 500: the request failed" in caplog.text


def test_paths_and_methods_of_clients_make_no_series(store_path: Path) -> None:
    with running("serve", "--store", str(store_path)) as service:
        before = service.metrics()
        for number in range(20):
            assert service.get(f"/made-up/{number}")[0] == 404
        new = {name for name in service.metrics() if "savings_http_requests_total" in name} - set(before)
        assert new <= {
            'savings_http_requests_total{code="404",method="GET",route="other"}',
            'savings_http_requests_total{code="200",method="GET",route="/metrics"}',
        }
        assert answered(service, "GET", "other", 404) == 20


def test_first_refusal_is_logged_and_the_others_with_their_number(store_path: Path) -> None:
    with running("serve", "--store", str(store_path)) as service:
        for tokens in ("one", "two", "three"):
            assert service.post({"model": "m", "tokens_saved": tokens})[0] == 422
        assert service.post(b"{")[0] == 400
        _, _, log = service.stop()
    lines = [line.partition('msg="')[2] for line in log.splitlines()]
    assert [line for line in lines if "status 422" in line] == [
        'POST /v1/savings: refused a request with status 422: tokens_saved must be an integer, not text"',
        "POST /v1/savings: refused 2 requests with status 422, the latest one: "
        'tokens_saved must be an integer, not text"',
    ]
    assert len([line for line in lines if "status 400" in line]) == 1


def test_waiting_refusals_are_logged_without_another_request(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(requests, "_LOG_INTERVAL_SECONDS", 0.05)

    async def refuse() -> None:
        log = RequestLog(CollectorRegistry(), ["/v1/savings"])
        for number in range(5):
            log.note("POST", "/v1/savings", 422, 0.001, f"reason {number}")
        while len(caplog.records) < 2:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(refuse(), 10))
    assert [record.getMessage() for record in caplog.records] == [
        "POST /v1/savings: refused a request with status 422: reason 0",
        "POST /v1/savings: refused 4 requests with status 422, the latest one: reason 4",
    ]


def test_requests_that_are_no_http_are_counted_and_summed_up(store_path: Path) -> None:
    with running("serve", "--store", str(store_path)) as service:
        address = str(urlsplit(service.url).hostname), urlsplit(service.url).port or 0
        upgrade = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
        for request in [b"GARBAGE\r\n\r\n"] * 20 + [upgrade] * 20:
            with socket.create_connection(address) as client:
                client.sendall(request)
                assert client.recv(12)
        assert answered(service, "other", "other", 400) == 20
        _, _, log = service.stop()
    # Two about the requests, and the one at the end.
    assert len(log.splitlines()) == 3, log


def test_health_while_the_disk_fails_is_no_refusal(store_path: Path) -> None:
    with running("serve", "--store", str(store_path), faulty=True) as service:
        service.tell("fail fsync_journal")
        assert service.post(SAVING)[0] == 202
        eventually(lambda: service.get("/-/healthy")[0] == 503, "the fault to be seen")
        assert answered(service, "GET", "/-/healthy", 503) >= 1
        service.tell("mend")
        _, _, log = service.stop()
    assert "/-/healthy" not in log


def test_idempotency_key_stays_out_of_the_log(store_path: Path) -> None:
    with running("serve", "--store", str(store_path)) as service:
        key = {"Idempotency-Key": "user-42"}
        assert service.post(SAVING, headers=key)[0] == 200
        assert service.post({**SAVING, "tokens_saved": 2}, headers=key)[0] == 422
        _, _, log = service.stop()
    assert "Idempotency-Key was used before with other content" in log
    assert "user-42" not in log


def test_a_kind_of_refusal_gets_one_line_a_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also when a request comes at the moment at which the waiting ones are logged."""
    monkeypatch.setattr(requests, "_LOG_INTERVAL_SECONDS", 0.2)

    async def refuse() -> None:
        log, loop = RequestLog(CollectorRegistry(), ["/v1/savings"]), asyncio.get_running_loop()
        log.note("POST", "/v1/savings", 422, 0.001, "first")
        log.note("POST", "/v1/savings", 422, 0.001, "waiting")
        # Longer than the interval, while the loop cannot run the timer.
        end = loop.time() + 0.3
        while loop.time() < end:
            pass
        log.note("POST", "/v1/savings", 422, 0.001, "due")
        log.note("POST", "/v1/savings", 422, 0.001, "next")
        await asyncio.sleep(0)
        await asyncio.sleep(0.02)
        assert len(caplog.records) == 2
        while len(caplog.records) < 3:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(refuse(), 10))
    assert [record.getMessage().rpartition(" ")[2] for record in caplog.records] == ["first", "due", "next"]
