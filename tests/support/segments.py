"""Segments of a journal: their names, their frames, and a file system that logs which ones are written."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from savings_exporter.formats.frame import Damage, Frame, scan, store_of
from savings_exporter.storage.filesystem import LOCAL
from tests.support.faults import FaultyFileSystem


class WatchedSegments(FaultyFileSystem):
    """Logs each write and sync of a segment, by its name, in ``touched``.

    ``late``: raised by each write and sync of a frame into a segment that is in use, after it has gone through.
    """

    def __init__(self, *, has_direct_io: bool = True) -> None:
        super().__init__(has_direct_io=has_direct_io)
        self.touched: list[str] = []
        self.late: BaseException | None = None
        self._names: dict[int, str] = {}

    def create(self, path: str, like: str) -> int:
        descriptor = super().create(path, like)
        self._names[descriptor] = os.path.basename(path)
        return descriptor

    def open_direct(self, path: str) -> int:
        descriptor = super().open_direct(path)
        self._names[descriptor] = os.path.basename(path)
        return descriptor

    def write_all(self, descriptor: int, data: bytes | memoryview) -> None:
        self._touch(descriptor)
        super().write_all(descriptor, data)

    def write_at(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        self._touch(descriptor)
        super().write_at(descriptor, data, offset)

    def write_direct(self, descriptor: int, data: memoryview, offset: int) -> None:
        self._touch(descriptor)
        super().write_direct(descriptor, data, offset)
        self._raise_late()

    def fsync_file(self, descriptor: int) -> None:
        self._touch(descriptor)
        super().fsync_file(descriptor)

    def sync_data(self, descriptor: int) -> None:
        self._touch(descriptor)
        super().sync_data(descriptor)
        self._raise_late()

    def _touch(self, descriptor: int) -> None:
        if ".journal." in (name := self._names.get(descriptor, "")):
            self.touched.append(name)

    def _raise_late(self) -> None:
        if self.late is not None:
            raise self.late


def segments(document: Path) -> list[Path]:
    """A store's segments: each writer's in the order of their numbers."""
    return sorted(document.parent.glob(f"{document.name}.journal.*.{'[0-9]' * 8}"))


def frames(segment: Path) -> list[Frame]:
    """The frames in a segment that contains only frames."""
    data, writer = segment.read_bytes(), bytes.fromhex(segment.name.split(".")[-2])
    found = []
    for item in scan(data, store_of(data), writer):
        assert not isinstance(item, Damage), item
        found.append(item)
    return found


@contextmanager
def copied(document: Path) -> Iterator[Path]:
    """Copy the current files of a store, as after a kill of its processes. Return the path of the document's copy."""
    with tempfile.TemporaryDirectory() as directory:
        for file in document.parent.glob(f"{document.name}*"):
            shutil.copy(file, directory)
        yield Path(directory, document.name)


def has_direct_io() -> bool:
    """Whether the temporary directory's file system has direct I/O."""
    with tempfile.NamedTemporaryFile() as file:
        try:
            LOCAL.close(LOCAL.open_direct(file.name))
        except OSError:
            return False
    return True
