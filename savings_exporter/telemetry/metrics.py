"""Prometheus metrics: the store's totals, read at each scrape, and what happened to each save."""

from __future__ import annotations

import errno
import platform
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Protocol

from opentelemetry import trace
from prometheus_client import Counter, Gauge, Histogram, values
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from savings_exporter.records import UNKNOWN
from savings_exporter.storage.steps import (
    COMMIT,
    COMMIT_STEPS,
    FSYNC_DIR,
    FSYNC_TARGETS,
    PREPARE,
    ROTATE,
    SAVE,
    SAVE_STEPS,
    Operation,
    Step,
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
# What another process or another program causes.
_PREPARE_ERRORS = (*_LIKELY_ERRORS, *(errno.errorcode[number] for number in (errno.EAGAIN, errno.ESTALE)))
_RECOVERIES = ("corrupt_document", "previous_document", "torn_tail")

DRILLS = ("dir-fsync", "file-fsync", "journal-fsync", "save-latency")
"""What a fire drill can pretend."""

_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)

# Prometheus's own multiprocess mode keeps instruments in files that its collector adds up.
_IS_MULTIPROCESS = bool(getattr(values.ValueClass, "_multiprocess", False))

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

    @property
    def store_metrics(self) -> StoreMetrics:
        """What happened to its commits and saves."""


class SavingsCollector(Collector):
    """Collects a tracker's metrics for any registry::

        REGISTRY.register(SavingsCollector(tracker))

    Lifetime counters come from the store at each scrape, so they go on across restarts and show what every process
    recorded. They only count what is durable.

    In prometheus-client's multiprocess mode (``PROMETHEUS_MULTIPROC_DIR``) the registry needs a
    ``MultiProcessCollector`` beside this one, as for any other metric: that adds up the histograms and failure counters
    of all processes.
    """

    def __init__(self, tracker: TrackedSource) -> None:
        self._tracker = tracker

    def collect(self) -> Iterator[Metric]:
        """All families of the store and of its saves."""
        yield from totals_families(self._tracker)
        if not _IS_MULTIPROCESS:
            yield from self._tracker.store_metrics.collect()


class WatchCollector(Collector):
    """Collects the totals of a file that another program saves."""

    def __init__(self, watched: Source) -> None:
        self._watched = watched

    def collect(self) -> Iterator[Metric]:
        """The families of the totals."""
        yield from totals_families(self._watched)


