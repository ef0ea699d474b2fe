"""One segment of a journal: a file of zeros, synced once, that frames are written to from its beginning to its end.

A commit into it changes no metadata. There are two ways to write a frame:

* ``DirectSegment``: one direct, synchronous write (``O_DIRECT | O_DSYNC``) of the blocks that the frame lies in. The
  page cache holds no dirty copy, so a failed write cannot be reported once and then forgotten.
* ``BufferedSegment``: ``pwrite`` and ``fdatasync``, where direct I/O is not available or slower.

After any error a segment is never written or synced again.
"""

from __future__ import annotations

import errno
import mmap
from typing import Literal

from savings_exporter.formats.frame import BLOCK_BYTES, next_block, place_for
from savings_exporter.storage.atomic_file import Directory
from savings_exporter.storage.filesystem import FileSystem
from savings_exporter.storage.operation import APPEND, FSYNC_DIR, FSYNC_FILE, FSYNC_JOURNAL, WRITE, Operation

SyncMethod = Literal["auto", "direct", "fdatasync"]
"""How the journal is written: ``auto`` is ``direct`` where that works, else ``fdatasync``."""

NO_DIRECT_IO = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP})
"""The errors of an open or of a first write by which a file system says that it has no direct I/O."""

_BUFFER_BYTES = 64 * 1024


class BufferedSegment:
    """A segment that is written through the page cache; it owns the descriptor."""

    def __init__(self, fs: FileSystem, path: str, descriptor: int, size: int, offset: int) -> None:
        self.path = path
        self.size = size
        self.offset = offset
        self._fs = fs
        self._descriptor = descriptor

    def has_room_for(self, size: int) -> bool:
        """Whether a frame of this size still fits."""
        return self.offset + size + BLOCK_BYTES <= self.size or place_for(size, self.offset) + size <= self.size

    def write(self, frame: bytes, operation: Operation) -> None:
        """Write a frame after the last one; it is durable when this returns.

        Raises:
            OSError: whether it is durable is not known.
        """
        place = place_for(len(frame), self.offset)
        with operation.step(APPEND) as step:
            step.size = len(frame)
            self._fs.write_at(self._descriptor, frame, place)
        with operation.step(FSYNC_JOURNAL, "journal"):
            self._fs.sync_data(self._descriptor)
        self.offset = place + len(frame)

    def is_in_place(self) -> bool:
        """Whether the file still has its name."""
        return self._fs.is_at(self.path, self._descriptor)

    def content(self) -> bytes:
        """What was written to it, also after its name is gone."""
        return self._fs.read_at(self._descriptor, self.offset, 0)

    def close(self) -> None:
        """Close the file."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            self._fs.close(descriptor)


class DirectSegment(BufferedSegment):
    """A segment that is written by direct, synchronous writes of whole blocks.

    Raises:
        OSError: EINVAL and its like, the file cannot be opened for direct I/O.
    """

    def __init__(self, fs: FileSystem, path: str, descriptor: int, size: int, offset: int, last_block: bytes) -> None:
        super().__init__(fs, path, descriptor, size, offset)
        self._direct = fs.open_direct(path)
        # It begins with what the block that the next frame begins in holds already; the rest is zero.
        self._buffer = _aligned(_BUFFER_BYTES)
        self._buffer[: len(last_block)] = last_block
        self._try_direct_write()

    def write(self, frame: bytes, operation: Operation) -> None:
        """Write the blocks that the frame lies in; what they held before is written again as it was."""
        with operation.step(FSYNC_JOURNAL, "journal") as step:
            step.size = size = len(frame)
            place = place_for(size, self.offset)
            buffer = self._buffer
            if place != self.offset:
                # It skips the rest of a block, and begins the next one.
                buffer[:BLOCK_BYTES] = bytes(BLOCK_BYTES)
            inside = place % BLOCK_BYTES
            end = inside + size
            length = next_block(end)
            if length > _BUFFER_BYTES:
                buffer = _aligned(length)
                buffer[:inside] = self._buffer[:inside]
            buffer[inside:end] = frame
            self._fs.write_direct(self._direct, buffer[:length], place - inside)
        if end >= BLOCK_BYTES:
            self._begin_block(buffer[end - end % BLOCK_BYTES : end].tobytes(), length)
        self.offset = place + size

    def close(self) -> None:
        """Close the file."""
        super().close()
        direct, self._direct = self._direct, -1
        if direct >= 0:
            self._fs.close(direct)

    def _begin_block(self, block: bytes, used: int) -> None:
        """Have the buffer, of which so many bytes were used, begin with another block."""
        used = min(used, _BUFFER_BYTES)
        self._buffer[:used] = block.ljust(used, b"\0")

    def _try_direct_write(self) -> None:
        """Write what is there once more: some file systems refuse only the write."""
        if self.offset == self.size:
            # Full with its first frame. Another block would make it larger.
            return
        try:
            self._fs.write_direct(self._direct, self._buffer[:BLOCK_BYTES], self.offset // BLOCK_BYTES * BLOCK_BYTES)
        except BaseException:
            self._fs.close(self._direct)
            raise


def _aligned(size: int) -> memoryview:
    """Zeros in a buffer as direct I/O asks for: a mapping begins at a page boundary."""
    return memoryview(mmap.mmap(-1, size))


def make_segment(
    fs: FileSystem,
    path: str,
    size: int,
    operation: Operation,
    directory: Directory,
    method: SyncMethod,
    frame: bytes = b"",
) -> BufferedSegment:
    """Make a segment of so many bytes, a first frame included, durable with its name.

    Raises:
        OSError: it failed, and the file is removed. Should it be there after a power loss, it says nothing new: what
            it holds was not acknowledged, and is written again under the same numbers.
    """
    is_commit = bool(frame)
    descriptor = -1
    try:
        with operation.step(APPEND if is_commit else WRITE) as step:
            step.size = size
            descriptor = fs.create(path, like=directory.like)
            # A second sign of life, for when the writer's file is removed by hand.
            fs.try_lock(descriptor)
            if is_commit:
                fs.write_all(descriptor, frame)
            fs.write_zeros(descriptor, size - len(frame))
        with operation.step(FSYNC_JOURNAL if is_commit else FSYNC_FILE, "journal"):
            fs.fsync_file(descriptor)
        with operation.step(FSYNC_DIR, "directory") as step:
            directory.sync(step, path)
        return _opened(fs, path, descriptor, size, len(frame), method, frame)
    except BaseException:
        if descriptor >= 0:
            fs.close(descriptor)
            fs.discard(path)
        raise


def _opened(
    fs: FileSystem, path: str, descriptor: int, size: int, offset: int, method: SyncMethod, frame: bytes
) -> BufferedSegment:
    if method != "fdatasync":
        last_block = frame[offset // BLOCK_BYTES * BLOCK_BYTES :]
        try:
            return DirectSegment(fs, path, descriptor, size, offset, last_block)
        except OSError as error:
            if method == "direct" or error.errno not in NO_DIRECT_IO:
                raise
    return BufferedSegment(fs, path, descriptor, size, offset)
