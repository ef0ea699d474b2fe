"""A store on the disk: open it, know what other processes wrote, commit to its journal, save its document."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import secrets
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any, NamedTuple

import msgspec

from savings_exporter.documents import Document, encode
from savings_exporter.errors import StoreError
from savings_exporter.idempotency import Keys
from savings_exporter.records import SavingsRecord
from savings_exporter.storage import filesystem, journal
from savings_exporter.storage.atomic_file import AtomicFile
from savings_exporter.storage.batch import Batch, Keyed
from savings_exporter.storage.lock import NOBODY, Mark, StoreLock, unpacked
from savings_exporter.storage.recovery import Found, find, previous_path, refuse_losses
from savings_exporter.storage.steps import (
    APPEND,
    COMMIT,
    FSYNC_JOURNAL,
    PREPARE,
    ROTATE,
    SAVE,
    Observers,
    Operation,
    error_symbol,
)
from savings_exporter.totals import Delta, Ledger, Limits, thinned

logger = logging.getLogger(__name__)

# After a segment could not be made, commits go by the document for so long: on a full disk there may still be room for
# that, and trying anew each time would cost each commit as much as a segment.
_NO_SEGMENT_SECONDS = 5.0

# A torn tail has at most the size of a segment.
_MOST_TAILS = 10

_READING_ATTEMPTS = 3
_MOST_UNCOUNTED = 500


class State(NamedTuple):
    """What a store holds: its name, durable totals, when the document was saved (by any process; None when never), and
    how many bytes document and journal have.
    """

    store_id: str
    ledger: Ledger
    saved_at: datetime | None
    document_bytes: int
    journal_bytes: int


class _Plan(NamedTuple):
    """How a batch is going to be counted, each key once, up to a ``last`` sequence."""

    batch: Batch
    base: int
    last: int
    fresh: Sequence[tuple[Keyed, int]]
    repeated: Sequence[tuple[Keyed, int]]

    def settle(self) -> None:
        """Everybody's records are durable."""
        for keyed, sequence in (*self.fresh, *self.repeated):
            keyed.sequence = sequence
        self.batch.base = self.base


