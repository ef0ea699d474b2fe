"""Group commit: records that wait at the same time share one frame.

The thread of the first record in a batch is the *leader*. It takes the commit lock, seals the batch, commits it and
releases the *followers*, each of which waits on its own lock. The leader releases one follower, and each follower
releases the next one. The committing thread in the background leads a batch if its first record belongs to a task or is
not waited for. It also leads retries.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from opentelemetry.trace import INVALID_SPAN, Span, get_current_span

from savings_exporter.errors import KeyConflictError
from savings_exporter.formats.frame import Group
from savings_exporter.model.keys import checked_key, digest_of, fingerprint_of
from savings_exporter.model.record import SavingsRecord
from savings_exporter.prices import Prices
from savings_exporter.storage.operation import PREPARE, error_symbol
from savings_exporter.storage.store import Committed, Failed, Store
from savings_exporter.tracking.batch import Batch, finish
from savings_exporter.tracking.entered import Entered, is_owned
from savings_exporter.tracking.receipt import Counted, Receipt, Refused
from savings_exporter.tracking.retry import Retry

if TYPE_CHECKING:
    import asyncio

logger = logging.getLogger(__name__)

# While a disk fails, at most _MOST_UNFOLDED waiting records without a key are kept. Of older ones only the sums are
# kept. _MOST_ROWS limits the number of their rows (see ``Sums``).
_MOST_UNFOLDED = 10_000
_MOST_ROWS = 10_000

# While a disk fails, no more records with a key are accepted when as many of them, or sums of the records of one key,
# are waiting. They cannot be added up across keys, and their sender can send them again.
_MOST_KEYED_ROWS = 10_000


class Batches(NamedTuple):
    """The open batch, which accepts records, and the sealed batch, whose commit is in progress or has failed."""

    open: Batch
    sealed: Batch | None = None


class _Keyed(NamedTuple):
    """An idempotency key and the fingerprint of its records."""

    key: str
    digest: bytes
    fingerprint: bytes


class _Expected(NamedTuple):
    """Pending records with a key: their batch, their position in it, and the fingerprint of their content."""

    batch: Batch
    place: int
    fingerprint: bytes


class GroupCommit:
    """Commits the records of one tracker's threads and tasks.

    ``failure`` is why the last commit failed, or None when it did not fail. ``retry`` says when the next attempt is
    due. ``wake`` wakes the committing thread. ``committed`` is called after each successful commit. ``entered`` says
    whether the current thread is in a call of the tracker. ``prices`` are for records without ``savings_usd``.
    """

    def __init__(
        self, store: Store, wake: Callable[[], None], committed: Callable[[], None], prices: Prices | None
    ) -> None:
        self.failure: Failed | None = None
        self.retry = Retry()
        self.entered = Entered()
        self._store = store
        self._wake = wake
        self._committed = committed
        self._prices = prices
        # Held while batches change, but never during disk I/O.
        self._mutex = threading.RLock()
        # Held by the thread that commits.
        self._committing = threading.RLock()
        self._batches = Batches(Batch(self.entered))
        # Records of signal handlers that interrupted a call of the same thread. Each gets its own batch, because the
        # interrupted call may be changing the open batch.
        self._nested: deque[Batch] = deque()
        self._pending_keys: dict[bytes, _Expected] = {}
        self._was_interrupted = False
        self._is_closed = False

    # Recording.

    def record(self, records: Sequence[SavingsRecord] | Group, key: Any, *, wait: bool) -> Receipt:
        """Accept records, or a group that was imported. With ``wait``, return when a commit with them has ended.

        Raises:
            KeyConflictError: the key was recorded with other content.
            RuntimeError: the tracker is closed.
        """
        entered = self.entered.lock
        is_nested = is_owned(entered)
        with entered:
            keyed = None if key is None or isinstance(records, Group) else self._looked_up(records, key)
            if self._prices is not None and not isinstance(records, Group):
                records = self._prices.priced(records)
            span = get_current_span()
            if is_nested:
                return self._accept_nested(records, keyed, span)
            try:
                return self._recorded(records, keyed, span, wait=wait)
            except BaseException:
                self._note_interrupt()
                raise

    def accept(self, records: Sequence[SavingsRecord], key: Any, ended: asyncio.Future[None] | None) -> Receipt:
        """Accept records for the committing thread. ``ended`` is set when a commit with these records has ended."""
        is_nested = self.entered.is_here()
        with self.entered.lock:
            keyed = None if key is None else self._looked_up(records, key)
            if self._prices is not None:
                records = self._prices.priced(records)
            if is_nested:
                receipt, batch = self._accept_nested(records, keyed, get_current_span()), None
            else:
                with self._mutex:
                    receipt, batch = self._accept(records, keyed, get_current_span())
                    if ended is not None and batch is not None and self.failure is None:
                        batch.futures.add(ended)
                        ended = None
            if ended is not None:
                # There is nothing to wait for, or the time to wait is unknown because commits fail.
                ended.get_loop().call_soon_threadsafe(finish, [ended])
            self._leave_to_background(batch)
            return receipt

    def refuse(self) -> None:
        """Stop accepting records."""
        self._is_closed = True

    # Committing.

    def commit(self, span: Span | None = None) -> None:
        """Commit all waiting batches, including one that failed before, regardless of the retry schedule."""
        with self.entered.lock:
            try:
                with self._committing:
                    self._was_interrupted = False
                    for _ in range(len(self._nested) + 2):
                        batch = self._sealed()
                        if batch is None or not self._commit(batch, span):
                            break
            except BaseException:
                self._note_interrupt()
                raise

    def repair_names(self) -> None:
        """Recreate this process's files if their names were removed, before a save reads them."""
        with self._committing:
            self._store.repair_names()

    def is_waiting(self) -> bool:
        """Whether there are records that no thread except the committing thread will commit."""
        with self._mutex:
            waiting, sealed = self._batches
            is_led = waiting.is_led or not waiting.count
        return self.failure is None and (
            bool(self._nested) or not is_led or (sealed is not None and self._was_interrupted)
        )

    def last(self) -> Batch | None:
        """The batch with the newest records that are not durable; None when all are."""
        waiting = self._waiting()
        return waiting[-1] if waiting else None

    def pending(self) -> tuple[int, int]:
        """How many records are accepted but not durable, and how many tokens they saved."""
        with self.entered.lock, self._mutex:
            waiting = self._waiting()
            return sum(batch.count for batch in waiting), sum(batch.tokens for batch in waiting)

    def pending_since(self) -> datetime | None:
        """When the oldest pending record was accepted."""
        since = min((batch.since for batch in self._waiting()), default=0.0)
        return datetime.fromtimestamp(since, timezone.utc) if since else None

    def abandon(self) -> None:
        """Abandon the records that are not durable. They are not committed any more."""
        with self.entered.lock, self._mutex:
            for batch in self._waiting():
                batch.end()
                batch.attempted()

    def leave_to_parent(self) -> None:
        """Called in a forked child. The parent commits the waiting batches, so their receipts never become durable in
        the child.
        """
        for batch in (*self._batches, *self._nested):
            if batch is not None:
                batch.is_over = True

    def reason(self) -> str:
        """A description of why commits fail."""
        records, tokens = self.pending()
        what = described(self._store.path, "records could not be committed", self.failure)
        return f"{what}; {records} records ({tokens} tokens saved) are not durable"

    def _waiting(self) -> list[Batch]:
        """The batches that hold records and are not durable, in the order of their commits."""
        with self.entered.lock, self._mutex:
            open_batch, sealed = self._batches
            batches = [*([sealed] if sealed is not None else []), *self._nested, open_batch]
            # After an interrupt, a nested batch may also be the sealed one.
            return [batch for batch in dict.fromkeys(batches) if batch.count and not batch.durable]

    def _recorded(
        self, records: Sequence[SavingsRecord] | Group, keyed: _Keyed | None, span: Span, *, wait: bool
    ) -> Receipt:
        turn = None
        with self._mutex:
            receipt, batch = self._accept(records, keyed, span)
            if batch is None or not wait or self.failure is not None:
                self._leave_to_background(batch)
                return receipt
            if len(batch.entries) > 1:
                turn = batch.follow()
            else:
                batch.is_led = True
        if turn is not None:
            batch.await_commit(turn)
        else:
            self._lead(batch, span)
        return receipt

    def _looked_up(self, records: Sequence[SavingsRecord], key: Any) -> _Keyed:
        """Validate a key and compute the fingerprint of its records. Also reads what other processes have recorded.

        The fingerprint is that of the records without prices, because prices may have changed before a retry.
        """
        checked = checked_key(key)
        assert checked is not None
        digest = digest_of(checked)
        self._store.key_entry(digest)
        return _Keyed(checked, digest, fingerprint_of(records))

    def _accept(
        self, records: Sequence[SavingsRecord] | Group, keyed: _Keyed | None, span: Span
    ) -> tuple[Receipt, Batch | None]:
        """Add records to the open batch. The returned batch is None when there is nothing to wait for."""
        if keyed is not None or self._is_closed:
            repeat = self._refused_or_repeat(keyed)
            if repeat is not None:
                return repeat
        batch = self._batches.open
        is_delayed = self.failure is not None or self._batches.sealed is not None
        if keyed is not None and is_delayed and batch.keyed_rows >= _MOST_KEYED_ROWS:
            batch.fold(0, _MOST_ROWS)
            if batch.keyed_rows >= _MOST_KEYED_ROWS:
                return Receipt(Refused(), 1), None
        place = self._add(batch, records, keyed)
        if span is not INVALID_SPAN and span.is_recording():
            batch.link(span)
        if is_delayed:
            batch.fold(_MOST_UNFOLDED, _MOST_ROWS)
        return Receipt(batch, place), batch

    def _accept_nested(self, records: Sequence[SavingsRecord] | Group, keyed: _Keyed | None, span: Span) -> Receipt:
        """Accept records of a signal handler that interrupted a call of the same thread. The committing thread commits
        them.
        """
        repeat = self._refused_or_repeat(keyed)
        if repeat is not None:
            return repeat[0]
        batch = Batch(self.entered)
        place = self._add(batch, records, keyed)
        if span.is_recording():
            batch.link(span)
        self._nested.append(batch)
        self._wake()
        return Receipt(batch, place)

    def _add(self, batch: Batch, records: Sequence[SavingsRecord] | Group, keyed: _Keyed | None) -> int:
        """Add records to a batch. Returns the position of the last one."""
        if isinstance(records, Group):
            return batch.add_imported(records)
        if keyed is None:
            return batch.add(records)
        place = batch.add(records, keyed.digest, keyed.fingerprint)
        self._pending_keys[keyed.digest] = _Expected(batch, place, keyed.fingerprint)
        return place

    def _refused_or_repeat(self, keyed: _Keyed | None) -> tuple[Receipt, Batch | None] | None:
        """The result for a repeat; None when the records are new.

        Raises:
            KeyConflictError: the key was recorded with other content.
            RuntimeError: the tracker is closed.
        """
        if self._is_closed:
            raise RuntimeError(f"the tracker of {self._store.path} is closed")
        return None if keyed is None else self._repeat_of(keyed)

    def _repeat_of(self, keyed: _Keyed) -> tuple[Receipt, Batch | None] | None:
        """The receipt of the earlier records with this key; None when there are none."""
        entry = self._store.view.keys.get(keyed.digest)
        if entry is not None:
            _refuse_other_content(is_same=entry.matches(keyed.fingerprint))
            return Receipt(Counted(entry), 1, duplicate=True), None
        expected = self._pending_keys.get(keyed.digest)
        if expected is None or not expected.batch.holds(keyed.digest):
            return None
        _refuse_other_content(is_same=expected.fingerprint == keyed.fingerprint)
        return Receipt(expected.batch, expected.place, duplicate=True), expected.batch

    def _lead(self, batch: Batch, span: Span) -> None:
        """Commit a batch that this thread leads, and release the threads that wait for it."""
        with self._committing:
            # A batch that an interrupt left behind may come first. While commits fail, this call does not retry.
            while self.failure is None and not batch.is_over:
                sealed = self._sealed()
                if sealed is None or not self._commit(sealed, span):
                    break
        if not batch.is_over:
            batch.attempted()

    def _sealed(self) -> Batch | None:
        """The batch to commit: the one that failed before, or else a nested batch or the open one, which is sealed now.
        A sealed batch accepts no more records.
        """
        with self._mutex:
            batches = self._batches
            if batches.sealed is None and self._nested:
                # Removed only after the assignment. If an interrupt comes in between, the batch is committed twice but
                # written once.
                self._batches = batches._replace(sealed=self._nested[0])
                self._nested.popleft()
            elif batches.sealed is None and batches.open.entries:
                self._batches = Batches(Batch(self.entered), batches.open)
            return self._batches.sealed

    def _commit(self, batch: Batch, span: Span | None) -> bool:
        """Commit a sealed batch. Returns whether this succeeded. It can be repeated after an interrupt at any point."""
        if not batch.durable:
            try:
                result = self._attempt(batch, span)
            except Exception as error:
                result = Failed(PREPARE, error)
            if isinstance(result, Failed):
                self._note_failure(batch, result)
                return False
            self._note_success(batch)
        batch.end()
        batch.attempted()
        self._batches = Batches(self._batches.open)
        return True

    def _attempt(self, batch: Batch, span: Span | None) -> Committed | Failed:
        if batch.frame is None:
            groups = batch.groups()
            if self._prices is not None:
                groups[0] = msgspec.structs.replace(groups[0], prices=self._prices.basis)
            journal = self._store.journal or self._store.own_journal()
            batch.writer = journal.writer.name
            batch.frame = journal.seal(batch.count, groups), groups
        return self._store.commit(batch.frame[0], span, batch.links)

    def _note_success(self, batch: Batch) -> None:
        assert batch.frame is not None
        frame, groups = batch.frame
        was_failing = self.failure is not None
        if was_failing:
            self.failure, self.retry = None, Retry()
        if batch.has_groups:
            self._store.remember(frame, groups)
            with self._mutex:
                for entry in batch.entries:
                    self._pending_keys.pop(entry.key, None)
        batch.first = frame.first
        if was_failing:
            logger.info("%s: commits work again", self._store.path)
        self._committed()

    def _note_failure(self, batch: Batch, failure: Failed) -> None:
        with self._mutex:
            self.failure, self.retry = failure, self.retry.failed(time.monotonic())
        batch.attempted()
        self._batches.open.attempted()
        logger.error("%s; trying again in %.1f s", self.reason(), self.retry.delay)
        self._wake()

    def _note_interrupt(self) -> None:
        """Called after any interrupt or error in a call. The committing thread then commits the waiting records."""
        self._was_interrupted = True
        self._batches.open.is_led = False
        self._wake()

    def _leave_to_background(self, batch: Batch | None) -> None:
        """Let the committing thread commit a batch, unless another thread leads it."""
        if batch is not None and not batch.is_led:
            self._wake()


def described(path: str, what: str, failure: Failed | None) -> str:
    """A description of a failure."""
    if failure is None:
        return f"{path}: {what}"
    error = failure.error
    words = getattr(error, "strerror", None) or str(error)
    symbol = error_symbol(error)
    return f"{path}: {what}: {failure.step} failed: {words} ({symbol})"


def _refuse_other_content(*, is_same: bool) -> None:
    if not is_same:
        raise KeyConflictError("idempotency_key was used before with other content; use a new key for other records")
