"""Batches of records that are accepted together, sealed as one frame, and durable together."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from opentelemetry.trace import Span, SpanContext

from savings_exporter.formats.frame import Group
from savings_exporter.model.record import SavingsRecord
from savings_exporter.model.totals import Row, Sums
from savings_exporter.storage.journal import Frame
from savings_exporter.tracking.entered import Entered

if TYPE_CHECKING:
    import asyncio

MOST_LINKS = 128
"""The maximum number of record spans that a commit is linked to. OpenTelemetry keeps no more links."""

_HANDOVER_SECONDS = 1.0

# Beyond it, records of a key are added up under "other".
_MOST_ROWS_OF_KEY = 500

# Folding this number of records takes some milliseconds. It must be short, because the caller may be an event loop.
_FOLDED_AT_ONCE = 500


class Entry(NamedTuple):
    """Records that one call added. ``last`` is the position of the last record in the batch, starting at 1.

    ``key`` and ``fingerprint`` are empty without an idempotency key. ``sums`` represent records that were folded.
    ``imported`` is what was imported from a source, in place of records.
    """

    last: int
    records: Sequence[SavingsRecord]
    key: bytes = b""
    fingerprint: bytes = b""
    sums: tuple[Row, ...] = ()
    imported: Group | None = None

    @property
    def is_folded(self) -> bool:
        """Whether the entry holds sums of records without a key."""
        return bool(self.sums) and not self.key

    @property
    def can_be_folded(self) -> bool:
        """Whether the entry takes less memory when its records are added up."""
        return self.imported is None and (not self.key or len(self.records) > 1)

    def group(self) -> Group:
        """The entry as a group of a frame."""
        if self.imported is not None:
            return self.imported
        if self.key:
            key, fingerprint = self.key.hex(), self.fingerprint.hex()
            return Group(records=self.records, sums=self.sums, key=key, print=fingerprint, at=self.last)
        return Group(records=self.records, sums=self.sums)


class Batch:
    """Records that become durable together, in the order in which they were accepted.

    Each change is one assignment or one call of a list's method. An interrupt therefore leaves the state either before
    or after the change.
    """

    __slots__ = (
        *(
            "entries",
            "writer",
            "first",
            "frame",
            "is_over",
            "links",
            "is_led",
            "futures",
            "has_groups",
            "keyed_rows",
            "since",
        ),
        *("_followers", "_waiting", "_entered", "_unfolded"),
    )

    def __init__(self, entered: Entered) -> None:
        self.entries: list[Entry] = []
        self.writer = ""
        self.first: int | None = None
        self.frame: tuple[Frame, list[Group]] | None = None
        self.is_over = False
        self.links: list[SpanContext] = []
        self.is_led = False
        self.since = 0.0
        """When its first record was accepted, in seconds since 1970."""
        self.has_groups = False
        self.keyed_rows = 0
        """How many records and sums of records with keys the batch keeps."""
        self.futures: set[asyncio.Future[None]] = set()
        self._followers: deque[threading.Lock] = deque()
        # These are locks rather than an event, because a signal may interrupt a thread that holds the event's own lock.
        self._waiting: deque[threading.Lock] = deque()
        self._entered = entered
        self._unfolded = 0

    @property
    def count(self) -> int:
        """How many records the batch holds."""
        return self.entries[-1].last if self.entries else 0

    @property
    def tokens(self) -> int:
        """How many tokens compression saved in these records."""
        return sum(
            sum(record.tokens_saved for record in entry.records)
            + sum(row.counts[0] for row in (entry.imported.sums if entry.imported is not None else entry.sums))
            for entry in self.entries
        )

    def holds(self, key: bytes) -> bool:
        """Whether the batch holds records with this key. An interrupt may have come before they were added."""
        return any(entry.key == key for entry in self.entries)

    @property
    def durable(self) -> bool:
        """Whether the records survive a power loss from now on."""
        return self.first is not None

    def add(self, records: Sequence[SavingsRecord], key: bytes = b"", fingerprint: bytes = b"") -> int:
        """Add records. Returns the position of the last one."""
        entries = self.entries
        last = len(records) + (entries[-1].last if entries else 0)
        if key:
            self.has_groups = True
            self.keyed_rows += len(records)
        if not key or len(records) > 1:
            self._unfolded += len(records)
        if not entries:
            self.since = time.time()
        entries.append(Entry(last, records, key, fingerprint))
        return last

    def add_imported(self, group: Group) -> int:
        """Add what was imported from a source. Returns the position of its last record."""
        last = group.count + self.count
        self.has_groups = True
        if not self.entries:
            self.since = time.time()
        self.entries.append(Entry(last, (), imported=group))
        return last

    def link(self, span: Span) -> None:
        """Link the commit to a record's span."""
        if len(self.links) < MOST_LINKS:
            self.links.append(span.get_span_context())

    def groups(self) -> list[Group]:
        """The groups for the frame. If all entries hold only records, they form one group."""
        entries = self.entries
        if self.has_groups:
            return [entry.group() for entry in entries]
        if len(entries) == 1:
            return [Group(records=entries[0].records)]
        return [Group(records=[record for entry in entries for record in entry.records])]

    def fold(self, most_unfolded: int, most_rows: int) -> None:
        """Replace the oldest records by their sums, so that memory is bounded while a disk fails. Records with a key
        have sums of their own, because a key that another process records, too, counts once.
        """
        if self._unfolded <= most_unfolded:
            return
        unfolded = sum(len(entry.records) for entry in self.entries if entry.can_be_folded)
        sums, kept = Sums(most_rows), []
        for entry in self.entries:
            if entry.is_folded:
                sums.add_rows(entry.sums)
            elif unfolded <= most_unfolded - _FOLDED_AT_ONCE or not entry.can_be_folded:
                kept.append(entry)
            elif entry.key:
                unfolded -= len(entry.records)
                kept.append(self._folded(entry))
            else:
                sums.add_all(entry.records)
                unfolded -= len(entry.records)
        if folded := tuple(sums.rows()):
            # At the end, because the last entry's ``last`` is the number of records in the batch.
            kept.append(Entry(self.count, (), sums=folded))
            self.has_groups = True
        self.entries = kept
        self._unfolded = unfolded

    def _folded(self, entry: Entry) -> Entry:
        sums = Sums(_MOST_ROWS_OF_KEY)
        sums.add_all(entry.records)
        rows = tuple(sums.rows())
        self.keyed_rows += len(rows) - len(entry.records)
        return entry._replace(records=(), sums=rows)

    # Waiting for the commit.

    def follow(self) -> threading.Lock:
        """A lock that is released when the batch's commit has ended."""
        turn = threading.Lock()
        turn.acquire()
        self._followers.append(turn)
        return turn

    def await_commit(self, turn: threading.Lock) -> None:
        """Wait until the batch's commit has ended, and then release the next waiting thread."""
        try:
            # The state is checked regularly, because an interrupt may have come before the release.
            while not turn.acquire(True, _HANDOVER_SECONDS) and not (self.is_over or self.durable):
                pass
            self.release_next()
        except BaseException:
            try:
                self._followers.remove(turn)
            except ValueError:
                # This thread was already released, so it must release the next one.
                self.release_next()
            raise

    def release_next(self) -> None:
        """Release one waiting thread, which then releases the next one."""
        if self._followers:
            with suppress(IndexError):  # another thread may be as fast
                self._followers.popleft().release()

    def wait(self, timeout: float | None) -> bool:
        """Wait until the batch is durable or abandoned. A signal handler that interrupts a tracker call of the same
        thread does not wait.
        """
        turn = threading.Lock()
        turn.acquire()
        self._waiting.append(turn)
        try:
            if not (self.durable or self.is_over or self._entered.is_here()):
                turn.acquire(timeout=-1 if timeout is None else max(timeout, 0))
        finally:
            with suppress(ValueError):
                self._waiting.remove(turn)
        return self.durable

    def attempted(self) -> None:
        """Called when a commit has succeeded or failed. Releases the threads and tasks that wait for it."""
        if self.futures:
            futures = self.futures.copy()
            _finish_all(futures)
            self.futures -= futures
        self.release_next()

    def end(self) -> None:
        """Called when the batch is durable or abandoned. From then on, only its receipts are needed."""
        self.is_over = True
        if self._waiting:
            for turn in self._waiting.copy():
                with suppress(RuntimeError):  # an interrupted call of this method has released it
                    turn.release()
        if self.durable:
            self.entries, self.links, self.frame = [Entry(self.count, ())], [], None


def _finish_all(futures: Iterable[asyncio.Future[None]]) -> None:
    loops: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for future in futures:
        loops.setdefault(future.get_loop(), []).append(future)
    for loop, waiting in loops.items():
        with suppress(RuntimeError):  # the loop may be closed by now
            loop.call_soon_threadsafe(finish, waiting)


def finish(futures: Iterable[asyncio.Future[None]]) -> None:
    """Complete the futures that are still pending. Called in their event loop."""
    for future in futures:
        if not future.done():
            future.set_result(None)
