"""The past of a store as OpenMetrics text: under the names of a scrape, and up to its values."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta, timezone
from itertools import groupby, pairwise
from pathlib import Path

import pytest
from msgspec.structs import replace
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from savings_exporter import SavingsRecord, SavingsTracker
from savings_exporter.model.days import MOST_ROWS
from savings_exporter.model.history import History
from savings_exporter.telemetry.backfill import Backfill
from savings_exporter.telemetry.metrics import TOTALS_FAMILIES, UNPRICED_FAMILY, SavingsCollector
from savings_exporter.watched import WatchedFile

NOW = datetime.now(timezone.utc)
MIDNIGHT = NOW.replace(hour=0, minute=0, second=0, microsecond=0)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
TARGET = {"instance": "127.0.0.1:9478", "job": 'a "job"\n'}

Series = tuple[str, frozenset[tuple[str, str]]]


def saving(days: int, hour: float, model: str = "a", **fields: object) -> SavingsRecord:
    moment = MIDNIGHT - timedelta(days=days) + hour * HOUR
    return SavingsRecord(model=model, tokens_saved=days + 1, timestamp=moment, **fields)  # type: ignore[arg-type]


def backfill_of(
    store: Path, records: Iterable[SavingsRecord] = (), step: timedelta = HOUR, until: datetime | None = None
) -> Backfill:
    if records:
        with SavingsTracker(store) as tracker:
            assert tracker.record_many(list(records)).durable
    snapshot, dated = WatchedFile(store).snapshot_and_days()
    return Backfill(snapshot, dated.rows, TARGET, step, until or snapshot.read_at)


def read(backfill: Backfill) -> dict[Series, list[tuple[float, float]]]:
    """The times and the values of each series. The strict parser of the client refuses series that are not together,
    and times that are not in order.
    """
    found: list[Sample] = []
    text = b"".join(backfill.text()).decode()
    for family in text_string_to_metric_families(text):  # type: ignore[no-untyped-call]
        found += family.samples
    assert len(found) == backfill.samples
    series: dict[Series, list[tuple[float, float]]] = {}
    for (name, labels), points in groupby(found, lambda sample: (sample.name, frozenset(sample.labels.items()))):
        assert labels >= TARGET.items()
        found_series = (name, frozenset(labels - TARGET.items()))
        assert found_series not in series
        series[found_series] = [(float(point.timestamp or 0), point.value) for point in points]
    return series


def of_model(backfill: Backfill, name: str, model: str = "a") -> list[tuple[float, float]]:
    return read(backfill)[name, frozenset({"provider": "unknown", "model": model}.items())]


def hours(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points at which the value changes, and the first one, by the hours since the last midnight but two."""
    start = (MIDNIGHT - timedelta(days=2)).timestamp()
    changed = points[:1] + [point for before, point in pairwise(points) if before[1] != point[1]]
    return [((time - start) / 3600, value) for time, value in changed]


def many_names() -> Iterable[SavingsRecord]:
    """More combinations of names on a day than it holds, and more models and agents than the totals hold."""
    for days in (1000, 30, 8, 1):
        for number in range(MOST_ROWS + 50):
            yield saving(
                days,
                number % 24,
                model=f"m{number - days}",
                provider="p",
                agent=f"agent {number}" if number % 3 else None,
                project=f"x{(number + days) % 60}",
                source="s" if number % 2 else None,
                savings_usd=0.1 - number / 100 if number % 5 else None,
                input_tokens=number,
            )


def test_last_values_are_those_of_a_scrape(store_path: Path) -> None:
    """For all series that a scrape of the totals has."""
    unusual = SavingsRecord(model='\N{SNOWMAN} "quoted" \\', tokens_saved=1)
    backfill = backfill_of(store_path, [unusual, *many_names()], DAY)
    last = {series: points[-1] for series, points in read(backfill).items()}
    families = (*TOTALS_FAMILIES, UNPRICED_FAMILY)
    names = {f"{family.name}_total" if family.is_counter else family.name for family in families}
    with SavingsTracker(store_path) as tracker:
        expected = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in SavingsCollector(tracker).collect()
            for sample in family.samples
            if sample.name in names | {"savings_store_info"}
        }
    assert {series: value for series, (_, value) in last.items()} == expected
    assert {time for time, _ in last.values()} == {backfill.times[-1]}


