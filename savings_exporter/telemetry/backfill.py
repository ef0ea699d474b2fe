"""The lifetime totals of the past as OpenMetrics text, for ``promtool tsdb create-blocks-from openmetrics``.

The store knows what was saved on each day (UTC) under each name, and when the last record of a day was. A sample
includes a day when all its records are in. It is therefore never above the value that a scrape at that time would have
returned, and equal to it from the last record of a day until the first record of the next.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone

from prometheus_client.utils import floatToGoString

from savings_exporter.model.days import DayRow
from savings_exporter.model.past import Name, Past, past_by
from savings_exporter.model.record import parse_timestamp
from savings_exporter.model.snapshot import Snapshot
from savings_exporter.telemetry.metrics import (
    STORE_INFO,
    STORE_INFO_HELP,
    TOTALS_FAMILIES,
    UNPRICED_FAMILY,
    Labels,
    totals_by,
)

DAY = timedelta(days=1)

_LINES_AT_ONCE = 1000

_Run = tuple[int, float | None]
"""From which time on a series has a value. Times are given by their position."""


class Backfill:
    """The samples of a store's past.

    Args:
        snapshot: the totals.
        rows: what was saved on each day, up to the same record as the totals. There is at least one.
        target: the labels that Prometheus adds to each series of the exporter, such as ``job`` and ``instance``.
        step: the distance between samples. It divides a day.
        until: the time of the last sample.

    Attributes:
        times: the times of samples, in seconds since 1970: each step from the beginning of the first day, and
            ``until``. Empty when ``until`` is before the first day.
        samples: how many samples the last call of ``text`` has returned so far.
    """

    def __init__(
        self, snapshot: Snapshot, rows: Sequence[DayRow], target: Mapping[str, str], step: timedelta, until: datetime
    ) -> None:
        self.samples = 0
        self._snapshot = snapshot
        self._target = target
        self._rows = rows
        self._completed = _completed(snapshot, {row.day for row in rows})
        # A clock that was wrong for a while leaves days in the future.
        first = min(f"{snapshot.read_at:%Y-%m-%d}", *self._completed)
        self.times = _times(_midnight(first), step, until)
        self._stamps = [f"{time:.3f}".removesuffix(".000") for time in self.times]

    def text(self) -> Iterator[bytes]:
        """The text, in pieces. Each family is complete, and each series in it is in the order of time."""
        self.samples = 0
        labels: Labels = ()
        pasts: dict[Name, Past] = {}
        for family in (*TOTALS_FAMILIES, UNPRICED_FAMILY):
            if family.labels != labels:
                labels = family.labels
                pasts = past_by(labels, totals_by(labels, self._snapshot), self._rows)
            yield _head(family.name, family.help_text, "counter" if family.is_counter else "gauge")
            name = f"{family.name}_total" if family.is_counter else family.name
            for values, past in pasts.items():
                runs = [(self._begin(past), family.value_of(past.before))]
                runs += [(self._position(day), family.value_of(totals)) for day, totals in past.after]
                series = _series(name, {**self._target, **dict(zip(labels, values, strict=True))})
                yield from self._lines(series, runs)
        yield _head(STORE_INFO, STORE_INFO_HELP, "info")
        info = _series(f"{STORE_INFO}_info", {**self._target, "store": self._snapshot.store_id})
        yield from self._lines(info, [(0, 1)])
        yield b"# EOF\n"

    def _position(self, day: str) -> int:
        """Which sample is the first one that includes a day."""
        return bisect_left(self.times, self._completed[day])

    def _begin(self, past: Past) -> int:
        """Which sample is the first one of a name: the last one before its first saving, so that ``increase()``
        includes this saving.
        """
        if not past.before.is_empty or not past.after:
            return 0
        first = self._position(past.after[0][0])
        return max(first - 1, 0) if first < len(self.times) else first

    def _lines(self, series: str, runs: list[_Run]) -> Iterator[bytes]:
        ends = [*(start for start, _ in runs[1:]), len(self._stamps)]
        for (start, value), end in zip(runs, ends, strict=True):
            if value is None:
                continue
            sample = f"{series} {_number(value)} "
            separator = f"\n{sample}"
            self.samples += end - start
            for at in range(start, end, _LINES_AT_ONCE):
                stamps = self._stamps[at : min(at + _LINES_AT_ONCE, end)]
                yield f"{sample}{separator.join(stamps)}\n".encode()


def _completed(snapshot: Snapshot, days: Iterable[str]) -> dict[str, float]:
    """When the last record of each day was in: at its time, which the history has to the second, and at the latest
    when the day ended, or when the totals were read.
    """
    moments = (parse_timestamp(point["timestamp"]) for point in snapshot.history)
    last = {moment.date().isoformat(): moment.timestamp() + 1 for moment in moments if moment is not None}
    now = _seconds(snapshot.read_at)
    return {day: min(last.get(day, now), _midnight(day) + DAY.total_seconds(), now) for day in days}


def _times(first: float, step: timedelta, until: datetime) -> list[float]:
    last = _seconds(until)
    if last < first:
        return []
    distance = int(step.total_seconds())
    times: list[float] = [*range(int(first), math.ceil(last), distance), last]
    return times


def _midnight(day: str) -> float:
    return datetime.fromisoformat(day).replace(tzinfo=timezone.utc).timestamp()


def _seconds(moment: datetime) -> float:
    """A time in seconds since 1970, to the millisecond below, as Prometheus stores it."""
    return math.floor(moment.timestamp() * 1000) / 1000


def _head(name: str, help_text: str, kind: str) -> bytes:
    return f"# HELP {name} {help_text}\n# TYPE {name} {kind}\n".encode()


def _series(name: str, labels: Mapping[str, str]) -> str:
    pairs = (f'{label}="{_escaped(value)}"' for label, value in labels.items())
    return f"{name}{{{','.join(pairs)}}}"


def _number(value: float) -> str:
    return str(floatToGoString(value))  # type: ignore[no-untyped-call]


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
