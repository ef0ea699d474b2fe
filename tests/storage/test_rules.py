"""Rules of the journals and of saves that only certain moments show: each is one that ``tests/mutants.py`` takes out."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from savings_exporter import SavingsRecord, SavingsTracker
from savings_exporter.storage.filesystem import FileSystem
from tests.support.faults import FaultyFileSystem
from tests.support.wait import WAIT_SECONDS, eventually

NEVER = 1e6
"""A save interval: saves happen when a test asks for one."""


def record(tracker: SavingsTracker, count: int = 1) -> None:
    """Record, and have it acknowledged."""
    receipt = tracker.record_many([SavingsRecord(model="m", tokens_saved=1)] * count)
    assert receipt.wait(WAIT_SECONDS)


def requests(path: Path, filesystem: FileSystem | None = None) -> int:
    """How many records a store holds when it is opened."""
    with SavingsTracker(path, filesystem=filesystem, save_interval=NEVER) as tracker:
        return tracker.snapshot().lifetime.requests


def segments(path: Path) -> list[Path]:
    return sorted(path.parent.glob("*.journal.*"))


class AnotherBoot(FileSystem):
    """As after a power loss: the machine has booted since."""

    def boot_id(self) -> bytes:
        return bytes(range(16))


def test_segment_order(store_path: Path, faults: FaultyFileSystem) -> None:
    """A segment that was made ahead too late is not used after a newer one."""
    made, go_on = threading.Event(), threading.Event()

    class Slow(FaultyFileSystem):
        def write_zeros(self, descriptor: int, size: int) -> None:
            if threading.current_thread().name == "savings-exporter":
                made.set()
                go_on.wait(WAIT_SECONDS)
            super().write_zeros(descriptor, size)

    slow = Slow(has_direct_io=False)
    with SavingsTracker(store_path, filesystem=slow, save_interval=NEVER) as tracker:
        while not made.is_set():
            record(tracker, 100)
            made.wait(0.01)
        before = tracker.snapshot().lifetime.requests
        record(tracker, 5000)  # more than a segment holds: it gets one of its own
        slow.fail("fsync_journal", errno.EIO, 1)
        receipt = tracker.record_request(model="m", tokens_saved=1)
        assert not receipt.durable
        go_on.set()
        assert receipt.wait(WAIT_SECONDS)
        assert tracker.snapshot().lifetime.requests == before + 5001
    assert requests(store_path) == before + 5001


@pytest.mark.needs("linux")
def test_lock_of_new_writer(store_path: Path) -> None:
    """A writer whose new file another process looks at is no writer without a lock."""

    class Looked(FileSystem):
        looking = -1

        def create(self, path: str, like: str) -> int:
            descriptor = super().create(path, like)
            if ".writer." in path and self.looking < 0:
                self.looking = os.open(path, os.O_RDONLY)
                assert self.try_lock(self.looking, shared=True)
            return descriptor

    looked = Looked()
    with SavingsTracker(store_path, filesystem=looked, save_interval=NEVER) as tracker:
        record(tracker)
        os.close(looked.looking)
        with SavingsTracker(store_path, save_interval=NEVER) as other:
            assert other.snapshot().writers == 1


def test_last_copy_is_noted(store_path: Path) -> None:
    """A document points to the copy of a frame that is on the disk, not to one whose sync failed."""
    faults = FaultyFileSystem(has_direct_io=False)
    with SavingsTracker(store_path, filesystem=faults, save_interval=NEVER) as tracker:
        record(tracker)
        assert tracker.save()
        faults.fail("fsync_journal", errno.EIO, 1)
        record(tracker)
        assert tracker.save()
        first, second = segments(store_path)
        lost = shutil.copytree(store_path.parent, store_path.parent / "lost")
    # The first copy was never on the disk, and the segment of the second one was removed at the end of its writer.
    held = (lost / first.name).read_bytes()
    end = held.index(b"SXJ2", 4)
    (lost / first.name).write_bytes(held[:end].ljust(len(held), b"\0"))
    (lost / second.name).unlink()
    assert requests(lost / store_path.name, AnotherBoot()) == 2


def test_kill_between_names(store_path: Path, faults: FaultyFileSystem) -> None:
    """A process that dies between the two names of a save at close leaves nothing that looks damaged."""
    tracker = SavingsTracker(store_path, filesystem=faults, save_interval=NEVER)
    record(tracker)
    assert tracker.save()
    record(tracker)
    fail_at(faults, "replace", 2, lambda: shutil.copytree(store_path.parent, store_path.parent / "killed"))
    tracker.close()
    killed = store_path.parent / "killed" / store_path.name
    assert requests(killed) == 2
    assert not list(killed.parent.glob("*.corrupt-*"))


def fail_at(faults: FaultyFileSystem, step: str, nth: int, do: Callable[[], object]) -> None:
    """Do something just before the nth call of a step from now on."""
    calls = []

    def before(name: str) -> None:
        if name == step:
            calls.append(name)
            if len(calls) == nth:
                do()

    faults.before = before
