"""Reads files of lines that another program appends to, from a cursor on.

The other program may also remove old lines from the beginning, rename the file and begin a new one, or truncate it. The
state holds the file, the offset, and digests of the last lines that were read. If these lines are no longer before the
offset, they are looked for in the whole file. A file that was renamed in its directory is read to its end first.

Each line is read once under these conditions. Between two reads to the end that find lines, the other program does only
one of these things, and does it once. It renames a file that has been read before. It truncates a file after all lines
were read. If it removes lines, it removes either all that were read, or leaves the last two of them. After a truncation
or a removal, the last two lines that were read are not there a second time: lines with times fulfil this.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
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
# Several lines say more than one: many lines can be equal.
_TAIL_LINES = 8
_TAIL_BYTES = 64 * 1024
_LEAST_LINES = 2


class Place(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where reading continues.

    Attributes:
        inode: the file; 0 before the first read.
        offset: the end of what was read, in bytes.
        lines: how many lines of this file were read.
        tail: the length and the digest of each of the last lines that were read, with their line breaks.
    """

    inode: int = 0
    offset: int = 0
    lines: int = 0
    tail: tuple[tuple[int, str], ...] = ()


class Block(NamedTuple):
    """Whole lines of a file, at most some megabytes.

    Attributes:
        data: the lines, each with its line break. A line that is longer than four megabytes comes in parts.
        first_line: the number of the first of them in the file, from 1.
        before: where reading continued.
        place: where reading continues after them.
        progress: how many bytes of the file have been read.
        is_restart: whether the file was begun from its start, although lines of it were read before.
        can_grow: whether the file ends with these lines, and may get more.
    """

    data: bytes
    first_line: int
    before: Place
    place: Place
    progress: Progress
    is_restart: bool
    can_grow: bool

    def until(self, size: int) -> Block:
        """The block without what follows its first bytes, with which a line ends. It is read again."""
        data, rest = self.data[:size], self.data[size:]
        offset, lines = self.place.offset - len(rest), self.place.lines - rest.count(b"\n")
        place = msgspec.structs.replace(self.place, offset=offset, lines=lines, tail=_tail(data, self.before))
        progress = self.progress._replace(done=offset)
        return self._replace(data=data, place=place, progress=progress, can_grow=False)

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
    renamed, is_written = _renamed(path, place)
    if renamed is not None:
        with LOCAL.opened(renamed) as descriptor:
            reading = _Reading(descriptor)
            if reading.is_read_up_to(place):
                # The other program completes the old file before it writes to the new one.
                found = reading.block(place, is_complete=is_written or is_complete)
                if found is not None or not is_written:
                    return found
                place = Place()
    with LOCAL.opened(path) as descriptor, _shared_lock(descriptor, wanted=locked) as is_free:
        return _Reading(descriptor).block(place, is_complete=is_complete) if is_free else None


