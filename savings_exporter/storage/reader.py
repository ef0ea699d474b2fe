"""Reads a store without a lock: the document, then the watermarks, then the new frames, then the document again.

If a save replaces the document and removes segments in the meantime, the read starts again. A single save cannot hide
any record, because it removes a segment only if the previous document does not need the segment either.
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
from savings_exporter.formats.document import Document, decode, is_of_another_program
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
from savings_exporter.storage.filesystem import NO_SUCH_FILE, FileSystem, Identity
from savings_exporter.storage.journal import segment_path
from savings_exporter.storage.view import Position, Reading, Special, View, counted, view_of
from savings_exporter.storage.writers import Writer, is_alive, read_counts, read_facts, writer_of, writer_path

logger = logging.getLogger(__name__)

_ATTEMPTS = 5
_FIRST_CHUNK_BYTES = 64 * 1024
# Larger groups of records are not added up faster, and other threads would have to wait for the interpreter.
_ADDED_AT_ONCE = 1_000
_SEGMENT_NAME = re.compile(r"\.journal\.([0-9a-f]{16})\.(\d{8})")


class Listing(NamedTuple):
    """The files of a store at one moment: each writer's segments in order, and the writers that have a writer file."""

    segments: Mapping[bytes, Sequence[int]]
    writers: frozenset[bytes]


