"""One segment of a journal: a preallocated file of zeros. Frames are written to it in order, from start to end.

The file is synced once when it is created, so a later commit changes no metadata. There are two ways to write a frame:

* ``DirectSegment``: one direct, synchronous write (``O_DIRECT | O_DSYNC``) of the blocks that contain the frame. The
  page cache holds no dirty copy, so the kernel cannot report a failed write once and then forget it.
* ``BufferedSegment``: ``pwrite`` and ``fdatasync``, for systems where direct I/O is not available or is slower.

After any error, a segment is never written or synced again.
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
"""How the journal is written. ``auto`` means ``direct`` if the file system supports it, and ``fdatasync`` otherwise."""

NO_DIRECT_IO = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP})
"""The errors of an open or a first write which mean that a file system does not support direct I/O."""

_BUFFER_BYTES = 64 * 1024


class BufferedSegment:
    """A segment that is written through the page cache. It owns the descriptor."""

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
        """Append a frame. It is durable when this returns.

        Raises:
            OSError: it is unknown whether the frame is durable.
        """
        place = place_for(len(frame), self.offset)
        with operation.step(APPEND) as step:
            step.size = len(frame)
            self._fs.write_at(self._descriptor, frame, place)
        with operation.step(FSYNC_JOURNAL, "journal"):
            self._fs.sync_data(self._descriptor)
        self.offset = place + len(frame)

    def is_in_place(self) -> bool:
        """Whether the file still exists under its name."""
        return self._fs.is_at(self.path, self._descriptor)

    def content(self) -> bytes:
        """The data written to the segment. It can be read even after the file's name was removed."""
        return self._fs.read_at(self._descriptor, self.offset, 0)

    def close(self) -> None:
        """Close the file."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            self._fs.close(descriptor)


class DirectSegment(BufferedSegment):
    """A segment that is written by direct, synchronous writes of whole blocks.

    Raises:
        OSError: the file cannot be opened or written with direct I/O. The errno is EINVAL, ENOTSUP or EOPNOTSUPP when
            the file system does not support it.
    """

    def __init__(self, fs: FileSystem, path: str, descriptor: int, size: int, offset: int, last_block: bytes) -> None:
        super().__init__(fs, path, descriptor, size, offset)
        self._direct = fs.open_direct(path)
        # The buffer begins with the existing content of the block in which the next frame begins. The rest is zero.
        self._buffer = _aligned(_BUFFER_BYTES)
        self._buffer[: len(last_block)] = last_block
        self._try_direct_write()

    def write(self, frame: bytes, operation: Operation) -> None:
        """Write the blocks that contain the frame. Existing data in these blocks is rewritten unchanged."""
        with operation.step(FSYNC_JOURNAL, "journal") as step:
            step.size = size = len(frame)
            place = place_for(size, self.offset)
            buffer = self._buffer
            if place != self.offset:
                # The frame skips the rest of the current block and begins in the next one.
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
        """Make ``block`` the start of the buffer, and clear the ``used`` bytes of the previous write."""
        used = min(used, _BUFFER_BYTES)
        self._buffer[:used] = block.ljust(used, b"\0")

    def _try_direct_write(self) -> None:
        """Rewrite the current block: some file systems accept the open and refuse only the write."""
        if self.offset == self.size:
            # The first frame fills the segment. Writing another block would extend the file.
            return
        try:
            self._fs.write_direct(self._direct, self._buffer[:BLOCK_BYTES], self.offset // BLOCK_BYTES * BLOCK_BYTES)
        except BaseException:
            self._fs.close(self._direct)
            raise


def _aligned(size: int) -> memoryview:
    """A buffer of zeros, aligned as direct I/O requires: a memory mapping begins at a page boundary."""
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
    """Create a segment of ``size`` bytes, including a first frame. The file and its name are durable when this returns.

    Raises:
        OSError: the segment was not created, and the file is removed. If a power loss restores the file, it does no
            harm: its frame was not acknowledged, and the same frame is written again under the same numbers.
    """
    is_commit = bool(frame)
    descriptor = -1
    try:
        with operation.step(APPEND if is_commit else WRITE) as step:
            step.size = size
            descriptor = fs.create(path, like=directory.like)
            # This lock also shows that the writer is alive, in case an operator removes the writer's file.
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