class _Reading:
    """One look at an open file."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        identity = os.fstat(descriptor)
        self._inode, self._size = identity.st_ino, identity.st_size

    def is_read_up_to(self, place: Place) -> bool:
        """Whether this is the file of a place, and it still has the lines that were read."""
        return self._inode == place.inode and place.offset <= self._size and self._ends_with(place)

    def block(self, place: Place, *, is_complete: bool) -> Block | None:
        """The lines after a place; None when there is no whole one."""
        start = self._continued(place)
        is_restart = bool(place.tail) and not start.tail
        data, is_last = self._read(start.offset)
        end = data.rfind(b"\n") + 1
        if not data or (is_last and not end and not is_complete):
            return None
        if is_last and is_complete:
            end = len(data)
        data = data[: end or len(data)]
        following = Place(
            inode=self._inode,
            offset=start.offset + len(data),
            lines=start.lines + data.count(b"\n"),
            tail=_tail(data, start),
        )
        return Block(
            data=data,
            first_line=start.lines + 1,
            before=start,
            place=following,
            progress=Progress(following.offset, self._size),
            is_restart=is_restart,
            can_grow=is_last and not is_complete,
        )

    def _read(self, offset: int) -> tuple[bytes, bool]:
        """Some bytes, with the end of a line if it is not too long, and whether the file ends with them."""
        data = b""
        for size in (_BLOCK_BYTES, _LONGEST_LINE_BYTES):
            data = LOCAL.read_at(self._descriptor, size, offset)
            if len(data) < size:
                return data, True
            if b"\n" in data:
                break
        return data, False

    def _continued(self, place: Place) -> Place:
        """The place itself, or the same place in the changed file, or the beginning."""
        if not place.tail:
            return Place(inode=self._inode)
        if place.offset <= self._size and self._ends_with(place):
            return msgspec.structs.replace(place, inode=self._inode)
        return self._found(place) or Place(inode=self._inode)

    def _ends_with(self, place: Place) -> bool:
        size = sum(length for length, _ in place.tail)
        if size > place.offset:
            return False
        data, position = LOCAL.read_at(self._descriptor, size, place.offset - size), 0
        for length, digest in place.tail:
            if _digest(data[position : position + length]) != digest:
                return False
            position += length
        return True

    def _found(self, place: Place) -> Place | None:
        """The place after the last lines that were read, after the other program has moved them; None without them."""
        offset = lines = seen = 0
        latest: deque[bytes] = deque(maxlen=len(place.tail))
        while data := self._read(offset)[0]:
            for line in _lines(data[: data.rfind(b"\n") + 1 or len(data)]):
                offset += len(line)
                lines += line.endswith(b"\n")
                seen += 1
                latest.append(line)
                # The first line can be a header, which stays when the lines below it are removed.
                below = tuple(latest)[1:] if seen == len(latest) else ()
                for found in (tuple(latest), below):
                    if _is_tail(found, place):
                        return Place(inode=self._inode, offset=offset, lines=lines, tail=place.tail[-len(found) :])
        return None


def _is_tail(latest: Sequence[bytes], place: Place) -> bool:
    """Whether these are the last lines that were read. Older ones may have been removed."""
    if len(latest) < min(len(place.tail), _LEAST_LINES):
        return False
    pairs = zip(reversed(latest), reversed(place.tail), strict=False)
    return all(len(line) == length and _digest(line) == digest for line, (length, digest) in pairs)


def _tail(data: bytes, before: Place) -> tuple[tuple[int, str], ...]:
    """The last lines of what was read, of which some follow a place."""
    tail: list[tuple[int, str]] = []
    end = len(data)
    while end and len(tail) < _TAIL_LINES:
        start = data.rfind(b"\n", 0, end - 1) + 1
        tail.insert(0, (end - start, _digest(data[start:end])))
        end = start
    tail = [*before.tail, *tail][-_TAIL_LINES:]
    while len(tail) > 1 and sum(length for length, _ in tail) > _TAIL_BYTES:
        tail.pop(0)
    return tuple(tail)


def _lines(data: bytes) -> Iterator[bytes]:
    """The lines with their line breaks. ``splitlines`` would also split them at a carriage return."""
    start = 0
    while end := data.find(b"\n", start) + 1:
        yield data[start:end]
        start = end
    if start < len(data):
        yield data[start:]


def _renamed(path: str, place: Place) -> tuple[str | None, bool]:
    """The file that was at the path before, if it was renamed to a longer name in the same directory, and whether the
    new file at the path has content.
    """
    if not place.inode:
        return None, False
    directory, name = os.path.split(path)
    try:
        status = os.stat(path)
        if status.st_ino == place.inode:
            return None, False
        with os.scandir(directory or ".") as entries:
            for entry in entries:
                if entry.inode() == place.inode and entry.name.startswith(name) and entry.is_file():
                    return entry.path, status.st_size > 0
    except FileNotFoundError:
        return None, False
    return None, False


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
