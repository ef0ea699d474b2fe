"""The store's lock: only its holder saves the document, adopts journals and removes segments.

The lock file holds the store's name and the time when the store got it, so that all processes agree on both before the
first document exists. An earlier version of this program wrote a mark to the file instead. This version overwrites the
mark, so that a running process of the earlier version detects the change.
"""

from __future__ import annotations

import errno
import os
import struct
import time
from datetime import datetime, timedelta, timezone
from typing import NamedTuple

from savings_exporter.storage.filesystem import FileSystem

PATIENCE_SECONDS = 2.0
"""How long to wait for another process's save. After that the operation fails and is retried later."""

CLOSING_PATIENCE_SECONDS = 5.0
"""The same for a process that ends and does not retry. Many processes that end together wait for each other."""

STORE_BYTES = 8

_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.0001, 0.02
_MAGIC = b"SXL2"
_NEW, _SAVED, _BEGUN, _FOREIGN = range(4)
_OLD_MAGIC = b"SXM1"
_OLD_MARK = struct.Struct("<8sQQQQ")
_OLD_MARK_BYTES = 88
_TIME = struct.Struct("<Q")  # microseconds since 1970
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


class LockContent(NamedTuple):
    """The content of a lock file.

    ``store`` is the store's name, empty when the store is new. ``created_at`` is when the store got it, None when that
    is not known. ``is_saved`` says whether a document was ever saved, ``is_begun`` whether the first save has begun.
    ``is_foreign`` says whether the path held another program's document before that.

    ``earlier_records`` is how many records an earlier version of this program acknowledged, or None when that version
    did not write the file. ``earlier_saved`` is how many of these records its document held. ``earlier_end`` is the
    segment in which its journal ended, and the offset in this segment.
    """

    store: bytes = b""
    is_saved: bool = False
    is_begun: bool = False
    is_foreign: bool = False
    created_at: datetime | None = None
    earlier_records: int | None = None
    earlier_saved: int = 0
    earlier_end: tuple[int, int] = (0, 0)


def content_of(data: bytes) -> LockContent:
    """Decode the bytes of a lock file."""
    if data.startswith(_MAGIC) and len(data) > len(_MAGIC) + STORE_BYTES:
        end = len(_MAGIC) + STORE_BYTES
        state, created_at = data[end], _read_time(data[end + 1 :])
        return LockContent(data[len(_MAGIC) : end], state == _SAVED, state == _BEGUN, state == _FOREIGN, created_at)
    if data.startswith(_OLD_MAGIC) and len(data) == _OLD_MARK_BYTES:
        _, epoch, offset, records, saved = _OLD_MARK.unpack_from(data, len(_OLD_MAGIC))
        return LockContent(is_saved=True, earlier_records=records, earlier_saved=saved, earlier_end=(epoch, offset))
    return LockContent()


def read_lock(fs: FileSystem, document: str) -> LockContent:
    """Read a store's lock file without opening it for writing, for a process that only reads.

    Raises:
        OSError: it cannot be read.
    """
    try:
        return content_of(fs.read(lock_path(document))[0])
    except FileNotFoundError:
        return LockContent()


def lock_path(document: str) -> str:
    """The path of a store's lock file."""
    return document + ".lock"


class StoreLock:
    """This process's handle on the lock of one store.

    Raises:
        OSError: the lock file cannot be opened or created.
    """

    def __init__(self, fs: FileSystem, document: str, *, opened: bool = True) -> None:
        self.path = lock_path(document)
        self.held = False
        self._fs = fs
        self._document = document
        # If the file is not opened here, the first attempt to take the lock opens it.
        self._descriptor = fs.open_lock(self.path, like=document) if opened else -1

    def take(self, patience: float = PATIENCE_SECONDS) -> None:
        """Take the lock, unless this process holds it already.

        Raises:
            BlockingIOError: EAGAIN, another process held the lock for the whole time.
        """
        deadline, pause = time.monotonic() + patience, _SHORTEST_PAUSE_SECONDS
        while not self.held and not self._take_if_free():
            if time.monotonic() > deadline:
                raise BlockingIOError(errno.EAGAIN, "another process holds the store's lock", self.path)
            time.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_PAUSE_SECONDS)

    def take_if_free(self) -> bool:
        """Try to take the lock. Returns whether this process holds it now."""
        return self.held or self._take_if_free()

    def release(self) -> None:
        """Release the lock, even if an interrupt came before ``held`` was set."""
        self.held = False
        if self._descriptor >= 0:
            self._fs.unlock(self._descriptor)

    def close(self) -> None:
        """Release the lock and close its file."""
        self.release()
        self._close_file()

    def abandon(self) -> None:
        """Close the file in a forked child without unlocking it, because the parent owns the lock."""
        self.held = False
        self._close_file()

    def content(self) -> LockContent:
        """Read the lock file."""
        return content_of(self._fs.read_at(self._descriptor, _OLD_MARK_BYTES, 0))

    def write(
        self,
        store: bytes,
        *,
        is_saved: bool = False,
        is_begun: bool = False,
        is_foreign: bool = False,
        created_at: datetime | None = None,
    ) -> None:
        """Write the store's name and the state of its document. The caller holds the lock. While the store keeps its
        name, it keeps the time ``created_at``.

        Raises:
            OSError: the file was not written.
        """
        content = self.content()
        if content.store == store:
            created_at = content.created_at or created_at
        if content != LockContent(store, is_saved, is_begun and not is_saved, is_foreign, created_at):
            state = _SAVED if is_saved else _BEGUN if is_begun else _FOREIGN if is_foreign else _NEW
            # Padded to the length of an earlier version's mark, so that the mark is overwritten completely.
            data = (_MAGIC + store + bytes([state]) + _time_bytes(created_at)).ljust(_OLD_MARK_BYTES, b"\0")
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
            # The file was removed, and another process may have created a new one. The next round opens that one.
            descriptor, self._descriptor = self._descriptor, -1
            self._fs.close(descriptor)
        return False


def _time_bytes(moment: datetime | None) -> bytes:
    microseconds = (moment - _EPOCH) // timedelta(microseconds=1) if moment is not None else 0
    return _TIME.pack(max(microseconds, 0))


def _read_time(data: bytes) -> datetime | None:
    """A time; None when there is none, as in a file of an earlier version, which has zeros there."""
    if len(data) < _TIME.size:
        return None
    (microseconds,) = _TIME.unpack_from(data)
    try:
        return _EPOCH + timedelta(microseconds=microseconds) if microseconds else None
    except OverflowError:
        return None


def new_store() -> bytes:
    """A name for a new store."""
    return os.urandom(STORE_BYTES)
