"""``SavingsTracker``: records from any number of threads and tasks, saved together, durable when acknowledged.

Records that wait at the same moment share one save. A thread that finds no save running leads one for all that
wait; a background thread leads for tasks, for records that nobody waits for, and, with a backoff, while the disk is
failing. What is not saved yet is folded into one delta, so that waiting costs no memory.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec
import platformdirs

from savings_exporter.errors import StoreError
from savings_exporter.records import Receipt, SavingsRecord
from savings_exporter.storage import filesystem
from savings_exporter.storage.steps import Observers, error_symbol
from savings_exporter.storage.store import Store
from savings_exporter.telemetry.metrics import SaveMetrics
from savings_exporter.telemetry.tracing import SaveTracing
from savings_exporter.totals import Delta, Ledger, Limits, Pair, Totals

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

logger = logging.getLogger(__name__)

DOCUMENT_NAME = "proxy_savings.json"

# More records than this are folded in a thread by the async face: each takes some microseconds.
_MANY_RECORDS = 100

_FIRST_RETRY_SECONDS = 0.1
_LONGEST_RETRY_SECONDS = 30.0


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What is durable at one moment, and how much is still on its way.

    ``sequence`` counts the records in it. ``pending_records`` and ``pending_tokens`` (the ``tokens_saved`` of those
    records) are accepted and not durable yet, so they are not part of the totals.
    """

    sequence: int
    lifetime: Totals
    by_model: Mapping[str, Totals]
    projects: Mapping[str, Totals]
    by_provider_model: Mapping[Pair, Totals]
    history: tuple[Mapping[str, Any], ...]
    saved_at: datetime | None
    document_bytes: int
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
    """Keeps the savings of one store.

    Args:
        path: the document; by default ``proxy_savings.json`` in the user's state directory, which is made if needed.
        save_interval: seconds between saves of the document once records are committed to a journal. There is no
            journal yet and every commit is a save, so it has no effect.
        max_models: how many models (and pairs of provider and model) are told apart; further ones become ``other``.
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
        self._limits = Limits(max_models=max_models, max_projects=max_projects)
        self.save_metrics = SaveMetrics()
        observer = Observers([SaveTracing(tracer_provider), self.save_metrics])
        self._store = Store(os.fspath(self._path), observer, self._limits)

        self._process = os.getpid()
        self._closing = threading.Lock()
        # Guards everything below; never held while the disk is at work.
        self._changed = threading.Condition()
        self._durable = self._store.state
        self._open = _Batch(self._changed)
        self._sealed: _Batch | None = None
        self._saves_begun = 0
        self._saves_ended = 0
        self._failure: BaseException | None = None
        self._retries = 0
        self._retry_at = 0.0
        self._wanted = False
        self._closed = False

        if self._store.exists:
            # What was read may be only in the page cache, left there by a process whose sync failed. A save of its
            # own makes it durable before anything is built on it, and tells at once whether saving works.
            self.save()
        self._thread = threading.Thread(target=self._save_in_background, name="savings-exporter", daemon=True)
        self._thread.start()
        atexit.register(self.close)

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
        wait: bool = True,
    ) -> Receipt:
        """Record what one request saved; the arguments are those of ``SavingsRecord``.

        Returns when the record is durable, or as soon as it is clear that it cannot be now: the receipt says which.
        With ``wait=False`` it returns at once, and the receipt becomes durable later. Storage faults never raise.

        Raises:
            TypeError, ValueError: an argument is wrong; nothing was recorded.
            RuntimeError: the tracker is closed, or was opened before this process was forked.
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
        return self._record((record,), wait=wait)

    def record_many(self, records: Iterable[SavingsRecord], *, wait: bool = True) -> Receipt:
        """Record several savings, all of them or none; the receipt is the last one's. As ``record_request`` else.

        Raises:
            ValueError: there is no record.
        """
        return self._record(_checked(records), wait=wait)

    async def record_request_async(self, **arguments: Any) -> Receipt:
        """``record_request`` for a task: the same arguments and receipt, and the event loop is never blocked."""
        wait = arguments.pop("wait", True)
        return await self.record_many_async([_record_of(arguments)], wait=wait)

    async def record_many_async(self, records: Iterable[SavingsRecord], *, wait: bool = True) -> Receipt:
        """``record_many`` for a task."""
        checked = _checked(records)
        if len(checked) > _MANY_RECORDS:
            delta = await asyncio.to_thread(self._folded, checked)
        else:
            delta = self._folded(checked)
        with self._changed:
            receipt = self._accept(delta)
            self._want_save()
            if not wait or self._failure is not None:
                return receipt
            saved = self._open.saved_or_failed(asyncio.get_running_loop())
        await saved
        return receipt

    def snapshot(self) -> Snapshot:
        """The durable totals now, with what other processes saved."""
        self._store.refresh()
        with self._changed:
            if self._sealed is None:
                self._durable = self._store.state
            # While a save runs its records are still pending, even if it has just succeeded.
            ledger, saved_at, document_bytes = self._durable
            pending_records, pending_tokens = self._pending()
            return Snapshot(
                sequence=ledger.sequence,
                lifetime=ledger.lifetime,
                by_model=dict(ledger.by_model),
                projects=dict(ledger.projects),
                by_provider_model=dict(ledger.by_provider_model),
                history=ledger.history,
                saved_at=saved_at,
                document_bytes=document_bytes,
                pending_records=pending_records,
                pending_tokens=pending_tokens,
            )

    def health(self) -> Health:
        """Whether saving works, and if not, why."""
        with self._changed:
            pending_records, pending_tokens = self._pending()
            if self._failure is None:
                return Health(healthy=True, pending_records=pending_records, pending_tokens=pending_tokens)
            return Health(
                healthy=False,
                reason=self._reason(self._failure),
                error=error_symbol(self._failure),
                pending_records=pending_records,
                pending_tokens=pending_tokens,
            )

    @property
    def storage_path(self) -> str:
        """The document's path, as given."""
        return self._path

    def save(self) -> bool:
        """Save the document now, also while the disk is failing. Returns whether it is durable.

        Raises:
            RuntimeError: the tracker is closed.
        """
        with self._changed:
            self._check_open()
            self._save_once()
            return self._failure is None

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything recorded before is durable, ``timeout`` seconds at most (None: as long as it takes).

        Returns:
            Whether it is.
        """
        with self._changed:
            last = self._open if self._open.delta.records else self._sealed
            if last is None:
                return True
            self._want_save()
        return last.wait(timeout)

    def close(self) -> bool:
        """Save what is pending, once, and stop. Receipts that are not durable then stay so.

        Returns:
            Whether everything recorded is durable. What is not is lost with the process, and logged.
        """
        if os.getpid() != self._process:
            # A forked copy: what is pending is the parent's to save, and so is the lock to let go of.
            return False
        with self._closing:
            if not self._closed:
                self._close()
            return not self._pending()[0]

    def __enter__(self) -> SavingsTracker:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _close(self) -> None:
        with self._changed:
            self._closed = True
            if self._open.delta.records or self._sealed is not None:
                self._save_once()
            self._open.abandon()
            self._changed.notify_all()
            pending_records, pending_tokens = self._pending()
        self._thread.join()
        atexit.unregister(self.close)
        self._store.close()
        if pending_records:
            logger.error(
                "%s: closed with %d records (%d tokens saved) that could not be saved: %s",
                *(self._path, pending_records, pending_tokens, self._failure),
            )

    def _record(self, records: tuple[SavingsRecord, ...], *, wait: bool) -> Receipt:
        delta = self._folded(records)
        with self._changed:
            receipt = self._accept(delta)
            if not wait or self._failure is not None:
                self._want_save()
            else:
                self._save_once(give_up_when_failing=True)
            return receipt

    def _folded(self, records: tuple[SavingsRecord, ...]) -> Delta:
        """The records' sums, made before the lock is taken, so that a large batch holds nobody up."""
        if os.getpid() != self._process:
            raise RuntimeError(f"the tracker of {self._path} was opened before a fork; open one in each process")
        delta, ledger = Delta(), self._store.ledger
        for record in records:
            delta.add(record, ledger, self._limits)
        return delta

    # What follows is called with the lock held.

    def _accept(self, delta: Delta) -> Receipt:
        self._check_open()
        self._open.delta.absorb(delta, self._store.ledger, self._limits)
        return Receipt(self._open, self._open.delta.records)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"the tracker of {self._path} is closed")

    def _want_save(self) -> None:
        self._wanted = True
        self._changed.notify_all()

    def _save_once(self, *, give_up_when_failing: bool = False) -> None:
        """Wait for a save that begins after this call to end, leading it when nobody else does."""
        mine = self._saves_begun + 1
        while self._saves_ended < mine and not (give_up_when_failing and self._failure is not None):
            if self._sealed is None:
                self._lead_save()
            else:
                self._changed.wait()

    def _lead_save(self) -> None:
        """Save all that is pending. The lock is let go while the disk is at work."""
        batch = self._sealed = self._open
        self._open = _Batch(self._changed)
        self._saves_begun += 1
        self._wanted = False
        failure: BaseException | None = None
        try:
            # Within the try, so that an interrupt from here on finds its way to the end of the save.
            self._changed.release()
            self._store.save(batch.delta)
        except BaseException as error:
            failure = error
            if not isinstance(error, Exception):
                # The caller was interrupted. Its records stay pending, like those of everybody who waits with it.
                raise
        finally:
            self._changed.acquire()
            self._sealed = None
            self._saves_ended += 1
            if failure is None:
                self._saved(batch)
            else:
                self._failed(batch, failure)
            self._changed.notify_all()

    def _saved(self, batch: _Batch) -> None:
        if self._failure is not None:
            logger.info("%s: saving works again; %d records are durable now", self._path, batch.delta.records)
        self._failure, self._retries = None, 0
        self._durable = self._store.state
        batch.settle(durable_from=self._durable.ledger.sequence - batch.delta.records)

    def _failed(self, batch: _Batch, failure: BaseException) -> None:
        batch.absorb(self._open, self._store.ledger, self._limits)
        self._open = batch
        batch.settle(durable_from=None)
        self._failure = failure
        delay = min(_FIRST_RETRY_SECONDS * 2**self._retries, _LONGEST_RETRY_SECONDS)
        self._retries = min(self._retries + 1, 30)
        self._retry_at = time.monotonic() + delay
        logger.error("%s; trying again in %.1f s", self._reason(failure), delay)

    def _reason(self, failure: BaseException) -> str:
        pending_records, pending_tokens = self._pending()
        what = getattr(failure, "strerror", None) or str(failure)
        return (
            f"{self._path}: could not be saved: {self._store.failed_step} failed: {what} ({error_symbol(failure)}); "
            f"{pending_records} records ({pending_tokens} tokens saved) are not durable"
        )

    def _pending(self) -> tuple[int, int]:
        batches = [batch for batch in (self._sealed, self._open) if batch is not None]
        return (
            sum(batch.delta.records for batch in batches),
            sum(batch.delta.lifetime.tokens_saved for batch in batches),
        )

    def _save_in_background(self) -> None:
        with self._changed:
            while not self._closed:
                wait = self._seconds_until_retry() if self._failure is not None else None if not self._wanted else 0
                if self._sealed is not None or wait is None:
                    self._changed.wait()
                elif wait > 0:
                    self._changed.wait(wait)
                else:
                    self._lead_save()

    def _seconds_until_retry(self) -> float:
        return max(self._retry_at - time.monotonic(), 0.0)


