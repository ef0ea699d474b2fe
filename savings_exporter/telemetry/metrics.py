"""Prometheus metrics: the store's totals, read at each scrape, and what happened to each save."""

from __future__ import annotations

import errno
import platform
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Protocol

from opentelemetry import trace
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from savings_exporter.records import UNKNOWN
from savings_exporter.storage.steps import (
    FSYNC_DIR,
    FSYNC_TARGETS,
    PREPARE,
    SAVE,
    SAVE_STEPS,
    Operation,
    error_symbol,
)
from savings_exporter.totals import Totals

if TYPE_CHECKING:
    from savings_exporter.tracker import Health, Snapshot

# From a fast NVMe's fsync to a disk that hangs, in seconds.
_LATENCY_BUCKETS = (
    *(0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01),
    *(0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)

# What disks say; other errors get a series when they first happen.
_LIKELY_ERRORS = tuple(
    errno.errorcode[number] for number in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
)
_RECOVERIES = ("corrupt_document", "previous_document")

_MODEL_COUNTERS = {
    "tokens_saved": ("tokens_saved", "Tokens that compression saved, over the store's lifetime."),
    "requests": ("requests", "Requests recorded, over the store's lifetime."),
    "input_tokens": ("total_input_tokens", "Input tokens sent after saving, over the store's lifetime."),
    "tool_tokens_saved": ("tool_tokens_saved", "Tokens that deferred tool schemas saved, over the store's lifetime."),
    "output_tokens_saved": ("output_tokens_saved", "Output tokens saved, over the store's lifetime."),
    "cache_read_tokens": ("cache_read_tokens", "Input tokens read from prompt caches, over the store's lifetime."),
}
_MODEL_GAUGES = {
    "cost_saved_usd": ("compression_savings_usd", "US dollars saved, over the store's lifetime; can be negative."),
    "input_cost_usd": ("total_input_cost_usd", "US dollars paid for input, over the store's lifetime."),
}
_PROJECT_COUNTERS = {
    "project_tokens_saved": ("tokens_saved", "Tokens that compression saved for a project."),
    "project_requests": ("requests", "Requests recorded for a project."),
}


class Source(Protocol):
    """What totals are collected from: a tracker, or a watched file."""

    def snapshot(self) -> Snapshot:
        """The durable totals."""

    def health(self) -> Health:
        """Whether they can still be kept."""


class TrackedSource(Source, Protocol):
    """A source that saves."""

    save_metrics: SaveMetrics


class SavingsCollector(Collector):
    """Collects a tracker's metrics for any registry::

        REGISTRY.register(SavingsCollector(tracker))

    Lifetime counters come from the store at each scrape, so they go on across restarts and show what every process
    saved. They only count what is durable.
    """

    def __init__(self, tracker: TrackedSource) -> None:
        self._tracker = tracker

    def collect(self) -> Iterator[Metric]:
        """All families of the store and of its saves."""
        yield from totals_families(self._tracker)
        yield from self._tracker.save_metrics.collect()


class WatchCollector(Collector):
    """Collects the totals of a file that another program saves."""

    def __init__(self, watched: Source) -> None:
        self._watched = watched

    def collect(self) -> Iterator[Metric]:
        """The families of the totals."""
        yield from totals_families(self._watched)


class SaveMetrics:
    """Observes a store and counts what happens to its saves."""

    def __init__(self) -> None:
        self._saves = Counter("savings_saves", "Saves of the document that were tried.", registry=None)
        self._failures = Counter(
            "savings_save_failures",
            "Saves of the document that failed, by the step and the error (an errno's symbol).",
            ["step", "error"],
            registry=None,
        )
        self._duration = Histogram(
            "savings_save_duration_seconds",
            "How long a whole save of the document took.",
            buckets=_LATENCY_BUCKETS,
            registry=None,
        )
        self._step_duration = Histogram(
            "savings_save_step_duration_seconds",
            "How long one step of a save took.",
            ["step"],
            buckets=_LATENCY_BUCKETS,
            registry=None,
        )
        self._fsync_failures = Counter(
            "savings_fsync_failures", "Syncs that failed, by what was synced.", ["target"], registry=None
        )
        self._dir_fsync_supported = Gauge(
            "savings_dir_fsync_supported",
            "Whether the store's filesystem has directory fsync: 0 means that a save can vanish in a power loss.",
            registry=None,
        )
        self._last_dir_fsync = Gauge(
            "savings_last_dir_fsync_success", "Whether the last directory fsync did not fail.", registry=None
        )
        self._recoveries = Counter(
            "savings_recoveries", "Damage that was mended when the store was opened, by kind.", ["kind"], registry=None
        )
        # A series that first appears at 1 has no increase(), so all that can be known are there at 0.
        for step in (PREPARE, *SAVE_STEPS):
            for error in _LIKELY_ERRORS:
                self._failures.labels(step, error)
        for step in SAVE_STEPS:
            self._step_duration.labels(step)
        for target in FSYNC_TARGETS:
            self._fsync_failures.labels(target)
        for kind in _RECOVERIES:
            self._recoveries.labels(kind)
        self._dir_fsync_supported.set(1)
        self._last_dir_fsync.set(1)

    def begin(self, operation: Operation) -> None:
        """Nothing is known yet."""

    def end(self, operation: Operation) -> None:
        """Count it. Observations carry the current trace as an exemplar."""
        if operation.name == SAVE:
            self._saves.inc()
            self._duration.observe(operation.duration, _exemplar())
            if operation.error is not None:
                self._failures.labels(operation.failed_step or PREPARE, error_symbol(operation.error)).inc()
            return
        self._step_duration.labels(operation.name).observe(operation.duration, _exemplar())
        if operation.outcome == "failed" and operation.fsync_target is not None:
            self._fsync_failures.labels(operation.fsync_target).inc()
        if operation.name == FSYNC_DIR:
            self._last_dir_fsync.set(operation.outcome != "failed")
            if operation.outcome != "failed":
                self._dir_fsync_supported.set(operation.outcome == "ok")

    def recovered(self, kind: str) -> None:
        """Count it."""
        self._recoveries.labels(kind).inc()

    def collect(self) -> Iterator[Metric]:
        """All families of the saves."""
        instruments: tuple[Collector, ...] = (
            *(self._saves, self._failures, self._duration, self._step_duration),
            *(self._fsync_failures, self._dir_fsync_supported, self._last_dir_fsync, self._recoveries),
        )
        for instrument in instruments:
            yield from instrument.collect()


def totals_families(source: Source) -> Iterator[Metric]:
    """The families that show what a store holds. Their counters carry no creation time: they are older than us."""
    snapshot, health = source.snapshot(), source.health()
    # An empty store shows a zero, and it stays, so that a sum over models is never without data.
    pairs = {(UNKNOWN, UNKNOWN): Totals(), **snapshot.by_provider_model}.items()
    for name, (field, help_text) in _MODEL_COUNTERS.items():
        yield _filled(CounterMetricFamily(f"savings_{name}", help_text, labels=["provider", "model"]), pairs, field)
    for name, (field, help_text) in _MODEL_GAUGES.items():
        yield _filled(GaugeMetricFamily(f"savings_{name}", help_text, labels=["provider", "model"]), pairs, field)
    projects = [((name,), totals) for name, totals in snapshot.projects.items()]
    for name, (field, help_text) in _PROJECT_COUNTERS.items():
        yield _filled(CounterMetricFamily(f"savings_{name}", help_text, labels=["project"]), projects, field)
    saved_at = snapshot.saved_at.timestamp() if snapshot.saved_at else 0
    for name, help_text, value in (
        ("tokens_pending", "Tokens saved in records that are accepted and not durable yet.", snapshot.pending_tokens),
        ("records_pending", "Records that are accepted and not durable yet.", snapshot.pending_records),
        (
            "store_healthy",
            "Whether savings can be kept, or the watched file read: 0 if not.",
            float(health.healthy),
        ),
        ("last_save_success_timestamp_seconds", "When the document was last saved, 0 if never.", saved_at),
        ("document_size_bytes", "The document's size.", snapshot.document_bytes),
    ):
        yield GaugeMetricFamily(f"savings_{name}", help_text, value=value)
    build = {"version": version("savings-exporter"), "python_version": platform.python_version()}
    yield InfoMetricFamily("savings_build", "The exporter that answers.", value=build)


def _filled(
    family: CounterMetricFamily | GaugeMetricFamily, labelled: Iterable[tuple[tuple[str, ...], Totals]], field: str
) -> Metric:
    for labels, total in labelled:
        family.add_metric(list(labels), getattr(total, field))
    return family


def _exemplar() -> dict[str, str] | None:
    span = trace.get_current_span().get_span_context()
    if not span.is_valid or not span.trace_flags.sampled:
        return None
    return {"trace_id": trace.format_trace_id(span.trace_id), "span_id": trace.format_span_id(span.span_id)}
