"""``SavingsTracker``: accepts records from many threads, tasks and processes. Acknowledged records are durable."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypedDict

from opentelemetry.trace import get_current_span

from savings_exporter.errors import StoreError
from savings_exporter.model.crowds import name_in_records
from savings_exporter.model.days import LAST_DAY, Dated
from savings_exporter.model.record import DecodedRecord, SavingsRecord
from savings_exporter.model.snapshot import Health, Snapshot
from savings_exporter.model.totals import Ledger, Limits, Totals
from savings_exporter.prices import Prices
from savings_exporter.storage.closed_days import read_days
from savings_exporter.storage.filesystem import LOCAL, FileSystem
from savings_exporter.storage.observers import Observers
from savings_exporter.storage.operation import error_symbol
from savings_exporter.storage.segment import SyncMethod
from savings_exporter.storage.store import Store
from savings_exporter.telemetry.counters import OperationCounters
from savings_exporter.telemetry.recent import RecentOperations
from savings_exporter.telemetry.tracing import StoreTracing
from savings_exporter.tracking.background import Background
from savings_exporter.tracking.importing import Importer
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

# If a call has more records than this, the asynchronous methods accept them in a thread. Looking up prices takes long.
_MANY_RECORDS = 1000
_MANY_PRICED_RECORDS = 100


class RecordArguments(TypedDict, total=False):
    """The arguments of ``record_request``. They have the same meanings as the fields of ``SavingsRecord``."""

    model: Required[str]
    tokens_saved: Required[int]
    input_tokens: int
    tool_search_saved: int
    output_tokens_saved: int
    output_tokens: int
    provider: str | None
    agent: str | None
    project: str | None
    source: str | None
    cache_read_tokens: int
    cache_write_tokens: int
    uncached_input_tokens: int
    timestamp: datetime | str | None
    savings_usd: float | None
    cache_savings_usd: float | None
    input_cost_usd: float | None
    idempotency_key: str | None
    wait: bool


class SavingsTracker:
    """Records savings in one store. Any number of processes, including forked children, may have a tracker on a store.

    Args:
        path: the document; by default ``proxy_savings.json`` in the user's state directory, which is created if needed.
        save_interval: seconds after which records in the journal are also saved in the document. Records are durable
            without this, but programs that read only the document lag behind by up to this interval.
        max_models: the maximum number of different models, and of different pairs of provider and model. Further ones
            count as ``other``. Use the same limits in all processes on a store, because each process applies its own
            limits to the records in the journals.
        max_projects: the maximum number of different projects.
        tracer_provider: the OpenTelemetry provider for spans; by default the global provider.
        sync_method: how the journal is written: ``direct`` (direct, synchronous writes), ``fdatasync``, or ``auto``,
            which is ``direct`` if the file system supports it. ``savings-exporter doctor`` measures both.
        prices: the prices for records without ``savings_usd``, from ``load_prices``; by default such records have no
            price. They do not change amounts that are recorded already.
        filesystem: the file system object, by default that of the platform. For tests.

    Raises:
        StoreError: the store cannot be used (CorruptStoreError: it is damaged; NewerSchemaError: a newer program
            wrote it), or its directory is not writable. A full or failing disk does not raise an error: the tracker
            starts in a degraded state and keeps trying.
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
        prices: Prices | None = None,
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
        self._prices = prices
        self._tracing = StoreTracing(tracer_provider)
        self._counters = OperationCounters(self._publish_failure)
        self._is_closed = False
        self._closing = threading.RLock()
        limits = Limits(max_models=max_models, max_projects=max_projects)
        self._recent = RecentOperations()
        observers = self.observers
        store = Store.open(os.fspath(self._path), fs, limits, observers, self._counters.counts, sync_method)
        self._store = store
        self._background = Background(store, save_interval, prices)
        self._importer = Importer(store, self._background)
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
        source: str | None = None,
        cache_read_tokens: int = 0,
        cache_write_tokens: int = 0,
        uncached_input_tokens: int = 0,
        timestamp: datetime | str | None = None,
        savings_usd: float | None = None,
        cache_savings_usd: float | None = None,
        input_cost_usd: float | None = None,
        idempotency_key: str | None = None,
        wait: bool = True,
    ) -> Receipt:
        """Record what one request saved. The arguments are the fields of ``SavingsRecord``.

        Returns when the record is durable, or when it cannot become durable now. The receipt says which. With
        ``wait=False`` the call returns at once, and the receipt becomes durable later. Storage faults never raise.

        ``idempotency_key`` (1 to 255 characters) identifies the record, for a sender that may repeat it. Of all records
        with the same key, only the first is counted, and all of them get a receipt for it. The store remembers the last
        100,000 keys. While the disk fails, at most 10,000 records with a key are accepted: ``receipt.pending`` is then
        false for a record that is not durable, and it has to be recorded again.

        Raises:
            TypeError, ValueError: an argument is wrong; nothing was recorded. KeyConflictError, a ValueError: the key
                was recorded before with different content.
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
            source=source,
            cache_read_tokens=cache_read_tokens,
            cache_write_tokens=cache_write_tokens,
            uncached_input_tokens=uncached_input_tokens,
            timestamp=timestamp,  # type: ignore[arg-type]  # a string is parsed, and refused with the field's name
            savings_usd=savings_usd,
            cache_savings_usd=cache_savings_usd,
            input_cost_usd=input_cost_usd,
        )
        return self._record((record,), idempotency_key, wait=wait)

    def record_many(
        self, records: Iterable[SavingsRecord], *, idempotency_key: str | None = None, wait: bool = True
    ) -> Receipt:
        """Record several savings atomically: all of them or none. The receipt is that of the last record. Otherwise
        this works like ``record_request``.

        Raises:
            ValueError: ``records`` is empty.
        """
        return self._record(_checked(records), idempotency_key, wait=wait)

    async def record_request_async(self, **arguments: Unpack[RecordArguments]) -> Receipt:
        """``record_request`` for a task. It has the same arguments and receipt, and never blocks the event loop."""
        fields: dict[str, Any] = dict(arguments)
        wait, key = fields.pop("wait", True), fields.pop("idempotency_key", None)
        return await self.record_many_async([SavingsRecord(**fields)], idempotency_key=key, wait=wait)

    async def record_many_async(
        self, records: Iterable[SavingsRecord], *, idempotency_key: str | None = None, wait: bool = True
    ) -> Receipt:
        """``record_many`` for a task."""
        # Imported here, so that programs without asyncio do not load it.
        import asyncio

        checked, loop = _checked(records), asyncio.get_running_loop()
        ended = loop.create_future() if wait else None
        many = _MANY_RECORDS if self._prices is None else _MANY_PRICED_RECORDS
        if len(checked) > many or idempotency_key is not None:
            # The lookup of a key includes records of other processes, which requires reading files.
            receipt = await asyncio.to_thread(self._accept, checked, idempotency_key, ended)
        else:
            receipt = self._accept(checked, None, ended)
        if ended is not None:
            await ended
        return receipt

    def snapshot(self) -> Snapshot:
        """The current durable totals, including records of other processes."""
        group = self._background.group
        with group.entered.lock:
            view = self._store.refresh()
            if not self._is_closed and not self._store.is_saved():
                # This also saves records of other processes that have ended since.
                self._background.keep_saved(self._close_with_process)
            records, tokens = group.pending()
            self._background.publish_counts()
            operations = self._store.operations()
            return self._store.reader.snapshot(
                view,
                operations,
                self._store.read_at,
                store_id=view.store.hex(),
                pending_records=records,
                pending_tokens=tokens,
            )

    def days(self, first: str = "", last: str = LAST_DAY) -> Dated:
        """What was saved from one day to another, both included, such as ``2026-01-31``: by provider, model, project,
        agent and source.

        Raises:
            StoreError: the file of closed days cannot be read.
        """
        store = self._store
        return read_days(store.reader.fs, lambda: (store.path, store.refresh()), first, last)

    def let_in(self, kind: str, name: str) -> None:
        """Give a name a place of its own in the totals, even if all places are used. What it has saved so far stays in
        ``other``.

        Args:
            kind: ``model``, ``project``, ``agent`` or ``source``.
            name: the name.

        Raises:
            ValueError: the name has a place, or too many names were let in; or there is no such kind or name.
            StoreError: the document cannot be saved.
        """
        cleaned = name_in_records(kind, name)
        self._change(lambda ledger: ledger.letting_in(kind, cleaned))

    def fold(self, kind: str, name: str) -> Totals:
        """Move a name's totals to ``other``, from now on and in all processes. Its counters disappear.

        Args:
            kind: ``model``, ``project``, ``agent`` or ``source``.
            name: the name.

        Returns:
            What the name had saved.

        Raises:
            ValueError: the name has no place, or too many names were folded; or there is no such kind or name.
            StoreError: the document cannot be saved.
        """
        cleaned, moved = name_in_records(kind, name), Totals()

        def folding(ledger: Ledger) -> Ledger:
            nonlocal moved
            moved = ledger.named(kind).get(cleaned, moved)
            return ledger.folding(kind, cleaned)

        self._change(folding)
        return moved

    def _change(self, change: Callable[[Ledger], Ledger]) -> None:
        # What cannot be changed is no failure of the disk.
        change(self._store.refresh().ledger)
        try:
            self._store.change_ledger(change)
        except OSError as error:
            raise StoreError(
                f"{self._path}: cannot be saved: {error.strerror or error}; names may not be changed", path=self._path
            ) from None

    def importing(self) -> Importer:
        """Imports from other programs, as a context manager. One process at a time can import into a store."""
        self._background.start(self._close_with_process)
        return self._importer

    def health(self) -> Health:
        """Whether commits and saves work, and if not, why."""
        group, saves = self._background.group, self._background.saves
        records, tokens = group.pending()
        since = group.pending_since() if records else None
        failure = group.failure or saves.failure
        if failure is None:
            return Health(healthy=True, pending_records=records, pending_tokens=tokens, pending_since=since)
        return Health(
            healthy=False,
            reason=group.reason() if group.failure is not None else self._background.reason(),
            error=error_symbol(failure.error),
            pending_records=records,
            pending_tokens=tokens,
            pending_since=since,
        )

    @property
    def counters(self) -> OperationCounters:
        """The operation counters of this process."""
        return self._counters

    @property
    def recent(self) -> RecentOperations:
        """The latest commits and saves of this process."""
        return self._recent

    @property
    def observers(self) -> Observers:
        """The observers that are notified about this process's commits and saves."""
        return Observers([self._tracing, self._counters, self._recent])

    @property
    def storage_path(self) -> str:
        """The document's path, as given."""
        return self._path

    def save(self) -> bool:
        """Commit the pending records and save the document now, even while the disk is failing. Returns whether both
        succeeded.

        In a signal handler that interrupts a call of the tracker by the same thread, this does nothing and returns
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
        """Wait until all previous records are durable, for at most ``timeout`` seconds (None: no limit).

        In a signal handler that interrupts a call of the tracker by the same thread, this does not wait.

        Returns:
            Whether all previous records are durable.
        """
        last = self._background.group.last()
        if last is None:
            return True
        self._background.wake()
        return last.wait(timeout)

    def close(self) -> bool:
        """Try once to commit the pending records, save the document, and stop. Receipts that are not durable then never
        become durable.

        In a signal handler that interrupts a call of the tracker by the same thread, the tracker only stops accepting
        records, and this returns False. The tracker is closed again when the process exits.

        Returns:
            Whether all records are durable. How many this process recorded is logged, and how many are lost because
            they are not durable.
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
        background.end()
        durable = store.journal.sequence if store.journal is not None else 0
        store.close()
        self._is_closed = True
        atexit.unregister(self.close)
        _trackers.discard(self)
        if records:
            logger.error(
                "%s: closed: %d records of this process are durable, %d (%d tokens saved) are lost: %s",
                self._path,
                durable,
                records,
                tokens,
                reason,
            )
        else:
            logger.info("%s: closed: %d records of this process, all durable", self._path, durable)

    def _record(self, records: Sequence[SavingsRecord], key: str | None, *, wait: bool) -> Receipt:
        self._background.start(self._close_with_process)
        return self._background.group.record(records, key, wait=wait)

    def _accept(self, records: Sequence[SavingsRecord], key: str | None, ended: asyncio.Future[None] | None) -> Receipt:
        self._background.start(self._close_with_process)
        return self._background.group.accept(records, key, ended)

    def _close_with_process(self) -> None:
        # A process of multiprocessing does not run atexit handlers when it ends. Such a process has already loaded
        # these modules. Other programs do not pay for the import.
        process, util = sys.modules.get("multiprocessing.process"), sys.modules.get("multiprocessing.util")
        if process is not None and util is not None and process.parent_process() is not None:
            util.Finalize(self, self.close, exitpriority=0)

    def _publish_failure(self) -> None:
        # Published immediately, because the failure may cause the process to be killed.
        if hasattr(self, "_store"):
            self._store.publish_counts()

    def _begin_in_fork(self) -> None:
        """Reset the tracker in a forked child. Pending records belong to the parent."""
        self._counters = OperationCounters(self._publish_failure)
        self._recent = RecentOperations()
        observers = self.observers
        self._closing = threading.RLock()
        self._background.group.leave_to_parent()
        self._store = self._store.forked(observers, self._counters.counts)
        self._background = Background(self._store, self._save_interval, self._prices)
        self._importer = Importer(self._store, self._background)


_trackers: weakref.WeakSet[SavingsTracker] = weakref.WeakSet()


def _begin_in_fork() -> None:
    for tracker in tuple(_trackers):
        tracker._begin_in_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_in_fork)


def default_path() -> str:
    """The path of the default store in the user's state directory. Does not create anything.

    Raises:
        StoreError: the user has no home directory.
    """
    import platformdirs

    try:
        path = os.fspath(platformdirs.user_state_path("savings-exporter", appauthor=False) / DOCUMENT_NAME)
    except (KeyError, RuntimeError):
        path = ""
    # Without a home directory, "~" is not expanded.
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
        raise StoreError(f"{directory}: cannot be created: {error.strerror}; name a store with --store PATH") from None
    return path


def _checked(records: Iterable[SavingsRecord]) -> tuple[SavingsRecord, ...]:
    checked = tuple(records)
    if not checked:
        raise ValueError("records must not be empty")
    for position, record in enumerate(checked):
        # The journal stores only the fields of these types.
        if type(record) is not SavingsRecord and type(record) is not DecodedRecord:
            raise TypeError(f"records[{position}] must be a SavingsRecord, not {type(record).__name__}")
    return checked
