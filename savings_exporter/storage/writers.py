"""The writer file beside the document: whether the writer is alive, how far its journal is durable, and its counters.

A writer is one open tracker in one process. Its name is 8 random bytes. The writer file is created and locked before
the first segment has a name, and removed after the last segment is gone. While the writer is alive, only the writer
itself writes the file, without syncs. The file provides:

* The *lock* (flock) is held as long as the process lives. It can only err in one direction, by showing a dead writer
  as alive: a forked child with a copy of the descriptor keeps the lock. This only delays the cleanup of dead writers.
  POSIX record locks err in the other direction: a process loses them when it closes any descriptor of the file.
* The *watermark* is the sequence number up to which the journal is durable. It is written after the sync has returned,
  never before. It is valid only within one boot of the machine, because a power loss can restore an older value.
* The *operation counters* are stored twice, so that a reader always finds a complete version.

Each writer has its own file instead of an entry in a common table, so nothing is allocated, freed or locked in common.
The file is written with ``pwrite`` instead of a memory mapping: a store to a mapping of a file system that has aborted
kills the process (SIGBUS).
"""

from __future__ import annotations

import errno
import logging
import os
import re
import struct
import zlib
from contextlib import suppress
from typing import NamedTuple

import msgspec

from savings_exporter.model.operations import OperationCounts
from savings_exporter.storage.filesystem import NO_SUCH_FILE, FileSystem

logger = logging.getLogger(__name__)

WRITER_BYTES = 8

_MAGIC = b"SXW1"
_HEADER = struct.Struct("<4s8s8s16s")
_CHECK = struct.Struct("<I")
_WATERMARK = struct.Struct("<QQ")
_WATERMARK_OFFSET = 64
_FIRST_BLOCK_BYTES = 4096
_COUNTS = struct.Struct("<QII")
_COUNTS_BYTES = 16 * 1024
_ALL_ONES = 2**64 - 1


_SUFFIX = ".writer."
_ATTEMPTS = 3


class WriterFacts(NamedTuple):
    """The content of a writer's file. ``boot`` is the boot of the machine in which its watermark is valid."""

    store: bytes
    writer: bytes
    boot: bytes
    watermark: int


class Writer:
    """A living writer's own file. It is locked as long as this object is open. ``name`` is the id in hexadecimal.

    Raises:
        OSError: the file cannot be created.
    """

    def __init__(self, fs: FileSystem, document: str, store: bytes, writer: bytes | None = None) -> None:
        self.id = writer or os.urandom(WRITER_BYTES)
        self.name = self.id.hex()
        self.path = writer_path(document, self.id)
        self.watermark = 0
        self._fs = fs
        self._document = document
        self._store = store
        self._version = 0
        self._descriptor = -1
        self._make()

    def raise_watermark(self, sequence: int) -> None:
        """Set the sequence number up to which the journal is durable.

        Raises:
            OSError: the watermark was not written; the previous one is still valid.
        """
        self._fs.write_at(self._descriptor, _WATERMARK.pack(sequence, sequence ^ _ALL_ONES), _WATERMARK_OFFSET)
        self.watermark = sequence

    def publish(self, counts: OperationCounts) -> None:
        """Write the operation counters, so that other processes can read them, even after this process has ended.

        Raises:
            OSError: the counters were not written; the previous version still exists.
        """
        data = msgspec.json.encode(counts)
        if len(data) > _COUNTS_BYTES - _COUNTS.size:
            return
        version = self._version + 1
        block = _COUNTS.pack(version, len(data), zlib.crc32(data)) + data
        self._fs.write_at(self._descriptor, block, _FIRST_BLOCK_BYTES + version % 2 * _COUNTS_BYTES)
        self._version = version

    def is_in_place(self) -> bool:
        """Whether the file still exists under its name."""
        return self._fs.is_at(self.path, self._descriptor)

    def make_again(self) -> None:
        """Recreate the file after its name was removed, with at least the same watermark."""
        adopted = read_facts(self._fs, self.path)
        if adopted is not None:
            self.watermark = max(self.watermark, adopted.watermark)
        old = self._descriptor
        self._make()
        self._fs.close(old)

    def close(self) -> None:
        """Release the lock. The file stays until a save has added its counters to the document."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            self._fs.close(descriptor)

    def _make(self) -> None:
        header = _HEADER.pack(_MAGIC, self._store, self.id, self._fs.boot_id())
        block = (header + _CHECK.pack(zlib.crc32(header))).ljust(_WATERMARK_OFFSET, b"\0")
        block += _WATERMARK.pack(self.watermark, self.watermark ^ _ALL_ONES)
        for attempt in range(1, _ATTEMPTS + 1):
            # If only one process may use the store, no temporary name is needed: no other process can mistake the
            # writer for dead. Also, Windows cannot rename an open file.
            temporary = self._fs.temporary_name(self.path) if self._fs.is_shared else self.path
            descriptor = self._fs.create(temporary, like=self._document)
            try:
                # The file is locked before it has its final name: a writer file without a lock would be removed as that
                # of a dead writer.
                if not self._fs.try_lock(descriptor):
                    raise BlockingIOError(errno.EAGAIN, "another process looks at it", temporary)
                self._fs.write_at(descriptor, block.ljust(_FIRST_BLOCK_BYTES, b"\0"), 0)
                if temporary != self.path:
                    self._fs.replace(temporary, self.path)
            except BaseException as error:
                self._fs.close(descriptor)
                self._fs.discard(temporary)
                # A process that opened the store in the meantime treated the file as the leftover of a dead process.
                if not isinstance(error, (BlockingIOError, FileNotFoundError)) or attempt == _ATTEMPTS:
                    raise
            else:
                self._descriptor = descriptor
                return


def writer_path(document: str, writer: bytes) -> str:
    """The path of a writer's file."""
    return f"{document}{_SUFFIX}{writer.hex()}"


