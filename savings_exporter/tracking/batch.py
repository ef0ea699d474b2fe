"""Records on their way: accepted together, sealed as one frame, durable together."""

from __future__ import annotations

import threading
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
"""A commit is linked to at most so many spans of its records, as many as OpenTelemetry keeps."""

_HANDOVER_SECONDS = 1.0

# So few at a time take some milliseconds: the caller may be an event loop.
_FOLDED_AT_ONCE = 500


class Entry(NamedTuple):
    """Records that were accepted by one call. ``last`` is the place of the last one in the batch, from 1.

    ``key`` and ``fingerprint`` are empty without an idempotency key. ``sums`` stand for entries that were folded.
    """

    last: int
    records: Sequence[SavingsRecord]
    key: bytes = b""
    fingerprint: bytes = b""
    sums: tuple[Row, ...] = ()

    def group(self) -> Group:
        """The entry as a frame holds it."""
        if self.key:
            return Group(records=self.records, key=self.key.hex(), print=self.fingerprint.hex(), at=self.last)
        return Group(records=self.records, sums=self.sums)


class Batch:
    """Records that become durable together, in the order in which they were accepted.

    Each change is one assignment or one call of a list's method, so an interrupt leaves the state before or after it.
    """

    __slots__ = (
        *("entries", "writer", "first", "frame", "is_over", "links", "is_led", "futures", "has_keys"),
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
        self.has_keys = False
        self.futures: set[asyncio.Future[None]] = set()
        self._followers: deque[threading.Lock] = deque()
        # Of locks rather than an event: an event's own lock may be held by the thread that a signal interrupts.
        self._waiting: deque[threading.Lock] = deque()
        self._entered = entered
        self._unfolded = 0

    @property
    def count(self) -> int:
        """How many records it holds."""
        return self.entries[-1].last if self.entries else 0

    @property
    def tokens(self) -> int:
        """What compression saved in them, in tokens."""
        return sum(
            sum(record.tokens_saved for record in entry.records) + sum(row.counts[0] for row in entry.sums)
            for entry in self.entries
        )

    def holds(self, key: bytes) -> bool:
        """Whether records with this key are in it: an interrupt may have come before they were added."""
        return any(entry.key == key for entry in self.entries)

    @property
    def durable(self) -> bool:
        """Whether the records survive a power loss from now on."""
        return self.first is not None

    def add(self, records: Sequence[SavingsRecord], key: bytes = b"", fingerprint: bytes = b"") -> int:
        """Accept records; the place of the last one."""
        entries = self.entries
        last = len(records) + (entries[-1].last if entries else 0)
        if key:
            self.has_keys = True
        else:
            self._unfolded += len(records)
        entries.append(Entry(last, records, key, fingerprint))
        return last

    def link(self, span: Span) -> None:
        """Link the commit to a record's span."""
        if len(self.links) < MOST_LINKS:
            self.links.append(span.get_span_context())

    def groups(self) -> list[Group]:
        """The entries as a frame holds them; those without a key together."""
        entries = self.entries
        if self.has_keys or entries[0].sums:
            return [entry.group() for entry in entries]
        if len(entries) == 1:
            return [Group(records=entries[0].records)]
        return [Group(records=[record for entry in entries for record in entry.records])]

    def fold(self, most_unfolded: int, most_rows: int) -> None:
        """Keep only the sums of the oldest records without a key, so that memory has a bound while a disk fails."""
        if self._unfolded <= most_unfolded:
            return
        unfolded = sum(len(entry.records) for entry in self.entries if not entry.key)
        sums, kept = Sums(most_rows), []
        for entry in self.entries:
            if entry.key or unfolded <= most_unfolded - _FOLDED_AT_ONCE:
                kept.append(entry)
            else:
                sums.add_rows(entry.sums)
                sums.add_all(entry.records)
                unfolded -= len(entry.records)
        # The last entry says how many records there are.
        self.entries = [Entry(self.count if not kept else 0, (), sums=tuple(sums.rows())), *kept]
        self._unfolded = unfolded

    # Waiting for the commit.

    def follow(self) -> threading.Lock:
        """A lock that is released when the batch's commit has ended."""
        turn = threading.Lock()
        turn.acquire()
        self._followers.append(turn)
        return turn

    def await_commit(self, turn: threading.Lock) -> None:
        """Wait until the batch's commit has ended, and then release the next one that waits."""
        try:
            # Looked at again from time to time: an interrupt may have come before the release.
            while not turn.acquire(True, _HANDOVER_SECONDS) and not (self.is_over or self.durable):
                pass
            self.release_next()
        except BaseException:
            try:
                self._followers.remove(turn)
            except ValueError:
                # It was this thread's turn, so it is up to this thread to release the next one.
                self.release_next()
            raise

    def release_next(self) -> None:
        """Release one thread that waits; it releases the next."""
        if self._followers:
            with suppress(IndexError):  # another thread may be as fast
                self._followers.popleft().release()

    def wait(self, timeout: float | None) -> bool:
        """Wait until it is durable or given up. A signal handler within a call of its own thread does not wait."""
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
        """A commit has ended, well or badly: release those who wait for it."""
        if self.futures:
            futures = self.futures.copy()
            _finish_all(futures)
            self.futures -= futures
        self.release_next()

    def end(self) -> None:
        """It is durable, or given up: only its receipts are needed any more."""
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
    """Set futures that still wait. Called in their event loop."""
    for future in futures:
        if not future.done():
            future.set_result(None)
