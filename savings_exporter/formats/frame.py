"""Frames: the data that one commit writes to a segment of a writer's journal. All functions here are pure.

::

    frame   = magic "SXJ2", CRC-32 of the rest of the frame, store, writer, first, count, length of the payload, payload
    payload = a JSON array of groups; a group holds records, or sums of records, or the records of one idempotency key,
              or what was imported from a source

The records of a frame have the writer's sequence numbers ``first`` to ``first + count - 1``. A frame that fits into a
block of 4 KiB never crosses a block boundary, so that its commit writes only one block. If the frame does not fit into
the rest of the current block, that rest stays zero, and the frame begins in the next block.
"""

from __future__ import annotations

import operator
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from savings_exporter.errors import CorruptStoreError
from savings_exporter.model.cursors import Cursor
from savings_exporter.model.pricing import PriceBasis
from savings_exporter.model.record import SavingsRecord
from savings_exporter.model.totals import Row

BLOCK_BYTES = 4096

FRAME_END = b"]"
"""The last byte of every frame."""

_MAGIC = b"SXJ2"
_REST = struct.Struct("<8s8sQII")
_CHECK = struct.Struct("<4sI")
HEADER_BYTES = _CHECK.size + _REST.size
_HEADER = struct.Struct("<4sI8s8sQII")


