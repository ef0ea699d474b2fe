"""Metrics of made-up snapshots: all children from the start, sums of writers, exemplars, and how they are written."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.trace import SpanContext, TraceFlags
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from savings_exporter.model.operations import OperationCounts
from savings_exporter.model.snapshot import Health, Snapshot
from savings_exporter.model.totals import Ledger, Totals
from savings_exporter.storage.operation import COMMIT, FSYNC_DIR, SAVE
from savings_exporter.telemetry.counters import OperationCounters
from savings_exporter.telemetry.metrics import SavingsCollector, WatchCollector
from tests.support.scrape import samples
from tests.unit.telemetry.operations import run

SAVED_AT = datetime(2026, 6, 15, 12, 30, tzinfo=timezone.utc)


class Tracker:
    """A tracker with a made-up ledger, beside other writers."""

    def __init__(self, *others: OperationCounters, **ledger: Any) -> None:
        self.counters = OperationCounters()
        self.fields: dict[str, Any] = {}
        self.healthy = True
        self.storage_path = "/proxy_savings.json"
        self._others = others
        self._ledger = Ledger(**ledger)

    def snapshot(self) -> Snapshot:
        operations = self.counters.counts()
        for other in self._others:
            operations = operations.plus(other.counts())
        fields = {
            "store_id": "00112233445566aa",
            "saved_at": None,
            "read_at": SAVED_AT,
            "document_bytes": 7,
            "operations": operations,
        }
        return Snapshot(ledger=self._ledger, **{**fields, **self.fields})

    def health(self) -> Health:
        return Health(healthy=self.healthy)


def shown(tracker: Tracker) -> dict[str, float]:
    return samples(SavingsCollector(tracker))


def family(found: Mapping[str, float], name: str) -> dict[str, float]:
    """The samples of one name, by their labels."""
    return {sample.removeprefix(name): value for sample, value in found.items() if sample.partition("{")[0] == name}


def test_an_empty_store() -> None:
    found = shown(Tracker())
    unknown = '{model="unknown",provider="unknown"}'
    assert family(found, "savings_tokens_saved_total") == {unknown: 0}
    # Nobody gave a price, and that is not zero dollars.
    assert not [name for name in found if name.endswith("_usd")]
    assert found["savings_last_save_success_timestamp_seconds"] == 0
    assert found["savings_last_record_timestamp_seconds"] == 0
    assert found["savings_dir_fsync_supported"] == 1
    assert found["savings_last_dir_fsync_success"] == 1
    assert not [name for name in found if name.startswith(("savings_project", "savings_agent", "savings_source"))]


def test_known_children_are_zero() -> None:
    found = shown(Tracker())
    errors = ("EIO", "ENOSPC", "EDQUOT", "EROFS", "EACCES")
    for what, steps in (
        ("commit", ("append", "fsync_journal", "fsync_dir")),
        ("save", ("write", "fsync_file", "replace", "fsync_dir")),
    ):
        expected = [(step, error) for step in steps for error in errors]
        expected += [("prepare", error) for error in (*errors, "EAGAIN", "ESTALE")]
        labels = {f'{{error="{error}",step="{step}"}}': 0.0 for step, error in expected}
        assert family(found, f"savings_{what}_failures_total") == labels
    targets = {f'{{target="{target}"}}': 0.0 for target in ("file", "directory", "journal")}
    assert family(found, "savings_fsync_failures_total") == targets
    names = ("closed_days", "corrupt_document", "previous_document", "torn_tail")
    kinds = {f'{{kind="{kind}"}}': 0.0 for kind in names}
    assert family(found, "savings_recoveries_total") == kinds
    drills = ("dir-fsync", "file-fsync", "journal-fsync", "save-latency")
    assert family(found, "savings_drill_active") == {f'{{drill="{drill}"}}': 0.0 for drill in drills}
    for step in ("write", "fsync_file", "replace", "fsync_dir"):
        assert found[f'savings_save_step_duration_seconds_bucket{{le="5e-05",step="{step}"}}'] == 0
    for histogram in ("commit_duration_seconds", "commit_records", "save_duration_seconds"):
        assert found[f'savings_{histogram}_bucket{{le="+Inf"}}'] == found[f"savings_{histogram}_sum"] == 0


def test_totals() -> None:
    some = Totals(
        tokens_saved=5,
        requests=2,
        total_input_tokens=9,
        tool_tokens_saved=3,
        output_tokens_saved=4,
        cache_read_tokens=6,
        compared_tokens_saved=8,
        priced_requests=1,
        costed_requests=1,
        compression_savings_usd=-0.5,
        cache_savings_usd=0.25,
        total_input_cost_usd=1.5,
        last_activity_at="2026-06-15T12:30:00Z",
    )
    tracker = Tracker(
        records=2,
        lifetime=some,
        by_provider_model={("p", "m"): some},
        projects={"x": some},
        agents={"a": some},
        sources={"s": some},
    )
    tracker.fields = {"saved_at": SAVED_AT, "journal_bytes": 11, "pending_records": 1, "pending_tokens": 99}
    tracker.healthy = False
    found = shown(tracker)
    pair = '{model="m",provider="p"}'
    assert {name: found[f"savings_{name}{pair}"] for name in ("tokens_saved_total", "requests_total")} == {
        "tokens_saved_total": 5,
        "requests_total": 2,
    }
    assert found[f"savings_input_tokens_total{pair}"] == 9
    assert found[f"savings_tool_tokens_saved_total{pair}"] == 3
    assert found[f"savings_output_tokens_saved_total{pair}"] == 4
    assert found[f"savings_cache_read_tokens_total{pair}"] == 6
    assert found[f"savings_compared_tokens_saved_total{pair}"] == 8
    assert found[f"savings_cost_saved_usd{pair}"] == -0.5
    assert found[f"savings_cache_cost_saved_usd{pair}"] == 0.25
    assert found[f"savings_input_cost_usd{pair}"] == 1.5
    for label, value in (("project", "x"), ("agent", "a"), ("source", "s")):
        assert found[f'savings_{label}_tokens_saved_total{{{label}="{value}"}}'] == 5
        assert found[f'savings_{label}_requests_total{{{label}="{value}"}}'] == 2
    assert found["savings_last_save_success_timestamp_seconds"] == SAVED_AT.timestamp()
    assert found["savings_last_record_timestamp_seconds"] == SAVED_AT.timestamp()
    assert (found["savings_document_size_bytes"], found["savings_journal_size_bytes"]) == (7, 11)
    assert (found["savings_records_pending"], found["savings_tokens_pending"]) == (1, 99)
    assert found["savings_store_healthy"] == 0
    assert found['savings_store_info{store="00112233445566aa"}'] == 1


@pytest.mark.parametrize(
    ("iso", "expected"),
    [
        ("2026-06-15T12:30:00", SAVED_AT.timestamp()),
        ("2026-06-15T14:30:00+02:00", SAVED_AT.timestamp()),
        ("0001-01-01T00:00:00", datetime(1, 1, 1, tzinfo=timezone.utc).timestamp()),
        ("yesterday", 0),
        ("", 0),
    ],
)
def test_time_of_the_last_record(iso: str, expected: float) -> None:
    tracker = Tracker(lifetime=Totals(last_activity_at=iso))
    assert shown(tracker)["savings_last_record_timestamp_seconds"] == expected


def test_operations_of_all_writers() -> None:
    ended, other = OperationCounters(), OperationCounters()
    tracker = Tracker(ended, other)
    for writer in (ended, other, tracker.counters):
        run(writer, records=3)
        run(writer, failing="append")
        run(writer, SAVE, failing=FSYNC_DIR)
        writer.recovered("torn_tail")
    found = shown(tracker)
    assert found["savings_commits_total"] == 6
    assert found['savings_commit_failures_total{error="EIO",step="append"}'] == 3
    assert found["savings_commit_duration_seconds_count"] == 6
    assert found["savings_commit_records_count"] == 3
    assert found['savings_commit_records_bucket{le="2.0"}'] == 0
    assert found['savings_commit_records_bucket{le="4.0"}'] == 3
    assert found["savings_commit_records_sum"] == 9
    assert found["savings_saves_total"] == found["savings_save_duration_seconds_count"] == 3
    assert found['savings_save_step_duration_seconds_count{step="write"}'] == 3
    assert found['savings_save_failures_total{error="EIO",step="fsync_dir"}'] == 3
    assert found['savings_fsync_failures_total{target="directory"}'] == 3
    assert found['savings_recoveries_total{kind="torn_tail"}'] == 3
    assert found["savings_last_dir_fsync_success"] == 0


def test_whichever_worker_answers() -> None:
    one, two = Tracker(), Tracker()
    first, second = Tracker(two.counters), Tracker(one.counters)
    first.counters, second.counters = one.counters, two.counters
    run(one.counters, failing="append")
    run(two.counters, SAVE)
    # Other programs change the free space between the two.
    first_shown, second_shown = (
        {name: value for name, value in shown(worker).items() if not name.startswith("savings_store_free_")}
        for worker in (first, second)
    )
    assert first_shown == second_shown


def test_unexpected_children() -> None:
    operations = OperationCounts(
        counts={"save_failures/write/EMFILE": 2.0, "commit_failures/later/EIO": 1.0, "recoveries/other": 1.0}
    )
    tracker = Tracker()
    tracker.fields = {"operations": operations}
    found = shown(tracker)
    assert found['savings_save_failures_total{error="EMFILE",step="write"}'] == 2
    assert found['savings_commit_failures_total{error="EIO",step="later"}'] == 1
    assert found['savings_recoveries_total{kind="other"}'] == 1


def test_bounds_of_another_version() -> None:
    counts = {"commit_seconds/0.0003": 1.0, "commit_seconds/60.0": 2.0, "commit_seconds/sum": 90.0}
    tracker = Tracker()
    tracker.fields = {"operations": OperationCounts(counts=counts)}
    found = shown(tracker)
    assert found['savings_commit_duration_seconds_bucket{le="0.00025"}'] == 0
    assert found['savings_commit_duration_seconds_bucket{le="0.0005"}'] == 1
    assert found['savings_commit_duration_seconds_bucket{le="10.0"}'] == 1
    assert found['savings_commit_duration_seconds_bucket{le="+Inf"}'] == 3
    assert found["savings_commits_total"] == found["savings_commit_duration_seconds_count"] == 3


def test_a_drill() -> None:
    tracker = Tracker()
    tracker.counters.drilling("dir-fsync", active=True)
    run(tracker.counters, SAVE, steps=[FSYNC_DIR], failing=FSYNC_DIR, drill=True)
    found = shown(tracker)
    assert found['savings_drill_active{drill="dir-fsync"}'] == 1
    assert found["savings_last_dir_fsync_success"] == 0
    tracker.counters.drilling("dir-fsync", active=False)
    found = shown(tracker)
    assert found['savings_drill_active{drill="dir-fsync"}'] == 0
    assert found["savings_last_dir_fsync_success"] == 1
    assert found['savings_fsync_failures_total{target="directory"}'] == 1


def openmetrics(tracker: Tracker) -> str:
    registry = CollectorRegistry()
    registry.register(SavingsCollector(tracker))
    text: str = generate_openmetrics(registry).decode()  # type: ignore[no-untyped-call]
    return text


class Traced(OperationCounters):
    """Counters that see each operation and step with a trace."""

    def __init__(self, flags: int) -> None:
        super().__init__()
        self._trace = SpanContext(0xAB, 0xCD, False, TraceFlags(flags))

    def ended(self, operation: Any) -> None:
        for step in (operation, *operation.steps):
            step.trace = self._trace
        super().ended(operation)


@pytest.mark.parametrize("flags", [0, 1])
def test_exemplars(flags: int) -> None:
    tracker = Tracker()
    tracker.counters = Traced(flags)
    run(tracker.counters)
    run(tracker.counters, SAVE)
    found = {
        sample.name: sample.exemplar
        for metric in text_string_to_metric_families(openmetrics(tracker))  # type: ignore[no-untyped-call]
        for sample in metric.samples
        if sample.exemplar
    }
    named = ("savings_commit_duration_seconds", "savings_save_duration_seconds", "savings_save_step_duration_seconds")
    assert set(found) == {f"{name}_bucket" for name in named if flags}
    for exemplar in found.values():
        assert exemplar.labels == {"trace_id": f"{0xAB:032x}", "span_id": f"{0xCD:016x}"}
        assert exemplar.timestamp


def test_no_creation_times() -> None:
    tracker = Tracker()
    run(tracker.counters)
    registry = CollectorRegistry()
    registry.register(SavingsCollector(tracker))
    assert "_created" not in generate_latest(registry).decode() + openmetrics(tracker)


def test_free_space_of_the_store(tmp_path: Path) -> None:
    """As df shows it to a user without privileges."""
    tracker = Tracker()
    tracker.storage_path = str(tmp_path / "proxy_savings.json")
    before = os.statvfs(tmp_path)
    found = samples(SavingsCollector(tracker))
    after = os.statvfs(tmp_path)
    bounds = sorted(stat.f_bavail * stat.f_frsize for stat in (before, after))
    assert bounds[0] - 100e6 <= found["savings_store_free_bytes"] <= bounds[1] + 100e6
    assert found["savings_store_free_inodes"] > 0
    tracker.storage_path = str(tmp_path / "gone" / "proxy_savings.json")
    assert "savings_store_free_bytes" not in samples(SavingsCollector(tracker))


def test_age_of_the_latest_failed_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the exporter's own clock. Nothing is known before a failure, and after the clock was set back."""
    tracker, name = Tracker(), 'savings_last_fsync_failure_age_seconds{target="directory"}'
    assert name not in samples(SavingsCollector(tracker))
    now = time.time()
    tracker.fields = {"operations": OperationCounts(latest={"fsync_failures/directory": (now - 100, 1.0)})}
    assert samples(SavingsCollector(tracker))[name] == pytest.approx(100, abs=30)
    monkeypatch.setattr("time.time", lambda: now - 200)
    assert name not in samples(SavingsCollector(tracker))


def test_a_scrape_of_a_watched_file() -> None:
    tracker = Tracker(records=1, agents={"a": Totals(tokens_saved=5)})
    found = samples(WatchCollector(tracker))
    assert found['savings_agent_tokens_saved_total{agent="a"}'] == 5
    assert not [name for name in found if name.startswith(("savings_commit", "savings_saves", "savings_fsync"))]


def test_a_scrape_runs_nothing_else() -> None:
    asked: list[str] = []

    class Strict:
        counters = OperationCounters()

        def __getattr__(self, name: str) -> Any:
            asked.append(name)
            return getattr(Tracker(), name)

    samples(SavingsCollector(Strict()))
    assert set(asked) == {"snapshot", "health", "storage_path"}


def test_operation_names() -> None:
    tracker = Tracker()
    run(tracker.counters, COMMIT, steps=["append", "fsync_journal", "fsync_dir"], failing="fsync_dir")
    assert shown(tracker)['savings_commit_failures_total{error="EIO",step="fsync_dir"}'] == 1
