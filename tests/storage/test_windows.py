"""Windows: one process a store, no directory fsync, no reads and writes at an offset, no renaming of open files.

Run on an interpreter that looks like Windows (tests/support/windows.py), never on Windows itself.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.wait import WAIT_SECONDS

pytestmark = pytest.mark.needs("linux")

PRELUDE = """
import tests.support.windows
import os, sys
from savings_exporter import SavingsCollector, SavingsRecord, SavingsTracker, StoreError
from savings_exporter.storage.filesystem import LOCAL, WindowsFileSystem
assert type(LOCAL) is WindowsFileSystem
path = sys.argv[1]
"""


def on_windows(store_path: Path, program: str, status: int = 0) -> str:
    """Run a program that looks at ``path``; what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + program, str(store_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=WAIT_SECONDS * 2,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done.stdout


def files(store_path: Path) -> list[str]:
    """What kinds of files the store has."""
    return sorted(
        path.name.removeprefix(store_path.name).split(".")[1] if path != store_path else "document"
        for path in store_path.parent.iterdir()
    )


RECORD_AND_CLOSE = """
with SavingsTracker(path) as tracker:
    for number in range(1, 51):
        receipt = tracker.record_request(model="m", tokens_saved=number)
        assert receipt.durable and receipt.sequence == number, receipt
    assert tracker.snapshot().lifetime.tokens_saved == 1275
    assert tracker.save()
    assert tracker.record_request(model="m", tokens_saved=1).durable
    assert tracker.snapshot().lifetime.tokens_saved == 1276
    assert tracker.health().healthy, tracker.health()
"""

PRINT_TOTAL = """
with SavingsTracker(path) as tracker:
    print(tracker.snapshot().lifetime.tokens_saved, tracker.health().healthy)
"""


def test_records_and_saves(store_path: Path) -> None:
    on_windows(store_path, RECORD_AND_CLOSE)
    assert on_windows(store_path, PRINT_TOTAL) == "1276 True\n"


@pytest.mark.slow
def test_files_do_not_accumulate(store_path: Path) -> None:
    on_windows(
        store_path,
        """
for number in range(12):
    with SavingsTracker(path) as tracker:
        assert tracker.record_request(model="m", tokens_saved=1).durable
        assert tracker.snapshot().lifetime.requests == number + 1
""",
    )
    assert files(store_path).count("journal") <= 1
    assert files(store_path).count("writer") <= 2
    assert "tmp" not in files(store_path)
    assert on_windows(store_path, PRINT_TOTAL) == "12 True\n"


@pytest.mark.slow
@pytest.mark.parametrize("after_save", [False, True])
def test_reopened_after_a_kill(store_path: Path, after_save: bool) -> None:
    on_windows(
        store_path,
        f"""
tracker = SavingsTracker(path, save_interval=3600)
assert tracker.record_request(model="m", tokens_saved=1, idempotency_key="a").durable
if {after_save}:
    assert tracker.save()
assert tracker.record_many([SavingsRecord(model="m", tokens_saved=10)] * 3).durable
os._exit(9)
""",
        status=9,
    )
    again = """
with SavingsTracker(path) as tracker:
    assert tracker.snapshot().lifetime.tokens_saved == 31, tracker.snapshot()
    assert tracker.record_request(model="m", tokens_saved=1, idempotency_key="a").duplicate
    assert tracker.record_request(model="m", tokens_saved=100).sequence == 1
"""
    on_windows(store_path, again)
    assert on_windows(store_path, PRINT_TOTAL) == "131 True\n"


@pytest.mark.slow
def test_many_segments(store_path: Path) -> None:
    on_windows(
        store_path,
        """
with SavingsTracker(path, save_interval=0.05) as tracker:
    for _ in range(60):
        assert tracker.record_many([SavingsRecord(model="m", tokens_saved=1)] * 200).durable
    assert tracker.snapshot().lifetime.requests == 12_000
""",
    )
    assert on_windows(store_path, PRINT_TOTAL) == "12000 True\n"


@pytest.mark.slow
def test_threads_share_descriptors(store_path: Path) -> None:
    on_windows(
        store_path,
        """
import threading
with SavingsTracker(path) as tracker:
    def record():
        for _ in range(50):
            assert tracker.record_request(model="m", tokens_saved=1).durable
            tracker.snapshot()
    threads = [threading.Thread(target=record) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert tracker.save()
    assert tracker.snapshot().lifetime.requests == 400
""",
    )
    assert on_windows(store_path, PRINT_TOTAL) == "400 True\n"


def test_one_process_a_store(store_path: Path) -> None:
    on_windows(
        store_path,
        """
with SavingsTracker(path) as tracker:
    assert tracker.record_request(model="m", tokens_saved=1).durable
    try:
        SavingsTracker(path)
    except StoreError as error:
        assert "only one process may open it here" in str(error), error
    else:
        raise AssertionError("opened twice")
    assert tracker.record_request(model="m", tokens_saved=1).durable
""",
    )
    assert on_windows(store_path, PRINT_TOTAL) == "2 True\n"


def test_directory_fsync_is_unsupported(store_path: Path) -> None:
    on_windows(
        store_path,
        """
from tests.support.scrape import samples
with SavingsTracker(path) as tracker:
    assert tracker.record_request(model="m", tokens_saved=1).durable
    assert tracker.save()
    seen = samples(SavingsCollector(tracker))
    assert seen["savings_dir_fsync_supported"] == 0
    assert seen["savings_store_healthy"] == 1
    assert seen['savings_fsync_failures_total{target="directory"}'] == 0
    assert not [name for name, value in seen.items() if "failures_total" in name and value]
""",
    )


def test_failed_fsync_is_a_failure(store_path: Path) -> None:
    on_windows(
        store_path,
        """
import errno
from tests.support.scrape import samples
class Failing(WindowsFileSystem):
    fails = False
    def fsync_path(self, path):
        if self.fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        super().fsync_path(path)
fs = Failing()
with SavingsTracker(path, filesystem=fs, save_interval=3600) as tracker:
    assert tracker.record_request(model="m", tokens_saved=1).durable
    fs.fails = True
    assert not tracker.save()
    assert tracker.health().error == "EIO"
    seen = samples(SavingsCollector(tracker))
    assert seen["savings_store_healthy"] == 0
    assert seen['savings_save_failures_total{error="EIO",step="fsync_dir"}'] >= 1
    fs.fails = False
    assert tracker.save()
    assert tracker.health().healthy
""",
    )


def test_watching(store_path: Path) -> None:
    on_windows(
        store_path,
        """
from savings_exporter.watched import WatchedFile
with SavingsTracker(path, save_interval=3600) as tracker:
    assert tracker.record_request(model="m", tokens_saved=1).durable
    assert tracker.save()
    watched = WatchedFile(path)
    assert watched.snapshot().lifetime.requests == 1
    assert tracker.record_request(model="m", tokens_saved=1).durable
    assert tracker.save()
    assert watched.snapshot().lifetime.requests == 2
    assert watched.health().healthy
""",
    )


def test_damaged_document(store_path: Path) -> None:
    on_windows(store_path, RECORD_AND_CLOSE)
    store_path.write_bytes(store_path.read_bytes()[:-50])
    assert on_windows(store_path, PRINT_TOTAL) == "1276 True\n"
    assert "corrupt-" in "".join(path.name for path in store_path.parent.iterdir())