class StoreMetrics:
    """Observes a store and counts what happens to its commits and saves."""

    def __init__(self) -> None:
        self._saves = Counter("savings_saves", "Saves of the document that were tried.", registry=None)
        self._save_failures = Counter(
            "savings_save_failures",
            "Saves of the document that failed, by the step and the error (an errno's symbol).",
            ["step", "error"],
            registry=None,
        )
        self._save_duration = _latency("savings_save_duration_seconds", "How long a whole save of the document took.")
        self._step_duration = _latency(
            "savings_save_step_duration_seconds", "How long one step of a save took.", ["step"]
        )
        self._commits = Counter("savings_commits", "Commits to the journal that were tried.", registry=None)
        self._commit_failures = Counter(
            "savings_commit_failures",
            "Commits to the journal that failed, by the step and the error (an errno's symbol).",
            ["step", "error"],
            registry=None,
        )
        self._commit_duration = _latency(
            "savings_commit_duration_seconds",
            "How long one commit to the journal took, other processes' turns included.",
        )
        self._commit_records = Histogram(
            "savings_commit_records", "How many records one commit carried.", buckets=_BATCH_BUCKETS, registry=None
        )
        self._fsync_failures = Counter(
            "savings_fsync_failures", "Syncs that failed, by what was synced.", ["target"], registry=None
        )
        self._dir_fsync_supported = Gauge(
            "savings_dir_fsync_supported",
            "Whether the store's filesystem has directory fsync: 0 means that a save can vanish in a power loss.",
            registry=None,
            multiprocess_mode="mostrecent",
        )
        self._last_dir_fsync = Gauge(
            "savings_last_dir_fsync_success",
            "Whether the last directory fsync did not fail.",
            registry=None,
            multiprocess_mode="mostrecent",
        )
        self._recoveries = Counter(
            "savings_recoveries", "Damage that was mended when the store was opened, by kind.", ["kind"], registry=None
        )
        self._drill_active = Gauge(
            "savings_drill_active",
            "Whether a fire drill pretends now that this fails: then failures are told that did not happen.",
            ["drill"],
            registry=None,
            multiprocess_mode="livemax",
        )
        # A series that first appears at 1 has no increase(), so all that can be known are there at 0.
        for failures, steps in (
            (self._save_failures, (PREPARE, *SAVE_STEPS)),
            (self._commit_failures, (PREPARE, ROTATE, *COMMIT_STEPS)),
        ):
            for step in steps:
                for error in _PREPARE_ERRORS if step == PREPARE else _LIKELY_ERRORS:
                    failures.labels(step, error)
        for step in SAVE_STEPS:
            self._step_duration.labels(step)
        for target in FSYNC_TARGETS:
            self._fsync_failures.labels(target)
        for kind in _RECOVERIES:
            self._recoveries.labels(kind)
        for drill in DRILLS:
            self._drill_active.labels(drill)
        self._dir_fsync_supported.set(1)
        self._last_dir_fsync.set(1)
        # What a drill said of it is over with the drill.
        self._is_dir_fsync_well = True
        self._is_drilling = False

    def ended(self, operation: Operation) -> None:
        """Count it and its steps. Observations carry their trace as an exemplar."""
        for step in operation.steps:
            self._count_step(step, operation)
        if operation.name == COMMIT:
            # One that found its records counted already, or went by the document instead, committed nothing.
            if operation.records or operation.error is not None:
                self._count_commit(operation)
        elif operation.name == SAVE:
            self._saves.inc()
            self._save_duration.observe(operation.duration, _exemplar(operation))
            if operation.error is not None:
                self._save_failures.labels(operation.failed_step or PREPARE, error_symbol(operation.error)).inc()

    def recovered(self, kind: str) -> None:
        """Count it."""
        self._recoveries.labels(kind).inc()

    def drilling(self, drill: str, *, active: bool) -> None:
        """Say that a fire drill has begun or ended."""
        self._drill_active.labels(drill).set(active)
        self._is_drilling = active
        if not active:
            self._forget_drills()

    def collect(self) -> Iterator[Metric]:
        """All families of commits and saves."""
        instruments: tuple[Collector, ...] = (
            *(self._commits, self._commit_failures, self._commit_duration, self._commit_records),
            *(self._saves, self._save_failures, self._save_duration, self._step_duration),
            *(self._fsync_failures, self._dir_fsync_supported, self._last_dir_fsync, self._recoveries),
            self._drill_active,
        )
        for instrument in instruments:
            yield from instrument.collect()

    def _count_commit(self, operation: Operation) -> None:
        self._commits.inc()
        self._commit_duration.observe(operation.duration, _exemplar(operation))
        if operation.error is None:
            self._commit_records.observe(operation.records)
        else:
            self._commit_failures.labels(operation.failed_step or PREPARE, error_symbol(operation.error)).inc()

    def _count_step(self, step: Step, operation: Operation) -> None:
        if operation.name == SAVE:
            self._step_duration.labels(step.name).observe(step.duration, _exemplar(step))
        if step.outcome == "failed" and step.fsync_target is not None:
            self._fsync_failures.labels(step.fsync_target).inc()
        if step.name == FSYNC_DIR:
            if not step.is_drill:
                self._is_dir_fsync_well = step.outcome != "failed"
            self._last_dir_fsync.set(step.outcome != "failed")
            if step.is_drill and not self._is_drilling:
                self._forget_drills()
            if step.outcome != "failed":
                self._dir_fsync_supported.set(step.outcome == "ok")

    def _forget_drills(self) -> None:
        # A real result may come meanwhile, from another thread. No lock, because a fork might leave it taken.
        is_well = None
        while is_well != self._is_dir_fsync_well:
            is_well = self._is_dir_fsync_well
            self._last_dir_fsync.set(is_well)


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
        ("journal_size_bytes", "How much of the journal's segments is written.", snapshot.journal_bytes),
    ):
        yield GaugeMetricFamily(f"savings_{name}", help_text, value=value)
    build = {"version": version("savings-exporter"), "python_version": platform.python_version()}
    # Two exporters may show one store, and then their totals must not be added up.
    yield InfoMetricFamily("savings_store", "The store that the totals are of.", value={"store": snapshot.store_id})
    yield InfoMetricFamily("savings_build", "The exporter that answers.", value=build)


def _filled(
    family: CounterMetricFamily | GaugeMetricFamily, labelled: Iterable[tuple[tuple[str, ...], Totals]], field: str
) -> Metric:
    for labels, total in labelled:
        family.add_metric(list(labels), getattr(total, field))
    return family


def _latency(name: str, help_text: str, labels: Iterable[str] = ()) -> Histogram:
    return Histogram(name, help_text, labels, buckets=_LATENCY_BUCKETS, registry=None)


def _exemplar(step: Step) -> dict[str, str] | None:
    context = step.trace
    if context is None or not context.trace_flags.sampled:
        return None
    return {"trace_id": trace.format_trace_id(context.trace_id), "span_id": trace.format_span_id(context.span_id)}
