"""A file of the store that is temporarily unreadable is not treated as missing."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from savings_exporter import SavingsTracker, StoreError
from savings_exporter.storage.filesystem import FileSystem
from savings_exporter.storage.observers import Observers
from savings_exporter.storage.repair import repair

pytestmark = pytest.mark.needs("linux")

# What an open or a read may answer; none of them says that there is no file.
ERRORS = (errno.EINVAL, errno.EIO, errno.EMFILE, errno.ENOSPC)


class UnreadableFileSystem(FileSystem):
    """After part of a name is set, opening or reading a file with this name fails ``failures`` times."""

    def __init__(self, number: int, when: str, failures: int) -> None:
        self.number = number
        self.when = when
        self.failures = failures
        self.part = ""
        self.descriptors: set[int] = set()

    @contextmanager
    def opened(self, path: str) -> Iterator[int]:
        is_named = bool(self.part) and self.part in path
        if is_named and self.when == "open":
            self.fail(path)
        with super().opened(path) as descriptor:
            if is_named:
                self.descriptors.add(descriptor)
            try:
                yield descriptor
            finally:
                self.descriptors.discard(descriptor)

    def read_at(self, descriptor: int, size: int, offset: int) -> bytes:
        if self.when == "read" and descriptor in self.descriptors:
            self.fail(self.part)
        return super().read_at(descriptor, size, offset)

    def fail(self, path: str) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError(self.number, os.strerror(self.number), path)


@pytest.mark.parametrize("failures", [1, 2, 3, 4, 1_000])
@pytest.mark.parametrize("when", ["open", "read"])
@pytest.mark.parametrize("part", [".writer.", ".journal."])
@pytest.mark.parametrize("number", ERRORS)
def test_own_files_at_close(store_path: Path, number: int, part: str, when: str, failures: int) -> None:
    disk = UnreadableFileSystem(number, when, failures)
    tracker = SavingsTracker(store_path, filesystem=disk, save_interval=3600)
    assert tracker.record_request(model="m", tokens_saved=1)
    assert tracker.save()
    assert tracker.record_request(model="m", tokens_saved=2)
    disk.part = part
    tracker.close()
    with SavingsTracker(store_path) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == 3


@pytest.mark.parametrize("failures", [1, 2, 3, 4, 1_000])
@pytest.mark.parametrize("when", ["open", "read"])
@pytest.mark.parametrize("part", [".writer.", ".journal."])
@pytest.mark.parametrize("number", ERRORS)
def test_living_writers_files(store_path: Path, number: int, part: str, when: str, failures: int) -> None:
    disk = UnreadableFileSystem(number, when, failures)
    with SavingsTracker(store_path, save_interval=3600) as living:
        assert living.record_request(model="m", tokens_saved=1)
        with SavingsTracker(store_path, filesystem=disk, save_interval=3600) as other:
            assert other.record_request(model="m", tokens_saved=2)
            disk.part = part
            other.save()
            other.save()
            assert living.record_request(model="m", tokens_saved=4)
        names = {path.name for path in store_path.parent.iterdir()}
        assert any(living_writer(living) in name and ".writer." in name for name in names)
        assert any(living_writer(living) in name and ".journal." in name for name in names)
    with SavingsTracker(store_path) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == 7


def living_writer(tracker: SavingsTracker) -> str:
    writer = tracker.record_request(model="m", tokens_saved=0).writer
    assert writer is not None
    return writer


@pytest.mark.parametrize("number", ERRORS)
def test_previous_document_under_another_programs(store_path: Path, number: int) -> None:
    """Another program rewrote the document from an older one: what it lacks is in the previous document."""
    with SavingsTracker(store_path, save_interval=3600) as tracker:
        assert tracker.record_request(model="m", tokens_saved=1)
        assert tracker.save()
        assert tracker.record_request(model="m", tokens_saved=2)
    store_path.write_text('{"schema_version": 6, "lifetime": {"tokens_saved": 1, "requests": 1}}')
    disk = UnreadableFileSystem(number, "open", 1)
    disk.part = ".previous"
    with pytest.raises(StoreError, match=r"cannot read the store: .*\.previous"):
        SavingsTracker(store_path, filesystem=disk)
    with pytest.raises(StoreError, match="another program rewrote the document"):
        SavingsTracker(store_path)


@pytest.mark.parametrize("number", ERRORS)
def test_previous_document_of_a_repair(store_path: Path, number: int) -> None:
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_request(model="m", tokens_saved=1)
    store_path.write_bytes(b"damaged")
    disk = UnreadableFileSystem(number, "open", 1)
    disk.part = ".previous"
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        repair(str(store_path), Observers(), disk)
    repair(str(store_path), Observers())
    with SavingsTracker(store_path) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == 1


def test_previous_document_that_is_not_needed(store_path: Path) -> None:
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_request(model="m", tokens_saved=1)
    disk = UnreadableFileSystem(errno.EIO, "open", 1_000)
    disk.part = ".previous"
    with SavingsTracker(store_path, filesystem=disk) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == 1
