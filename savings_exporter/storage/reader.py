"""Reading a store without a lock: the document, then the watermarks, then the new frames, then the document again.

A save may replace the document and remove segments in between; then reading begins again. One save alone cannot hide
anything: a segment goes only when the previous document does not need it either.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import NamedTuple

import msgspec

from savings_exporter.errors import CorruptStoreError, StoreError
from savings_exporter.formats.document import Document, decode
from savings_exporter.formats.frame import (
    BLOCK_BYTES,
    FRAME_END,
    HEADER_BYTES,
    Damage,
    Frame,
    Line,
    decode_groups,
    frames_in_row,
    next_block,
    scan,
    size_at_start,
    store_of,
)
from savings_exporter.model.operations import OperationCounts
from savings_exporter.model.snapshot import Snapshot
from savings_exporter.model.totals import Limits, Sums
from savings_exporter.storage.filesystem import NO_SUCH_FILE, FileSystem, Identity, place
from savings_exporter.storage.journal import segment_path
from savings_exporter.storage.view import Position, Reading, Special, View, counted, view_of
from savings_exporter.storage.writers import Writer, is_alive, read_counts, read_facts, writer_of, writer_path

logger = logging.getLogger(__name__)

_ATTEMPTS = 5
_FIRST_CHUNK_BYTES = 64 * 1024
# Adding up more records in one go is no faster, and other threads would wait for the interpreter meanwhile.
_ADDED_AT_ONCE = 1_000
_SEGMENT_NAME = re.compile(r"\.journal\.([0-9a-f]{16})\.(\d{8})")


class Listing(NamedTuple):
    """The files of a store at one moment: each writer's segments in order, and the writers that have a file."""

    segments: Mapping[bytes, Sequence[int]]
    writers: frozenset[bytes]


