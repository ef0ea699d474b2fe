"""Reads files of lines that another program appends to, from a cursor on.

The other program may also remove old lines from the beginning, rename the file and begin a new one, or truncate it. The
state holds the file, the offset, and a digest of the last line that was read. If this line is no longer before the
offset, it is looked for in the rest of the file. A file that was renamed in its directory is read to its end first.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgspec

from savings_exporter.sources.source import Progress, SourceError
from savings_exporter.storage.filesystem import LOCAL

if sys.platform != "win32":
    import fcntl

# The decoded lines of a larger block do not fit into the processor's cache.
_BLOCK_BYTES = 512 * 1024
_LONGEST_LINE_BYTES = 4 * 1024 * 1024
_DIGEST_BYTES = 12


class Place(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where reading continues.

    Attributes:
        inode: the file; 0 before the first read.
        offset: the end of what was read, in bytes.
        lines: how many lines of this file were read.
        last_bytes, last: the length and the digest of the last line that was read, with its line break.
    """

    inode: int = 0
    offset: int = 0
    lines: int = 0
    last_bytes: int = 0
    last: str = ""


class Block(NamedTuple):
    """Whole lines of a file, at most some megabytes.

    Attributes:
        data: the lines, each with its line break. A line that is longer than four megabytes comes in parts.
        first_line: the number of the first of them in the file, from 1.
        place: where reading continues after them.
        progress: how many bytes of the file have been read.
        is_restart: whether the file was begun from its start, although lines of it were read before.
    """

    data: bytes
    first_line: int
    place: Place
    progress: Progress
    is_restart: bool

    def numbered(self) -> Iterator[tuple[int, bytes]]:
        """Each line with its number."""
        return enumerate(self.data.removesuffix(b"\n").split(b"\n"), self.first_line)


def place_of(state: Mapping[str, Any] | None, member: str = "place") -> Place:
    """The place that a state holds under a name."""
    return msgspec.convert((state or {}).get(member, {}), Place)


def blocks(path: str, place: Place, *, is_complete: bool = False, locked: bool = False) -> Iterator[Block]:
    """The whole lines that follow a place, in blocks.

    Args:
        path: the file.
        place: where the last block ended.
        is_complete: whether the last line counts although it has no line break: the file is not being written.
        locked: whether the other program locks the file (flock) while it changes it. Each block is then read under a
            shared lock. While the file is locked, nothing is read.

    Raises:
        SourceError: the file cannot be read.
    """
    while True:
        try:
            block = _next_block(path, place, is_complete=is_complete, locked=locked)
        except OSError as error:
            raise SourceError(f"{path}: cannot be read: {error.strerror or error}", path=path) from None
        if block is None:
            return
        yield block
        place = block.place


def _next_block(path: str, place: Place, *, is_complete: bool, locked: bool) -> Block | None:
    renamed = _renamed(path, place)
    if renamed is not None:
        with LOCAL.opened(renamed) as descriptor:
            found = _Reading(descriptor).block(place, is_complete=True)
        if found is not None and found.place.inode == place.inode and not found.is_restart:
            return found
    with LOCAL.opened(path) as descriptor, _shared_lock(descriptor, wanted=locked) as is_free:
        return _Reading(descriptor).block(place, is_complete=is_complete) if is_free else None


class _Reading:
    """One look at an open file."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        identity = os.fstat(descriptor)
        self._inode, self._size = identity.st_ino, identity.st_size

    def block(self, place: Place, *, is_complete: bool) -> Block | None:
        """The lines after a place; None when there is no whole one."""
        start = self._continued(place)
        is_restart = bool(place.last) and not start.last
        data, is_last = self._read(start.offset, _BLOCK_BYTES)
        if not is_last and b"\n" not in data:
            data, is_last = self._read(start.offset, _LONGEST_LINE_BYTES)
        end = data.rfind(b"\n") + 1
        if not data or (is_last and not end and not is_complete):
            return None
        if is_last and is_complete:
            end = len(data)
        data = data[: end or len(data)]
        last = data[data.rfind(b"\n", 0, -1) + 1 :]
        following = Place(
            inode=self._inode,
            offset=start.offset + len(data),
            lines=start.lines + data.count(b"\n"),
            last_bytes=len(last),
            last=_digest(last),
        )
        return Block(data, start.lines + 1, following, Progress(following.offset, self._size), is_restart)

    def _read(self, offset: int, size: int) -> tuple[bytes, bool]:
        """Some bytes, and whether the file ends with them."""
        data = LOCAL.read_at(self._descriptor, size, offset)
        return data, len(data) < size

    def _continued(self, place: Place) -> Place:
        """The place itself, or the same place in the changed file, or the beginning."""
        if not place.last:
            return Place(inode=self._inode)
        if place.offset <= self._size and self._ends_with(place, place.offset):
            return msgspec.structs.replace(place, inode=self._inode)
        return self._found(place) or Place(inode=self._inode)

    def _ends_with(self, place: Place, offset: int) -> bool:
        return _digest(LOCAL.read_at(self._descriptor, place.last_bytes, offset - place.last_bytes)) == place.last

    def _found(self, place: Place) -> Place | None:
        """The place after the last line that was read, after the other program has moved it; None without it."""
        offset = lines = 0
        while data := LOCAL.read_at(self._descriptor, _BLOCK_BYTES, offset):
            end = data.rfind(b"\n") + 1 or len(data)
            for line in data[:end].splitlines(keepends=True):
                offset += len(line)
                lines += line.endswith(b"\n")
                if len(line) == place.last_bytes and _digest(line) == place.last:
                    return msgspec.structs.replace(place, inode=self._inode, offset=offset, lines=lines)
        return None


def _renamed(path: str, place: Place) -> str | None:
    """The file that was at the path before, if it was renamed to a longer name in the same directory."""
    if not place.inode:
        return None
    directory, name = os.path.split(path)
    try:
        if os.stat(path).st_ino == place.inode:
            return None
        with os.scandir(directory or ".") as entries:
            for entry in entries:
                if entry.inode() == place.inode and entry.name.startswith(name) and entry.is_file():
                    return entry.path
    except FileNotFoundError:
        return None
    return None


@contextmanager
def _shared_lock(descriptor: int, *, wanted: bool) -> Iterator[bool]:
    """Whether the file may be read now. The lock ends with the descriptor."""
    if wanted and sys.platform != "win32":
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
    yield True


def _digest(line: bytes) -> str:
    return hashlib.blake2b(line, digest_size=_DIGEST_BYTES).hexdigest()
