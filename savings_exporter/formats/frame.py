"""Frames: what one commit writes into a segment of a writer's journal. Pure.

::

    frame   = magic "SXJ2", CRC-32 of the rest of the frame, store, writer, first, count, length of the payload, payload
    payload = a JSON array of groups; a group holds records, or sums of records, or the records of one idempotency key

The records of a frame have the sequence numbers ``first`` to ``first + count - 1`` of its writer. A frame that fits
into a block of 4 KiB lies in one, so that its commit writes one block; the rest of the block before it stays zero.
"""

from __future__ import annotations

import operator
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from savings_exporter.errors import CorruptStoreError
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
    """A record as a frame holds it. Fields that a later version adds are ignored."""

    def __post_init__(self) -> None:
        """Nothing is validated or cleaned again: the checksum says that this is what was written."""


class Group(msgspec.Struct, frozen=True, omit_defaults=True):
    """Records that are counted together.

    With a ``key`` (a digest, 32 hexadecimal digits) they are counted once, however often the key appears; ``print`` is
    the fingerprint of what the key carried, ``at`` the place of the group's last record in its frame, from 1. ``sums``
    stand for records of which only the sums were kept.
    """

    records: Sequence[SavingsRecord] = ()
    key: str = ""
    print: str = ""
    at: int = 0
    sums: Sequence[Row] = ()


class ReadGroup(msgspec.Struct, frozen=True, gc=False):
    """A group as it is read; its fields are those of ``Group``.

    It takes part in no reference cycle. A journal has many groups, and the garbage collector need not look at them.
    """

    records: tuple[Line, ...] = ()
    key: str = ""
    print: str = ""
    at: int = 0
    sums: tuple[Row, ...] = ()

    @property
    def count(self) -> int:
        """How many records it stands for."""
        records = len(self.records)
        return records + sum(row.requests for row in self.sums) if self.sums else records


class Frame(NamedTuple):
    """A good frame in a segment's bytes, from ``start`` to ``end``; it holds ``records`` records."""

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
    """Bytes of a segment that are no frame, and not zero either."""

    start: int
    end: int


_COUNT = operator.attrgetter("count")
_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(tuple[tuple[ReadGroup, ...], ...])


def encode_frame(store: bytes, writer: bytes, first: int, count: int, groups: Sequence[Group]) -> bytes:
    """A frame as it is written."""
    payload = _encoder.encode(groups)
    return frame_of(store, writer, first, count, payload)


def frame_of(store: bytes, writer: bytes, first: int, count: int, payload: bytes) -> bytes:
    """A frame with a payload that is encoded already."""
    rest = _REST.pack(store, writer, first, count, len(payload))
    return b"".join((_CHECK.pack(_MAGIC, zlib.crc32(payload, zlib.crc32(rest))), rest, payload))


def decode_groups(frames: Sequence[Frame]) -> Sequence[Sequence[ReadGroup]]:
    """What each frame holds.

    Raises:
        CorruptStoreError: one holds something else, though its checksum is right.
    """
    # All in one call, as one JSON array: a journal has many frames.
    parts = [part for frame in frames for part in (b",", frame.payload)]
    parts[:1] = [b"["]
    try:
        decoded = _decoder.decode(b"".join((*parts, b"]")))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptStoreError(f"a frame's checksum matches, but its content cannot be read: {error}") from None
    if [sum(map(_COUNT, groups)) for groups in decoded] != [frame.records for frame in frames]:
        raise CorruptStoreError("a frame's checksum matches, but it holds another number of records than it says")
    return decoded


def place_for(size: int, offset: int) -> int:
    """Where a frame begins that is written when the segment is full up to ``offset``."""
    inside = offset % BLOCK_BYTES
    # At the start of a block it fits, or fits into no block.
    return offset - inside + BLOCK_BYTES if inside and size <= BLOCK_BYTES < inside + size else offset


def next_block(offset: int) -> int:
    """The first block boundary at or after an offset."""
    return -(-offset // BLOCK_BYTES) * BLOCK_BYTES


def store_of(data: bytes) -> bytes:
    """The store that the first frame of a segment's bytes names; empty when there is no frame."""
    return bytes(data[8:16]) if data.startswith(_MAGIC) else b""


def size_at_start(data: bytes) -> int:
    """The size that the header at the start of a segment's bytes gives its frame; 0 when there is none."""
    if not data.startswith(_MAGIC) or len(data) < HEADER_BYTES:
        return 0
    return HEADER_BYTES + int(_HEADER.unpack_from(data)[-1])


def frames_in_row(
    data: bytes, start: int, store: bytes, writer: bytes, first: int, limit: int | None
) -> Sequence[Frame]:
    """The good frames from an offset on that follow each other without a gap: what ``scan`` finds, faster.

    The first one's records begin with number ``first``, and no record's number is above ``limit``.
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
    """Everything in a segment's bytes from an offset on, in order; frames of other stores and writers are damage."""
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
