"""Opening a store that other processes save all the time."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from savings_exporter import SavingsTracker
from savings_exporter.storage.filesystem import FileSystem, Identity

pytestmark = [pytest.mark.needs("linux"), pytest.mark.slow]


class BusyFileSystem(FileSystem):
    """Whenever the document has been read, another tracker saves it, if it gets the lock.

    The lock is held by a save that takes long, until the document is read for the first time.
    """

    def __init__(self, document: Path, other: SavingsTracker) -> None:
        self.document = document
        self.other = other
        self.saves = 0
        self.lock = document.with_name(f"{document.name}.lock").open("rb")
        fcntl.flock(self.lock, fcntl.LOCK_EX)

    def read(self, path: str) -> tuple[bytes, Identity]:
        found = super().read(path)
        if path == str(self.document):
            self.lock.close()
            self.saves += self.other.save()
        return found


def test_open_while_saved_all_the_time(store_path: Path) -> None:
    with SavingsTracker(store_path) as other:
        assert other.record_request(model="m", tokens_saved=7)
        assert other.save()
        disk = BusyFileSystem(store_path, other)
        with SavingsTracker(store_path, filesystem=disk) as tracker:
            assert tracker.snapshot().lifetime.tokens_saved == 7
        assert disk.saves > 1
