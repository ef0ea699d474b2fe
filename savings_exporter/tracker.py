"""``SavingsTracker``: records from any number of threads and tasks, committed together, durable when acknowledged.

Records that wait at the same moment share one commit. A thread that finds nobody leading leads a commit for itself;
those that come meanwhile wait for the next one, which a background thread leads, as it does for tasks, for records that
nobody waits for and, with a backoff, while the disk is failing. It saves the document from time to time, too.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import math
import multiprocessing.process
import multiprocessing.util
import os
import queue
import threading
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec
import platformdirs
from opentelemetry.trace import Span, get_current_span

from savings_exporter.errors import StoreError
from savings_exporter.idempotency import MAX_KEYS, checked_key
from savings_exporter.records import Receipt, SavingsRecord
from savings_exporter.storage import filesystem
from savings_exporter.storage.batch import Batch, Keyed
from savings_exporter.storage.steps import Observers, error_symbol
from savings_exporter.storage.store import Store
from savings_exporter.telemetry.metrics import StoreMetrics
from savings_exporter.telemetry.tracing import StoreTracing
from savings_exporter.totals import Limits, Pair, Totals

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

logger = logging.getLogger(__name__)

DOCUMENT_NAME = "proxy_savings.json"

# Of more records than this that wait, only the sums are kept. A frame of so many is some megabytes.
_MOST_UNFOLDED = 10_000

# So few at a time are some milliseconds: whoever's record crosses the limit may be an event loop.
_FOLDED_AT_ONCE = 500

# More records than this are taken on in a thread by the async face.
_MANY_RECORDS = 100

# A commit is linked to the spans of at most so many of its records, which is what OpenTelemetry keeps.
_MOST_LINKS = 128

_LONGEST_HANDOVER_SECONDS = 1.0

_FIRST_RETRY_SECONDS = 0.1
_LONGEST_RETRY_SECONDS = 30.0


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What is durable at one moment, and how much is still on its way.

    ``sequence`` counts the records in it. ``store_id`` names the store: once it is saved, for good and wherever it is.
    ``pending_records`` and ``pending_tokens`` (the ``tokens_saved`` of those records) are accepted and not durable yet,
    so they are not part of the totals.
    """

    sequence: int
    store_id: str
    lifetime: Totals
    by_model: Mapping[str, Totals]
    projects: Mapping[str, Totals]
    by_provider_model: Mapping[Pair, Totals]
    history: tuple[Mapping[str, Any], ...]
    saved_at: datetime | None
    document_bytes: int
    journal_bytes: int = 0
    pending_records: int = 0
    pending_tokens: int = 0


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """Whether saving works. ``reason`` says in words why not; ``error`` is the errno's symbol."""

    healthy: bool
    reason: str | None = None
    error: str | None = None
    pending_records: int = 0
    pending_tokens: int = 0


