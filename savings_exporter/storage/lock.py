"""The store's lock: one process at a time saves the document, adopts journals and removes segments.

The lock file holds the store's name, so that all processes agree on it before there is a document. The file of an
earlier version of this program holds a mark instead; it is replaced, so that such a process notices.
"""

from __future__ import annotations

import errno
import os
import struct
import time
from typing import NamedTuple

from savings_exporter.storage.filesystem import FileSystem

PATIENCE_SECONDS = 2.0
"""How long to wait for another process's save before that counts as a failure, which is tried again later."""

CLOSING_PATIENCE_SECONDS = 5.0
"""The same when a process ends, which does not try again. Many that end together wait for each other."""

STORE_BYTES = 8

_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.0001, 0.02
_MAGIC = b"SXL2"
_NEW, _SAVED, _BEGUN, _FOREIGN = range(4)
_OLD_MAGIC = b"SXM1"
_OLD_MARK = struct.Struct("<8sQQQQ")
_OLD_MARK_BYTES = 88


class LockContent(NamedTuple):
    """What a lock file says: the store's name (empty when it is new), whether a document was ever saved, whether the
    first save has begun, and whether, before that, there was another program's document.

    ``earlier_records`` is how many records an earlier version of this program acknowledged, None where it did not write
    the file, ``earlier_saved`` how many of them its document held, and ``earlier_end`` the segment and the offset in it
    where its journal ended.
    """

    store: bytes = b""
    is_saved: bool = False
    is_begun: bool = False
    is_foreign: bool = False
    earlier_records: int | None = None
    earlier_saved: int = 0
    earlier_end: tuple[int, int] = (0, 0)


def content_of(data: bytes) -> LockContent:
    """What the bytes of a lock file say."""
    if data.startswith(_MAGIC) and len(data) > len(_MAGIC) + STORE_BYTES:
        end = len(_MAGIC) + STORE_BYTES
        state = data[end]
        return LockContent(data[len(_MAGIC) : end], state == _SAVED, state == _BEGUN, state == _FOREIGN)
    if data.startswith(_OLD_MAGIC) and len(data) == _OLD_MARK_BYTES:
        _, epoch, offset, records, saved = _OLD_MARK.unpack_from(data, len(_OLD_MAGIC))
        return LockContent(is_saved=True, earlier_records=records, earlier_saved=saved, earlier_end=(epoch, offset))
    return LockContent()


def read_lock(fs: FileSystem, document: str) -> LockContent:
    """What the lock file of a store says, for a process that only reads.

    Raises:
        OSError: it cannot be read.
    """
    try:
        return content_of(fs.read(lock_path(document))[0])
    except FileNotFoundError:
        return LockContent()


def lock_path(document: str) -> str:
    """The lock file of a store."""
    return document + ".lock"


class StoreLock:
    """The lock of one store, as this process has it.

    Raises:
        OSError: the lock file cannot be opened or made.
    """

    def __init__(self, fs: FileSystem, document: str, *, opened: bool = True) -> None:
        self.path = lock_path(document)
        self.held = False
        self._fs = fs
        self._document = document
        # Not opened yet, it is when the lock is first taken.
        self._descriptor = fs.open_lock(self.path, like=document) if opened else -1

    def take(self, patience: float = PATIENCE_SECONDS) -> None:
        """Take the lock, unless it is held already.

        Raises:
            BlockingIOError: EAGAIN, another process held it all the time.
        """
        deadline, pause = time.monotonic() + patience, _SHORTEST_PAUSE_SECONDS
        while not self.held and not self._take_if_free():
            if time.monotonic() > deadline:
                raise BlockingIOError(errno.EAGAIN, "another process holds the store's lock", self.path)
            time.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_PAUSE_SECONDS)

    def take_if_free(self) -> bool:
        """Take the lock, unless another process holds it."""
        return self.held or self._take_if_free()

    def release(self) -> None:
        """Release the lock, also when an interrupt came before this object knew that it held it."""
        self.held = False
        if self._descriptor >= 0:
            self._fs.unlock(self._descriptor)

    def close(self) -> None:
        """Release the lock and its file."""
        self.release()
        self._close_file()

    def abandon(self) -> None:
        """Close the file in a forked child, without unlocking: the lock is the parent's."""
        self.held = False
        self._close_file()

    def content(self) -> LockContent:
        """What the lock file says."""
        return content_of(self._fs.read_at(self._descriptor, _OLD_MARK_BYTES, 0))

    def write(self, store: bytes, *, is_saved: bool = False, is_begun: bool = False, is_foreign: bool = False) -> None:
        """Write the store's name, and what is known of its document. Called with the lock held.

        Raises:
            OSError: it was not written.
        """
        if self.content() != LockContent(store, is_saved, is_begun and not is_saved, is_foreign):
            state = _SAVED if is_saved else _BEGUN if is_begun else _FOREIGN if is_foreign else _NEW
            # As long as an earlier version's mark, of which nothing may stay.
            data = (_MAGIC + store + bytes([state])).ljust(_OLD_MARK_BYTES, b"\0")
            self._fs.write_at(self._descriptor, data, 0)
            self._fs.sync_data(self._descriptor)

    def _close_file(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            self._fs.close(descriptor)

    def _take_if_free(self) -> bool:
        for _ in range(2):
            if self._descriptor < 0:
                self._descriptor = self._fs.open_lock(self.path, like=self._document)
            locked = self._fs.try_lock(self._descriptor)
            if self._fs.is_at(self.path, self._descriptor):
                self.held = locked
                return locked
            # The file was removed, and another process may have made a new one: use that.
            descriptor, self._descriptor = self._descriptor, -1
            self._fs.close(descriptor)
        return False


def new_store() -> bytes:
    """A name for a new store."""
    return os.urandom(STORE_BYTES)
