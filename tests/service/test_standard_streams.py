"""Processes that are started without standard streams, and output that goes to a pipe."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from savings_exporter import SavingsTracker
from tests.support.service import run_cli
from tests.support.wait import WAIT_SECONDS

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