class SavingsTracker:
    """Keeps the savings of one store. Any number of processes may have a tracker on it, forked copies included.

    Args:
        path: the document; by default ``proxy_savings.json`` in the user's state directory, which is made if needed.
        save_interval: seconds after which what was committed to the journal is saved in the document, too. A record is
            durable without that; those who read the document alone are behind by so much.
        max_models: how many models (and pairs of provider and model) are told apart; further ones become ``other``.
            Give all processes on a store the same limits: each applies its own to what is in the journal.
        max_projects: the same for projects.
        tracer_provider: where spans go; by default OpenTelemetry's global provider.

    Raises:
        StoreError: the store cannot be used (CorruptStoreError: it is damaged; NewerSchemaError: a newer program
            wrote it). A disk that only fails to save does not raise: the tracker starts degraded and goes on trying.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        save_interval: float = 5.0,
        max_models: int = 200,
        max_projects: int = 200,
        tracer_provider: TracerProvider | None = None,
    ) -> None:
        for name, limit in (("max_models", max_models), ("max_projects", max_projects)):
            if isinstance(limit, bool) or not isinstance(limit, int):
                raise TypeError(f"{name} must be an integer, not {type(limit).__name__}")
            if limit < 1:
                raise ValueError(f"{name} must be at least 1, got {limit}")
        if not save_interval > 0:
            raise ValueError(f"save_interval must be more than 0 seconds, got {save_interval}")
        self._path = os.path.expanduser(path) if path is not None else _made_default_path()
        self._save_interval = save_interval
        self._limits = Limits(max_models=max_models, max_projects=max_projects)
        self._tracing = StoreTracing(tracer_provider)
        self._observe()
        self._store = Store(os.fspath(self._path), self._observers, self._limits)
        self._closing = False
        self._closed = False
        self._begin()
        if self._store.must_save:
            self.save()
        atexit.register(self.close)
        _trackers.add(self)

    def _observe(self) -> None:
        self._metrics = StoreMetrics()
        self._observers = Observers([self._tracing, self._metrics])

    def _begin(self) -> None:
        """The state of a process that has recorded nothing yet."""
        # Guards everything below; never held while the disk is at work.
        self._mutex = self._store.changing
        # Which thread commits or saves: the one whose identifier this is, and only that one gives it up.
        self._leader: int | None = None
        self._queue: list[tuple[int, threading.Lock]] = []
        # What the leader is committing, or failed to commit; and what is taken on meanwhile.
        self._sealed: _Batch | None = None
        self._open = _Batch(self._mutex)
        self._pending_keys: dict[str, _Expected] = {}
        self._failure: BaseException | None = None
        self._save_failure: BaseException | None = None
        self._failed_step = ""
        self._retries = 0
        self._retry_at = 0.0
        self._save_at: float | None = None
        self._bell = _Bell()
        self._wakes_at = math.inf
        self._thread: threading.Thread | None = None

    def record_request(
        self,
        *,
        model: str,
        tokens_saved: int,
        input_tokens: int = 0,
        tool_search_saved: int = 0,
        output_tokens_saved: int = 0,
        output_tokens: int = 0,
        provider: str | None = None,
        agent: str | None = None,
        project: str | None = None,
        cache_read_tokens: int = 0,
        cache_write_tokens: int = 0,
        uncached_input_tokens: int = 0,
        timestamp: datetime | str | None = None,
        savings_usd: float | None = None,
        input_cost_usd: float | None = None,
        idempotency_key: str | None = None,
        wait: bool = True,
    ) -> Receipt:
        """Record what one request saved; the arguments are those of ``SavingsRecord``.

        Returns when the record is durable, or as soon as it is clear that it cannot be now: the receipt says which.
        With ``wait=False`` it returns at once, and the receipt becomes durable later. Storage faults never raise.

        ``idempotency_key`` (1 to 255 characters) names the record for those who may send it again: of all records with
        one key, among the last 100,000 that had any, the first is counted, and all get its receipt.

        Raises:
            TypeError, ValueError: an argument is wrong; nothing was recorded.
            RuntimeError: the tracker is closed.
        """
        record = SavingsRecord(
            model=model,
            tokens_saved=tokens_saved,
            input_tokens=input_tokens,
            tool_search_saved=tool_search_saved,
            output_tokens_saved=output_tokens_saved,
            output_tokens=output_tokens,
            provider=provider,
            agent=agent,
            project=project,
            cache_read_tokens=cache_read_tokens,
            cache_write_tokens=cache_write_tokens,
            uncached_input_tokens=uncached_input_tokens,
            timestamp=timestamp,  # type: ignore[arg-type]  # a string is parsed, and refused with the field's name
            savings_usd=savings_usd,
            input_cost_usd=input_cost_usd,
        )
        return self._record((record,), idempotency_key, wait=wait)

    def record_many(
        self, records: Iterable[SavingsRecord], *, idempotency_key: str | None = None, wait: bool = True
    ) -> Receipt:
        """Record several savings, all of them or none; the receipt is the last one's. As ``record_request`` else.

        Raises:
            ValueError: there is no record.
        """
        return self._record(_checked(records), idempotency_key, wait=wait)

    async def record_request_async(self, **arguments: Any) -> Receipt:
        """``record_request`` for a task: the same arguments and receipt, and the event loop is never blocked."""
        wait, key = arguments.pop("wait", True), arguments.pop("idempotency_key", None)
        return await self.record_many_async([_record_of(arguments)], idempotency_key=key, wait=wait)

    async def record_many_async(
        self, records: Iterable[SavingsRecord], *, idempotency_key: str | None = None, wait: bool = True
    ) -> Receipt:
        """``record_many`` for a task."""
        checked, loop = _checked(records), asyncio.get_running_loop()
        ended = loop.create_future() if wait else None
        if len(checked) > _MANY_RECORDS:
            receipt = await asyncio.to_thread(self._take_on, checked, idempotency_key, ended)
        else:
            receipt = self._take_on(checked, idempotency_key, ended)
        if ended is not None:
            await ended
        return receipt

    def snapshot(self) -> Snapshot:
        """The durable totals now, with what other processes recorded."""
        self._store.refresh()
        with self._mutex:
            state = self._store.state
            pending_records, pending_tokens = self._pending()
        ledger = state.ledger
        return Snapshot(
            sequence=ledger.sequence,
            store_id=state.store_id,
            lifetime=ledger.lifetime,
            by_model=dict(ledger.by_model),
            projects=dict(ledger.projects),
            by_provider_model=dict(ledger.by_provider_model),
            history=ledger.history,
            saved_at=state.saved_at,
            document_bytes=state.document_bytes,
            journal_bytes=state.journal_bytes,
            pending_records=pending_records,
            pending_tokens=pending_tokens,
        )

    def health(self) -> Health:
        """Whether committing and saving work, and if not, why."""
        with self._mutex:
            pending_records, pending_tokens = self._pending()
            failure = self._failure or self._save_failure
            if failure is None:
                return Health(healthy=True, pending_records=pending_records, pending_tokens=pending_tokens)
            return Health(
                healthy=False,
                reason=self._reason(),
                error=error_symbol(failure),
                pending_records=pending_records,
                pending_tokens=pending_tokens,
            )

    @property
    def store_metrics(self) -> StoreMetrics:
        """What happened to each commit and save of this process, until now."""
        self._observers.tell()
        return self._metrics

    @property
    def observers(self) -> Observers:
        """Who is told of this process's commits and saves."""
        return self._observers

    @property
    def storage_path(self) -> str:
        """The document's path, as given."""
        return self._path

    def save(self) -> bool:
        """Save the document now, with what is pending, also while the disk is failing. Returns whether it is durable.

        Raises:
            RuntimeError: the tracker is closed.
        """
        self._check_open()
        if self._leads():
            return False
        try:
            self._take_lead()
            self._lead(get_current_span(), save=True)
        except BaseException:
            self._resign()
            raise
        with self._mutex:
            return self._failure is None and self._save_failure is None

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything recorded before is durable, ``timeout`` seconds at most (None: as long as it takes).

        The spans of what was committed by then are made, too; else that may take until the next commit or save.

        Returns:
            Whether it is.
        """
        with self._mutex:
            last = self._open if self._open.count else self._sealed
        if last is not None:
            self._bell.ring()
            last.wait(timeout)
        self._observers.tell()
        return last is None or last.durable

    def close(self) -> bool:
        """Commit what is pending, once, save the document, and stop. Receipts that are not durable then stay so.

        In a signal handler that interrupts a commit of the same thread it can do nothing, and returns False: the
        process's end closes the tracker again.

        Returns:
            Whether everything recorded is durable. What is not is lost with the process, and logged.
        """
        self._closing = True
        if self._leads():
            return False
        try:
            self._take_lead()
            if not self._closed:
                self._close()
        finally:
            self._resign()
        with self._mutex:
            return not self._pending()[0]

    def __enter__(self) -> SavingsTracker:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _close(self) -> None:
        try:
            with self._mutex:
                is_saved = not self._store.unsaved and not self._open.count and self._sealed is None
            if not is_saved:
                self._commit_and_save(get_current_span())
            self._observers.tell()
            with self._mutex:
                self._closed = True
                for batch in (self._sealed, self._open):
                    if batch is not None and not batch.durable:
                        batch.abandon()
                pending_records, pending_tokens = self._pending()
                reason = self._reason() if self._failure else ""
        finally:
            self._resign()
        self._bell.ring()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        atexit.unregister(self.close)
        _trackers.discard(self)
        self._store.close()
        if pending_records:
            logger.error(
                "%s: closed with %d records (%d tokens saved) that are lost: %s",
                *(self._path, pending_records, pending_tokens, reason),
            )

    def _record(self, records: Sequence[SavingsRecord], key: Any, *, wait: bool) -> Receipt:
        key = checked_key(key)
        me, mine, span = threading.get_ident(), None, get_current_span()
        is_nested = self._leads()
        try:
            with self._mutex:
                receipt = self._accept(records, key, span)
                # Below a signal handler that interrupts a commit of this thread, nobody would end the wait.
                if not wait or receipt.durable or self._failure is not None or is_nested:
                    self._bell.ring()
                    return receipt
                if self._leader is None:
                    self._leader = me
                else:
                    mine = self._open.follow()
            if mine is None:
                self._lead(span)
            else:
                mine.acquire()
            return receipt
        except BaseException:
            with self._mutex:
                self._open.recount()
                self._drop_keys_of_nothing()
            if mine is None and self._leader == me and not is_nested:
                # Interrupted between taking the lead and giving it up.
                self._resign()
            raise

    def _take_on(self, records: Sequence[SavingsRecord], key: Any, ended: asyncio.Future[None] | None) -> Receipt:
        """Take records on for the background thread; ``ended`` is done when a commit that carried them has ended."""
        key, span = checked_key(key), get_current_span()
        with self._mutex:
            receipt = self._accept(records, key, span)
            if ended is not None:
                if receipt.durable or self._failure is not None:
                    ended.get_loop().call_soon_threadsafe(_finish, [ended])
                else:
                    self._open.futures.append(ended)
        self._bell.ring()
        return receipt

    def _accept(self, records: Sequence[SavingsRecord], key: str | None, span: Span) -> Receipt:
        """Add records to the open batch. Called with the mutex held."""
        self._check_open()
        if self._thread is None:
            self._start_thread()
        if key is not None and len(self._pending_keys) < MAX_KEYS:
            # Of more keys than are known at all, none is kept: this happens only after a very long failure.
            return self._accept_keyed(records, key, span)
        batch = self._open
        position = batch.add(records)
        if span.is_recording():
            batch.link(span)
        if len(batch.records) > _MOST_UNFOLDED:
            batch.fold(max(len(records), _FOLDED_AT_ONCE), self._store.ledger, self._limits)
        return Receipt(batch, position)

    def _accept_keyed(self, records: Sequence[SavingsRecord], key: str, span: Span) -> Receipt:
        expected = self._pending_keys.get(key)
        if expected is None:
            keyed = Keyed(key, records)
            keyed.sequence = self._store.sequence_of(key)
            expected = _Expected(keyed, self._open)
            if keyed.sequence is None:
                self._pending_keys[key] = expected
                self._open.add_keyed(keyed)
                if span.is_recording():
                    self._open.link(span)
        return Receipt(expected, 0)

    def _drop_keys_of_nothing(self) -> None:
        """After an interrupt between noting a key and taking on its records: its repeat is no repeat."""
        kept = {id(keyed) for batch in (self._sealed, self._open) if batch is not None for keyed in batch.keyed}
        self._pending_keys = {key: known for key, known in self._pending_keys.items() if known.is_one_of(kept)}

    def _check_open(self) -> None:
        if self._closing:
            raise RuntimeError(f"the tracker of {self._path} is closed")

    def _leads(self) -> bool:
        """Whether this thread is the leader already, or takes records on: then this is a signal handler within that."""
        return self._leader == threading.get_ident() or self._mutex._is_owned()  # type: ignore[attr-defined]

    def _take_lead(self) -> None:
        """Become the leader, after whoever is."""
        me = threading.get_ident()
        turn = None
        try:
            with self._mutex:
                if self._leader is None:
                    self._leader = me
                    return
                turn = _taken_lock()
                self._queue.append((me, turn))
            # Looked at again from time to time: an interrupt may come between naming a leader and waking it.
            while not turn.acquire(timeout=_LONGEST_HANDOVER_SECONDS) and self._leader != me:
                pass
            with self._mutex:
                self._queue.remove((me, turn))
        except BaseException:
            with self._mutex:
                self._queue = [waiting for waiting in self._queue if waiting[1] is not turn]
                if self._leader == me:
                    self._resign()
            raise

    def _lead(self, span: Span | None, *, save: bool = False) -> None:
        """Commit what waits and, if asked and if that worked, save the document; below a span. The lead is given up at
        the end.
        """
        try:
            if save:
                self._commit_and_save(span)
            else:
                self._commit(span)
        finally:
            self._resign()

    def _commit_and_save(self, span: Span | None) -> None:
        self._commit(span)
        # If it was what had failed before, there is what was taken on since.
        if self._failure is None:
            self._commit(span)
        if self._failure is None:
            self._save(span)

    def _commit(self, span: Span | None) -> None:
        """Commit the batch that failed before, or all that is taken on now."""
        with self._mutex:
            if self._sealed is None:
                if not self._open.count:
                    return
                self._sealed, self._open = self._open, _Batch(self._mutex)
            batch = self._sealed
        try:
            self._store.commit(batch, span)
        except Exception as failure:
            self._commit_failed(batch, failure)
        else:
            self._committed(batch)

    def _committed(self, batch: _Batch) -> None:
        with self._mutex:
            was_failing, self._failure, self._retries = self._failure is not None, None, 0
            if self._store.is_saved:
                # It went by the document.
                self._save_failure, self._save_at = None, None
            for keyed in batch.keyed:
                self._pending_keys.pop(keyed.key, None)
            batch.end()
            # Last: until then, who was interrupted here does all of it again.
            self._sealed = None
        if was_failing:
            logger.info("%s: committing works again; %d records are durable now", self._path, batch.count)

    def _commit_failed(self, batch: _Batch, failure: Exception) -> None:
        with self._mutex:
            self._failure, self._failed_step = failure, self._store.failed_step
            self._open.release()
            batch.release()
            delay = self._back_off()
            reason = self._reason()
        logger.error("%s; trying again in %.1f s", reason, delay)

    def _save(self, span: Span | None) -> None:
        try:
            self._store.save(span)
        except Exception as failure:
            with self._mutex:
                self._save_failure, self._failed_step = failure, self._store.failed_step
                delay = self._back_off()
                self._save_at = self._retry_at
                reason = self._reason()
            logger.error("%s; trying again in %.1f s", reason, delay)
        else:
            with self._mutex:
                was_failing, self._save_failure, self._retries = self._save_failure is not None, None, 0
                self._save_at = None
            if was_failing:
                logger.info("%s: saving works again", self._path)

    def _resign(self) -> None:
        """Give up the lead, also when an interrupt comes between, and have the background thread do what is left."""
        try:
            self._give_up_the_lead()
        except BaseException:
            self._give_up_the_lead()
            raise

    def _give_up_the_lead(self) -> None:
        if self._leader != threading.get_ident():
            return
        with self._mutex:
            if self._sealed is not None and self._sealed.durable:
                # An interrupt came between the commit and taking note of it.
                self._committed(self._sealed)
            if self._save_failure is None:
                if self._store.is_full:
                    self._save_at = 0.0
                elif self._save_at is None and self._store.unsaved:
                    self._save_at = time.monotonic() + self._save_interval
            if self._queue:
                # Handed over, because a thread that records all the time would be faster each time. Who is named takes
                # itself off the queue, so that no interrupt can lose it in between.
                self._leader, turn = self._queue[0]
                turn.release()
                return
            self._leader = None
            if self._due_at() < self._wakes_at:
                self._wakes_at = 0.0
                self._bell.ring()

    def _back_off(self) -> float:
        delay = min(_FIRST_RETRY_SECONDS * 2.0**self._retries, _LONGEST_RETRY_SECONDS)
        self._retries = min(self._retries + 1, 30)
        self._retry_at = time.monotonic() + delay
        return delay

    def _reason(self) -> str:
        failure = self._failure or self._save_failure
        what = getattr(failure, "strerror", None) or str(failure)
        if self._failure is None:
            outcome = "the document could not be saved"
            rest = "what was recorded is durable in the journal"
        else:
            outcome = "could not be saved"
            pending_records, pending_tokens = self._pending()
            rest = f"{pending_records} records ({pending_tokens} tokens saved) are not durable"
        symbol = error_symbol(failure) if failure else ""
        return f"{self._path}: {outcome}: {self._failed_step} failed: {what} ({symbol}); {rest}"

    def _pending(self) -> tuple[int, int]:
        batches = [batch for batch in (self._sealed, self._open) if batch is not None and not batch.durable]
        return sum(batch.count for batch in batches), sum(batch.tokens for batch in batches)

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._work, name="savings-exporter", daemon=True)
        thread.start()
        self._thread = thread
        if multiprocessing.process.parent_process() is not None:
            # Such a process ends without running what is registered to be run at its exit.
            multiprocessing.util.Finalize(self, self.close, exitpriority=0)

    def _work(self) -> None:
        """Lead what nobody else does, until the tracker is closed."""
        while not self._closed:
            with self._mutex:
                self._wakes_at = self._due_at()
            pause = self._wakes_at - time.monotonic()
            self._bell.wait(max(pause, 0.0) if pause < math.inf else None)
            self._observers.tell()
            if self._due_at() <= time.monotonic() and not self._closing:
                try:
                    self._take_lead()
                    self._lead_in_background()
                except Exception:
                    # Such as no memory. Who waits for a lead that nobody gives up waits for ever.
                    self._resign()
                    logger.exception("%s: the background thread failed and goes on", self._path)
                    time.sleep(_FIRST_RETRY_SECONDS)

    def _lead_in_background(self) -> None:
        save = self._save_at is not None and self._save_at <= time.monotonic()
        if save:
            # Another process may have saved meanwhile.
            self._store.refresh()
            if not self._store.unsaved:
                save, self._save_at = False, None
        self._lead(None, save=save)

    def _due_at(self) -> float:
        """When the background thread has something to do next, on the monotonic clock."""
        if self._failure is not None:
            return self._retry_at
        if self._leader is None and (self._open.count or self._sealed is not None):
            return 0.0
        return self._save_at if self._save_at is not None else math.inf

    def _begin_in_fork(self) -> None:
        """Begin anew in a forked copy. What was pending is the parent's."""
        self._observe()
        self._store.reopen_after_fork(self._observers)
        self._begin()


