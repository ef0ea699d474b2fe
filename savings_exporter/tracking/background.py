"""The background threads. They commit batches that no other thread leads, retry failed commits and saves, save the
document, and create segments in advance.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from typing import NamedTuple

from opentelemetry.trace import Span

from savings_exporter.prices import Prices
from savings_exporter.storage.store import Failed, Store
from savings_exporter.tracking.group_commit import GroupCommit, described
from savings_exporter.tracking.retry import Retry
from savings_exporter.tracking.worker import Publisher, Worker

logger = logging.getLogger(__name__)

_PUBLISH_SECONDS = 1.0
_PUBLISH_PATIENCE_SECONDS = 1.0

# How often within the save interval to check whether another process's save has ended.
_LOOKS_IN_INTERVAL = 10


class Saves(NamedTuple):
    """The state of the document's saves: why the last one failed (None if it did not), and when the next one is due."""

    failure: Failed | None = None
    retry: Retry = Retry()
    due: float = math.inf

    def failed(self, failure: Failed, now: float) -> Saves:
        """The state after a failed save."""
        retry = self.retry.failed(now)
        return Saves(failure, retry, retry.at)


class Background:
    """Runs the background work of one tracker. ``save_interval`` is in seconds.

    One thread commits and another one saves. A save may wait for another process's save or for a slow disk. Records
    must not wait for that.
    """

    def __init__(self, store: Store, save_interval: float, prices: Prices | None) -> None:
        self.saves = Saves()
        self._committer = Worker("savings-commit", self._commit_due, self._commit)
        self._saver = Worker("savings-save", self._save_due, self._keep_saved)
        self._publisher = Publisher("savings-counts", store.publish_counts)
        self.group = GroupCommit(store, self._committer.wake, self._note_commit, prices)
        self._store = store
        self._save_interval = save_interval
        self._segments = Retry()
        self._has_started = False
        self._counts_published_at = 0.0
        self._has_news = False
        self._was_interrupted = False

    def wake(self) -> None:
        """Wake the committing thread, so that it commits the waiting records."""
        self._committer.wake()

    def start(self, started: Callable[[], None]) -> None:
        """Start the threads, unless they are running. ``started`` is called only the first time.

        Raises:
            RuntimeError: a thread cannot be started now.
        """
        if not self._has_started:
            self._saver.start()
            self._committer.start()
            self._publisher.start()
            started()
            self._has_started = True

    def keep_saved(self, started: Callable[[], None]) -> None:
        """Schedule a save after the interval, even if this process has recorded nothing."""
        if self.saves.due == math.inf:
            with suppress(RuntimeError):
                self.start(started)
            self._saver.wake()

    def stop(self) -> None:
        """Stop the threads. They do not commit waiting records any more."""
        self._committer.stop()
        self._saver.stop()

    def end(self) -> None:
        """Publish the operation counters for the last time."""
        self.publish_counts()
        self._publisher.stop()

    def publish_counts(self) -> None:
        """Publish the operation counters, and wait at most a second for it: a reader does not wait for a disk that
        hangs. It then sees the counters that were published before.
        """
        if not self._has_started:
            self._store.publish_counts()
        elif self._store.has_unpublished_counts():
            self._publisher.publish(_PUBLISH_PATIENCE_SECONDS)

    def save(self, span: Span | None = None, *, closing: bool = False) -> bool:
        """Save the document now. Returns whether this succeeded."""
        try:
            self.group.repair_names()
            failure = self._store.save(span, closing=closing)
        except BaseException:
            # After an interrupt, the saving thread saves again, so that the files and the lock are in the state of a
            # complete save.
            self._was_interrupted = True
            self._saver.wake()
            raise
        self._has_news = True
        if failure is not None:
            self.saves = self.saves.failed(failure, time.monotonic())
            self._saver.wake()
            retry = "" if closing else f"; trying again in {self.saves.retry.delay:.1f} s"
            logger.error("%s%s", self.reason(), retry)
            return False
        if self.saves.failure is not None:
            logger.info("%s: saves work again", self._store.path)
        self.saves = Saves()
        return True

    def reason(self) -> str:
        """A description of why saves fail."""
        what = described(self._store.path, "the document could not be saved", self.saves.failure)
        return f"{what}; what was recorded is durable in the journal"

    def _note_commit(self) -> None:
        """Called after a commit, which any thread may lead. Wakes the saving thread to schedule a save."""
        if not self._has_news or (self._store.wants_segment() and self._may_make_segment()):
            self._has_news = True
            self._saver.wake()

    def _commit_due(self) -> float:
        """When the next work of the committing thread is due, on the monotonic clock."""
        return 0.0 if self.group.is_waiting() else self.group.retry.at

    def _commit(self) -> None:
        if self._commit_due() <= time.monotonic():
            self.group.commit()

    def _save_due(self) -> float:
        """When the next work of the saving thread is due, on the monotonic clock."""
        publish = self._counts_published_at + _PUBLISH_SECONDS if self._has_news else math.inf
        return min(self.saves.due, publish)

    def _keep_saved(self) -> None:
        now = time.monotonic()
        if self._may_make_segment():
            self._segments = Retry() if self._store.make_segment() else self._segments.failed(now)
        self._schedule_save()
        if self._has_news and self._counts_published_at + _PUBLISH_SECONDS <= now:
            self._has_news, self._counts_published_at = False, now
            self.group.repair_names()
            self._store.publish_counts()
        if self._was_interrupted:
            self._was_interrupted = False
            self.save()
        elif self.saves.due <= time.monotonic():
            self._save_if_needed()

    def _may_make_segment(self) -> bool:
        """Whether a segment may be created ahead of need: on a disk that fails, not at each commit."""
        return not self._segments.failures or self._segments.at <= time.monotonic()

    def _schedule_save(self) -> None:
        """Schedule a save after the interval, if the document does not hold everything."""
        if self.saves.due == math.inf and not self._store.is_saved():
            self.saves = self.saves._replace(due=time.monotonic() + self._save_interval)

    def _save_if_needed(self) -> None:
        # One save per interval is enough for all processes, because each save reads all journals. The document alone
        # therefore shows whether a save is needed.
        saved_at, now = self._store.saved_at(), time.monotonic()
        age = (datetime.now(timezone.utc) - saved_at).total_seconds() if saved_at else math.inf
        if self.saves.failure is None and self._store.is_saved():
            self.saves = Saves()
        elif self.saves.failure is None and 0 <= age < self._save_interval:
            self.saves = Saves(due=now + self._save_interval - age)
        elif self.saves.failure is None and 0 <= age < 2 * self._save_interval and self._store.is_being_saved():
            self.saves = Saves(due=now + self._save_interval / _LOOKS_IN_INTERVAL)
        else:
            # This also runs after a failed save: the document at the path may then be the one from that save, and it is
            # unknown whether it is durable.
            self.save()
            self._schedule_save()
