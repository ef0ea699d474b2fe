"""Names come from clients. A million records with hostile names use bounded memory and lose no token."""

from __future__ import annotations

import errno
import subprocess
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from savings_exporter import SavingsCollector, SavingsRecord, SavingsTracker
from savings_exporter.model.names import OTHER
from savings_exporter.model.totals import OTHER_PAIR, Sums, total_of
from tests.support.faults import FaultyFileSystem
from tests.support.hostile import DIFFERENT, LIMIT, NAMES
from tests.support.scrape import parsed
from tests.support.wait import WAIT_SECONDS


def hostile_records(count: int) -> list[SavingsRecord]:
    """As many records, each name of a model with another one of a project, saving 0, 1, 2, ... tokens."""
    return [
        SavingsRecord(
            model=NAMES[n % DIFFERENT],
            project=NAMES[n * 7 % DIFFERENT],
            provider=NAMES[n * 13 % DIFFERENT],
            tokens_saved=n,
            input_tokens=2 * n,
            savings_usd=n / 1000,
        )
        for n in range(count)
    ]


def exposition_of(tracker: SavingsTracker) -> str:
    registry = CollectorRegistry()
    registry.register(SavingsCollector(tracker))
    return generate_latest(registry).decode()


def assert_bounded_and_exact(tracker: SavingsTracker, records: list[SavingsRecord], times: int) -> None:
    snapshot = tracker.snapshot()
    assert snapshot.lifetime.requests == len(records) * times
    assert snapshot.lifetime.tokens_saved == sum(record.tokens_saved for record in records) * times
    assert snapshot.lifetime.compression_savings_usd == sum(record.tokens_saved for record in records) * times / 1000
    assert len(snapshot.by_model.keys() - {OTHER}) == LIMIT
    assert len(snapshot.projects.keys() - {OTHER}) == LIMIT
    assert len(snapshot.by_provider_model.keys() - {OTHER_PAIR}) == LIMIT
    assert total_of(snapshot.by_model.values()) == snapshot.lifetime
    assert total_of(snapshot.by_provider_model.values()) == snapshot.lifetime
    of_projects = [record for record in records if record.project is not None]
    assert total_of(snapshot.projects.values()).requests == len(of_projects) * times
    assert total_of(snapshot.projects.values()).tokens_saved == sum(r.tokens_saved for r in of_projects) * times

    seen = parsed(exposition_of(tracker))
    of_models = {name: value for name, value in seen.items() if name.startswith("savings_tokens_saved_total{")}
    assert sum(of_models.values()) == snapshot.lifetime.tokens_saved
    assert len(of_models) <= LIMIT + 2
    assert 'savings_tokens_saved_total{model="forged"}' not in seen


@pytest.mark.slow
def test_a_million_records(store_path: Path) -> None:
    records = hostile_records(DIFFERENT)
    with SavingsTracker(store_path, max_models=LIMIT, max_projects=LIMIT) as tracker:
        for _ in range(100):
            tracker.record_many(records, wait=False)
        assert tracker.flush()
        assert_bounded_and_exact(tracker, records, times=100)
    assert store_path.stat().st_size < 200_000
    with SavingsTracker(store_path, max_models=LIMIT, max_projects=LIMIT) as tracker:
        assert_bounded_and_exact(tracker, records, times=100)


@pytest.mark.slow
def test_pending_records_stay_bounded(store_path: Path, faults: FaultyFileSystem) -> None:
    records = hostile_records(DIFFERENT)
    with SavingsTracker(store_path, max_models=LIMIT, max_projects=LIMIT, filesystem=faults) as tracker:
        faults.fail("fsync_journal", errno.EIO)
        for _ in range(5):
            assert not tracker.record_many(records)
        assert tracker.snapshot().pending_records == 5 * DIFFERENT
        faults.mend()
        assert tracker.flush(WAIT_SECONDS)
        assert_bounded_and_exact(tracker, records, times=5)
    with SavingsTracker(store_path, max_models=LIMIT, max_projects=LIMIT) as tracker:
        assert_bounded_and_exact(tracker, records, times=5)


def test_sums_stay_bounded() -> None:
    records = hostile_records(DIFFERENT)
    sums = Sums(most_rows=LIMIT)
    sums.add_all(records)
    rows = sums.rows()
    assert len(rows) <= 3 * LIMIT
    assert sum(row.requests for row in rows) == DIFFERENT
    assert sum(row.counts[0] for row in rows) == sum(record.tokens_saved for record in records)


@pytest.mark.needs("prometheus")
def test_promtool_on_hostile_names(store_path: Path) -> None:
    with SavingsTracker(store_path) as tracker:
        tracker.record_many(hostile_records(DIFFERENT))
        exposition = exposition_of(tracker)
    checked = subprocess.run(["promtool", "check", "metrics"], input=exposition.encode(), capture_output=True)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
