"""Processes that are started without standard streams, and output that goes to a pipe."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from savings_exporter import SavingsTracker
from tests.support.service import Service, free_port, run_cli
from tests.support.wait import WAIT_SECONDS, eventually

LOCK_BYTES = 88
EMBEDDED = """
import os, sys
from savings_exporter import SavingsTracker
with SavingsTracker(sys.argv[1]) as tracker:
    assert tracker.record_request(model="m", tokens_saved=5).durable
    for descriptor in range(3):
        try:
            os.write(descriptor, b"printed")
        except OSError:
            pass
    assert tracker.save()
"""


def shell(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command with redirections."""
    return subprocess.run(
        ["bash", "-c", command, "bash", sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
    )


def assert_intact(store: Path, tokens: int) -> None:
    """Nothing was printed into a file of the store."""
    for path in store.parent.iterdir():
        assert b"printed" not in path.read_bytes()
        assert b"savings-exporter: " not in path.read_bytes()
    assert Path(f"{store}.lock").stat().st_size == LOCK_BYTES
    with SavingsTracker(store) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == tokens


@pytest.mark.parametrize("closed", ["2>&-", "<&-", "<&- 2>&-"])
def test_command_without_streams(store_path: Path, closed: str) -> None:
    """An error is not printed to standard output in place of standard error."""
    command = f'"$1" -m savings_exporter record --store "$2" --model m --tokens-saved "$3" {closed}'
    done = shell(command, str(store_path), "5")
    assert (done.returncode, done.stdout) == (0, "recorded: 5 tokens saved in total\n")
    done = shell(command, str(store_path), "-1")
    assert (done.returncode, done.stdout) == (2, "")
    assert_intact(store_path, 5)


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_embedded_tracker_without_streams(store_path: Path, closed: str) -> None:
    done = shell(f'"$1" -c "$2" "$3" {closed}', EMBEDDED, str(store_path))
    assert done.returncode == 0
    assert_intact(store_path, 5)


def test_service_without_standard_error(store_path: Path) -> None:
    """Its log goes nowhere."""
    command = 'exec "$1" -m savings_exporter serve --web.listen-address 127.0.0.1:0 --store "$2" <&- 2>&-'
    process = subprocess.Popen(
        ["bash", "-c", command, "bash", sys.executable, str(store_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert "keeps savings in" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 0
    assert_intact(store_path, 0)


def test_nothing_is_cut_in_a_pipe(store_path: Path) -> None:
    names = [f"{kind}-{'x' * 110}" for kind in ("model", "project", "agent", "source", "provider")]
    with SavingsTracker(store_path) as tracker:
        model, project, agent, source, provider = names
        tracker.record_request(
            model=model, project=project, agent=agent, source=source, provider=provider, tokens_saved=123_456
        )
    columns = "provider,model,project,agent,source"
    for arguments in (["show"], ["names"], ["export", "--by", columns]):
        printed = run_cli(*arguments, "--store", str(store_path), env={"COLUMNS": "40"}).stdout
        for name in names:
            assert name in printed
        assert "123,456" in printed
        assert "…" not in printed
    (row,) = (line for line in printed.splitlines() if "123,456" in line)
    assert all(name in row for name in names)


def full_pipe() -> tuple[int, int]:
    """A pipe that takes nothing more until it is read."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 4096)
    os.set_blocking(writing, True)
    return reading, writing


def test_service_with_pipes_that_nobody_reads(store_path: Path) -> None:
    """It answers, counts what waits, and ends, also when there is an error to print."""
    address = f"127.0.0.1:{free_port()}"
    reading, writing = full_pipe()
    command = [sys.executable, "-m", "savings_exporter", "serve", "--store", str(store_path)]
    process = subprocess.Popen(
        [*command, "--web.listen-address", address], stdin=subprocess.DEVNULL, stdout=writing, stderr=writing
    )
    try:
        service = Service(process, "", f"http://{address}")  # type: ignore[arg-type]
        eventually(lambda: _is_ready(service), "the service")
        assert service.post({"model": "m", "tokens_saved": 5})[0] == 200
        assert service.post({"model": "m"})[0] == 422
        assert service.metrics()["savings_log_lines_dropped_total"] == 0
        refused = subprocess.run([*command, "--web.listen-address", address], stderr=writing, timeout=WAIT_SECONDS)
        assert refused.returncode == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_SECONDS) == 0
    finally:
        process.kill()
        process.wait()
        os.close(reading)
        os.close(writing)
    assert_intact(store_path, 5)


def _is_ready(service: Service) -> bool:
    try:
        return service.get("/-/ready")[0] == 200
    except OSError:
        return False
