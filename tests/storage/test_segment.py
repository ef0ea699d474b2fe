"""Segments: frames of many sizes, across the borders of blocks and of segments, are read back as they were written."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from savings_exporter.formats.frame import BLOCK_BYTES, FRAME_END, HEADER_BYTES, Frame, frame_of, frames_in_row, scan
from savings_exporter.storage.atomic_file import Directory
from savings_exporter.storage.filesystem import LOCAL
from savings_exporter.storage.observers import Observers
from savings_exporter.storage.operation import COMMIT, Operation
from savings_exporter.storage.segment import BufferedSegment, DirectSegment, SyncMethod, make_segment

STORE, WRITER = b"a store.", b"a writer"
SIZES = st.one_of(
    st.integers(HEADER_BYTES + 1, 300),
    st.integers(HEADER_BYTES + 1, 3 * BLOCK_BYTES),
    st.integers(-3, 3).map(lambda around: BLOCK_BYTES + around),
    st.integers(-3, 3).map(lambda around: 2 * BLOCK_BYTES + around),
    st.sampled_from([64 * 1024, 64 * 1024 + 1, 100_000]),
)
METHODS: list[SyncMethod] = ["direct", "fdatasync"]

needs_direct_io = pytest.mark.needs("direct-io")
each_method = pytest.mark.parametrize("method", [pytest.param("direct", marks=needs_direct_io), "fdatasync"])


def frame_of_size(size: int, number: int) -> bytes:
    """A frame of so many bytes, different for each number."""
    payload = (b"%d," % number * size)[: size - HEADER_BYTES - 1] + FRAME_END
    return frame_of(STORE, WRITER, number, 1, payload)


def operation() -> Operation:
    return Operation(COMMIT, Observers())


@contextmanager
def made(method: SyncMethod, size: int, frame: bytes = b"") -> Iterator[tuple[BufferedSegment, Path]]:
    """A segment, and its file."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "segment")
        segment = make_segment(LOCAL, str(path), size, operation(), Directory(LOCAL, str(path)), method, frame)
        try:
            yield segment, path
        finally:
            segment.close()


def written(method: SyncMethod, size: int, frames: list[bytes], *, has_first: bool) -> tuple[list[bytes], bytes]:
    """The frames that fit into a segment, in this order, and what its file holds then."""
    first, rest = (frames[0], frames[1:]) if has_first else (b"", frames)
    with made(method, max(size, len(first)), first) as (segment, path):
        assert isinstance(segment, DirectSegment) == (method == "direct")
        fitting = [first] if has_first else []
        for frame in rest:
            if not segment.has_room_for(len(frame)):
                break
            segment.write(frame, operation())
            fitting.append(frame)
        return fitting, path.read_bytes()


@each_method
@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(SIZES, min_size=1, max_size=25), has_first=st.booleans(), blocks=st.integers(1, 60))
@example(sizes=[BLOCK_BYTES] * 5, has_first=True, blocks=5)
@example(sizes=[100, BLOCK_BYTES - 100, 100], has_first=False, blocks=4)
@example(sizes=[100, BLOCK_BYTES - 99, 100], has_first=False, blocks=4)
@example(sizes=[3 * BLOCK_BYTES + 10, 50, 3 * BLOCK_BYTES, 50], has_first=True, blocks=20)
def test_frames_are_read_back(method: SyncMethod, sizes: list[int], has_first: bool, blocks: int) -> None:
    frames = [frame_of_size(size, number) for number, size in enumerate(sizes, 1)]
    size = max(blocks * BLOCK_BYTES, -(-len(frames[0]) // BLOCK_BYTES) * BLOCK_BYTES)
    fitting, data = written(method, size, frames, has_first=has_first)
    assert len(data) == size
    found = list(scan(data, STORE, WRITER))
    assert all(isinstance(item, Frame) for item in found)
    assert [data[item.start : item.end] for item in found] == fitting
    for item in found:
        if item.end - item.start <= BLOCK_BYTES and item.start:
            assert item.start // BLOCK_BYTES == (item.end - 1) // BLOCK_BYTES, "a small frame lies in one block"


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(SIZES, min_size=1, max_size=12),
    damage=st.lists(st.tuples(st.integers(0, 200_000), st.integers(1, 255)), max_size=3),
    limit=st.one_of(st.none(), st.integers(0, 13)),
    cut=st.integers(0, 3 * BLOCK_BYTES),
)
def test_frames_in_row(sizes: list[int], damage: list[tuple[int, int]], limit: int | None, cut: int) -> None:
    frames = [frame_of_size(size, number) for number, size in enumerate(sizes, 1)]
    data = bytearray(written("fdatasync", 512 * 1024, frames, has_first=False)[1].rstrip(b"\0") + bytes(BLOCK_BYTES))
    for place, difference in damage:
        data[place % len(data)] ^= difference
    garbled = bytes(data[: max(len(data) - cut, 0)])
    expected: list[Frame] = []
    for item in scan(garbled, STORE, WRITER):
        if not isinstance(item, Frame) or item.first != len(expected) + 1 or (limit is not None and item.last > limit):
            break
        expected.append(item)
    assert frames_in_row(garbled, 0, STORE, WRITER, 1, limit) == expected


@needs_direct_io
@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(SIZES, min_size=1, max_size=15), has_first=st.booleans())
def test_methods_write_the_same(sizes: list[int], has_first: bool) -> None:
    frames = [frame_of_size(size, number) for number, size in enumerate(sizes, 1)]
    size = 512 * 1024
    direct, buffered = (written(method, size, frames, has_first=has_first) for method in METHODS)
    assert direct == buffered


@each_method
def test_each_write_keeps_those_before(method: SyncMethod) -> None:
    frames = [frame_of_size(size, number) for number, size in enumerate([500, 700, 900, 3000, 100, 5000, 60, 200], 1)]
    with made(method, 8 * BLOCK_BYTES, frames[0]) as (segment, path):
        for count, frame in enumerate(frames[1:], 2):
            segment.write(frame, operation())
            data = path.read_bytes()
            assert [data[item.start : item.end] for item in scan(data, STORE, WRITER)] == frames[:count]


@each_method
def test_full_segment_has_no_room(method: SyncMethod) -> None:
    with made(method, 2 * BLOCK_BYTES, frame_of_size(BLOCK_BYTES + 1, 1)) as (segment, _):
        assert segment.has_room_for(BLOCK_BYTES - 1)
        assert not segment.has_room_for(BLOCK_BYTES)
        segment.write(frame_of_size(BLOCK_BYTES - 1, 2), operation())
        assert not segment.has_room_for(1)