_trackers: weakref.WeakSet[SavingsTracker] = weakref.WeakSet()


def _begin_in_fork() -> None:
    for tracker in tuple(_trackers):
        tracker._begin_in_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_in_fork)


class _Bell:
    """Wakes the background thread. A signal handler may ring it while the same thread does, unlike an event's."""

    def __init__(self) -> None:
        self._rings: queue.SimpleQueue[None] = queue.SimpleQueue()

    def ring(self) -> None:
        if self._rings.empty():
            self._rings.put(None)

    def wait(self, timeout: float | None) -> None:
        """Wait until it has been rung since the last time."""
        with suppress(queue.Empty):
            self._rings.get(timeout=timeout)
            while True:
                self._rings.get_nowait()


class _Batch(Batch):
    """A batch, and who waits for it."""

    def __init__(self, mutex: threading.RLock) -> None:
        super().__init__()
        self.futures: list[asyncio.Future[None]] = []
        self._mutex = mutex
        self._followers: list[threading.Lock] = []
        self._over: threading.Event | None = None
        self._abandoned = False

    def sequence_of(self, position: int) -> int | None:
        return None if self.base is None else self.base + position

    def link(self, span: Span) -> None:
        """Have the commit that carries a record linked to that record's span."""
        if len(self.links) < _MOST_LINKS:
            self.links.append(span.get_span_context())

    def wait(self, timeout: float | None) -> bool:
        """Wait until it is durable or given up."""
        with self._mutex:
            if self.durable or self._abandoned:
                return self.durable
            if self._over is None:
                self._over = threading.Event()
        self._over.wait(timeout)
        return self.durable

    # What follows is called with the mutex held.

    def follow(self) -> threading.Lock:
        """A lock that can be taken when the batch's next commit has ended."""
        lock = _taken_lock()
        self._followers.append(lock)
        return lock

    def release(self) -> None:
        """A commit has ended, well or badly: nobody waits for another one."""
        while self._followers:
            lock = self._followers[-1]
            # An interrupt may have come between its release and its leaving the list.
            if lock.locked():
                lock.release()
            self._followers.pop()
        futures, self.futures = self.futures, []
        loops: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
        for future in futures:
            loops.setdefault(future.get_loop(), []).append(future)
        for loop, waiting in loops.items():
            with suppress(RuntimeError):  # the loop may be closed by now
                loop.call_soon_threadsafe(_finish, waiting)

    def end(self) -> None:
        """It is durable, and only its receipts are needed any more."""
        self.release()
        self.records, self.links = [], []
        if self._over is not None:
            self._over.set()

    def abandon(self) -> None:
        """Nobody will try again."""
        self._abandoned = True
        self.release()
        if self._over is not None:
            self._over.set()


