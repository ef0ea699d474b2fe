"""A writer's own journal: a sequence of segments, and the only code path for a commit.

::

    frame -> segment (one synchronous write) -> watermark -> acknowledged

After any write error, the segment is never written or synced again. The next attempt writes the same frame, with the
same sequence numbers, to a new segment. The counting rule counts the frame once, whether the first copy, the second
copy or both reached the disk.
"""

from __future__ import annotations

import errno
import itertools
import logging
from collections.abc import Sequence
from typing import NamedTuple

from savings_exporter.formats.frame import Group, encode_frame, next_block
from savings_exporter.storage.atomic_file import Directory
from savings_exporter.storage.filesystem import FileSystem
from savings_exporter.storage.observers import Observer
from savings_exporter.storage.operation import ROTATE, Operation
from savings_exporter.storage.segment import BufferedSegment, SyncMethod, make_segment
from savings_exporter.storage.writers import Writer

logger = logging.getLogger(__name__)

FIRST_SEGMENT_BYTES = 64 * 1024
"""The size of a first segment. It is small, so that a process with a single record does not write much."""

SEGMENT_BYTES = 4 * 1024 * 1024

_GROWTH = 8
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})


class Frame(NamedTuple):
    """A sealed batch. Its bytes and sequence numbers are the same in every attempt to write it."""

    first: int
    last: int
    data: bytes

    @property
    def records(self) -> int:
        """How many records it holds."""
        return self.last - self.first + 1


class Journal:
    """The journal of a living writer. One thread at a time commits. Another thread may create a segment at that time.

    ``sequence`` is the number of the last durable record.
    """

    def __init__(
        self, fs: FileSystem, path: str, directory: Directory, store: bytes, writer: Writer, method: SyncMethod
    ) -> None:
        self.writer = writer
        self.sequence = 0
        self._written = 0
        self._fs = fs
        self._path = path
        self._directory = directory
        self._store = store
        self._method = method
        self._segment: BufferedSegment | None = None
        self._next: BufferedSegment | None = None
        # The newest segment that a frame was or may have been written to. No frame goes to an earlier segment.
        self._newest = ""
        self._numbers = itertools.count(1)

    def seal(self, count: int, groups: Sequence[Group]) -> Frame:
        """Assign sequence numbers to records. They follow those of the last durable frame."""
        first = self.sequence + 1
        return Frame(first, first + count - 1, encode_frame(self._store, self.writer.id, first, count, groups))

    def commit(self, frame: Frame, operation: Operation) -> None:
        """Make a frame durable.

        Raises:
            OSError: it is unknown whether the frame is durable. The same frame has to be committed again.
        """
        last = frame.last
        if last <= self.sequence:
            # An earlier attempt succeeded, but an interrupt came before the acknowledgement.
            return
        if last > self._written:
            try:
                self._write(frame, operation)
            except BaseException:
                self._poison()
                raise
            self._written = last
        # If only this step fails, the frame is already durable and is not written again.
        self.writer.raise_watermark(last)
        self.sequence = last

    def wants_segment(self) -> bool:
        """Whether to create the next segment now, before it is needed."""
        segment = self._segment
        return segment is not None and self._next is None and segment.offset * 2 > segment.size

    def make_next(self, observer: Observer) -> None:
        """Create the next segment, so that no commit has to wait for it.

        Raises:
            OSError: the segment was not created; the commit that needs a segment tries again.
        """
        segment = self._segment
        if segment is None or self._next is not None:
            return
        size = min(segment.size * _GROWTH, SEGMENT_BYTES)
        with Operation(ROTATE, observer) as rotation:
            made = make_segment(self._fs, self._path_of_next(), size, rotation, self._directory, self._method)
        if made.path < self._newest:
            # In the meantime a commit needed a segment and created a newer one.
            made.close()
            self._fs.discard(made.path)
        else:
            self._next = made

    def is_in_place(self) -> bool:
        """Whether the writer's file and the current segment still exist under their names."""
        return self.writer.is_in_place() and (self._segment is None or self._segment.is_in_place())

    def repair_names(self, operation: Operation) -> None:
        """Recreate the writer's file and the current segment if their names were removed. Other processes read them by
        name.

        Raises:
            OSError: a file was not recreated; the next save tries again.
        """
        if not self.writer.is_in_place():
            logger.error("%s: was removed; making it again", self.writer.path)
            self.writer.make_again()
        segment = self._segment
        if segment is not None and not segment.is_in_place():
            logger.error("%s: was removed; writing its content again", segment.path)
            content = segment.content()
            self._segment = self._made(content, operation)
            segment.close()

    def close(self) -> None:
        """Close the files and release the writer's lock."""
        self._poison()
        ready, self._next = self._next, None
        if ready is not None:
            ready.close()
        self.writer.close()

    def _write(self, frame: Frame, operation: Operation) -> None:
        segment, size = self._segment, len(frame.data)
        if segment is None or not segment.has_room_for(size):
            self._segment = self._taken_next(size)
            if segment is not None:
                segment.close()
            segment = self._segment
        if segment is None:
            self._segment = self._made(frame.data, operation)
        else:
            segment.write(frame.data, operation)

    def _taken_next(self, size: int) -> BufferedSegment | None:
        """The segment that was created in advance, if it is newer than the newest one and the frame fits into it."""
        ready, self._next = self._next, None
        if ready is None:
            return None
        if ready.has_room_for(size) and ready.path > self._newest:
            self._newest = ready.path
            return ready
        ready.close()
        self._fs.discard(ready.path)
        return None

    def _made(self, data: bytes, operation: Operation) -> BufferedSegment:
        """Create a segment with a first frame. On a full disk, the segment only has room for that frame."""
        least = next_block(len(data))
        try:
            return self._make(max(least, FIRST_SEGMENT_BYTES), data, operation)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            return self._make(least, data, operation)

    def _make(self, size: int, data: bytes, operation: Operation) -> BufferedSegment:
        path = self._newest = self._path_of_next()
        return make_segment(self._fs, path, size, operation, self._directory, self._method, data)

    def _path_of_next(self) -> str:
        return segment_path(self._path, self.writer.id, next(self._numbers))

    def _poison(self) -> None:
        segment, self._segment = self._segment, None
        if segment is not None:
            segment.close()


def segment_path(document: str, writer: bytes, number: int) -> str:
    """The path of a segment's file. The names sort in the order of the numbers."""
    return f"{document}.journal.{writer.hex()}.{number:08}"
