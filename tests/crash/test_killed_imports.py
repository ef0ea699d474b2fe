"""An import that is killed at any moment, and begun again, counts each record once."""

from __future__ import annotations

import json
import random
import re
import resource
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from savings_exporter import SavingsTracker
from savings_exporter.errors import StoreError
from savings_exporter.sources.headroom import HeadroomLedger
from savings_exporter.storage.filesystem import LOCAL
from savings_exporter.storage.lock import StoreLock
from savings_exporter.storage.repair import inspect
from savings_exporter.watched import WatchedFile
from tests.crash.lab import LONG
from tests.support.sources import imported
from tests.support.wait import WAIT_SECONDS

LINES = 1_000_000
KILLS = 20

CHANGES = ("pwrite64", "pwritev2", "fdatasync", "fsync", "rename", "linkat", "unlink", "ftruncate", "fallocate")
READS = ("openat", "pread64", "flock")

_LINE = (
    '{"v":2,"ts":"2026-%02d-%02dT%02d:%02d:%02d.%06d+00:00","before":%d,"after":1000,"saved":%d,"cost_usd":%s,'
    '"model":"model-%d","client":"claude-code","source":"proxy","pid":4242,"saved_tool_schema":%d,"provider":"p"}\n'
)


def write_ledger(path: Path, lines: int, seed: int = 0) -> tuple[int, int]:
    """Write a ledger of 30 days, and return what compression and deferred tool schemas saved in it."""
    saved = tools = 0
    chance = random.Random(seed)
    numbers = [chance.randrange(1, 9000) for _ in range(10_000)]
    with path.open("w") as file:
        for number in range(lines):
            seconds = number * 30 * 86400 // lines
            day, second = divmod(seconds, 86400)
            all_saved = numbers[number % len(numbers)]
            of_tools = all_saved // 10
            time = (10, day + 1, second // 3600, second // 60 % 60, second % 60, number % 1_000_000)
            file.write(_LINE % (*time, 1000 + all_saved, all_saved, all_saved * 3 / 1e6, number % 5, of_tools))
            saved, tools = saved + all_saved - of_tools, tools + of_tools
    return saved, tools


def command(store: Path, *paths: Path) -> list[str]:
    return [sys.executable, "-m", "savings_exporter", "import", "--store", str(store), *map(str, paths)]


def test_killed_at_random_within_a_million_lines(tmp_path: Path) -> None:
    ledger = tmp_path / "events.jsonl"
    expected = write_ledger(ledger, LINES)
    chance, kills = random.Random(0), 0
    for number in range(KILLS):
        store = tmp_path / str(number) / "proxy_savings.json"
        store.parent.mkdir()
        kills += killed_import(store, ledger, chance.randrange(LINES * 9 // 10))
        assert WatchedFile(store).snapshot().lifetime.requests <= LINES
        subprocess.run(command(store, ledger), check=True, stdout=subprocess.DEVNULL, timeout=WAIT_SECONDS * 4)
        lifetime = WatchedFile(store).snapshot().lifetime
        assert (lifetime.requests, lifetime.tokens_saved, lifetime.tool_tokens_saved) == (LINES, *expected)
        assert inspect(str(store)).problems == ()
    # The others were as fast as the look at their store.
    assert kills > KILLS // 2
    # In kilobytes: of the largest of all children of this process.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 300_000


def killed_import(store: Path, ledger: Path, lines: int) -> bool:
    """Kill an import when it has imported so many lines. Returns whether it was killed before its end."""
    process = subprocess.Popen(command(store, ledger), stdout=subprocess.DEVNULL)
    pause = threading.Event()
    while process.poll() is None and imported_lines(store) < lines:
        pause.wait(0.005)
    process.kill()
    return process.wait() == -signal.SIGKILL


def imported_lines(store: Path) -> int:
    try:
        return WatchedFile(store).snapshot().lifetime.requests
    except StoreError:
        # There is no document yet.
        return 0


@pytest.mark.needs("linux", "strace")
def test_killed_at_any_call(tmp_path: Path) -> None:
    """The import is killed at a system call on the store's files, while another process has the store open."""
    ledgers = [tmp_path / f"events{number}.jsonl" for number in range(4)]
    written = [write_ledger(ledger, 50, seed) for seed, ledger in enumerate(ledgers)]
    expected = sum(saved for saved, _ in written)
    calls = counted_calls(tmp_path, ledgers)
    stride = 1 if LONG else 2
    chosen = [(*call, False) for call in calls[::stride]]
    chosen += [(name, number, True) for name, number in calls if name in ("pwrite64", "pwritev2")][::stride]
    wrong: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda call: met(tmp_path, call, ledgers, expected), chosen):
            wrong += found
    assert wrong == []


def counted_calls(tmp_path: Path, ledgers: Sequence[Path]) -> list[tuple[str, int]]:
    """The calls of an import on the files of its store: each name with each number."""
    log = tmp_path / "calls"
    store = tmp_path / "counted" / "proxy_savings.json"
    store.parent.mkdir()
    traced(store, ledgers, ["-o", str(log), "-e", f"trace={','.join((*CHANGES, *READS))}"]).check_returncode()
    made = Counter(re.findall(r"^\d+ +(\w+)\(", log.read_text(), re.MULTILINE))
    assert {"pwrite64", "fsync", "flock"} <= made.keys()
    changes = [(name, number) for name in CHANGES for number in range(1, made[name] + 1)]
    return changes + [(name, number) for name in READS for number in range(1, made[name] + 1, 20)]


def traced(store: Path, ledgers: Sequence[Path], options: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["strace", "-f", *options, *command(store, *ledgers)],
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_SECONDS * 4,
    )


def met(tmp_path: Path, killed_at: tuple[str, int, bool], ledgers: Sequence[Path], expected: int) -> list[str]:
    """What is wrong after an import was killed at a call.

    The last part of ``killed_at`` says whether another process saves when the store is opened again, so that the
    journal of the killed process cannot be adopted at that time.
    """
    name, number, is_locked = killed_at
    call = f"{name} number {number}{', locked' if is_locked else ''}"
    store = tmp_path / call / "proxy_savings.json"
    store.parent.mkdir()
    with SavingsTracker(store) as other:
        other.record_request(model="other", tokens_saved=1)
        traced(store, ledgers, ["-o", "/dev/null", "-e", f"inject={name}:signal=KILL:when={number}"])
        before = other.snapshot().lifetime.tokens_saved
        if before > expected + 1:
            return [f"{call}: {before} tokens after the kill"]
        lock = StoreLock(LOCAL, str(store))
        if is_locked:
            lock.take()
        with SavingsTracker(store) as tracker:
            lock.close()
            try:
                imported(tracker, *(HeadroomLedger(str(ledger)) for ledger in ledgers))
            except StoreError as error:
                return [f"{call}: {error}"]
        after = other.snapshot().lifetime.tokens_saved
    again = json.loads(store.read_text())["lifetime"]["tokens_saved"]
    right = after == again == expected + 1
    return [] if right and before <= after else [f"{call}: {before}, then {after}, saved {again}, not {expected + 1}"]