class _Expected:
    """What receipts ask for records with a key."""

    def __init__(self, keyed: Keyed, batch: _Batch) -> None:
        self._keyed = keyed
        self._batch = batch

    @property
    def durable(self) -> bool:
        return self._keyed.sequence is not None

    def sequence_of(self, _position: int) -> int | None:
        return self._keyed.sequence

    def is_one_of(self, identities: set[int]) -> bool:
        return id(self._keyed) in identities

    def wait(self, timeout: float | None) -> bool:
        return self.durable or (self._batch.wait(timeout) and self.durable)


def default_path() -> str:
    """The default store, in the user's state directory. Makes nothing."""
    return str(platformdirs.user_state_path("savings-exporter", appauthor=False) / DOCUMENT_NAME)


def _made_default_path() -> str:
    path = default_path()
    try:
        filesystem.make_directories(os.path.dirname(path))
    except OSError as error:
        directory = os.path.dirname(path)
        raise StoreError(f"{directory}: cannot be made: {error.strerror}; name a store with --store PATH") from None
    return path


def _taken_lock() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


def _finish(futures: Iterable[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)


def _checked(records: Iterable[SavingsRecord]) -> tuple[SavingsRecord, ...]:
    checked = tuple(records)
    if not checked:
        raise ValueError("records must not be empty")
    for position, record in enumerate(checked):
        # The journal holds the fields of this type, and no others.
        if type(record) is not SavingsRecord:
            raise TypeError(f"records[{position}] must be a SavingsRecord, not {type(record).__name__}")
    return checked


def _record_of(arguments: dict[str, Any]) -> SavingsRecord:
    return SavingsRecord(**arguments)
