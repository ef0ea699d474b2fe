"""``SavingsTracker``: records from any number of threads, tasks and processes, durable when acknowledged."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import weakref
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypedDict

from opentelemetry.trace import get_current_span

from savings_exporter.errors import StoreError
from savings_exporter.model.record import SavingsRecord
from savings_exporter.model.snapshot import Health, Snapshot
from savings_exporter.model.totals import Limits
from savings_exporter.storage.filesystem import LOCAL, FileSystem
from savings_exporter.storage.observers import Observers
from savings_exporter.storage.operation import error_symbol
from savings_exporter.storage.segment import SyncMethod
from savings_exporter.storage.store import Store
from savings_exporter.telemetry.counters import OperationCounters
from savings_exporter.telemetry.tracing import StoreTracing
from savings_exporter.tracking.background import Background
from savings_exporter.tracking.receipt import Receipt

if sys.version_info >= (3, 11):
    from typing import Required, Unpack
else:
    from typing_extensions import Required, Unpack

if TYPE_CHECKING:
    import asyncio

    from opentelemetry.trace import TracerProvider

logger = logging.getLogger(__name__)

DOCUMENT_NAME = "proxy_savings.json"

# More records than this are accepted in a thread by the async face.
_MANY_RECORDS = 100


class RecordArguments(TypedDict, total=False):
    """The arguments of ``record_request``; their meanings are those of ``SavingsRecord``'s fields."""

    model: Required[str]
    tokens_saved: Required[int]
    input_tokens: int
    tool_search_saved: int
    output_tokens_saved: int
    output_tokens: int
    provider: str | None
    agent: str | None
    project: str | None
    cache_read_tokens: int
    cache_write_tokens: int
    uncached_input_tokens: int
    timestamp: datetime | str | None
    savings_usd: float | None
    input_cost_usd: float | None
    idempotency_key: str | None
    wait: bool


