"""Savings by day and names, as rows of figures, for ``export`` and ``GET /v1/history``."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from typing import Any

import msgspec

from savings_exporter.model.days import COLUMNS, LAST_DAY, Dated, Group, grouped
from savings_exporter.model.figures import ZERO, Totals, added
from savings_exporter.service.views import csv_row, figures

_ROWS_AT_ONCE = 500


class WrongQueryError(ValueError):
    """A part of a query is wrong. ``name`` is ``from``, ``to`` or ``by``."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"{name} {problem}")
        self.name = name
        self.problem = problem


class Query:
    """Which days are asked for, and by what they are grouped.

    Args:
        first, last: days such as ``2026-01-31``, both included; empty for no limit.
        by: some of day, provider, model, project, agent and source, with commas.

    Raises:
        WrongQueryError: a day is no day, or ``by`` names something else.
    """

    def __init__(self, first: str = "", last: str = "", by: str = "day,model") -> None:
        self.first = _day("from", first)
        self.last = _day("to", last)
        if self.first and self.last and self.first > self.last:
            raise WrongQueryError("to", f"must not be before from, {self.first}")
        self.by = tuple(filter(None, (name.strip() for name in by.split(","))))
        wrong = [name for name in self.by if name not in COLUMNS]
        if wrong or not self.by or len(set(self.by)) < len(self.by):
            raise WrongQueryError("by", f"must be some of {', '.join(COLUMNS)}, each once, not {by[:64]!r}")

    @property
    def days(self) -> tuple[str, str]:
        """The first and the last day, as a source of days takes them."""
        return self.first, self.last or LAST_DAY

    def rows(self, dated: Dated) -> Iterator[dict[str, Any]]:
        """A row for each group. Without a first day, what belongs to no day is a row whose ``by`` fields are empty."""
        groups = grouped(dated.rows, self.by)
        if not self.first and dated.undated != ZERO:
            none: Group = (None,) * len(self.by)
            nameless = added(dated.undated, groups.pop(none, ZERO))
            groups = {none: nameless, **groups}
        for group, numbers in groups.items():
            totals = Totals().plus(numbers, None)
            yield {**dict(zip(self.by, group, strict=True)), **_figures(totals)}


def as_json(query: Query, rows: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    """The rows as one JSON object, in pieces."""
    head = msgspec.json.encode({"from": query.first or None, "to": query.last or None, "by": query.by})
    yield head[:-1] + b',"rows":['
    is_first = True
    for some in _some(rows):
        yield (b"" if is_first else b",") + b",".join(map(msgspec.json.encode, some))
        is_first = False
    yield b"]}\n"


def as_csv(query: Query, rows: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    """The rows as CSV, in pieces."""
    text = io.StringIO()
    writer = csv.DictWriter(text, (*query.by, *_figures(Totals())), lineterminator="\n")
    writer.writeheader()
    for some in _some(rows):
        writer.writerows(map(csv_row, some))
        yield text.getvalue().encode()
        text.seek(0)
        text.truncate()
    yield text.getvalue().encode()


def _figures(totals: Totals) -> dict[str, Any]:
    # Days have no time of the newest record.
    return {name: value for name, value in figures(totals).items() if name != "last_activity_at"}


def _some(rows: Iterable[dict[str, Any]]) -> Iterator[Sequence[dict[str, Any]]]:
    remaining = iter(rows)
    while some := list(itertools.islice(remaining, _ROWS_AT_ONCE)):
        yield some


def _day(name: str, text: str) -> str:
    if not text:
        return ""
    try:
        day = date.fromisoformat(text)
    except ValueError:
        raise WrongQueryError(name, f"must be a day such as 2026-01-31, not {text[:64]!r}") from None
    return day.isoformat()