class Line(SavingsRecord, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """A record in a frame. Fields that a later version adds are ignored."""

    def __post_init__(self) -> None:
        """Skips validation and cleaning: the checksum proves that the record was read as it was written."""


class Group(msgspec.Struct, frozen=True, omit_defaults=True):
    """Records that are counted together.

    With a ``key`` (a digest, 32 hexadecimal digits), the records are counted once, no matter how often the key appears.
    ``print`` is the fingerprint of the key's records. ``at`` is the position of the group's last record in its frame,
    starting at 1. ``sums`` represent records of which only the sums were kept. ``cursor`` is how far a source has been
    imported with this group. ``projects`` are sums that count only in the totals by project: another program's document
    does not contain which model the savings of a project belong to. The first group of a frame has the ``prices`` that
    were used for the frame, if there were any.
    """

    records: Sequence[SavingsRecord] = ()
    key: str = ""
    print: str = ""
    at: int = 0
    sums: Sequence[Row] = ()
    cursor: Cursor | None = None
    projects: Sequence[Row] = ()
    prices: PriceBasis | None = None

    @property
    def count(self) -> int:
        """How many sequence numbers the group takes."""
        return _count(self)


class ReadGroup(msgspec.Struct, frozen=True, gc=False):
    """A group that was read from a frame. Its fields are those of ``Group``.

    Its objects cannot be in a reference cycle. The garbage collector therefore does not track them, which saves time
    because a journal has many groups.
    """

    records: tuple[Line, ...] = ()
    key: str = ""
    print: str = ""
    at: int = 0
    sums: tuple[Row, ...] = ()
    cursor: Cursor | None = None
    projects: tuple[Row, ...] = ()
    prices: PriceBasis | None = None

    @property
    def count(self) -> int:
        """How many sequence numbers the group takes."""
        return _count(self)

    @property
    def is_special(self) -> bool:
        """Whether the group holds more than records."""
        return bool(self.key or self.sums or self.cursor)


def _count(group: Group | ReadGroup) -> int:
    """One for each record that the group represents. A group that only moves a cursor takes a number, too, so that
    it can be told whether its frame was counted.
    """
    records = len(group.records)
    if group.sums:
        records += sum(row.requests for row in group.sums)
    return records or (1 if group.cursor is not None else 0)


class Frame(NamedTuple):
    """A valid frame in a segment's bytes, from ``start`` to ``end``, with ``records`` records."""

    start: int
    end: int
    first: int
    records: int
    payload: memoryview

    @property
    def last(self) -> int:
        """The sequence number of its last record."""
        return self.first + self.records - 1


class Damage(NamedTuple):
    """Bytes of a segment that are neither a frame nor zeros."""

    start: int
    end: int


_COUNT = operator.attrgetter("count")
_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(tuple[tuple[ReadGroup, ...], ...])


def encode_frame(store: bytes, writer: bytes, first: int, count: int, groups: Sequence[Group]) -> bytes:
    """Encode a frame."""
    payload = _encoder.encode(groups)
    return frame_of(store, writer, first, count, payload)


def frame_of(store: bytes, writer: bytes, first: int, count: int, payload: bytes) -> bytes:
    """Build a frame from an encoded payload."""
    rest = _REST.pack(store, writer, first, count, len(payload))
    return b"".join((_CHECK.pack(_MAGIC, zlib.crc32(payload, zlib.crc32(rest))), rest, payload))


def decode_groups(frames: Sequence[Frame]) -> Sequence[Sequence[ReadGroup]]:
    """Decode the groups of each frame.

    Raises:
        CorruptStoreError: a frame's content is invalid although its checksum matches.
    """
    # All frames are decoded in one call, as one JSON array, because a journal has many frames.
    parts = [part for frame in frames for part in (b",", frame.payload)]
    parts[:1] = [b"["]
    try:
        decoded = _decoder.decode(b"".join((*parts, b"]")))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptStoreError(f"a frame's checksum matches, but its content cannot be read: {error}") from None
    if [sum(map(_COUNT, groups)) for groups in decoded] != [frame.records for frame in frames]:
        raise CorruptStoreError("a frame's checksum matches, but its number of records differs from its header")
    return decoded


def place_for(size: int, offset: int) -> int:
    """The offset for a frame of ``size`` bytes in a segment that is filled up to ``offset``."""
    inside = offset % BLOCK_BYTES
    # A frame moves to the next block only if it fits into one block but not into the rest of the current block.
    return offset - inside + BLOCK_BYTES if inside and size <= BLOCK_BYTES < inside + size else offset


def next_block(offset: int) -> int:
    """The first block boundary at or after an offset."""
    return -(-offset // BLOCK_BYTES) * BLOCK_BYTES


def store_of(data: bytes) -> bytes:
    """The store named in the first frame of a segment's bytes; empty when there is no frame."""
    return bytes(data[8:16]) if data.startswith(_MAGIC) else b""


def size_at_start(data: bytes) -> int:
    """The size of the frame at the start of a segment's bytes, from its header; 0 when there is no header."""
    if not data.startswith(_MAGIC) or len(data) < HEADER_BYTES:
        return 0
    return HEADER_BYTES + int(_HEADER.unpack_from(data)[-1])


def frames_in_row(
    data: bytes, start: int, store: bytes, writer: bytes, first: int, limit: int | None
) -> Sequence[Frame]:
    """The valid frames from an offset on that follow each other without a gap. This is a faster version of ``scan``.

    The first record of the first frame has the number ``first``. No record has a number above ``limit``.
    """
    view, size, frames = memoryview(data), len(data), []
    position = start
    while (body := position + HEADER_BYTES) <= size:
        magic, check, of_store, of_writer, found, count, length = _HEADER.unpack_from(view, position)
        end = body + length
        if magic != _MAGIC:
            block = next_block(position)
            if block == position or any(view[position:block]):
                break
            position = block
            continue
        if found != first or of_writer != writer or of_store != store or end > size or not count:
            break
        first += count
        if (limit is not None and first > limit + 1) or zlib.crc32(view[position + _CHECK.size : end]) != check:
            break
        frames.append(Frame(position, end, found, count, view[body:end]))
        position = end
    return frames


def scan(data: bytes, store: bytes, writer: bytes, start: int = 0) -> Iterator[Frame | Damage]:
    """All frames and damaged bytes of a segment from an offset on, in order. Frames of other stores and writers are
    damage.
    """
    view, end = memoryview(data), start + len(data[start:].rstrip(b"\0"))
    position = start
    while position < end:
        frame = _frame_at(view, position, store, writer)
        if frame is None and not any(view[position : next_block(position)]):
            frame = _frame_at(view, next_block(position), store, writer)
        if frame is None:
            frame = _next_frame(data, view, position + 1, store, writer)
            yield Damage(position, frame.start if frame else end)
            if frame is None:
                return
        yield frame
        position = frame.end


def _frame_at(view: memoryview, start: int, store: bytes, writer: bytes) -> Frame | None:
    body = start + _HEADER.size
    if body > len(view):
        return None
    magic, check, of_store, of_writer, first, count, length = _HEADER.unpack_from(view, start)
    end = body + length
    if magic != _MAGIC or of_writer != writer or of_store != store or end > len(view) or not count:
        return None
    if zlib.crc32(view[start + _CHECK.size : end]) != check:
        return None
    return Frame(start, end, first, count, view[body:end])


def _next_frame(data: bytes, view: memoryview, position: int, store: bytes, writer: bytes) -> Frame | None:
    while (position := data.find(_MAGIC, position)) >= 0:
        if frame := _frame_at(view, position, store, writer):
            return frame
        position += 1
    return None
