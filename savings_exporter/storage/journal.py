"""Frames and segments: what was committed since the document was saved.

A segment is a file of zeros, made and synced once, so that a commit is one ``pwrite`` and one ``fdatasync`` and no
metadata. A frame is one commit: a header, and its records as JSON lines. A frame is written only when all before it is
durable, so a good frame proves every one before it. ::

    frame   = magic "SXJ1", CRC-32 of the rest of the frame, store, epoch, first sequence, records, length, payload
    payload = one JSON object a record, each with a newline at its end

A frame that fits into a block of 4 KiB lies in one, so that its commit writes one block; what is left of the block
before it stays zero.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from savings_exporter.errors import CorruptStoreError
from savings_exporter.records import SavingsRecord
from savings_exporter.storage import filesystem

SEGMENT_BYTES = 4 * 1024 * 1024
BLOCK_BYTES = 4096

_MAGIC = b"SXJ1"
_HEADER = struct.Struct("<4sI8sQQII")
_CHECKED_FROM = 8
_STORE = slice(8, 16)
_SUFFIX = ".journal."
_SEGMENT_NAME = re.compile(r".*\.journal\.(\d{8,18})", re.DOTALL)

LARGEST_PAYLOAD_BYTES = SEGMENT_BYTES - _HEADER.size

_encoder = msgspec.json.Encoder()


class Line(SavingsRecord, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """A record as the journal holds it. What a later version adds to one is no reason not to read the rest."""

    idempotency_key: str | None = None

    def __post_init__(self) -> None:
        """Nothing is validated or cleaned again: the checksum says that this is what was written."""


_lines = msgspec.json.Decoder(Line)


class Frame(NamedTuple):
    """A good frame in a segment's bytes, from ``start`` to ``end``."""

    start: int
    end: int
    first: int
    records: int
    payload: memoryview

    @property
    def last(self) -> int:
        """The sequence of its last record."""
        return self.first + self.records - 1


class Damage(NamedTuple):
    """Bytes of a segment that are no frame, and not zero either."""

    start: int
    end: int


def payload_of(records: Sequence[SavingsRecord]) -> bytes:
    """Records as the lines of a frame."""
    return _encoder.encode_lines(records)


def keyed_payload_of(records: Sequence[SavingsRecord], key: str) -> bytes:
    """Records that share an idempotency key, which stands in the last line."""
    lines = payload_of(records)
    return lines[: -len(b"}\n")] + b',"idempotency_key":' + _encoder.encode(key) + b"}\n"


def decoded(payload: bytes) -> list[Line]:
    """The lines of one or several frames.

    Raises:
        CorruptStoreError: they are no records, though their frame's checksum is right.
    """
    try:
        return _lines.decode_lines(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptStoreError(f"a frame's checksum matches, but it holds no records: {error}") from None


def frame_of(store: bytes, epoch: int, first: int, records: int, payload: bytes) -> bytes:
    """A frame as it is written."""
    rest = _HEADER.pack(_MAGIC, 0, store, epoch, first, records, len(payload))[_CHECKED_FROM:] + payload
    return _MAGIC + zlib.crc32(rest).to_bytes(4, "little") + rest


def store_of(data: bytes) -> bytes:
    """The store that the first frame of a segment's bytes names."""
    return bytes(data[_STORE]) if data.startswith(_MAGIC) else b""


def frame_bytes(payload: bytes) -> int:
    """How long the frame of a payload is."""
    return _HEADER.size + len(payload)


def place_for(size: int, offset: int) -> int:
    """Where a frame begins that is written when the segment is full up to ``offset``."""
    boundary = _next_block(offset)
    return boundary if size <= BLOCK_BYTES and offset + size > boundary else offset


def scan(data: bytes, store: bytes, epoch: int, start: int = 0) -> Iterator[Frame | Damage]:
    """Everything in a segment's bytes, in order; frames of other stores and epochs are damage."""
    view, end = memoryview(data), len(data.rstrip(b"\0"))
    position = start
    while position < end:
        frame = _frame_at(view, position, store, epoch)
        if frame is None and not any(view[position : _next_block(position)]):
            frame = _frame_at(view, _next_block(position), store, epoch)
        if frame is None:
            frame = _next_frame(data, view, position + 1, store, epoch)
            yield Damage(position, frame.start if frame else end)
            if frame is None:
                return
        yield frame
        position = frame.end


class Segment:
    """One open segment, written from ``offset`` on by whoever holds the store's lock.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: str, epoch: int, offset: int) -> None:
        self.epoch = epoch
        self.offset = offset
        self._path = path
        self._descriptor = filesystem.open_segment(path)

    def has_room_for(self, size: int) -> bool:
        """Whether a frame of this size still fits."""
        return place_for(size, self.offset) + size <= SEGMENT_BYTES

    def is_in_place(self) -> bool:
        """Whether it is where the next one who opens the store looks for it."""
        return filesystem.is_at(self._path, self._descriptor)

    def is_written_on(self) -> bool:
        """Whether there is something where the next frame will go, which nobody says is durable."""
        # A frame begins right there, or with the next block.
        size = -self.offset % BLOCK_BYTES + len(_MAGIC)
        return filesystem.read_at(self._descriptor, size, self.offset).strip(b"\0") != b""

    def append(self, frame: bytes) -> None:
        """Write a frame behind the last one."""
        place = place_for(len(frame), self.offset)
        filesystem.append_at(self._descriptor, frame, place)
        if len(frame) < BLOCK_BYTES:
            filesystem.begin_writing(self._descriptor, len(frame), place)
        self.offset = place + len(frame)

    def sync(self) -> None:
        """Make everything that was appended durable."""
        filesystem.sync_data(self._descriptor)

    def frames(self, store: bytes, start: int, end: int) -> Iterator[Frame | Damage]:
        """What was appended between two offsets."""
        block = start // BLOCK_BYTES * BLOCK_BYTES
        return scan(filesystem.read_at(self._descriptor, end - block, block), store, self.epoch, start - block)

    def close(self) -> None:
        """Close the file."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            filesystem.close(descriptor)


def segment_path(path: str, epoch: int) -> str:
    """The segment of an epoch, of the store at a path."""
    return f"{path}{_SUFFIX}{epoch:08}"


def segments(path: str) -> dict[int, str]:
    """The segments of a store by their epochs, in order."""
    found = {}
    for name in filesystem.with_suffix(path, _SUFFIX):
        if match := _SEGMENT_NAME.fullmatch(name):
            found[int(match[1])] = name
    return dict(sorted(found.items()))


def _frame_at(view: memoryview, start: int, store: bytes, epoch: int) -> Frame | None:
    body = start + _HEADER.size
    if body > len(view):
        return None
    magic, check, of_store, of_epoch, first, records, length = _HEADER.unpack_from(view, start)
    end = body + length
    if magic != _MAGIC or of_epoch != epoch or of_store != store or end > len(view):
        return None
    if zlib.crc32(view[start + _CHECKED_FROM : end]) != check:
        return None
    return Frame(start, end, first, records, view[body:end])


def _next_frame(data: bytes, view: memoryview, position: int, store: bytes, epoch: int) -> Frame | None:
    while (position := data.find(_MAGIC, position)) >= 0:
        if frame := _frame_at(view, position, store, epoch):
            return frame
        position += 1
    return None


def _next_block(offset: int) -> int:
    return -(-offset // BLOCK_BYTES) * BLOCK_BYTES