class Reader:
    """Reads one store. ``own`` is this process's writer, once it has one: its watermark is known without reading it."""

    def __init__(self, fs: FileSystem, path: str, limits: Limits) -> None:
        self.fs = fs
        self.path = path
        self.limits = limits
        self.own: Writer | None = None
        self._refused: Identity | None = None
        # What the document at the path said when it was last read, without the journals.
        self._found: View | None = None

    def refresh(self, view: View) -> View:
        """The view with all that is durable by now, what other processes wrote included.

        While the document at the path cannot be used, or is another program's, the last one is used.

        Raises:
            OSError: it cannot be read.
            StoreError: it is damaged.
        """
        for _ in range(_ATTEMPTS):
            current = view
            try:
                current = self.with_document(view)
                followed = self.follow(current)
                if self._is_older(current, view) and followed.ledger.records < view.ledger.records:
                    raise CorruptStoreError(f"{self.path}: was replaced by an older document")
                if self.is_current(current):
                    return followed
            except FileNotFoundError:
                # A segment was removed between the listing and its reading.
                continue
            except CorruptStoreError:
                # It may have been removed before the listing, by saves that came after the document was read.
                if self.is_current(current):
                    raise
        raise StoreError(f"{self.path}: is being saved too often to be read; try again")

    def follow(self, view: View) -> View:
        """The view with the new frames of each journal up to its watermark, under the document that it has.

        Raises:
            FileNotFoundError: a segment was removed meanwhile.
            OSError: something cannot be read.
            CorruptStoreError: acknowledged records are missing.
        """
        readings = list(self.read_journals(view))
        for reading in readings:
            if reading.lost or reading.doubt:
                raise CorruptStoreError(f"{self.path}: {described_losses(reading)}")
        if not any(reading.adds for reading in readings):
            return view
        return counted(view, readings, self.limits, datetime.now(timezone.utc))

    def listing(self) -> Listing:
        """The store's files now.

        Raises:
            OSError: the directory cannot be read.
        """
        name = os.path.basename(self.path)
        segments: dict[bytes, list[int]] = defaultdict(list)
        writers: set[bytes] = set()
        for entry in self.fs.names_beside(self.path):
            if found := _SEGMENT_NAME.fullmatch(entry, len(name)):
                segments[bytes.fromhex(found[1])].append(int(found[2]))
            elif writer := writer_of(name, entry):
                writers.add(writer)
        return Listing({writer: sorted(numbers) for writer, numbers in segments.items()}, frozenset(writers))

    def read_journals(self, view: View) -> Iterator[Reading]:
        """What each journal holds after what is counted, up to its watermark.

        Raises:
            OSError: a file cannot be read.
            CorruptStoreError: a frame's content cannot be read.
        """
        limits = self._limits_of_writers(view.store)
        # Listed after the watermarks were read: the frames up to them are in segments that are there by now.
        segments = self.listing().segments
        for writer, limit in limits.items():
            if limit is None or limit > view.position_of(writer).sequence:
                yield self.read_journal(view, writer, limit, segments.get(writer, ()))

    def read_journal(self, view: View, writer: bytes, limit: int | None, numbers: Sequence[int]) -> Reading:
        """What a writer's journal holds after what is counted, up to a sequence number (None: to its last good frame).

        Raises:
            OSError: a segment cannot be read.
            CorruptStoreError: a frame's content cannot be read.
        """
        start = view.position_of(writer)
        is_known = limit is not None or self._ends_a_frame(writer, numbers, start)
        replay = _Replay(writer, start if is_known else Position(start.sequence), limit)
        for number in numbers:
            if number >= replay.position.segment and not replay.is_complete:
                path = segment_path(self.path, writer, number)
                with self.fs.opened(path) as descriptor:
                    self._replay(replay, descriptor, path, number, view.store)
        # A watermark of an earlier boot may be old, but what it names was durable.
        least = limit if limit is not None else self._watermark_of(view.store, writer)
        if replay.position.sequence < least:
            replay.lost.append((replay.position.sequence + 1, least))
        if not is_known and replay.last_seen < start.sequence:
            replay.doubt = f"{self.path}.journal.{writer.hex()}.*: ends before what the document holds of it"
        return replay.reading()

    def _limits_of_writers(self, store: bytes) -> Mapping[bytes, int | None]:
        boot, listing = self.fs.boot_id(), self.listing()
        # A writer's file says what its journal held also when all segments are missing.
        without = {writer for writer in listing.writers - listing.segments.keys() if self._is_of(store, writer)}
        return {writer: self.limit_of(store, writer, boot) for writer in listing.segments.keys() | without}

    def _is_of(self, store: bytes, writer: bytes) -> bool:
        """Whether a writer's file says that it writes to this store."""
        facts = read_facts(self.fs, writer_path(self.path, writer))
        return facts is not None and facts.store == store

    def _watermark_of(self, store: bytes, writer: bytes) -> int:
        """A writer's watermark, of whatever boot; 0 when there is none."""
        facts = read_facts(self.fs, writer_path(self.path, writer))
        return facts.watermark if facts is not None and facts.store == store else 0

    def _ends_a_frame(self, writer: bytes, numbers: Sequence[int], position: Position) -> bool:
        """Whether the place where reading goes on follows a frame. After a power loss the first copy of a frame, whose
        sync had failed, may be gone from there, while another copy is in a later segment.
        """
        if position.segment not in numbers or not position.offset:
            return True
        with self.fs.opened(segment_path(self.path, writer, position.segment)) as descriptor:
            return self.fs.read_at(descriptor, 1, position.offset - 1) == FRAME_END

    def is_own(self, writer: bytes) -> bool:
        """Whether it is this process's writer."""
        return self.own is not None and writer == self.own.id

    def is_alive(self, writer: bytes, listing: Listing | None = None) -> bool:
        """Whether a writer's process lives: whether it holds the lock of its file or of one of its segments.

        Raises:
            OSError: a file cannot be opened.
        """
        if self.is_own(writer) or is_alive(self.fs, writer_path(self.path, writer)):
            return True
        numbers = (listing or self.listing()).segments.get(writer, ())
        return any(is_alive(self.fs, segment_path(self.path, writer, number)) for number in numbers)

    def is_of_another_store(self, view: View, writer: bytes, listing: Listing) -> bool:
        """Whether a writer's journal belongs to another store, whose files were left beside this one's.

        Raises:
            OSError: it cannot be read.
        """
        for number in listing.segments.get(writer, ()):
            with self.fs.opened(segment_path(self.path, writer, number)) as descriptor:
                if store := self._store_of(descriptor, writer):
                    return store != view.store
        return False

    def _store_of(self, descriptor: int, writer: bytes) -> bytes:
        """The store whose segment this is, by its first frame; empty when that is not whole."""
        header = self.fs.read_at(descriptor, HEADER_BYTES, 0)
        frame = self.fs.read_at(descriptor, size_at_start(header), 0)
        store = store_of(header)
        # Without its checksum, damage to the name would hide the frames that follow.
        return store if any(isinstance(item, Frame) for item in scan(frame, store, writer)) else b""

    def stores_of_segments(self) -> Iterator[bytes]:
        """The store that each segment belongs to, where that can be read.

        Raises:
            OSError: one cannot be read.
        """
        for writer, numbers in self.listing().segments.items():
            for number in numbers:
                with self.fs.opened(segment_path(self.path, writer, number)) as descriptor:
                    if store := self._store_of(descriptor, writer):
                        yield store

    def living(self) -> int:
        """How many writers are alive; 0 when that cannot be read."""
        try:
            listing = self.listing()
            return sum(self.is_alive(writer, listing) for writer in listing.writers)
        except OSError:
            return 0

    def journal_bytes(self, view: View) -> int:
        """How many bytes of the journals' segments hold frames; 0 when that cannot be read."""
        try:
            segments = self.listing().segments
            return sum(self._bytes_before(writer, segments[writer], view.position_of(writer)) for writer in segments)
        except OSError:
            return 0

    def _bytes_before(self, writer: bytes, numbers: Sequence[int], position: Position) -> int:
        full = (segment_path(self.path, writer, number) for number in numbers if number < position.segment)
        sizes = sum(identity.size for path in full if (identity := self.fs.identity(path)) is not None)
        return sizes + (position.offset if position.segment in numbers else 0)

    def snapshot(
        self,
        view: View,
        operations: OperationCounts,
        read_at: datetime,
        *,
        pending_records: int = 0,
        pending_tokens: int = 0,
    ) -> Snapshot:
        """What a view says, for the users of the package. The one builder of snapshots."""
        return Snapshot(
            ledger=view.ledger,
            store_id=view.document.store or place(self.path),
            saved_at=view.document.saved_at,
            read_at=read_at,
            document_bytes=view.identity.size if view.identity else 0,
            journal_bytes=self.journal_bytes(view),
            pending_records=pending_records,
            pending_tokens=pending_tokens,
            operations=operations,
            writers=self.living(),
        )

    def has_refused_document(self) -> bool:
        """Whether the document at the path is one that another program wrote."""
        return self._refused is not None

    def refusal(self) -> str:
        """Why the document at the path is not used."""
        return (
            "another program replaced the document. What is recorded stays durable in the journal. To choose between "
            f"the two: stop this process, then savings-exporter verify --store {self.path}"
        )

    def limit_of(self, store: bytes, writer: bytes, boot: bytes) -> int | None:
        """Up to which sequence number a journal counts; None when all that can be read is on stable storage.

        A watermark is valid in its own boot of the machine only. After another boot, what can be read was written. Of a
        living writer without a watermark (its file was removed by hand, or is being written) nothing new counts yet.

        Raises:
            OSError: the writer's file cannot be read.
        """
        if self.own is not None and self.is_own(writer):
            return self.own.watermark
        facts = read_facts(self.fs, writer_path(self.path, writer))
        if facts is None or facts.store != store:
            return 0 if facts is None and self.is_alive(writer) else None
        if any(boot):
            return facts.watermark if facts.boot == boot else None
        return facts.watermark if self.is_alive(writer) else None

    def operations(self, view: View) -> OperationCounts:
        """The operation counters of all writers, living and dead, but for this process's own.

        Raises:
            OSError: a writer's file cannot be read.
        """
        total = view.document.operations
        for writer in itertools.filterfalse(self.is_own, self.listing().writers):
            state = view.document.writers.get(writer.hex())
            if state is None or not state.ended:
                total = total.plus(read_counts(self.fs, writer_path(self.path, writer)))
        return total

    def is_current(self, view: View) -> bool:
        """Whether the document at the path is the one of a view, or one that is not used.

        Raises:
            OSError: that cannot be read.
        """
        return self._identity() in (view.identity, self._refused)

    @staticmethod
    def _is_older(view: View, other: View) -> bool:
        """Whether a view's document is an older one of the same store."""
        return view.document.is_ours and view.document.ledger.records < other.document.ledger.records

    def with_document(self, view: View) -> View:
        """The view itself, or that of the document at the path, without the journals, when another process saved it.

        Raises:
            OSError: it cannot be read.
            StoreError: it is damaged.
        """
        identity = self._identity()
        if identity is None:
            # It was removed, or never saved. The next save writes it anew.
            self._refused = None
            newest = self._newest(view)
            is_known = newest is view and view.identity is None
            return view if is_known else msgspec.structs.replace(newest, identity=None)
        if identity == view.identity:
            self._refused = None
            return view
        if identity == self._refused:
            return view
        if self._found is not None and identity == self._found.identity:
            return self._found
        try:
            document, identity = self.read_document()
        except CorruptStoreError:
            newest = self._newest(view)
            if not newest.document.is_ours:
                raise
            # It was damaged in its place. The next save keeps it aside and writes it anew.
            return msgspec.structs.replace(newest, identity=identity, is_whole=False)
        if document.is_ours and bytes.fromhex(document.store) == view.store:
            self._refused = None
            self._found = view_of(document, identity, view.store)
            return self._found
        # What this process has recorded may be in a document of its own that the other program has read.
        if view.document.is_ours or view.positions or self.own is not None:
            self._refused = identity
            return view
        return view_of(bounded(document, self.limits), identity, view.store)

    def _newest(self, view: View) -> View:
        """The view, or what a later document of the store says: of those that were read, and the previous one.

        Other processes may have saved since this one read the document, and have removed segments that it would need.

        Raises:
            OSError: the previous document cannot be read.
        """
        views = [view]
        if self._found is not None:
            views.append(self._found)
        previous = previous_document(self.fs, self.path)
        if previous is not None and bytes.fromhex(previous.store) == view.store:
            views.append(view_of(previous, None, view.store))
        return max(views, key=lambda found: found.document.ledger.records)

    def read_document(self) -> tuple[Document, Identity]:
        """The document at the path.

        Raises:
            OSError: it cannot be read.
            StoreError: it is damaged, or newer than this program.
        """
        data, identity = self.fs.read(self.path)
        return decode(data), identity

    def _identity(self) -> Identity | None:
        return self.fs.identity(self.path)

    def _replay(self, replay: _Replay, descriptor: int, path: str, number: int, store: bytes) -> None:
        """Take in one segment's frames, a chunk at a time."""
        offset = replay.position.offset if number == replay.position.segment else 0
        if not offset and self._store_of(descriptor, replay.writer) not in (b"", store):
            replay.foreign.append(path)
            return
        size = _FIRST_CHUNK_BYTES
        while True:
            block = offset // BLOCK_BYTES * BLOCK_BYTES
            data = self.fs.read_at(descriptor, size, block)
            is_last = len(data) < size
            end = replay.take(data, block, offset, number, path, store, is_last=is_last)
            if is_last or replay.is_complete or (replay.limit is not None and end == offset and not replay.is_cut):
                return
            if end == offset:
                # A frame was cut off at the end of the chunk, or there is nothing but zeros.
                needed = next_block(offset - block + size_at_start(data[offset - block :]))
                size = min(needed, size * 4) if needed > size else size * 4
            offset = end