class Reader:
    """Reads one store. ``own`` is this process's writer, once it has one: its watermark is known without a read."""

    def __init__(self, fs: FileSystem, path: str, limits: Limits) -> None:
        self.fs = fs
        self.path = path
        self.limits = limits
        self.own: Writer | None = None
        self._refused: Identity | None = None
        # The view of the document at the path when it was last read, without the journals.
        self._found: View | None = None

    def refresh(self, view: View) -> View:
        """The view with everything that is durable now, including records of other processes.

        While the document at the path is unusable or belongs to another program, the last usable document is the basis.

        Raises:
            OSError: the store cannot be read.
            StoreError: the store is damaged.
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
                # A save removed a segment after it was listed and before it was read.
                continue
            except CorruptStoreError:
                # Saves may have removed a segment after the document was read and before the segments were listed.
                if self.is_current(current):
                    raise
        raise StoreError(f"{self.path}: is being saved too often to be read; try again")

    def follow(self, view: View) -> View:
        """The view with the new frames of each journal up to its watermark. The view's document stays the same.

        Raises:
            FileNotFoundError: a segment was removed in the meantime.
            OSError: a file cannot be read.
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
        """The current files of the store.

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
        """Read the frames of each journal that are not counted yet, up to the watermark.

        Raises:
            OSError: a file cannot be read.
            CorruptStoreError: a frame's content cannot be read.
        """
        limits = self._limits_of_writers(view.store)
        # The segments are listed after the watermarks are read: the segments with all frames up to them exist by then.
        segments = self.listing().segments
        for writer, limit in limits.items():
            if limit is None or limit > view.position_of(writer).sequence:
                yield self.read_journal(view, writer, limit, segments.get(writer, ()))

    def read_journal(self, view: View, writer: bytes, limit: int | None, numbers: Sequence[int]) -> Reading:
        """Read the frames of a writer's journal that are not counted yet.

        ``limit`` is the last sequence number to read; None means up to the last good frame.

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
        # A watermark of an earlier boot may be outdated, but all records up to it were durable.
        least = limit if limit is not None else self._watermark_of(view.store, writer)
        if replay.position.sequence < least:
            replay.lost.append((replay.position.sequence + 1, least))
        if not is_known and replay.last_seen < start.sequence:
            replay.doubt = f"{self.path}.journal.{writer.hex()}.*: ends before the position in the document"
        return replay.reading()

    def _limits_of_writers(self, store: bytes) -> Mapping[bytes, int | None]:
        boot, listing = self.fs.boot_id(), self.listing()
        # A writer's file shows how far its journal was durable, even when all segments are missing.
        without = {writer for writer in listing.writers - listing.segments.keys() if self._is_of(store, writer)}
        return {writer: self.limit_of(store, writer, boot) for writer in listing.segments.keys() | without}

    def _is_of(self, store: bytes, writer: bytes) -> bool:
        """Whether a writer's file names this store."""
        facts = read_facts(self.fs, writer_path(self.path, writer))
        return facts is not None and facts.store == store

    def _watermark_of(self, store: bytes, writer: bytes) -> int:
        """A writer's watermark from any boot; 0 when there is none."""
        facts = read_facts(self.fs, writer_path(self.path, writer))
        return facts.watermark if facts is not None and facts.store == store else 0

    def _ends_a_frame(self, writer: bytes, numbers: Sequence[int], position: Position) -> bool:
        """Whether the position from which reading continues is directly after a frame.

        If the sync of a frame failed, a later segment holds another copy. A power loss may remove the first copy.
        """
        if position.segment not in numbers or not position.offset:
            return True
        with self.fs.opened(segment_path(self.path, writer, position.segment)) as descriptor:
            return self.fs.read_at(descriptor, 1, position.offset - 1) == FRAME_END

    def is_own(self, writer: bytes) -> bool:
        """Whether a writer is this process's own."""
        return self.own is not None and writer == self.own.id

    def is_alive(self, writer: bytes, listing: Listing | None = None) -> bool:
        """Whether a writer is alive: its process holds the lock of the writer's file or of one of its segments.

        Raises:
            OSError: a file cannot be opened.
        """
        if self.is_own(writer) or is_alive(self.fs, writer_path(self.path, writer)):
            return True
        numbers = (listing or self.listing()).segments.get(writer, ())
        return any(is_alive(self.fs, segment_path(self.path, writer, number)) for number in numbers)

    def is_of_another_store(self, view: View, writer: bytes, listing: Listing) -> bool:
        """Whether a writer's journal belongs to another store that left its files in this directory.

        Raises:
            OSError: a segment cannot be read.
        """
        for number in listing.segments.get(writer, ()):
            with self.fs.opened(segment_path(self.path, writer, number)) as descriptor:
                if store := self._store_of(descriptor, writer):
                    return store != view.store
        return False

    def _store_of(self, descriptor: int, writer: bytes) -> bytes:
        """The store that a segment belongs to, according to its first frame; empty when that frame is damaged."""
        header = self.fs.read_at(descriptor, HEADER_BYTES, 0)
        frame = self.fs.read_at(descriptor, size_at_start(header), 0)
        store = store_of(header)
        # The checksum is verified: otherwise a damaged store name would hide the frames that follow.
        return store if any(isinstance(item, Frame) for item in scan(frame, store, writer)) else b""

    def stores_of_segments(self) -> Iterator[bytes]:
        """The store that each segment belongs to. Segments with a damaged first frame are skipped.

        Raises:
            OSError: a segment cannot be read.
        """
        for writer, numbers in self.listing().segments.items():
            for number in numbers:
                with self.fs.opened(segment_path(self.path, writer, number)) as descriptor:
                    if store := self._store_of(descriptor, writer):
                        yield store

    def living(self) -> int:
        """How many writers are alive; 0 when the files cannot be read."""
        try:
            listing = self.listing()
            return sum(self.is_alive(writer, listing) for writer in listing.writers)
        except OSError:
            return 0

    def journal_bytes(self, view: View) -> int:
        """How many bytes of the journals' segments hold frames; 0 when the files cannot be read."""
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
        store_id: str,
        pending_records: int = 0,
        pending_tokens: int = 0,
    ) -> Snapshot:
        """A snapshot of a view, for users of the package. Only this method builds snapshots."""
        return Snapshot(
            ledger=view.ledger,
            store_id=store_id,
            saved_at=view.document.saved_at,
            created_at=view.document.created_at,
            read_at=read_at,
            document_bytes=view.identity.size if view.identity else 0,
            journal_bytes=self.journal_bytes(view),
            pending_records=pending_records,
            pending_tokens=pending_tokens,
            operations=operations,
            cursors=view.cursors,
            writers=self.living(),
        )

    def has_refused_document(self) -> bool:
        """Whether the document at the path is refused because another program wrote it."""
        return self._refused is not None

    def refusal(self) -> str:
        """Why the document at the path is not used."""
        return (
            "another program replaced the document. What is recorded stays durable in the journal. To choose between "
            f"the two: stop this process, then savings-exporter verify --store {self.path}"
        )

    def limit_of(self, store: bytes, writer: bytes, boot: bytes) -> int | None:
        """The sequence number up to which a journal counts; None when all readable frames are on stable storage.

        A watermark is valid only in the boot of the machine in which it was written. After another boot, all readable
        frames are on stable storage. If a living writer has no watermark, none of its new frames count yet: its file
        was removed manually or is still being written.

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
        """The operation counters of all living and dead writers except this process's own.

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
        """Whether the document at the path is the view's document, or a document that was refused.

        Raises:
            OSError: the file cannot be examined.
        """
        return self._identity() in (view.identity, self._refused)

    @staticmethod
    def _is_older(view: View, other: View) -> bool:
        """Whether a view's document is older than that of another view of the same store."""
        return view.document.is_ours and view.document.ledger.records < other.document.ledger.records

    def with_document(self, view: View) -> View:
        """The view itself or, when another process saved the document, the view of that document without the journals.

        Raises:
            OSError: the document cannot be read.
            StoreError: the document is damaged.
        """
        identity = self._identity()
        if identity is None:
            # The document was removed or never saved. The next save creates it.
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
            if is_of_another_program(self.fs.read(self.path)[0]):
                self._refused = identity
                return view
            # The document was damaged after it was saved. The next save keeps a copy of it and writes a new one.
            return msgspec.structs.replace(newest, identity=identity, is_whole=False)
        if document.is_ours and bytes.fromhex(document.store) == view.store:
            self._refused = None
            self._found = view_of(document, identity, view.store)
            return self._found
        # The other program may have read a document that already holds the records of this process.
        if view.document.is_ours or view.positions or self.own is not None:
            self._refused = identity
            return view
        return view_of(bounded(document, self.limits), identity, view.store)

    def _newest(self, view: View) -> View:
        """The newest of three views: the given one, that of the last document read, and that of the previous document.

        Other processes may have saved after this process read the document, and may have removed segments that the
        view's document needs.

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
            OSError: the document cannot be read.
            StoreError: the document is damaged, or a newer program wrote it.
        """
        data, identity = self.fs.read(self.path)
        return decode(data), identity

    def _identity(self) -> Identity | None:
        return self.fs.identity(self.path)

    def _replay(self, replay: _Replay, descriptor: int, path: str, number: int, store: bytes) -> None:
        """Process one segment's frames, one chunk at a time."""
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
                # The end of the chunk cuts off a frame, or the chunk holds only zeros.
                needed = next_block(offset - block + size_at_start(data[offset - block :]))
                size = min(needed, size * 4) if needed > size else size * 4
            offset = end


