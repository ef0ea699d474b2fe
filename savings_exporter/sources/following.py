"""Follows sources as long as a service runs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from savings_exporter.errors import StoreError
from savings_exporter.sources.importing import Importing
from savings_exporter.sources.source import Source, SourceError, Step
from savings_exporter.tracker import SavingsTracker
from savings_exporter.tracking.importing import Importer

logger = logging.getLogger(__name__)

_PAUSE_SECONDS = 1.0
_SEARCH_SECONDS = 60.0
_LONGEST_PAUSE_SECONDS = 30.0


class Status(NamedTuple):
    """The state of a source that is followed. ``problem`` is empty while it can be read."""

    source: Source
    problem: str = ""


class Following:
    """Follows sources in a thread, while it is entered as a context manager: what they add counts within a second or
    two.

    Args:
        tracker: the store's tracker.
        find: finds the sources. It is called again every minute.
    """

    def __init__(self, tracker: SavingsTracker, find: Callable[[], Sequence[Source]]) -> None:
        self._tracker = tracker
        self._find = find
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="savings-sources", daemon=True)
        self._statuses: Mapping[str, Status] = {}
        self._problem = ""

    def __enter__(self) -> Following:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop after the current step. The tracker must not be closed before."""
        self._ended.set()
        self._thread.join()

    def statuses(self) -> Sequence[Status]:
        """The sources that are followed, and whether they can be read."""
        return tuple(self._statuses.values())

    @property
    def problem(self) -> str:
        """Why nothing can be imported now; empty when it can."""
        return self._problem

    def _run(self) -> None:
        pause = _PAUSE_SECONDS
        while not self._ended.is_set():
            try:
                # Before the import begins, so that a source that cannot be imported is shown, too.
                self._search()
                with self._tracker.importing() as importer:
                    self._problem, pause = "", _PAUSE_SECONDS
                    self._follow(importer)
            except StoreError as error:
                self._note_problem(str(error))
            except Exception:
                # The other work of the service goes on.
                logger.exception("following sources failed; it begins again")
                self._note_problem("following sources failed")
            self._ended.wait(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)

    def _follow(self, importer: Importer) -> None:
        imports: dict[str, Importing] = {}
        searched_at = -_SEARCH_SECONDS
        while not self._ended.is_set():
            if time.monotonic() - searched_at >= _SEARCH_SECONDS:
                searched_at = time.monotonic()
                self._search()
                for name, status in self._statuses.items():
                    if name not in imports:
                        imports[name] = Importing(importer, status.source, self._ended.is_set)
            for name, importing in imports.items():
                self._import(name, importing)
            self._ended.wait(_PAUSE_SECONDS)

    def _search(self) -> None:
        for source in self._find():
            if source.name not in self._statuses:
                logger.info("%s: following it as %s", source.path, source.kind)
                self._statuses = {**self._statuses, source.name: Status(source)}

    def _import(self, name: str, importing: Importing) -> None:
        problem = ""
        try:
            for step in importing.steps(is_complete=False):
                self._note_step(importing.source, step)
        except SourceError as error:
            problem = str(error)
        status = self._statuses[name]
        if problem and problem != status.problem:
            logger.warning("%s. What was imported before stays counted", problem)
        elif status.problem and not problem:
            logger.info("%s: can be read again", status.source.path)
        self._statuses = {**self._statuses, name: status._replace(problem=problem)}

    def _note_step(self, source: Source, step: Step) -> None:
        if step.problems:
            number = sum(step.rejected.values())
            what = "1 record is" if number == 1 else f"{number} records are"
            logger.warning("%s: %s kept out of the totals; %s", source.path, what, step.problems[0])

    def _note_problem(self, problem: str) -> None:
        if problem != self._problem:
            logger.error("%s. Sources are not followed until then", problem)
        self._problem = problem


class FollowingCollector(Collector):
    """Collects whether the sources that are followed can be read."""

    def __init__(self, following: Following) -> None:
        self._following = following

    def collect(self) -> Iterator[Metric]:
        """The family of readable sources: 0 if one of a kind cannot be read, or if nothing can be imported."""
        family = GaugeMetricFamily(
            "savings_source_readable",
            "Whether the followed sources of this kind can be read and imported: 0 if one cannot.",
            labels=["source"],
        )
        readable: dict[str, bool] = {}
        for status in self._following.statuses():
            is_good = not status.problem and not self._following.problem
            readable[status.source.kind] = readable.get(status.source.kind, True) and is_good
        for kind, is_readable in readable.items():
            family.add_metric([kind], float(is_readable))
        yield family