class SavingsTracker:
    """Keeps the savings of one store. Any number of processes may have a tracker on it, forked children included.

    Args:
        path: the document; by default ``proxy_savings.json`` in the user's state directory, which is made if needed.
        save_interval: seconds after which what was committed to the journal is saved in the document, too. A record is
            durable without that; programs that read the document alone are behind by so much.
        max_models: how many models (and pairs of provider and model) are told apart; further ones become ``other``.
            Give all processes on a store the same limits: each applies its own to what is in the journals.
        max_projects: the same for projects.
        tracer_provider: where spans go; by default OpenTelemetry's global provider.
        sync_method: how the journal is written: ``direct`` (direct, synchronous writes), ``fdatasync``, or ``auto``:
            direct where the file system supports it. ``savings-exporter doctor`` measures both.
        filesystem: the files that are used, by default those of the platform; for tests.

    Raises:
        StoreError: the store cannot be used (CorruptStoreError: it is damaged; NewerSchemaError: a newer program
            wrote it), or its directory cannot be written to. A disk that is full or fails does not raise: the tracker
            starts degraded and goes on trying.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        save_interval: float = 5.0,
        max_models: int = 200,
        max_projects: int = 200,
        tracer_provider: TracerProvider | None = None,
        sync_method: SyncMethod = "auto",
        filesystem: FileSystem | None = None,
    ) -> None:
        for name, limit in (("max_models", max_models), ("max_projects", max_projects)):
            if isinstance(limit, bool) or not isinstance(limit, int):
                raise TypeError(f"{name} must be an integer, not {type(limit).__name__}")
            if limit < 1:
                raise ValueError(f"{name} must be at least 1, got {limit}")
        if not save_interval > 0:
            raise ValueError(f"save_interval must be more than 0 seconds, got {save_interval}")
        if sync_method not in ("auto", "direct", "fdatasync"):
            raise ValueError(f"sync_method must be auto, direct or fdatasync, got {sync_method!r}")
        fs = filesystem if filesystem is not None else LOCAL
        self._path = os.path.expanduser(path) if path is not None else _made_default_path(fs)
        self._save_interval = save_interval
        self._tracing = StoreTracing(tracer_provider)
        self._counters = OperationCounters(self._publish_failure)
        self._is_closed = False
        self._closing = threading.RLock()
        limits = Limits(max_models=max_models, max_projects=max_projects)
        observers = Observers([self._tracing, self._counters])
        store = Store.open(os.fspath(self._path), fs, limits, observers, self._counters.counts, sync_method)
        self._store = store
        self._background = Background(store, save_interval)
        if not store.view.is_whole:
            self._background.save()
        atexit.register(self.close)
        _trackers.add(self)

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

        ``idempotency_key`` (1 to 255 characters) names the record for a sender that may repeat it: of all records with
        one key, among the last 100,000 that had any, the first is counted, and all get its receipt.

        Raises:
            TypeError, ValueError: an argument is wrong; nothing was recorded. KeyConflictError, a ValueError: the key
                was recorded before with other content.
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

    async def record_request_async(self, **arguments: Unpack[RecordArguments]) -> Receipt:
        """``record_request`` for a task: the same arguments and receipt, and the event loop is never blocked."""
        fields: dict[str, Any] = dict(arguments)
        wait, key = fields.pop("wait", True), fields.pop("idempotency_key", None)
        return await self.record_many_async([SavingsRecord(**fields)], idempotency_key=key, wait=wait)

    async def record_many_async(
        self, records: Iterable[SavingsRecord], *, idempotency_key: str | None = None, wait: bool = True
    ) -> Receipt:
        """``record_many`` for a task."""
        # Here, because a program that records without asyncio need not load it.
        import asyncio

        checked, loop = _checked(records), asyncio.get_running_loop()
        ended = loop.create_future() if wait else None
        if len(checked) > _MANY_RECORDS or idempotency_key is not None:
            # A key is looked up in what other processes recorded, and that reads files.
            receipt = await asyncio.to_thread(self._accept, checked, idempotency_key, ended)
        else:
            receipt = self._accept(checked, None, ended)
        if ended is not None:
            await ended
        return receipt

    def snapshot(self) -> Snapshot:
        """The durable totals now, with what other processes recorded."""
        group = self._background.group
        with group.entered.lock:
            view = self._store.refresh()
            if not self._is_closed and not self._store.is_saved():
                # Also what other processes recorded that have ended since.
                self._background.keep_saved(self._close_with_process)
            records, tokens = group.pending()
            operations = self._store.operations()
            return self._store.reader.snapshot(
                view, operations, self._store.read_at, pending_records=records, pending_tokens=tokens
            )

    def health(self) -> Health:
        """Whether commits and saves work, and if not, why."""
        group, saves = self._background.group, self._background.saves
        records, tokens = group.pending()
        failure = group.failure or saves.failure
        if failure is None:
            return Health(healthy=True, pending_records=records, pending_tokens=tokens)
        return Health(
            healthy=False,
            reason=group.reason() if group.failure is not None else self._background.reason(),
            error=error_symbol(failure.error),
            pending_records=records,
            pending_tokens=tokens,
        )

    @property
    def counters(self) -> OperationCounters:
        """The operation counters of this process."""
        return self._counters

    @property
    def observers(self) -> Observers:
        """What is told of this process's commits and saves."""
        return Observers([self._tracing, self._counters])

    @property
    def storage_path(self) -> str:
        """The document's path, as given."""
        return self._path

    def save(self) -> bool:
        """Save the document now, with what is pending, also while the disk is failing. Returns whether it is durable.

        In a signal handler that interrupts a call of the tracker by the same thread it can do nothing, and returns
        False.

        Raises:
            RuntimeError: the tracker is closed.
        """
        if self._is_closed:
            raise RuntimeError(f"the tracker of {self._path} is closed")
        group = self._background.group
        if group.entered.is_here():
            return False
        with group.entered.lock:
            span = get_current_span()
            group.commit(span)
            return group.failure is None and self._background.save(span)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything recorded before is durable, at most ``timeout`` seconds (None: as long as it takes).

        In a signal handler that interrupts a call of the tracker by the same thread it does not wait.

        Returns:
            Whether it is.
        """
        last = self._background.group.last()
        if last is None:
            return True
        self._background.wake()
        return last.wait(timeout)

    def close(self) -> bool:
        """Commit what is pending, once, save the document, and stop. Receipts that are not durable then stay so.

        In a signal handler that interrupts a call of the tracker by the same thread it accepts no more records, and
        returns False: the process's end closes the tracker again.

        Returns:
            Whether everything recorded is durable. What is not is lost with the process, and logged.
        """
        group = self._background.group
        group.refuse()
        if group.entered.is_here():
            return False
        with group.entered.lock, self._closing:
            if not self._is_closed:
                self._close()
        return not group.pending()[0]

    def __enter__(self) -> SavingsTracker:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _close(self) -> None:
        background, store = self._background, self._store
        background.stop()
        background.group.commit(get_current_span())
        records, tokens = background.group.pending()
        reason = background.group.reason() if records else ""
        if not store.is_saved() or (store.journal is not None and store.journal.sequence):
            background.save(get_current_span(), closing=not records)
        background.group.abandon()
        store.publish_counts()
        store.close()
        self._is_closed = True
        atexit.unregister(self.close)
        _trackers.discard(self)
        if records:
            logger.error(
                "%s: closed with %d records (%d tokens saved) that are lost: %s", self._path, records, tokens, reason
            )

    def _record(self, records: Sequence[SavingsRecord], key: str | None, *, wait: bool) -> Receipt:
        self._background.start(self._close_with_process)
        return self._background.group.record(records, key, wait=wait)

    def _accept(self, records: Sequence[SavingsRecord], key: str | None, ended: asyncio.Future[None] | None) -> Receipt:
        self._background.start(self._close_with_process)
        return self._background.group.accept(records, key, ended)

    def _close_with_process(self) -> None:
        # A process of multiprocessing ends without running what is registered to be run at its exit. It has these
        # modules loaded; other programs do not pay for the import.
        process, util = sys.modules.get("multiprocessing.process"), sys.modules.get("multiprocessing.util")
        if process is not None and util is not None and process.parent_process() is not None:
            util.Finalize(self, self.close, exitpriority=0)

    def _publish_failure(self) -> None:
        # At once: the process may be killed for it.
        if hasattr(self, "_store"):
            self._store.publish_counts()

    def _begin_in_fork(self) -> None:
        """Begin anew in a forked child. What was pending is the parent's."""
        self._counters = OperationCounters(self._publish_failure)
        observers = Observers([self._tracing, self._counters])
        self._closing = threading.RLock()
        self._background.group.leave_to_parent()
        self._store = self._store.forked(observers, self._counters.counts)
        self._background = Background(self._store, self._save_interval)


