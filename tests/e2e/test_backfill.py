"""promtool makes blocks of a backfill, and a real Prometheus continues from them with scrapes."""

from __future__ import annotations

import subprocess
from collections import defaultdict
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from savings_exporter import SavingsRecord, SavingsTracker
from tests.support.prometheus import Prometheus, prometheus
from tests.support.service import free_port, run_cli, running
from tests.support.wait import eventually

pytestmark = pytest.mark.needs("prometheus")

NOW = datetime.now(timezone.utc)
MIDNIGHT = NOW.replace(hour=0, minute=0, second=0, microsecond=0)
DAYS = 40
STEP = 300
KEPT = "--storage.tsdb.retention.time=10y"
NAMES = ("billing", 'a "quoted" \\ name', "проект-ü")
FAMILIES = (
    "savings_tokens_saved_total",
    "savings_requests_total",
    "savings_input_tokens_total",
    "savings_compared_tokens_saved_total",
    "savings_cost_saved_usd",
    "savings_cache_cost_saved_usd",
    "savings_project_tokens_saved_total",
    "savings_agent_requests_total",
    "savings_source_tokens_saved_total",
    "savings_store_info",
)

Series = dict[frozenset[tuple[str, str]], float]


def recorded() -> Iterator[SavingsRecord]:
    """Records at several hours of each of the last days but one, and at this moment. The amount in US dollars is
    negative in the end. One name first appears after some days.
    """
    yield SavingsRecord(model="old", tokens_saved=10**6, timestamp=NOW - timedelta(days=1000))
    for number in range(DAYS):
        for hour in (2, 9 + number % 7):
            moment = MIDNIGHT - timedelta(days=DAYS - number) + timedelta(hours=hour, minutes=number)
            yield from at(moment, number)
    yield from at(datetime.now(timezone.utc), DAYS)


def at(moment: datetime, number: int) -> Iterator[SavingsRecord]:
    if number == DAYS // 2:  # a day without savings
        return
    for place, name in enumerate(NAMES[: 2 if number < 5 else 3]):
        yield SavingsRecord(
            model=f"m-{name}",
            provider="anthropic",
            project=name,
            agent="cli" if place else None,
            source="rtk",
            tokens_saved=1000 * number + place,
            input_tokens=50 * place,
            savings_usd=0.25 - number / 16 if place else None,
            timestamp=moment,
        )


@pytest.fixture
def records(store_path: Path) -> list[SavingsRecord]:
    """Records in a store whose days are closed."""
    some = list(recorded())
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_many(some).durable
    return some


def backfilled(directory: Path, store: Path, address: str, *options: str) -> tuple[float, float]:
    """Put the past of a store into Prometheus's data; the times of the first and of the last sample."""
    text = directory / "past.om"
    done = run_cli("backfill", "--store", str(store), "--output", str(text), "--instance", address, *options)
    assert (done.returncode, done.stderr) == (0, "")
    command = ["promtool", "tsdb", "create-blocks-from", "--max-block-duration=8760h", "openmetrics", str(text)]
    made = subprocess.run([*command, str(directory / "tsdb")], capture_output=True, text=True, check=False)
    assert (made.returncode, made.stderr) == (0, "")
    times = [
        float(line.rpartition(" ")[2]) for line in text.read_text(encoding="utf-8").splitlines()[:-1] if line[0] != "#"
    ]
    return min(times), max(times)


def tokens_by(field: str, records: list[SavingsRecord], until: datetime) -> dict[str, int]:
    """The tokens saved by name, of all records up to a time."""
    sums: dict[str, int] = defaultdict(int)
    for record in records:
        assert record.timestamp is not None
        if record.timestamp < until and getattr(record, field) is not None:
            sums[getattr(record, field)] += record.tokens_saved
    return dict(sums)


def values(server: Prometheus, query: str, label: str, time: float) -> dict[str, float]:
    return {series["metric"][label]: float(series["value"][1]) for series in server.series(query, time=time)}


def all_series(server: Prometheus, time: float) -> Mapping[str, Series]:
    return {
        family: {
            frozenset(found["metric"].items()): float(found["value"][1]) for found in server.series(family, time=time)
        }
        for family in FAMILIES
    }


def scraped_after(server: Prometheus, last: float) -> float:
    """The time of a scrape after a time. A later scrape that fails says nothing about that time."""

    def found() -> float | None:
        answer = server.query("max(timestamp(savings_store_info))")
        return answer[1] if answer is not None and answer[1] > last else None

    return float(eventually(found, "a scrape"))