class Store:
    """The store at one path. One thread at a time commits or saves; any may read ``state`` and ``refresh``.

    Each commit and save holds the lock file's lock and starts from what other processes wrote. What is in memory is
    durable, or ``_attempts`` is not empty: then an interrupt came between, and the disk is asked.

    Raises:
        StoreError: the store cannot be used; CorruptStoreError when it is damaged, NewerSchemaError when a newer
            program wrote it.
    """

    def __init__(self, path: str, observers: Observers, limits: Limits) -> None:
        self.path = filesystem.resolved(path)
        self.changing = threading.RLock()
        """Held while totals and batches change in memory, never while the disk is at work."""
        self.failed_step = PREPARE
        """The step at which the last commit or save that failed did so."""
        self.must_save = False
        """Whether a document has to be durable before anything may be committed to the journal."""
        self._observers = observers
        self._limits = limits
        self._working = threading.Lock()
        self._file = AtomicFile(self.path, previous_path(self.path))
        self._lock = _opened_lock(self.path)
        self._keep_lock = False
        self._changes = 0
        self._segment: journal.Segment | None = None
        self._no_segment_until = 0.0
        self._attempts: list[_Plan] = []
        self._attempted: set[filesystem.Identity] = set()
        self._written: filesystem.Identity | None = None
        self._journal_unsure = False
        self._document_unsure = False
        # What is durable: the document, and what the journal holds beyond it, up to a place in a segment.
        self._document = Document()
        self._identity: filesystem.Identity | None = None
        self._store_id = b""
        self._since, self._keys, self._sequence = Delta(), Keys(), 0
        # Part of what the journal holds, too, and not counted into the totals yet: in bulk that costs a fraction.
        self._uncounted: list[SavingsRecord] = []
        self._epoch, self._offset, self._journal_bytes = 0, 0, 0
        self._saved_sequence, self._document_epoch, self._only_in_document = 0, 0, False
        # The mark that was last seen, and whether it is our own: then nobody else began to write anything since.
        self._mark_data, self._is_mine = b"", False
        self._writer = secrets.token_bytes(len(NOBODY))
        self._merged: Ledger | None = None
        self._shown = State(filesystem.place(self.path), Ledger(), None, 0, 0)
        # Set while what is above changes. Who finds it set was preceded by an interrupt, and has it read again.
        self._torn = False
        self._found: Found | None = None
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    @property
    def ledger(self) -> Ledger:
        """The totals that were durable when the document was last saved: what names are taken."""
        return self._document.ledger

    @property
    def state(self) -> State:
        """What is durable, as one consistent piece."""
        with self.changing:
            if self._torn:
                return self._shown
            if self._merged is None:
                self._count_waiting()
                ledger = self._document.ledger
                if self._since.records:
                    ledger = ledger.plus(self._since, self._limits, datetime.now(timezone.utc))
                self._merged = msgspec.structs.replace(ledger, sequence=self._sequence)
            saved_at, size = self._document.saved_at, 0
            if self._identity is not None:
                size = self._identity.size
                saved_at = saved_at or datetime.fromtimestamp(self._identity.modified_ns / 1e9, timezone.utc)
            store_id = self._document.store or filesystem.place(self.path)
            self._shown = State(store_id, self._merged, saved_at, size, self._journal_bytes + self._offset)
            return self._shown

    @property
    def exists(self) -> bool:
        """Whether there is a document yet."""
        return self._identity is not None

    @property
    def is_saved(self) -> bool:
        """Whether the document has all that is durable."""
        return self._sequence == self._saved_sequence and not self.must_save

    @property
    def unsaved(self) -> bool:
        """Whether the document, or the one before it together with the journal, lacks something."""
        return not self.is_saved or self._only_in_document

    @property
    def is_full(self) -> bool:
        """Whether a segment was filled since the document was saved."""
        return self._epoch != self._document_epoch

    def commit(self, batch: Batch, parent: Any = None) -> None:
        """Make a batch durable: through the journal, or where that cannot be, by saving the document.

        ``parent`` is what observers are told that it is a part of.

        Raises:
            OSError: it is not durable, and the next commit or save has to carry the same batch again.
        """
        with self._working:
            if not batch.durable and not self._goes_by_journal(batch, parent):
                self._save(batch, parent)

    def save(self, parent: Any = None) -> None:
        """Save the document, with nothing counted in.

        Raises:
            OSError: it is not durable. Records that were are so still, by the journal.
        """
        with self._working:
            self._save(Batch(), parent)

    def sequence_of(self, key: str) -> int | None:
        """What an idempotency key was counted under, None when it was not, as far as this process knows to be durable.

        What was read and not saved since may be in the page cache only, and a commit tells.
        """
        return None if self.must_save or self._is_unsure else self._keys.sequence_of(key)

    def refresh(self) -> None:
        """Know what other processes made durable. Costs one read when that is nothing; never fails, never waits."""
        if self._working.acquire(blocking=False):
            try:
                if self._attempts or self._torn:
                    # An interrupt came between, and it may have left the totals half counted.
                    self._load(only_marked=True)
                elif not self._is_unsure and (data := self._lock.read()) != self._mark_data:
                    mark = unpacked(data)
                    if mark is not None and not self._follow(mark):
                        self._load(only_marked=True)
            except (OSError, StoreError) as error:
                # The next commit meets the same and reports it.
                logger.debug("%s: could not be read again: %s", self.path, error)
            finally:
                self._working.release()

    def close(self) -> None:
        """Let go of the lock and the files. Saves nothing."""
        self._close_segment()
        self._lock.close()

    def reopen_after_fork(self, observers: Observers) -> None:
        """Begin anew in a forked copy: locks, descriptors and what is on its way are the parent's."""
        self._observers = observers
        self.changing = threading.RLock()
        self._working = threading.Lock()
        self._file = AtomicFile(self.path, previous_path(self.path))
        self._attempts, self._journal_unsure, self._document_unsure = [], False, False
        self._attempted = set()
        self._is_mine, self._writer = False, secrets.token_bytes(len(NOBODY))
        self._close_segment()
        with suppress(OSError):
            # The next commit tries again, and reports it.
            self._lock.reopen()
        # Another thread may have been counting at the fork.
        self._torn = True
        self._saved_sequence, self._only_in_document = self._sequence, False

    @property
    def _is_unsure(self) -> bool:
        """Whether something may be on the disk of which nobody knows whether it stays there.

        Until that is known the lock is kept, because nobody may build on it.
        """
        return bool(self._attempts) or self._journal_unsure or self._document_unsure

    def _open(self) -> None:
        try:
            self._keep_lock = filesystem.filesystem_type(os.path.dirname(self.path)).is_network
            if self._keep_lock and not self._lock.take_if_free():
                raise StoreError(
                    f"{self.path}: another process has it open, and on a network filesystem only one may; stop that "
                    "one, send savings to its service, or use a store on a local disk"
                )
            try:
                self._lock.take()
            except BlockingIOError:
                # Its holder may be waiting for a disk. What is durable can be read, and the first commit catches up.
                self._load(only_marked=True)
                self.must_save = True
                return
            # Temporary files live only while the lock is held, so these were left by a process that died.
            for temporary in filesystem.temporaries(self.path):
                filesystem.discard(temporary)
            self._load()
        except OSError as error:
            raise _cannot("read", self.path, error) from None
        finally:
            self._let_go()

    def _goes_by_journal(self, batch: Batch, parent: Any) -> bool:
        """Commit a batch to the journal; False when it has to go by the document."""
        if self._goes_by_document(batch):
            return False
        try:
            return self._commit_to_journal(batch, parent)
        except OSError:
            if self.failed_step != ROTATE:
                raise
            return False

    def _goes_by_document(self, batch: Batch) -> bool:
        """Whether a batch cannot go into the journal: without asking the disk."""
        return (
            self._is_unsure
            or self.must_save
            or not self._document.is_ours
            or batch.folded is not None
            or bool(self._no_segment_until and time.monotonic() < self._no_segment_until)
        )

    def _commit_to_journal(self, batch: Batch, parent: Any) -> bool:
        """Commit a batch as one frame; False when it turned out that it has to go by the document."""
        with Operation(COMMIT, self._observers, parent, batch.links) as operation:
            self.failed_step = PREPARE
            try:
                self._lock.take()
                self._catch_up()
                self._look_after_segment()
                if self.must_save:
                    return False
                plan = self._planned(batch)
                if plan.last == self._sequence:
                    with self.changing:
                        plan.settle()
                    return True
                payload = _payload_of(plan)
                if len(payload) > journal.LARGEST_PAYLOAD_BYTES:
                    return False
                self._append(plan, payload, operation)
                return True
            finally:
                self.failed_step = operation.failed_step or PREPARE
                self._let_go()

    def _append(self, plan: _Plan, payload: bytes, operation: Operation) -> None:
        records = plan.last - plan.base
        segment = self._segment_for(journal.frame_bytes(payload), operation)
        frame = journal.frame_of(self._store_id, segment.epoch, plan.base + 1, records, payload)
        operation.records, operation.sequence, operation.size = records, plan.last, len(frame)
        if not self._is_mine:
            self._write_mark(self._mark_at(self._epoch, self._offset, self._sequence))
        self._attempts = [plan]
        try:
            with operation.step(APPEND) as step:
                step.size = len(frame)
                segment.append(frame)
            # The disk is at work by now.
            self._observers.tell()
            mark = self._mark_at(segment.epoch, segment.offset, plan.last)
            with operation.step(FSYNC_JOURNAL) as step:
                step.fsync_target = "journal"
                segment.sync()
        except OSError:
            # The segment is never written again, and what was counted so far is as it was.
            self._journal_unsure, self._attempts = True, []
            raise
        with suppress(OSError):
            # The one before it costs a recovery, and no record.
            self._write_mark(mark)
        with self.changing:
            self._torn = True
            self._uncounted += plan.batch.records
            for keyed, _ in plan.fresh:
                self._uncounted += keyed.records
            self._number(plan)
            if segment.epoch != self._epoch:
                self._journal_bytes += self._offset
            self._epoch, self._offset = segment.epoch, segment.offset
            plan.settle()
            self._torn = False
        self._attempts = []

    def _segment_for(self, size: int, operation: Operation) -> journal.Segment:
        """A segment that has room for a frame of this size, made when there is none."""
        segment = self._known_segment() if self._offset else self._segment
        if segment is not None and segment.has_room_for(size):
            return segment
        # One that nothing was committed to may have been left half made, and is made anew.
        epoch = self._next_epoch() if self._offset else self._epoch
        path = journal.segment_path(self.path, epoch)
        self._name(NOBODY)
        try:
            with Operation(ROTATE, self._observers, operation.parent) as rotation:
                rotation.size = journal.SEGMENT_BYTES
                # Zeros that take no memory: so much in the heap would stay there.
                with mmap.mmap(-1, journal.SEGMENT_BYTES) as zeros:
                    self._file.beside(path).save(zeros, rotation)
                self._close_segment()
                self._segment = segment = journal.Segment(path, epoch, 0)
        except OSError:
            with suppress(OSError):
                self._name(self._writer)
            operation.failed_step = ROTATE
            self._no_segment_until = time.monotonic() + _NO_SEGMENT_SECONDS
            raise
        return segment

    def _save(self, batch: Batch, parent: Any) -> None:
        with Operation(SAVE, self._observers, parent, batch.links) as operation:
            self.failed_step = PREPARE
            try:
                self._lock.take()
                self._catch_up()
                self._refuse_strangers()
                # What was interrupted before anything of it could be seen has not landed.
                landed = self._attempts = [plan for plan in self._attempts if plan.last <= self._sequence]
                carried = Batch() if any(plan.batch is batch for plan in landed) else batch
                self._save_document(carried, landed, operation)
            finally:
                self.failed_step = operation.failed_step or PREPARE
                self._let_go()

    def _save_document(self, batch: Batch, landed: list[_Plan], operation: Operation) -> None:
        """Run the recipe with a batch counted in. What had ``landed`` is on the disk, and becomes durable with it."""
        plan = self._planned(batch)
        self._keep_damage_aside()
        # A segment that may hold what nobody knows of is not written again.
        is_new_epoch = self.must_save or self._is_unsure or not self._document.is_ours
        epoch, offset = (self._next_epoch(), 0) if is_new_epoch else (self._epoch, self._offset)
        document = self._document_with(plan, epoch, offset)
        data = encode(document)
        operation.records, operation.sequence, operation.size = plan.last - plan.base, plan.last, len(data)
        keeps_previous = self._file.keeps_previous
        # Without them the journal holds all that the document does, so either one may come back after a power loss.
        says_more = is_new_epoch or plan.last > plan.base
        if says_more:
            self._name(NOBODY)
        self._attempts = [*landed, plan]
        try:
            self._file.save(data, operation, self._will_be)
        except OSError:
            # Nothing of it was counted in, and the next save has other bytes under another name.
            self._attempts = landed
            self._document_unsure = self._file.outcome_unknown and (says_more or self._document_unsure)
            if not self.must_save and not self._is_unsure:
                # Nothing came of it, so others may go on.
                with suppress(OSError):
                    self._name(self._writer)
            raise
        needed_from = min(epoch, self._document_epoch)
        with self.changing:
            self._torn = True
            self._document, self._identity, self._store_id = document, self._written, bytes.fromhex(document.store)
            self._since, self._uncounted = Delta(), []
            self._number(plan)
            self._saved_sequence, self._document_epoch = plan.last, epoch
            self._only_in_document = plan.last > plan.base
            if is_new_epoch:
                self._epoch, self._offset, self._journal_bytes = epoch, 0, 0
            elif needed_from == epoch:
                self._journal_bytes = 0
            for each in (*landed, plan):
                each.settle()
            self._torn = False
        with suppress(OSError):
            self._write_mark(self._mark_at(epoch, offset, plan.last))
            self._lock.sync()
        self._attempts, self._journal_unsure, self._document_unsure, self.must_save = [], False, False, False
        self._attempted.clear()
        self._file.previous = previous_path(self.path)
        if is_new_epoch:
            self._close_segment()
        if keeps_previous:
            self._retire(needed_from)

    def _document_with(self, plan: _Plan, epoch: int, offset: int) -> Document:
        now = datetime.now(timezone.utc)
        delta = Delta()
        _count(plan, delta, self._document.ledger, self._limits)
        return msgspec.structs.replace(
            self._document,
            ledger=msgspec.structs.replace(self.state.ledger.plus(delta, self._limits, now), sequence=plan.last),
            store=self._document.store or secrets.token_hex(8),
            epoch=epoch,
            offset=offset,
            keys=self._keys.pack((keyed.key, sequence) for keyed, sequence in plan.fresh),
            saved_at=now,
        )

    def _will_be(self, identity: filesystem.Identity) -> None:
        """Remember what the document's next identity is, so that it is known also when the save ends unclear."""
        self._written = identity
        self._attempted.add(identity)

    def _keep_damage_aside(self) -> None:
        """Keep what recovery could not use, before a save hides it."""
        found, self._found = self._found, None
        if found is None:
            return
        try:
            if found.damage is not None:
                # The save before it is what can be relied on: it stays where it is.
                self._file.previous = None
                aside = ""
                if found.identity is not None:
                    # A save that failed since may have kept it before.
                    aside = filesystem.kept_under(self.path, "corrupt") or ""
                    if not aside:
                        aside = filesystem.unused_name(self.path, "corrupt")
                        filesystem.keep_copy(self.path, aside)
                        self._observers.recovered("corrupt_document")
                self._observers.recovered("previous_document")
                logger.error(
                    "%s: %s; nothing is lost: its totals are those of the save before it and the journal%s",
                    *(self.path, found.damage, f"; the damaged file is kept as {aside}" if aside else ""),
                )
                # If what follows fails, it is not kept once more.
                found.damage = None
            if found.tail is not None:
                aside = filesystem.unused_name(found.tail.segment, "torn")
                filesystem.write_aside(aside, found.tail.data)
                self._observers.recovered("torn_tail")
                logger.warning(
                    "%s: ends with %d bytes of a commit that was never acknowledged; kept as %s",
                    *(found.tail.segment, len(found.tail.data), aside),
                )
                _keep_newest_tails(self.path)
        except BaseException:
            self._found = found
            raise

    def _retire(self, needed_from: int) -> None:
        """Remove the segments that neither the document nor the one before it needs."""
        for epoch, segment in journal.segments(self.path).items():
            if epoch < needed_from:
                filesystem.discard(segment)

    def _catch_up(self) -> None:
        """Know all that is in the store. Called with the lock held.

        Raises:
            OSError: it cannot be read; ESTALE when it is not what it was, and no later state of it.
        """
        if not self._attempts and not self._torn:
            if self._is_unsure:
                # The lock was kept, so nobody wrote since, and what is in memory is what was durable.
                return
            if self._is_known(self._lock.read()):
                return
        self._reload()

    def _look_after_segment(self) -> None:
        """Have the document saved when somebody removed the segment: what it holds is in no other place but here."""
        if self._changes == self._lock.changes:
            return
        if self._segment is not None and self._segment.epoch == self._epoch and not self._segment.is_in_place():
            logger.error(
                "%s: somebody removed it; what it held is saved in the document",
                journal.segment_path(self.path, self._epoch),
            )
            self.must_save = True
        self._changes = self._lock.changes

    def _is_known(self, data: bytes) -> bool:
        """Whether all that is in the store is known, now that the mark's bytes are these."""
        if self._is_mine and data == self._mark_data:
            return self._document.is_ours or filesystem.identity(self.path) == self._identity
        mark = unpacked(data)
        if mark is None or mark.writer == NOBODY:
            return False
        # Its writer may have died since, after a frame and before the mark that says that it is durable.
        return (data == self._mark_data or self._follow(mark)) and not self._is_written_on()

    def _is_written_on(self) -> bool:
        """Whether there is a frame that nobody says is durable."""
        try:
            return bool(self._offset) and self._known_segment().is_written_on()
        except FileNotFoundError:
            # A copy of the document alone, put in place as a backup: the journal begins anew.
            self.must_save = True
            return False

    def _known_segment(self) -> journal.Segment:
        """The segment that the last commit that is known went to, up to where it is known."""
        if self._segment is None or self._segment.epoch != self._epoch:
            self._close_segment()
            self._segment = journal.Segment(journal.segment_path(self.path, self._epoch), self._epoch, self._offset)
        return self._segment

    def _follow(self, mark: Mark) -> bool:
        """Count in what others appended to the segment that is known; False when more than that has changed."""
        if mark.store != self._store_id or mark.epoch != self._epoch or mark.offset < self._offset:
            return False
        if mark.offset == self._offset:
            if mark.sequence != self._sequence:
                # A document carried records. Until it is read, this mark is not known.
                return False
            with self.changing:
                self._know_saved(mark)
            self._mark_data, self._is_mine = mark.packed(), False
            return True
        if not self._offset:
            return False
        segment, sequence = self._known_segment(), self._sequence
        payloads = []
        for frame in segment.frames(self._store_id, self._offset, mark.offset):
            if isinstance(frame, journal.Damage) or frame.first != sequence + 1:
                return False
            sequence = frame.last
            payloads.append(frame.payload)
        if sequence != mark.sequence:
            return False
        try:
            records = journal.decoded(b"".join(payloads))
        except StoreError:
            return False
        with self.changing:
            self._torn = True
            self._uncounted += records
            for number, record in enumerate(records, self._sequence + 1):
                if record.idempotency_key is not None:
                    self._keys.remember(record.idempotency_key, number)
            self._sequence, self._offset, self._merged = sequence, mark.offset, None
            segment.offset = mark.offset
            self._know_saved(mark)
            self._torn = False
        self._mark_data, self._is_mine = mark.packed(), False
        return True

    def _know_saved(self, mark: Mark) -> None:
        if self._identity is None or not mark.is_of(self._identity):
            self._identity = filesystem.Identity(0, mark.inode, mark.modified_ns, mark.size)
            saved_at = datetime.fromtimestamp(mark.modified_ns / 1e9, timezone.utc)
            self._document = msgspec.structs.replace(self._document, saved_at=saved_at)
        self._saved_sequence, self._document_epoch = mark.saved_sequence, mark.document_epoch

    def _reload(self) -> None:
        """Read the store again as if it were opened. Called with the lock held."""
        known_store, known_sequence = self._document.store, self._sequence
        try:
            mark_data, mark, found = self._find(only_marked=False)
        except StoreError as error:
            raise OSError(errno.ESTALE, f"was changed by another program ({error})", self.path) from error
        if found.sequence < known_sequence or (known_store and found.document.store != known_store):
            raise OSError(errno.ESTALE, "was changed by another program", self.path)
        self._take_over(found, mark_data, mark)

    def _load(self, *, only_marked: bool = False) -> None:
        mark_data, mark, found = self._find(only_marked=only_marked)
        self._take_over(found, mark_data, mark)

    def _find(self, *, only_marked: bool) -> tuple[bytes, Mark | None, Found]:
        for attempt in range(1, _READING_ATTEMPTS + 1):
            mark_data = self._lock.read()
            mark = unpacked(mark_data)
            try:
                found = find(self.path, self._limits, mark, only_marked=only_marked)
                refuse_losses(self.path, found)
                break
            except (FileNotFoundError, StoreError):
                # Without the lock, a document may be replaced between our reading it and its segments.
                if not only_marked or attempt == _READING_ATTEMPTS:
                    raise
        return mark_data, mark, found

    def _take_over(self, found: Found, mark_data: bytes, mark: Mark | None) -> None:
        """Make what was found the state in memory."""
        document = found.document
        for problem in (*document.problems, *found.harmless):
            logger.warning("%s: %s", self.path, problem)
        if not document.is_ours:
            history = thinned(document.ledger.history)
            ledger = msgspec.structs.replace(document.ledger.bounded(self._limits), history=history)
            document = msgspec.structs.replace(document, ledger=ledger)
        self._close_segment()
        is_marked = mark is not None and mark.store == found.store
        with self.changing:
            self._torn = True
            self._document, self._identity, self._store_id = document, found.identity, bytes.fromhex(document.store)
            self._since, self._uncounted = found.since, []
            self._keys, self._sequence = found.keys, found.sequence
            self._epoch, self._offset = found.epoch, found.offset
            self._journal_bytes = max(found.journal_bytes - found.offset, 0)
            self._merged = None
            self._saved_sequence = mark.saved_sequence if mark and is_marked else document.ledger.sequence
            self._document_epoch = mark.document_epoch if mark and is_marked else document.epoch
            self._only_in_document = False
            self._torn = False
        self._mark_data, self._is_mine = mark_data, False
        self._found = found
        if self._lock.held:
            # On a network filesystem another host may have written since, so what is cached here says nothing.
            self.must_save = found.exists and (self._keep_lock or not found.is_as_marked(mark))

    def _refuse_strangers(self) -> None:
        """Raise when the document is not the one that was last saved, and no later one of this store."""
        current = filesystem.identity(self.path)
        if current is None or current in self._attempted or (self._identity and current[1:] == self._identity[1:]):
            return
        self._reload()

    def _count_waiting(self) -> None:
        was_torn, self._torn = self._torn, True
        waiting, self._uncounted = self._uncounted, []
        self._since.add_all(waiting, self._document.ledger, self._limits)
        self._torn = was_torn

    def _planned(self, batch: Batch) -> _Plan:
        if not batch.keyed:
            return _Plan(batch, self._sequence, self._sequence + batch.unkeyed, (), ())
        fresh: list[tuple[Keyed, int]] = []
        repeated: list[tuple[Keyed, int]] = []
        sequence = self._sequence + batch.unkeyed
        for keyed in batch.keyed:
            known = self._keys.sequence_of(keyed.key)
            if known is None:
                sequence += len(keyed.records)
                fresh.append((keyed, sequence))
            else:
                repeated.append((keyed, known))
        return _Plan(batch, self._sequence, sequence, fresh, repeated)

    def _number(self, plan: _Plan) -> None:
        self._sequence, self._merged = plan.last, None
        if len(self._uncounted) > _MOST_UNCOUNTED:
            self._count_waiting()
        for keyed, sequence in plan.fresh:
            self._keys.remember(keyed.key, sequence)

    def _next_epoch(self) -> int:
        return max([self._epoch, self._document_epoch, *journal.segments(self.path)]) + 1

    def _mark_at(self, epoch: int, offset: int, sequence: int) -> bytes:
        identity = self._identity or filesystem.Identity(0, 0, 0, 0)
        return Mark(
            *(self._store_id, epoch, offset, sequence, self._saved_sequence, self._document_epoch),
            *identity[1:],
            self._writer,
        ).packed()

    def _name(self, writer: bytes) -> None:
        """Have the mark name its writer, or ``NOBODY``: should this process die then, the next reads all again."""
        mark = unpacked(self._mark_data)
        if mark is not None:
            self._write_mark(mark._replace(writer=writer).packed())

    def _write_mark(self, data: bytes) -> None:
        self._is_mine = False
        self._lock.write(data)
        self._mark_data, self._is_mine = data, True

    def _close_segment(self) -> None:
        segment, self._segment = self._segment, None
        if segment is not None:
            segment.close()

    def _let_go(self) -> None:
        if not self._is_unsure and not self._keep_lock:
            self._lock.release()