_trackers: weakref.WeakSet[SavingsTracker] = weakref.WeakSet()


def _begin_in_fork() -> None:
    for tracker in tuple(_trackers):
        tracker._begin_in_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_in_fork)


def default_path() -> str:
    """The default store, in the user's state directory. Makes nothing.

    Raises:
        StoreError: the user has no home directory.
    """
    import platformdirs

    try:
        path = os.fspath(platformdirs.user_state_path("savings-exporter", appauthor=False) / DOCUMENT_NAME)
    except (KeyError, RuntimeError):
        path = ""
    # Without a home directory "~" is left as it is.
    if not os.path.isabs(path):
        raise StoreError(
            "this user has no home directory, so there is no default store", "Name a store with --store PATH"
        )
    return path


def _made_default_path(fs: FileSystem) -> str:
    path = default_path()
    directory = os.path.dirname(path)
    try:
        fs.make_directories(directory)
    except OSError as error:
        raise StoreError(f"{directory}: cannot be made: {error.strerror}; name a store with --store PATH") from None
    return path


def _checked(records: Iterable[SavingsRecord]) -> tuple[SavingsRecord, ...]:
    checked = tuple(records)
    if not checked:
        raise ValueError("records must not be empty")
    for position, record in enumerate(checked):
        # The journal holds the fields of this type, and no others.
        if type(record) is not SavingsRecord:
            raise TypeError(f"records[{position}] must be a SavingsRecord, not {type(record).__name__}")
    return checked
