"""Commands that are ended by SIGTERM or, because their terminal was closed, by SIGHUP: they still save."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from savings_exporter import SavingsTracker
from tests.support.service import Service, run_cli, running
from tests.support.wait import WAIT_SECONDS, eventually


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_import_saves_what_it_has_imported(tmp_path: Path, store_path: Path, number: int) -> None:
    table = tmp_path / "savings.csv"
    table.write_text("m,t\n" + "model,5\n" * 100_000)
    mapped = [str(table), "--map", "model=m", "--map", "tokens_saved=t", "--store", str(store_path)]
    with subprocess.Popen([sys.executable, "-m", "savings_exporter", "import", *mapped]) as process:
        try:
            eventually(lambda: list(tmp_path.glob("*.journal.*")), "the import to have begun")
            process.send_signal(number)
            assert process.wait(WAIT_SECONDS) == 128 + number
        finally:
            process.kill()
    assert list(tmp_path.glob("*.journal.*")) == []
    assert run_cli("verify", "--store", str(store_path)).returncode == 0
    assert run_cli("import", *mapped).returncode == 0
    with SavingsTracker(store_path) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == 500_000


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_service_saves(store_path: Path, number: int) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with running("serve", "--store", str(store_path), faulty=True) as service:
            _record_while_it_fails(service)
            assert service.stop(number)[0] == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    with SavingsTracker(store_path) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == 5


def test_service_says_what_it_took(store_path: Path) -> None:
    """A service that is stopped says how many records it took, not how many there are, and whether all are durable."""
    for count in (2, 1):
        with running("serve", "--store", str(store_path), faulty=True) as service:
            for _ in range(count):
                assert service.post({"model": "m", "tokens_saved": 5})[0] == 200
            assert f"{store_path}: closed: {count} records of this process, all durable" in service.stop()[2]
    with running("serve", "--store", str(store_path), faulty=True) as service:
        assert service.post({"model": "m", "tokens_saved": 5})[0] == 200
        service.tell("fail fsync_journal")
        assert service.post({"model": "m", "tokens_saved": 7})[0] == 202
        status, _, err = service.stop()
        assert status != 0
        assert "closed: 1 records of this process are durable, 1 (7 tokens saved) are lost: " in err


def _record_while_it_fails(service: Service) -> None:
    service.tell("fail fsync_journal")
    assert service.post({"model": "m", "tokens_saved": 5})[0] == 202
    service.tell("mend")


def test_half_a_body_does_not_hold_up_the_stop(store_path: Path) -> None:
    """It is refused, and that is no error of the service."""
    with running("serve", "--store", str(store_path)) as service:
        address = urlsplit(service.url)
        assert address.port is not None
        with socket.create_connection(("127.0.0.1", address.port), WAIT_SECONDS) as client:
            head = b"POST /v1/savings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            client.sendall(head + b"Content-Length: 100\r\n\r\n{")
            assert service.get("/-/ready")[0] == 200
            status, _, logged = service.stop()
            answer = client.makefile("rb").read()
    assert status == 0
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert "Traceback" not in logged
    assert "Cancel" not in logged


def test_nohup(tmp_path: Path, store_path: Path) -> None:
    """A signal that is ignored stays ignored."""
    table = tmp_path / "savings.csv"
    table.write_text("m,t\n" + "model,5\n" * 50_000)
    mapped = f"{table} --map model=m --map tokens_saved=t --store {store_path}"
    command = f"trap '' HUP; exec {sys.executable} -m savings_exporter import {mapped}"
    with subprocess.Popen(["bash", "-c", command]) as process:
        try:
            eventually(store_path.exists, "the import to have begun")
            process.send_signal(signal.SIGHUP)
            assert process.wait(WAIT_SECONDS) == 0
        finally:
            process.kill()
