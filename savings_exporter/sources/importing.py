"""Imports sources into a store, once or as long as a service runs."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from savings_exporter.errors import StoreError
from savings_exporter.model.cursors import Cursor, Cursors
from savings_exporter.model.figures import ZERO, Numbers, added
from savings_exporter.model.totals import Row
from savings_exporter.sources.source import Note, Source, SourceError, Step
from savings_exporter.tracker import SavingsTracker
from savings_exporter.tracking.importing import Importer

logger = logging.getLogger(__name__)

_MOST_PROBLEMS = 100
_PAUSE_SECONDS = 1.0
_SEARCH_SECONDS = 60.0
_LONGEST_PAUSE_SECONDS = 30.0


class Summary:
    """What was read from one source.

    Attributes:
        numbers: the sum of what counts.
        first, last: the days of the oldest and the newest records; empty without records.
        rejected: how many records were kept out, by reason.
        problems: descriptions of rejected records, the first ones.
    """

    def __init__(self) -> None:
        self.numbers: Numbers = ZERO
        self.first = self.last = ""
        self.rejected: Counter[str] = Counter()
        self.problems: list[str] = []

    def add(self, step: Step) -> None:
        """Add a step."""
        for row in step.rows:
            self.numbers = added(self.numbers, _numbers_of(row))
            day = f"{row.newest:%Y-%m-%d}"
            self.last = max(self.last, day)
            if not row.undated:
                self.first = min(self.first or day, day)
        self.rejected.update(step.rejected)
        self.problems += step.problems[: _MOST_PROBLEMS - len(self.problems)]


class Importing:
    """Imports one source into a store.

    Args:
        importer: the store's importer, entered.
        source: the source.
        is_ended: whether to stop waiting for a disk that fails.
    """

    def __init__(self, importer: Importer, source: Source, is_ended: Callable[[], bool] = lambda: False) -> None:
        self.source = source
        self._importer = importer
        self._is_ended = is_ended
        self._cursor: Cursor | None = importer.cursors().get(source.name)

    @property
    def state(self) -> Mapping[str, Any] | None:
        """The state up to which the source was read."""
        return self._cursor.state if self._cursor is not None else None

    def steps(self, *, is_complete: bool) -> Iterator[Step]:
        """Import what is new. Each step is durable when it is returned.

        Raises:
            SourceError: the source cannot be read.
            StoreError: the store has too many sources.
        """
        for step in self.source.steps(self.state, is_complete=is_complete):
            if not self.add(step):
                return
            yield step

    def add(self, step: Step) -> bool:
        """Make a step durable. Returns whether it is: not when the import is to end before."""
        cursor, receipt = self._importer.add(
            self._cursor,
            name=self.source.name,
            source=self.source.kind,
            state=step.state,
            rows=step.rows,
            projects=step.projects,
            rejected=step.rejected,
        )
        while not receipt.wait(_PAUSE_SECONDS):
            if self._is_ended():
                return False
        self._cursor = cursor
        return True


def preview(source: Source, cursors: Cursors, note: Note = lambda _progress: None) -> Summary:
    """What an import of a source would add to a store with these cursors. Changes nothing.

    Raises:
        SourceError: the source cannot be read.
    """
    summary, cursor = Summary(), cursors.get(source.name)
    for step in source.steps(cursor.state if cursor is not None else None, is_complete=True):
        summary.add(step)
        note(step.progress)
    return summary


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
                for source in self._find():
                    if source.name not in imports:
                        logger.info("%s: following it as %s", source.path, source.kind)
                        imports[source.name] = Importing(importer, source, self._ended.is_set)
                        self._statuses = {**self._statuses, source.name: Status(source)}
            for name, importing in imports.items():
                self._import(name, importing)
            self._ended.wait(_PAUSE_SECONDS)

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
            logger.warning("%s: %d records are kept out of the totals; %s", source.path, number, step.problems[0])

    def _note_problem(self, problem: str) -> None:
        if problem != self._problem:
            logger.error("%s. Sources are not followed until then", problem)
        self._problem = problem


def _numbers_of(row: Row) -> Numbers:
    return (row.requests, *row.counts, *row.units)
