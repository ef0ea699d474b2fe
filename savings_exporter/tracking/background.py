"""The background thread: commits what no thread leads, retries, saves the document, makes segments ahead of need."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from typing import NamedTuple

from opentelemetry.trace import Span

from savings_exporter.storage.store import Failed, Store
from savings_exporter.tracking.group_commit import GroupCommit, described
from savings_exporter.tracking.retry import FIRST_SECONDS, Retry

logger = logging.getLogger(__name__)

_PUBLISH_SECONDS = 1.0


class Saves(NamedTuple):
    """How the document's saves stand: why the last one failed (None: it did not), and when the next one is due."""

    failure: Failed | None = None
    retry: Retry = Retry()
    due: float = math.inf

    def failed(self, failure: Failed, now: float) -> Saves:
        """After a failed save."""
        retry = self.retry.failed(now)
        return Saves(failure, retry, retry.at)


class Background:
    """Does what is due for one tracker. ``save_interval`` is in seconds."""

    def __init__(self, store: Store, save_interval: float) -> None:
        self.saves = Saves()
        self.group = GroupCommit(store, self.wake, self.note_commit)
        self._store = store
        self._save_interval = save_interval
        self._wakeups: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        # The first one does the work. A call that was interrupted while it started a thread may start another.
        self._running: list[threading.Thread] = []
        self._counts_published_at = 0.0
        self._has_news = False
        self._was_interrupted = False
        self._is_ended = False

    def wake(self) -> None:
        """Wake the thread to do what is due. A signal handler may call this at any moment."""
        if self._wakeups.empty():
            self._wakeups.put(None)

    def note_commit(self) -> None:
        """Have the document saved after the interval: a commit may be led by any thread."""
        if self.saves.due == math.inf:
            self.wake()

    def start(self, started: Callable[[], None]) -> None:
        """Start the thread, unless it runs.

        Raises:
            RuntimeError: no thread can be started now.
        """
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="savings-exporter", daemon=True)
            thread.start()
            started()
            self._thread = thread

    def stop(self) -> None:
        """End the thread. What waits is not committed any more."""
        self._is_ended = True
        self.wake()
        for thread in self._running[:1]:
            if thread is not threading.current_thread():
                thread.join()

    def save(self, span: Span | None = None, *, closing: bool = False) -> bool:
        """Save the document now; whether that worked."""
        try:
            self.group.repair_names()
            failure = self._store.save(span, closing=closing)
        except BaseException:
            # An interrupt: the thread saves again, so that files and lock are as a whole save leaves them.
            self._was_interrupted = True
            self.wake()
            raise
        if failure is not None:
            self.saves = self.saves.failed(failure, time.monotonic())
            self.wake()
            logger.error("%s; trying again in %.1f s", self.reason(), self.saves.retry.delay)
            return False
        if self.saves.failure is not None:
            logger.info("%s: saves work again", self._store.path)
        self.saves = Saves()
        return True

    def reason(self) -> str:
        """Why saves fail, in words."""
        what = described(self._store.path, "the document could not be saved", self.saves.failure)
        return f"{what}; what was recorded is durable in the journal"

    def schedule_save(self) -> None:
        """Have the document saved after the interval, if there is something to save."""
        if self.saves.due == math.inf and not self._store.is_saved():
            self.saves = self.saves._replace(due=time.monotonic() + self._save_interval)

    def _run(self) -> None:
        self._running.append(threading.current_thread())
        while not self._is_ended and self._running[0] is threading.current_thread():
            pause = self._due() - time.monotonic()
            if pause > 0:
                with suppress(queue.Empty):
                    self._wakeups.get(timeout=pause if pause < math.inf else None)
                    self._has_news = True
            try:
                self._do_what_is_due()
            except Exception:
                # Such as no memory. A thread that ended would leave records pending for ever.
                logger.exception("%s: the background thread failed; it continues", self._store.path)
                time.sleep(FIRST_SECONDS)

    def _due(self) -> float:
        """When something is due next, on the monotonic clock."""
        if self.group.is_waiting():
            return 0.0
        publish = self._counts_published_at + _PUBLISH_SECONDS if self._has_news else math.inf
        return min(self.group.retry.at, self.saves.due, publish)

    def _do_what_is_due(self) -> None:
        if self._is_ended:
            return
        now = time.monotonic()
        if self.group.is_waiting() or self.group.retry.at <= now:
            self.group.commit()
        self._store.make_segment()
        self.schedule_save()
        if self._has_news and self._counts_published_at + _PUBLISH_SECONDS <= now:
            self._has_news, self._counts_published_at = False, now
            self.group.repair_names()
            self._store.publish_counts()
        if self._was_interrupted:
            self._was_interrupted = False
            self.save()
        elif self.saves.due <= time.monotonic():
            self._save_if_needed()

    def _save_if_needed(self) -> None:
        # Another process may have saved meanwhile; one save in the interval is enough for all of them.
        # After a failure the document at the path may be the one of which it is not known whether it is durable.
        view = self._store.refresh()
        saved_at = view.document.saved_at
        age = (datetime.now(timezone.utc) - saved_at).total_seconds() if saved_at else self._save_interval
        if self.saves.failure is None and self._store.is_saved():
            self.saves = Saves()
        elif self.saves.failure is None and 0 <= age < self._save_interval:
            self.saves = Saves(due=time.monotonic() + self._save_interval - age)
        else:
            self.save()
            self.schedule_save()