def test_no_counter_goes_back(store_path: Path) -> None:
    for (name, _), points in read(backfill_of(store_path, many_names(), DAY)).items():
        values = [value for _, value in points]
        assert values == sorted(values) or not name.endswith("_total")
        assert values[0] >= 0 or not name.endswith("_total")


def test_a_day_counts_from_its_last_record_on(store_path: Path) -> None:
    backfill = backfill_of(store_path, [saving(2, 3), saving(2, 5), saving(1, 7.5)])
    assert hours(of_model(backfill, "savings_tokens_saved_total")) == [(5, 0), (6, 6), (32, 8)]
    assert hours(of_model(backfill, "savings_requests_total")) == [(5, 0), (6, 2), (32, 3)]
    # Just as in a scrape, all counters of a name begin together.
    assert hours(of_model(backfill, "savings_cache_read_tokens_total")) == [(5, 0)]


def test_savings_without_a_day_come_first(store_path: Path) -> None:
    backfill = backfill_of(store_path, [saving(1000, 0), saving(2, 5), saving(1, 5, "b")])
    assert hours(of_model(backfill, "savings_tokens_saved_total")) == [(0, 1001), (6, 1004)]
    assert hours(of_model(backfill, "savings_tokens_saved_total", "b")) == [(29, 0), (30, 2)]
    assert hours(of_model(backfill, "savings_tokens_saved_total", "unknown")) == [(0, 0)]


def test_an_amount_begins_when_it_is_known(store_path: Path) -> None:
    records = [saving(2, 5), saving(1, 5, savings_usd=-0.5), saving(1, 6, savings_usd=0.125)]
    backfill = backfill_of(store_path, records)
    assert hours(of_model(backfill, "savings_cost_saved_usd")) == [(31, -0.375)]
    names = {name for name, _ in read(backfill)}
    assert not names & {"savings_input_cost_usd", "savings_cache_cost_saved_usd"}


def test_the_last_sample_can_be_earlier(store_path: Path) -> None:
    """It does not count the day that had not ended yet, and has no name that came later."""
    records = [saving(2, 5), saving(1, 5), saving(1, 9, "b")]
    until = MIDNIGHT - timedelta(days=1) + 7 * HOUR + timedelta(minutes=1)
    backfill = backfill_of(store_path, records, until=until)
    points = of_model(backfill, "savings_tokens_saved_total")
    assert points[-2:] == [((until - timedelta(minutes=1)).timestamp(), 3), (until.timestamp(), 3)]
    assert not any(("model", "b") in labels for _, labels in read(backfill))
    assert backfill_of(store_path, until=MIDNIGHT - timedelta(days=3)).times == []


@pytest.mark.parametrize("step", [timedelta(minutes=5), HOUR, timedelta(days=1)])
def test_step(store_path: Path, step: timedelta) -> None:
    times = [
        time
        for time, _ in of_model(
            backfill_of(store_path, [saving(1000, 0), saving(2, 5)], step), "savings_requests_total"
        )
    ]
    assert times[0] == (MIDNIGHT - timedelta(days=2)).timestamp()
    assert {later - time for time, later in pairwise(times[:-1])} == {step.total_seconds()}
    assert 0 < times[-1] - times[-2] <= step.total_seconds()


@pytest.mark.parametrize("first", ["2000-01-01", f"{NOW:%Y-%m-%d}"])
def test_days_in_the_future_count_now(store_path: Path, first: str) -> None:
    """A clock that was wrong for a while can leave them. A block in the future makes Prometheus refuse scrapes."""
    snapshot, dated = WatchedFile(stored(store_path)).snapshot_and_days()
    rows = [row._replace(day="2199-01-01") if row.day >= first else row for row in dated.rows]
    history = History([*snapshot.history[:-1], {**snapshot.history[-1], "timestamp": "2199-01-01T12:00:00Z"}])
    snapshot = replace(snapshot, ledger=replace(snapshot.ledger, history=history))
    backfill = Backfill(snapshot, rows, TARGET, HOUR, snapshot.read_at)
    points = of_model(backfill, "savings_tokens_saved_total")
    assert points[-1] == (backfill.times[-1], 4)
    assert {value for _, value in points[:-1]} <= {0, 3}
    assert backfill.times[-1] <= snapshot.read_at.timestamp()


def stored(store: Path) -> Path:
    with SavingsTracker(store) as tracker:
        assert tracker.record_many([saving(2, 5), SavingsRecord(model="a", tokens_saved=1)]).durable
    return store