def previous_path(path: str) -> str:
    """The name of the previous document."""
    return path + ".previous"


def previous_document(fs: FileSystem, path: str) -> Document | None:
    """The previous document, or None when there is no whole one.

    Raises:
        OSError: it cannot be read, which does not say that there is none.
    """
    try:
        return decode(fs.read(previous_path(path))[0])
    except (*NO_SUCH_FILE, StoreError):
        return None


def bounded(document: Document, limits: Limits) -> Document:
    """Another program's document with no more names and points of history than this program keeps."""
    return msgspec.structs.replace(document, ledger=document.ledger.bounded(limits))


def described_losses(reading: Reading) -> str:
    """What a journal lacks, in words."""
    ranges = [f"{first} to {last}" if last > first else str(first) for first, last in reading.lost]
    if not ranges:
        return f"{reading.doubt}, and whether acknowledged records are lost with it cannot be determined"
    return f"acknowledged records are lost: number {', '.join(ranges)} of writer {reading.writer.hex()}"


class _Replay:
    """Reads one journal by the counting rule."""

    def __init__(self, writer: bytes, start: Position, limit: int | None) -> None:
        self.position = start
        self.limit = limit
        self.lost: list[tuple[int, int]] = []
        self.doubt = ""
        self.last_seen = 0
        self.foreign: list[str] = []
        self.is_cut = False
        self.writer = writer
        # So that memory does not grow with the journal, records are not kept but added up.
        self._sums = Sums()
        self._records: list[Line] = []
        self._specials: list[Special] = []
        self._raw: list[bytes] = []
        self._tail: tuple[str, bytes] | None = None

    @property
    def is_complete(self) -> bool:
        """Whether everything up to the limit was read."""
        return self.limit is not None and self.position.sequence >= self.limit

    def take(self, data: bytes, block: int, offset: int, number: int, path: str, store: bytes, *, is_last: bool) -> int:
        """Take in the frames of a chunk that begins at ``block``, from ``offset`` on; the offset where they end."""
        self.is_cut = False
        frames = frames_in_row(data, offset - block, store, self.writer, self.position.sequence + 1, self.limit)
        if frames:
            offset = block + frames[-1].end
            self._take_frames(frames, data, number, offset, path)
        for item in scan(data, store, self.writer, offset - block):
            if isinstance(item, Damage):
                if not is_last and item.end == len(data.rstrip(b"\0")):
                    self.is_cut = True
                    return offset
                self._tail = (path, data[item.start : item.end])
            elif self.limit is not None and item.last > self.limit:
                return offset
            else:
                offset = block + item.end
                self._take_frame(item, data, number, offset, path)
        return offset

    def reading(self) -> Reading:
        """What was read."""
        self._add_up()
        return Reading(
            self.writer,
            self._sums,
            self._specials,
            self._raw,
            self.position,
            self.lost,
            self.doubt,
            self._tail,
            self.foreign,
        )

    def _add_up(self) -> None:
        self._sums.add_all(self._records)
        self._records = []

    def _take_frame(self, frame: Frame, data: bytes, number: int, end: int, path: str) -> None:
        """Take in a frame, wherever it stands in the sequence."""
        expected = self.position.sequence + 1
        if frame.last < expected:
            self._tail, self.last_seen = None, max(self.last_seen, frame.last)
            return
        if frame.first < expected:
            raise CorruptStoreError(f"{path}: two frames hold other records under the same numbers")
        if frame.first > expected:
            self.lost.append((expected, frame.first - 1))
        self._take_frames([frame], data, number, end, path)

    def _take_frames(self, frames: Sequence[Frame], data: bytes, number: int, end: int, path: str) -> None:
        """Take in frames that follow each other; the last one ends at ``end``."""
        try:
            decoded = decode_groups(frames)
        except CorruptStoreError as error:
            raise CorruptStoreError(f"{path}: {error}", "Restore it from a backup") from None
        for frame, groups in zip(frames, decoded, strict=True):
            for group in groups:
                if group.key or group.sums:
                    self._specials.append(Special(frame.first, group))
                else:
                    self._records += group.records
        if len(self._records) >= _ADDED_AT_ONCE:
            self._add_up()
        if self.limit is None:
            self._raw += [data[frame.start : frame.end] for frame in frames]
        last = frames[-1].last
        self._tail, self.last_seen = None, max(self.last_seen, last)
        self.position = Position(last, number, end)
