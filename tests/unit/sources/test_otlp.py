"""What is new in points of token usage: each token counts once, whatever is repeated, restarted or reordered."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import Parse, ParseDict
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from savings_exporter import SavingsTracker
from savings_exporter.errors import SettingsError, StoreError
from savings_exporter.model.snapshot import Snapshot
from savings_exporter.sources.otlp import METRICS, MOST_SERIES, MetricMap, Outcome, metric_maps, points_of
from savings_exporter.sources.otlp_import import OtlpImport
from tests.support.faults import FaultyFileSystem
from tests.support.paths import DATA

MINUTE = 60 * 10**9
NOON = 1_790_000_000 * 10**9
DELTA, CUMULATIVE = 1, 2


def payload(name: str) -> ExportMetricsServiceRequest:
    text = (DATA / "sources" / "otlp" / f"{name}.json").read_text()
    return Parse(text, ExportMetricsServiceRequest())


def usage(
    value: float,
    start: int,
    end: int,
    *,
    kind: int = CUMULATIVE,
    sender: str = "1",
    of: str = "output",
    name: str = "claude_code.token.usage",
) -> ExportMetricsServiceRequest:
    """A request with one point; ``start`` and ``end`` in minutes."""
    attributes = {"session.id": sender, "type": of, "model": "m"}
    point = {
        "attributes": [{"key": key, "value": {"stringValue": text}} for key, text in attributes.items()],
        "startTimeUnixNano": str(NOON + start * MINUTE),
        "timeUnixNano": str(NOON + end * MINUTE),
        "asDouble": value,
    }
    data = {"aggregationTemporality": kind, "isMonotonic": True, "dataPoints": [point]}
    return ParseDict(
        {"resourceMetrics": [{"scopeMetrics": [{"metrics": [{"name": name, "sum": data}]}]}]},
        ExportMetricsServiceRequest(),
    )


def sent(
    otlp: OtlpImport, *requests: ExportMetricsServiceRequest, metrics: Mapping[str, MetricMap] = METRICS
) -> list[Outcome]:
    outcomes = []
    for request in requests:
        outcomes.append(Outcome())
        assert otlp.add(list(points_of(request, metrics, outcomes[-1])), outcomes[-1])
    return outcomes


@pytest.fixture
def otlp(tracker: SavingsTracker) -> Any:
    with OtlpImport(tracker) as otlp:
        yield otlp


def written(tracker: SavingsTracker) -> int:
    return tracker.snapshot().lifetime.total_output_tokens


def figures(snapshot: Snapshot) -> dict[str, int]:
    lifetime = snapshot.lifetime
    names = ("total_input_tokens", "total_output_tokens", "cache_read_tokens", "cache_write_tokens")
    return {name: getattr(lifetime, name) for name in (*names, "uncached_input_tokens")}


def test_usage_of_claude_code(tracker: SavingsTracker, otlp: OtlpImport) -> None:
    """The same session as deltas, and as cumulative sums of another sender."""
    (outcome,) = sent(otlp, payload("claude_code_token_usage_delta"))
    once = {
        "total_input_tokens": 137 + 81_519 + 552,
        "total_output_tokens": 426,
        "cache_read_tokens": 81_519,
        "cache_write_tokens": 552,
        "uncached_input_tokens": 137,
    }
    assert figures(tracker.snapshot()) == once
    assert (outcome.counts["counted"], outcome.problems) == (4, [])
    sent(otlp, payload("claude_code_token_usage_cumulative"))
    assert figures(tracker.snapshot()) == {name: 3 * value for name, value in once.items()}
    snapshot = tracker.snapshot()
    assert list(snapshot.by_provider_model) == [("anthropic", "claude-sonnet-5")]
    assert list(snapshot.agents) == ["claude-code"]
    assert list(snapshot.sources) == ["otlp"]
    assert (snapshot.lifetime.requests, snapshot.lifetime.tokens_saved) == (0, 0)


def test_usage_of_generative_ai(tracker: SavingsTracker, otlp: OtlpImport) -> None:
    sent(otlp, payload("gen_ai_inference_usage_cumulative"))
    assert figures(tracker.snapshot()) == {
        "total_input_tokens": 82_208,
        "total_output_tokens": 426,
        "cache_read_tokens": 81_519,
        "cache_write_tokens": 552,
        "uncached_input_tokens": 0,
    }
    sent(otlp, payload("gen_ai_client_token_usage_histogram"))
    snapshot = tracker.snapshot()
    assert snapshot.by_model["gemini-3-pro-preview"].total_input_tokens == 30_000
    assert set(snapshot.agents) == {"gemini-cli", "my-agent"}


@pytest.mark.parametrize(
    "name",
    [
        "claude_code_token_usage_delta",
        "claude_code_token_usage_cumulative",
        "gen_ai_inference_usage_cumulative",
        "gen_ai_client_token_usage_histogram",
    ],
)
def test_repeat_counts_once_also_after_a_restart(store_path: Path, name: str) -> None:
    request = payload(name)
    with SavingsTracker(store_path) as tracker, OtlpImport(tracker) as otlp:
        sent(otlp, request, request)
        before = figures(tracker.snapshot())
    with SavingsTracker(store_path) as tracker, OtlpImport(tracker) as otlp:
        (outcome,) = sent(otlp, request)
        assert set(outcome.counts) == {"duplicate"}
        assert figures(tracker.snapshot()) == before
        assert sum(before.values()) > 0


@pytest.mark.parametrize(
    ("points", "total", "rejected"),
    [
        ([(10, 0, 1), (25, 0, 2), (25, 0, 3), (40, 0, 4)], 40, 0),
        ([(10, 0, 1), (40, 0, 4), (25, 0, 2)], 40, 0),
        ([(10, 0, 1), (5, 2, 3), (9, 2, 4)], 19, 0),
        ([(10, 0, 1), (5, 2, 3), (12, 0, 4)], 15, 1),
        ([(10, 0, 5), (7, 2, 6)], 10, 1),
        ([(10, 0, 1), (3, 0, 2)], 13, 0),
    ],
    ids=["grows", "late", "restart", "replaced", "overlap", "same start"],
)
def test_cumulative_points(
    tracker: SavingsTracker, otlp: OtlpImport, points: list[tuple[int, int, int]], total: int, rejected: int
) -> None:
    outcomes = sent(otlp, *(usage(*point) for point in points))
    assert written(tracker) == total
    assert sum(outcome.counts["rejected"] for outcome in outcomes) == rejected


@pytest.mark.parametrize(
    ("points", "total", "rejected"),
    [
        ([(10, 0, 1), (5, 1, 2), (5, 1, 2), (10, 0, 1)], 15, 0),
        ([(5, 1, 2), (10, 0, 1), (7, 3, 4), (1, 2, 3), (1, 2, 3)], 23, 0),
        ([(10, 0, 2), (5, 1, 3)], 10, 1),
        ([(1, 2 * number, 2 * number + 1) for number in range(9)] + [(1, 3, 4), (1, 15, 16), (1, 17, 18)], 11, 0),
        ([(1, 100 + 2 * number, 101 + 2 * number) for number in range(6)] + [(1, 0, 1)], 6, 1),
    ],
    ids=["repeated", "any order", "overlap", "many gaps", "too old"],
)
def test_delta_points(
    tracker: SavingsTracker, otlp: OtlpImport, points: list[tuple[int, int, int]], total: int, rejected: int
) -> None:
    """Of many gaps the oldest are closed: what comes for them later may be counted already."""
    outcomes = sent(otlp, *(usage(*point, kind=DELTA) for point in points))
    assert written(tracker) == total
    assert sum(outcome.counts["rejected"] for outcome in outcomes) == rejected


def test_senders_are_told_apart(tracker: SavingsTracker, otlp: OtlpImport) -> None:
    for sender in ("1", "2"):
        sent(otlp, usage(10, 0, 1, sender=sender), usage(5, 0, 1, sender=sender, kind=DELTA, of="input"))
    assert written(tracker) == 20
    assert tracker.snapshot().lifetime.total_input_tokens == 10


@pytest.mark.slow
def test_forgotten_series_do_not_count_again(tracker: SavingsTracker, otlp: OtlpImport) -> None:
    """Room is made only for series that come at least an hour later."""
    metrics = {"claude_code.token.usage": MetricMap(fields=["output_tokens"])}
    many, made = 70 * MOST_SERIES, ExportMetricsServiceRequest()
    for number in range(many):
        made.MergeFrom(usage(1, 0, 1, sender=str(number)))
    (outcome,) = sent(otlp, made, metrics=metrics)
    kept = written(tracker)
    assert 0.9 * 64 * MOST_SERIES < kept < many
    assert outcome.counts["rejected"] == many - kept
    assert "too many series" in outcome.problems[0]
    later = ExportMetricsServiceRequest()
    for number in range(1000):
        later.MergeFrom(usage(1, 119, 120, sender=f"later {number}"))
    sent(otlp, later, metrics=metrics)
    assert written(tracker) == kept + 1000
    # All series of the first hour go on. Of those that were forgotten, only what comes from now on counts.
    for minute in (121, 122):
        again = ExportMetricsServiceRequest()
        for number in range(2000):
            again.MergeFrom(usage(minute, 0, minute, sender=str(number)))
        sent(otlp, again, metrics=metrics)
    assert written(tracker) <= kept + 1000 + 2000 * 121


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda point: point.update(asDouble=-1), "a value must be a number from 0 to 1000000000000"),
        (lambda point: point.update(asDouble="NaN"), "a value must be a number from 0"),
        (lambda point: point.update(asDouble=1e300), "a value must be a number from 0"),
        (lambda point: point.update(timeUnixNano="0"), "a point needs a time"),
        (lambda point: point.update(timeUnixNano=str(2**64 - 1), startTimeUnixNano="0"), "needs a start time"),
        (lambda point: point.update(timeUnixNano="5", startTimeUnixNano="6"), "at or after its start time"),
        (lambda point: point.update(startTimeUnixNano="0"), "needs a start time"),
    ],
)
def test_point_that_makes_no_sense(
    tracker: SavingsTracker, otlp: OtlpImport, change: Callable[[dict[str, Any]], None], problem: str
) -> None:
    content = json.loads((DATA / "sources" / "otlp" / "claude_code_token_usage_delta.json").read_text())
    points = content["resourceMetrics"][0]["scopeMetrics"][0]["metrics"][0]["sum"]["dataPoints"]
    change(points[1])
    (outcome,) = sent(otlp, ParseDict(content, ExportMetricsServiceRequest()))
    assert dict(outcome.counts) == {"counted": 3, "rejected": 1}
    assert problem in outcome.problems[0]
    assert written(tracker) == 0


def test_other_metrics_are_ignored(tracker: SavingsTracker, otlp: OtlpImport) -> None:
    outcomes = sent(otlp, usage(1, 0, 1, name="claude_code.cost.usage"), usage(1, 0, 1, of="audio"))
    assert [dict(outcome.counts) for outcome in outcomes] == [{"ignored": 1}, {"ignored": 1}]
    assert tracker.snapshot().sequence == 0


def test_sum_that_can_fall(otlp: OtlpImport) -> None:
    request = usage(1, 0, 1)
    request.resource_metrics[0].scope_metrics[0].metrics[0].sum.is_monotonic = False
    (outcome,) = sent(otlp, request)
    assert outcome.problems == ["claude_code.token.usage: the sum is not monotonic"]


def test_metrics_of_a_file(tmp_path: Path, tracker: SavingsTracker, otlp: OtlpImport) -> None:
    path = tmp_path / "map.yml"
    path.write_text(
        "metrics:\n  proxy.saved: {fields: [tokens_saved], provider: openai}\n"
        "  claude_code.token.usage: {by: type, values: {output: [output_tokens_saved]}}\n"
    )
    sent(otlp, usage(7, 0, 1, name="proxy.saved"), usage(3, 0, 1), metrics=metric_maps(str(path)))
    snapshot = tracker.snapshot()
    assert (snapshot.lifetime.tokens_saved, snapshot.lifetime.output_tokens_saved) == (7, 3)
    assert snapshot.by_provider_model["openai", "m"].tokens_saved == 7


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("metrics: {a: {fields: [requests]}}", "metrics.a: requests is no field"),
        ("metrics: {a: {}}", "metrics.a needs either fields, or by and values"),
        ("metrics: {a: {by: type, fields: [tokens_saved]}}", "metrics.a needs either fields"),
        ("metric: {}", "unknown field metric"),
    ],
)
def test_file_that_is_wrong(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "map.yml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=problem):
        metric_maps(str(path))


@pytest.mark.slow
def test_points_on_a_full_disk(tracker: SavingsTracker, faults: FaultyFileSystem, otlp: OtlpImport) -> None:
    """They count once, whether they become durable before the sender sends them again or after it."""
    sent(otlp, usage(10, 0, 1))
    faults.fail("fsync_journal", 28)
    faults.fail("fsync_file", 28)
    points = list(points_of(usage(25, 0, 2), METRICS, Outcome()))
    assert not otlp.add(points, Outcome())
    assert not otlp.add(points, Outcome())
    assert written(tracker) == 10
    faults.mend()
    assert tracker.flush(60)
    assert otlp.add(points, Outcome())
    assert written(tracker) == 25


def test_one_process_imports(store_path: Path, otlp: OtlpImport) -> None:
    sent(otlp, usage(10, 0, 1))
    with SavingsTracker(store_path) as other, OtlpImport(other) as refused:
        points = list(points_of(usage(25, 0, 2), METRICS, Outcome()))
        with pytest.raises(StoreError, match="another process imports"):
            refused.add(points, Outcome())


def test_importing_beside_following(tracker: SavingsTracker, otlp: OtlpImport) -> None:
    """In one process, points and files are imported at the same time."""
    with tracker.importing():
        sent(otlp, usage(10, 0, 1))
    sent(otlp, usage(25, 0, 2))
    assert written(tracker) == 25