def previous_path(path: str) -> str:
    """The name of the previous document."""
    return path + ".previous"


def previous_document(fs: FileSystem, path: str) -> Document | None:
    """The previous document, or None when it does not exist or is damaged.

    Raises:
        OSError: the file cannot be read, so it is unknown whether the previous document exists.
    """
    try:
        return decode(fs.read(previous_path(path))[0])
    except (*NO_SUCH_FILE, StoreError):
        return None


def bounded(document: Document, limits: Limits) -> Document:
    """Another program's document, limited to the number of names and history points that this program keeps."""
    return msgspec.structs.replace(document, ledger=document.ledger.bounded(limits))


def described_losses(reading: Reading) -> str:
    """A description of the records that a journal lacks."""
    ranges = [f"{first} to {last}" if last > first else str(first) for first, last in reading.lost]
    if not ranges:
        return f"{reading.doubt}, and it cannot be determined whether acknowledged records are lost"
    return f"acknowledged records are lost: number {', '.join(ranges)} of writer {reading.writer.hex()}"


class _Replay:
    """Reads one journal according to the counting rule."""

    def __init__(self, writer: bytes, start: Position, limit: int | None) -> None:
        self.position = start
        self.limit = limit
        self.lost: list[tuple[int, int]] = []
        self.doubt = ""
        self.last_seen = 0
        self.foreign: list[str] = []
        self.is_cut = False
        self.writer = writer
        # Records are added up rather than kept, so that memory does not grow with the journal.
        self._sums = Sums()
        self._records: list[Line] = []
        self._specials: list[Special] = []
        self._raw: list[bytes] = []
        self._tail: tuple[str, bytes] | None = None

    @property
    def is_complete(self) -> bool:
        """Whether all records up to the limit were read."""
        return self.limit is not None and self.position.sequence >= self.limit

    def take(self, data: bytes, block: int, offset: int, number: int, path: str, store: bytes, *, is_last: bool) -> int:
        """Process the frames of a chunk that begins at ``block``, starting at ``offset``. Returns where they end."""
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
        """The result of reading the journal."""
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
        """Process a frame with any position in the sequence."""
        expected = self.position.sequence + 1
        if frame.last < expected:
            self._tail, self.last_seen = None, max(self.last_seen, frame.last)
            return
        if frame.first < expected:
            raise CorruptStoreError(f"{path}: two frames hold different records under the same numbers")
        if frame.first > expected:
            self.lost.append((expected, frame.first - 1))
        self._take_frames([frame], data, number, end, path)

    def _take_frames(self, frames: Sequence[Frame], data: bytes, number: int, end: int, path: str) -> None:
        """Process consecutive frames. The last one ends at ``end``."""
        try:
            decoded = decode_groups(frames)
        except CorruptStoreError as error:
            raise CorruptStoreError(f"{path}: {error}", "Restore it from a backup") from None
        for frame, groups in zip(frames, decoded, strict=True):
            for group in groups:
                if group.prices is not None:
                    self._sums.add_bases([group.prices])
                if group.is_special:
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
