"""The lock file: who may write, and the mark that says what is known to be durable.

Whoever holds the lock writes, and writes the mark when what it wrote is durable, never before. So what the mark
names was acknowledged, and what lies beyond it was left by a process that died, or whose sync failed. With a commit it
is not synced: living processes see it in the page cache, and after a power loss an older one is just as true, because
the journal proves itself. With a save it is, because only the mark says what a document held that is damaged later.
"""

from __future__ import annotations

import errno
import os
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from savings_exporter.storage import filesystem

# How long to wait for another process to finish what it writes before calling it a failure and trying again later.
_PATIENCE_SECONDS = 2.0
_READER_PATIENCE_SECONDS = 0.2
# A commit takes some hundred microseconds, so waiting for one begins with short pauses.
_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.00005, 0.002

# Longer than the coarsest clock by which a filesystem of ours stamps its files.
_TICK_NS = 100_000_000

_MAGIC = b"SXM1"
_MARK = struct.Struct("<4s8sQQQQQQQQ8s")
_CHECK_BYTES = 4
MARK_BYTES = _MARK.size + _CHECK_BYTES


NOBODY = bytes(8)


class Mark(NamedTuple):
    """What is durable in a store.

    Up to record ``sequence``: in the journal up to ``offset`` of segment ``epoch``, and up to ``saved_sequence`` in the
    document, which is the file of ``inode``, ``modified_ns`` and ``size`` and needs the journal from
    ``document_epoch`` on.

    ``writer`` is who appends, named before it does: so who finds its own name knows that nobody else began to write
    anything since. It is ``NOBODY`` while a document is saved that says more than this.
    """

    store: bytes
    epoch: int
    offset: int
    sequence: int
    saved_sequence: int
    document_epoch: int
    inode: int
    modified_ns: int
    size: int
    writer: bytes

    def packed(self) -> bytes:
        """The mark as the lock file holds it."""
        data = _MARK.pack(_MAGIC, *self)
        return data + zlib.crc32(data).to_bytes(_CHECK_BYTES, "little")

    def is_of(self, document: filesystem.Identity | None) -> bool:
        """Whether this is the document that was saved last. Devices are numbered anew at each mount."""
        return document is not None and (self.inode, self.modified_ns, self.size) == document[1:]


def unpacked(data: bytes) -> Mark | None:
    """The mark in a lock file's bytes; None when there is none, or it is being written at this moment."""
    if len(data) != MARK_BYTES or data[:4] != _MAGIC:
        return None
    if zlib.crc32(data[:-_CHECK_BYTES]) != int.from_bytes(data[-_CHECK_BYTES:], "little"):
        return None
    return Mark(*_MARK.unpack_from(data)[1:])


def lock_path(path: str) -> str:
    """The lock file of a store."""
    return path + ".lock"


class StoreLock:
    """The lock of one store, as this process has it. One thread at a time uses it.

    Raises:
        OSError: the lock file cannot be opened or made.
    """

    def __init__(self, path: str) -> None:
        self.path = lock_path(path)
        self._document = path
        self.held = False
        self.changes = 0
        """How often a name in the directory may have changed, as far as was noticed when the lock was taken."""
        self._directory = os.path.dirname(self.path)
        self._quiet_since_ns: int | None = None
        self._descriptor = -1
        self.reopen()

    def take(self) -> None:
        """Take the lock, unless it is held already.

        Raises:
            BlockingIOError: EAGAIN, another process has held it for 2 s.
        """
        if not self.held and not self.take_if_free() and not self._wait():
            raise BlockingIOError(errno.EAGAIN, "another process holds the lock for long", self.path)

    def take_if_free(self) -> bool:
        """Take the lock, unless another process holds it."""
        if self._descriptor < 0:
            self.reopen()
        for _ in range(2):
            locked = filesystem.try_lock(self._descriptor)
            if self._is_linked():
                self.held = locked
                return locked
            # Somebody removed the lock file, and a process that came later made another: agree with it.
            if locked:
                filesystem.unlock(self._descriptor)
            self.reopen()
        return False

    def release(self) -> None:
        """Let go of the lock."""
        if self.held:
            self.held = False
            filesystem.unlock(self._descriptor)

    def reopen(self) -> None:
        """Open the lock file anew. In a forked copy the old one is the parent's, and only closed.

        Raises:
            OSError: it cannot be opened now. The next one who takes the lock tries again.
        """
        self.held, self._quiet_since_ns = False, None
        self._close_file()
        self._descriptor = filesystem.open_lock(self.path, like=self._document)

    def read(self) -> bytes:
        """The mark's bytes, whatever they are."""
        return filesystem.read_at(self._descriptor, MARK_BYTES, 0)

    def write(self, mark: bytes) -> None:
        """Write the mark.

        Raises:
            OSError: it was not written, and the one before it stands.
        """
        filesystem.write_mark(self._descriptor, mark)

    def sync(self) -> None:
        """Have the mark on the disk."""
        filesystem.sync_data(self._descriptor)

    def close(self) -> None:
        """Let go of the lock and its file."""
        self.release()
        self._close_file()

    def _close_file(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            filesystem.close(descriptor)

    def _is_linked(self) -> bool:
        """Whether the lock file still has its name. While no name in its directory changes, the directory says so.

        Where timestamps are fine enough to tell each change that was looked at (Linux 6.13 and later), looking at the
        lock file itself would make writing the next mark a change of its metadata: half a commit's time on ext4.
        """
        changed_ns = filesystem.modified_ns(self._directory)
        if changed_ns == self._quiet_since_ns:
            return True
        self.changes += 1
        linked = filesystem.is_at(self.path, self._descriptor)
        # Elsewhere two changes within one tick of the clock look like one.
        if linked and time.time_ns() - changed_ns > _TICK_NS:
            self._quiet_since_ns = changed_ns
        return linked

    def _wait(self) -> bool:
        deadline, pause = time.monotonic() + _PATIENCE_SECONDS, _SHORTEST_PAUSE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(pause)
            if self.take_if_free():
                return True
            pause = min(pause * 1.1, _LONGEST_PAUSE_SECONDS)
        return False


def read_mark(path: str) -> Mark | None:
    """The mark of a store, for those who only read; None when there is none."""
    try:
        return unpacked(filesystem.read(lock_path(path))[0][:MARK_BYTES])
    except OSError:
        return None


@contextmanager
def nobody_writing(path: str) -> Iterator[bool]:
    """Keep writers away for the length of a block, if they let us soon; whether they did. Needs only to read."""
    with filesystem.opened_shared(lock_path(path)) as descriptor:
        deadline = time.monotonic() + _READER_PATIENCE_SECONDS
        while not (free := descriptor is None or filesystem.try_shared_lock(descriptor)):
            if time.monotonic() > deadline:
                break
            time.sleep(_SHORTEST_PAUSE_SECONDS)
        yield free