def test_past_and_seam(tmp_path: Path, store_path: Path, records: list[SavingsRecord]) -> None:
    address = f"127.0.0.1:{free_port()}"
    with running("serve", "--store", str(store_path), address=address) as service:
        first, last = backfilled(tmp_path, store_path, address)
        with prometheus(tmp_path, address, KEPT) as server:
            scraped = scraped_after(server, last)
            assert_right_at_the_end_of_each_day(server, records, first)
            assert_increase(server, records)
            live = all_series(server, scraped)
            assert live == all_series(server, last)
            assert all(live[family] for family in FAMILIES if "cache" not in family)

            saving = {"model": "m-billing", "provider": "anthropic", "project": "billing", "tokens_saved": 77}
            assert service.post(saving)[0] == 200
            total = server.query("sum(savings_tokens_saved_total)", time=last)
            assert total is not None
            end = server.becomes("sum(savings_tokens_saved_total)", total[1] + 77)
            assert_seamless(server, last, end, total[1])


def test_prometheus_keeps_what_it_scraped(tmp_path: Path, store_path: Path, records: list[SavingsRecord]) -> None:
    """Its newest samples are not in blocks yet. A block that ends after them would replace them."""
    address = f"127.0.0.1:{free_port()}"
    until = MIDNIGHT - timedelta(days=1) + timedelta(hours=3)
    with running("serve", "--store", str(store_path), address=address):
        with prometheus(tmp_path, address, KEPT) as server:
            total = sum(tokens_by("model", records, NOW + timedelta(days=1)).values())
            scraped = server.becomes("sum(savings_tokens_saved_total)", total)
        _, last = backfilled(tmp_path, store_path, address, "--until", until.isoformat())
        assert last == until.timestamp()
        with prometheus(tmp_path, address, KEPT) as server:
            end = server.becomes(f"timestamp(savings_store_info) > bool {scraped}", 1)
            assert server.query("sum(savings_tokens_saved_total)", time=scraped) == (scraped, total)
            # The day on which it ends is not over, so that it is never above what was scraped then.
            expected = sum(tokens_by("model", records, until - timedelta(hours=3)).values())
            assert server.query("sum(savings_tokens_saved_total)", time=last) == (last, expected)
            assert server.query("sum(resets(savings_tokens_saved_total[10d]))", time=end) == (end, 0)


def assert_right_at_the_end_of_each_day(server: Prometheus, records: list[SavingsRecord], first: float) -> None:
    """And from the last record of a day on, and before the first one of the next day."""
    for number in range(DAYS + 1):
        end = MIDNIGHT - timedelta(days=DAYS - number)
        moments = [end] if number == 0 else [end - timedelta(hours=8), end, end + timedelta(hours=1)]
        for moment in filter(NOW.__gt__, moments):
            time = moment.timestamp()
            assert time >= first
            for metric, label, field in (
                ("savings_tokens_saved_total", "model", "model"),
                ("savings_project_tokens_saved_total", "project", "project"),
                ("savings_source_tokens_saved_total", "source", "source"),
            ):
                found = values(server, f"{metric} > 0", label, time)
                assert found == {name: tokens for name, tokens in tokens_by(field, records, moment).items() if tokens}
            amounts = [record.savings_usd for record in records if record.timestamp < moment and record.savings_usd]  # type: ignore[operator]
            dollars = server.query("sum(savings_cost_saved_usd)", time=time)
            assert (dollars[1] if dollars else 0) == pytest.approx(sum(amounts), abs=1e-6)


def assert_increase(server: Prometheus, records: list[SavingsRecord]) -> None:
    """Of whole days. Prometheus 3 leaves the sample at the start of a range out, and extrapolates by one step."""
    end = MIDNIGHT - timedelta(days=2)
    for days in (1, 7, 30):
        length = days * 86400
        extrapolated = length / (length - STEP) if server.version >= (3, 0) else 1
        before, after = (tokens_by("model", records, moment) for moment in (end - timedelta(days=days), end))
        found = values(server, f"increase(savings_tokens_saved_total[{days}d])", "model", end.timestamp())
        for name in after:
            assert found[name] == pytest.approx((after[name] - before[name]) * extrapolated, rel=1e-9)
    # A counter that begins within the range begins at zero.
    found = values(server, f"increase(savings_tokens_saved_total[{DAYS}d])", "model", end.timestamp())
    assert found[f"m-{NAMES[2]}"] == tokens_by("model", records, end)[f"m-{NAMES[2]}"]


def assert_seamless(server: Prometheus, last: float, end: float, total: float) -> None:
    """Neither a gap nor a drop, and no step but those of the records."""
    seen = server.over("sum(savings_tokens_saved_total)", last - 7200, end, 1)
    assert len(seen) == int(end - last + 7200) + 1
    in_order = list(seen.values())
    assert in_order == sorted(in_order)
    assert {value for time, value in seen.items() if time >= last} <= {total, total + 77}
    for query in ("sum(resets(savings_tokens_saved_total[10d]))", "sum(resets(savings_project_requests_total[10d]))"):
        assert server.query(query, time=end) == (end, 0)
