"""A queue of records for programs that must not wait: a worker thread records them with a tracker of its own."""

from __future__ import annotations

import logging
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from savings_exporter.errors import KeyConflictError
from savings_exporter.model.record import SavingsRecord
from savings_exporter.tracking.retry import Retry

if TYPE_CHECKING:
    from savings_exporter.tracker import SavingsTracker
    from savings_exporter.tracking.receipt import Receipt

logger = logging.getLogger(__name__)

STORE_VARIABLE = "SAVINGS_EXPORTER_STORE"
"""The environment variable that names the store, for the commands as well."""

CLOSE_SECONDS = 10.0
"""How long ``RecordQueue.close`` waits for the worker by default."""

# How often the worker checks whether the process ends, while it waits for the store.
_LOOK_SECONDS = 0.25


class _Queued(NamedTuple):
    record: SavingsRecord
    key: str | None


class RecordQueue:
    """Accepts records on an event loop, and records them in a worker thread. ``put`` never waits for a disk and never
    raises.

    The worker imports and opens the tracker, because both take longer than an event loop may be blocked. It also looks
    up idempotency keys, which reads files. It takes all records that wait, and takes more when these are durable. So
    memory is bounded while the disk fails. When nothing waits, the worker ends; the next record starts another one. A
    process that ends waits for its worker.

    If the store cannot be opened, the worker logs this and tries again with a backoff. Records are lost when
    ``capacity`` records wait already, when the store cannot be opened before the process ends, and when the tracker
    cannot make them durable before it ends. The number of lost records is logged.

    A forked child begins with an empty queue.

    Args:
        path: the document. By default, it is read from the environment variable SAVINGS_EXPORTER_STORE when the store
            is opened, and without the variable it is the default store.
        capacity: the maximum number of records that wait for the worker.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, capacity: int = 10_000) -> None:
        self._path = path
        self._capacity = capacity
        self._tracker: SavingsTracker | None = None
        self._problem = ""
        self._begin()
        _queues.add(self)

    def put(self, record: SavingsRecord, key: str | None = None) -> None:
        """Accept a record. ``key`` is its idempotency key, as for ``SavingsTracker.record_request``."""
        with self._mutex:
            if self._closing.is_set():
                self._lose([record], "the queue is closed")
            elif len(self._waiting) >= self._capacity:
                self._lose([record], f"{self._capacity} records wait already")
            else:
                self._waiting.append(_Queued(record, key))
                self._start()

    @property
    def lost(self) -> int:
        """How many records this process has lost."""
        return self._lost

    def close(self, timeout: float = CLOSE_SECONDS) -> bool:
        """Record what waits, for at most ``timeout`` seconds, and close the tracker.

        Returns:
            Whether everything was recorded.
        """
        with self._mutex:
            self._closing.set()
            worker = self._worker
        if worker is not None:
            worker.join(timeout)
        self._lose([queued.record for queued in self._taken()], "the store did not answer in time")
        self._report()
        if worker is not None and worker.is_alive():
            return False
        return (self._tracker is None or self._tracker.close()) and not self._lost

    def _begin(self) -> None:
        self._mutex = threading.RLock()
        self._waiting: deque[_Queued] = deque()
        self._worker: threading.Thread | None = None
        self._closing = threading.Event()
        self._lost = self._lost_tokens = self._reported = 0
        self._has_finalizer = False

    def _start(self) -> None:
        """Start the worker, unless it is running. The caller holds the mutex."""
        if self._worker is not None:
            return
        # This is not a daemon: the interpreter waits for it before it runs atexit handlers, which close the tracker.
        self._worker = threading.Thread(target=self._run, name="savings-records")
        try:
            self._worker.start()
        except RuntimeError as error:
            self._worker = None
            self._lose([queued.record for queued in self._taken()], str(error))
            self._report()
        else:
            self._close_with_process()

    def _close_with_process(self) -> None:
        # A process of multiprocessing closes the tracker in a finalizer before it waits for threads. The finalizer with
        # the highest priority runs first, and the tracker's has 0.
        process, util = sys.modules.get("multiprocessing.process"), sys.modules.get("multiprocessing.util")
        if process is not None and util is not None and process.parent_process() is not None:
            if not self._has_finalizer:
                util.Finalize(self, self.close, exitpriority=1)
            self._has_finalizer = True

    # The worker.

    def _run(self) -> None:
        while waiting := self._taken():
            self._record(waiting)
            self._report()

    def _taken(self) -> list[_Queued]:
        """Take all records that wait. If there are none, the worker ends."""
        with self._mutex:
            waiting = list(self._waiting)
            self._waiting.clear()
            if not waiting:
                self._worker = None
            return waiting

    def _record(self, waiting: Sequence[_Queued]) -> None:
        tracker = self._opened()
        if tracker is None:
            self._lose([queued.record for queued in waiting], self._problem)
            return
        receipt: Receipt | None = None
        for record, key in waiting:
            try:
                receipt = tracker.record_many((record,), idempotency_key=key, wait=False)
            except KeyConflictError as error:
                logger.warning("savings: a record is not counted: %s", error)
            except Exception as error:  # Whatever it is, the worker has to go on with the other records.
                self._lose([record], f"{type(error).__name__}: {error}")
        while receipt is not None and not receipt.wait(_LOOK_SECONDS) and not self._is_ending(_LOOK_SECONDS):
            pass

    def _opened(self) -> SavingsTracker | None:
        """The tracker. Waits until the store can be opened; None when the process ends and it still cannot."""
        retry = Retry()
        while self._tracker is None:
            is_last_attempt = self._is_ending(0)
            try:
                from savings_exporter.tracker import SavingsTracker

                self._tracker = SavingsTracker(self._path or os.environ.get(STORE_VARIABLE) or None)
            except Exception as error:  # The program that saves tokens goes on without a store.
                self._note_problem(str(error) or type(error).__name__)
                if is_last_attempt:
                    return None
                retry = retry.failed(monotonic())
                while monotonic() < retry.at and not self._is_ending(min(_LOOK_SECONDS, retry.delay)):
                    pass
        if self._problem:
            logger.warning("savings: %s is open now", self._tracker.storage_path)
            self._problem = ""
        return self._tracker

    def _is_ending(self, seconds: float) -> bool:
        """Whether the process or the queue ends within some seconds."""
        return self._closing.wait(seconds) or not threading.main_thread().is_alive()

    def _note_problem(self, problem: str) -> None:
        if problem != self._problem:
            self._problem = problem
            logger.error(
                "savings are not recorded: %s. Up to %d records wait until the store can be opened; more are lost",
                problem,
                self._capacity,
            )

    def _lose(self, records: Sequence[SavingsRecord], why: str) -> None:
        """Count lost records. The first ones after a report are logged at once."""
        with self._mutex:
            is_first = self._lost == self._reported
            self._lost += len(records)
            self._lost_tokens += sum(record.tokens_saved for record in records)
        if records and is_first:
            logger.error("savings: records are lost: %s", why)

    def _report(self) -> None:
        """Log how many records are lost, if there are more than at the last report."""
        with self._mutex:
            lost, tokens, has_more = self._lost, self._lost_tokens, self._lost > self._reported
            self._reported = lost
        if has_more:
            logger.error("savings: this process has lost %d records (%d tokens saved)", lost, tokens)


_queues: weakref.WeakSet[RecordQueue] = weakref.WeakSet()


def _begin_in_fork() -> None:
    # What waits belongs to the parent. The tracker resets itself.
    for queue in tuple(_queues):
        queue._begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_in_fork)