def writer_of(document_name: str, name: str) -> bytes | None:
    """The writer that a file name belongs to; None when it is not the name of a writer's file."""
    found = re.fullmatch(re.escape(document_name + _SUFFIX) + "([0-9a-f]{16})", name)
    return bytes.fromhex(found[1]) if found else None


def read_facts(fs: FileSystem, path: str) -> WriterFacts | None:
    """Read a writer's file; None when the file does not exist or its content is invalid.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        with fs.opened(path) as descriptor:
            return facts_of(fs.read_at(descriptor, _WATERMARK_OFFSET + _WATERMARK.size, 0))
    except NO_SUCH_FILE:
        return None


def facts_of(data: bytes) -> WriterFacts | None:
    """Decode the first bytes of a writer's file; None when they are invalid."""
    if len(data) < _WATERMARK_OFFSET + _WATERMARK.size:
        return None
    header = data[: _HEADER.size]
    magic, store, writer, boot = _HEADER.unpack(header)
    (check,) = _CHECK.unpack_from(data, _HEADER.size)
    watermark, inverted = _WATERMARK.unpack_from(data, _WATERMARK_OFFSET)
    if magic != _MAGIC or check != zlib.crc32(header) or watermark ^ _ALL_ONES != inverted:
        return None
    return WriterFacts(store, writer, boot, watermark)


def read_counts(fs: FileSystem, path: str) -> OperationCounts:
    """The newest complete version of a writer's operation counters; empty counters when there is none.

    Raises:
        OSError: the file cannot be read.
    """
    versions: list[tuple[int, OperationCounts]] = [(0, OperationCounts())]
    try:
        with fs.opened(path) as descriptor:
            for place in range(2):
                block = fs.read_at(descriptor, _COUNTS_BYTES, _FIRST_BLOCK_BYTES + place * _COUNTS_BYTES)
                versions += _version_in(block)
    except NO_SUCH_FILE:
        pass
    return max(versions, key=lambda version: version[0])[1]


def is_alive(fs: FileSystem, path: str) -> bool:
    """Whether a living process holds the lock of a writer's file. False when the file does not exist.

    Raises:
        OSError: the file cannot be opened.
    """
    if not fs.is_shared:
        return False
    try:
        with fs.opened(path) as descriptor:
            return not fs.try_lock(descriptor, shared=True)
    except NO_SUCH_FILE:
        return False


def set_watermark(fs: FileSystem, path: str, sequence: int) -> None:
    """Raise the watermark of a dead writer whose journal was adopted. The caller holds the store's lock.

    Raises:
        OSError: the watermark was not written.
    """
    with suppress(FileNotFoundError):
        descriptor = fs.open_to_write(path)
        try:
            fs.write_at(descriptor, _WATERMARK.pack(sequence, sequence ^ _ALL_ONES), _WATERMARK_OFFSET)
        finally:
            fs.close(descriptor)


def _version_in(block: bytes) -> list[tuple[int, OperationCounts]]:
    if len(block) < _COUNTS.size:
        return []
    version, length, check = _COUNTS.unpack_from(block)
    data = block[_COUNTS.size : _COUNTS.size + length]
    if not version or len(data) != length or zlib.crc32(data) != check:
        return []
    try:
        return [(version, msgspec.json.decode(data, type=OperationCounts))]
    except (msgspec.DecodeError, UnicodeDecodeError):
        return []
