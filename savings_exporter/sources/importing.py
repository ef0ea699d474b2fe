"""Imports a source into a store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from savings_exporter.model.cursors import Cursor, Cursors
from savings_exporter.model.figures import ZERO, Numbers, added
from savings_exporter.model.totals import Row
from savings_exporter.sources.source import Note, Source, Step
from savings_exporter.tracking.importing import Importer

_MOST_PROBLEMS = 100
_PAUSE_SECONDS = 1.0


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
            day = row.newest.date().isoformat()
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
            prices=step.prices,
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


def _numbers_of(row: Row) -> Numbers:
    return (row.requests, *row.counts, *row.units)