def _payload_of(plan: _Plan) -> bytes:
    keyed = (journal.keyed_payload_of(keyed.records, keyed.key) for keyed, _ in plan.fresh)
    return journal.payload_of(plan.batch.records) + b"".join(keyed)


def _count(plan: _Plan, delta: Delta, ledger: Ledger, limits: Limits) -> None:
    """Count a plan's records into a delta, in the order of the journal."""
    if plan.batch.folded is not None:
        delta.absorb(plan.batch.folded, ledger, limits)
    delta.add_all(plan.batch.records, ledger, limits)
    for keyed, _ in plan.fresh:
        delta.add_all(keyed.records, ledger, limits)


def _keep_newest_tails(path: str) -> None:
    """Whoever is killed again and again fills no disk with what nobody was promised."""
    tails = [name for name in filesystem.with_suffix(path, ".journal.") if ".torn-" in name]
    for name in sorted(tails, key=filesystem.modified_ns)[:-_MOST_TAILS]:
        filesystem.discard(name)


def _opened_lock(path: str) -> StoreLock:
    try:
        if filesystem.is_directory(path):
            raise StoreError(f"{path}: is a directory; name a file in it, such as {path}/proxy_savings.json")
        return StoreLock(path)
    except FileNotFoundError:
        directory = os.path.dirname(path)
        raise StoreError(f"{path}: the directory does not exist; make it first: mkdir -p {directory}") from None
    except OSError as error:
        raise _cannot("use", path, error) from None


def _cannot(do: str, path: str, error: OSError) -> StoreError:
    reason = error.strerror or str(error)
    return StoreError(f"{path}: cannot {do} the store: {reason} ({error_symbol(error)}) on {error.filename or path}")