class _Batch:
    """Records that become durable together. After a failed save, later ones join it."""

    def __init__(self, changed: threading.Condition) -> None:
        self.delta = Delta()
        self._changed = changed
        self._durable_from: int | None = None
        self._abandoned = False
        self._joined: tuple[_Batch, int] | None = None
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    @property
    def durable(self) -> bool:
        batch, _ = self._carrier()
        return batch._durable_from is not None

    def sequence_of(self, position: int) -> int | None:
        batch, offset = self._carrier()
        return None if batch._durable_from is None else batch._durable_from + offset + position

    def wait(self, timeout: float | None) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self.durable or self._carrier()[0]._abandoned, timeout)
            return self.durable

    def saved_or_failed(self, loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
        """A future of this loop that is done when the save that carries the batch has ended."""
        future = loop.create_future()
        self._waiting.append((loop, future))
        return future

    def absorb(self, later: _Batch, ledger: Ledger, limits: Limits) -> None:
        """Carry a later batch's records too."""
        later._joined = (self, self.delta.records)
        self.delta.absorb(later.delta, ledger, limits)
        self._waiting += later._waiting
        later.delta = Delta()  # receipts may keep the batch for long; they need no sums

    def settle(self, durable_from: int | None) -> None:
        """A save ended: durable with the sequence numbers after ``durable_from``, or not durable yet (None)."""
        self._durable_from = durable_from
        if durable_from is not None:
            self.delta = Delta()
        waiting, self._waiting = self._waiting, []
        for loop, future in waiting:
            with suppress(RuntimeError):  # the loop may be closed by now
                loop.call_soon_threadsafe(_finish, future)

    def abandon(self) -> None:
        """Nobody will try again."""
        self._abandoned = True

    def _carrier(self) -> tuple[_Batch, int]:
        return self._joined if self._joined is not None else (self, 0)


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


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _checked(records: Iterable[SavingsRecord]) -> tuple[SavingsRecord, ...]:
    checked = tuple(records)
    if not checked:
        raise ValueError("records must not be empty")
    for position, record in enumerate(checked):
        if not isinstance(record, SavingsRecord):
            raise TypeError(f"records[{position}] must be a SavingsRecord, not {type(record).__name__}")
    return checked


def _record_of(arguments: dict[str, Any]) -> SavingsRecord:
    return SavingsRecord(**arguments)
