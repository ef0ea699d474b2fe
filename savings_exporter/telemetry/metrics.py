"""Prometheus metrics: what a store holds and what happened to it, read at each scrape.

This module counts nothing. Totals and operation counters come from the store: every process shows the same values, and
they continue across restarts. Gauges of pending records, of health and of drills belong to the process.
"""

from __future__ import annotations

import errno
import math
import platform
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple, Protocol

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

from savings_exporter.model.cursors import REASONS, Cursors
from savings_exporter.model.figures import Totals
from savings_exporter.model.names import OTHER, UNKNOWN
from savings_exporter.model.operations import OperationCounts
from savings_exporter.storage.filesystem import free_space
from savings_exporter.storage.operation import COMMIT_STEPS, FSYNC_TARGETS, PREPARE, SAVE_STEPS
from savings_exporter.telemetry.counters import (
    COMMIT_FAILURES,
    COMMIT_RECORDS,
    COMMIT_SECONDS,
    DIR_FSYNC_SUCCESS,
    DIR_FSYNC_SUPPORTED,
    FSYNC_FAILURES,
    LATENCY_BOUNDS,
    RECORDS_BOUNDS,
    RECOVERIES,
    SAVE_FAILURES,
    SAVE_SECONDS,
    SAVE_STEP_SECONDS,
    SUM,
    OperationCounters,
    bound_text,
    flat_name,
)
from savings_exporter.version import VERSION

if TYPE_CHECKING:
    from savings_exporter.model.snapshot import Health, Snapshot

DRILLS = ("dir-fsync", "file-fsync", "journal-fsync", "save-latency")
"""What a drill can simulate."""

# The usual errors of disks and file systems. Any other error gets a series when it first happens.
_LIKELY_ERRORS = tuple(
    errno.errorcode[number] for number in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
)
# These, and the errors that another process or program causes.
_PREPARE_ERRORS = (*_LIKELY_ERRORS, *(errno.errorcode[number] for number in (errno.EAGAIN, errno.ESTALE)))
_RECOVERY_KINDS = ("closed_days", "corrupt_document", "previous_document", "torn_tail")

STORE_INFO = "savings_store"
STORE_INFO_HELP = "The store that the totals are of."

_MODEL_COUNTERS = {
    "tokens_saved": ("tokens_saved", "Tokens that compression saved, over the store's lifetime."),
    "requests": ("requests", "Requests recorded, over the store's lifetime."),
    "input_tokens": ("total_input_tokens", "Input tokens sent after saving, over the store's lifetime."),
    "tool_tokens_saved": ("tool_tokens_saved", "Tokens that deferred tool schemas saved, over the store's lifetime."),
    "output_tokens_saved": ("output_tokens_saved", "Output tokens saved, over the store's lifetime."),
    "cache_read_tokens": ("cache_read_tokens", "Input tokens read from prompt caches, over the store's lifetime."),
    "compared_tokens_saved": (
        "compared_tokens_saved",
        "Tokens saved by compression and deferred tool schemas in requests whose input tokens are known, over the "
        "store's lifetime.",
    ),
}
# An amount that no record gave has no sample, because unknown is not zero.
_MODEL_GAUGES: Mapping[str, tuple[Callable[[Totals], float | None], str]] = {
    "cost_saved_usd": (
        lambda totals: totals.savings_usd,
        "US dollars saved, over the store's lifetime; can be negative. No sample where no record gave it.",
    ),
    "cache_cost_saved_usd": (
        lambda totals: totals.cache_savings_usd or None,
        "US dollars that prompt caches saved, over the store's lifetime. No sample where it is not known.",
    ),
    "input_cost_usd": (
        lambda totals: totals.input_cost_usd,
        "US dollars paid for input, over the store's lifetime. No sample where no record gave it.",
    ),
}
_NAMED_COUNTERS = {
    "tokens_saved": ("tokens_saved", "Tokens that compression saved for {}, over the store's lifetime."),
    "requests": ("requests", "Requests recorded for {}, over the store's lifetime."),
}

_MOST_SOURCES = 50

Labels = tuple[str, ...]


class TotalsFamily(NamedTuple):
    """A family that shows one figure of the lifetime totals, with a sample for each name.

    Attributes:
        name: the family's name, without the suffix ``_total`` of a counter's samples.
        help_text: what the family shows.
        is_counter: whether it is a counter. Otherwise it is a gauge.
        labels: the labels. Rows of days have columns of the same names.
        value_of: the value that it shows of some totals; None when there is no sample.
    """

    name: str
    help_text: str
    is_counter: bool
    labels: Labels
    value_of: Callable[[Totals], float | None]


_PAIR = ("provider", "model")
TOTALS_FAMILIES = (
    *(
        TotalsFamily(f"savings_{name}", help_text, True, _PAIR, attrgetter(field))
        for name, (field, help_text) in _MODEL_COUNTERS.items()
    ),
    *(
        TotalsFamily(f"savings_{name}", help_text, False, _PAIR, amount_of)
        for name, (amount_of, help_text) in _MODEL_GAUGES.items()
    ),
    *(
        TotalsFamily(f"savings_{label}_{name}", help_text.format(whose), True, (label,), attrgetter(field))
        for label, whose in (("project", "a project"), ("agent", "an agent"), ("source", "a source"))
        for name, (field, help_text) in _NAMED_COUNTERS.items()
    ),
)
"""The families of the lifetime totals, in the order in which they are exported."""

UNPRICED_FAMILY = TotalsFamily(
    "savings_unpriced_requests",
    "Requests that saved input tokens and have no price, over the store's lifetime.",
    True,
    ("model",),
    attrgetter("unpriced_requests"),
)
"""Not for the file of another program: it does not say which requests have no price."""

Bucket = tuple[str, float] | tuple[str, float, Exemplar]


class Source(Protocol):
    """The origin of totals: a tracker or a watched file."""

    def snapshot(self) -> Snapshot:
        """The durable totals."""

    def health(self) -> Health:
        """Whether savings can still be kept, or read."""

    @property
    def storage_path(self) -> str:
        """The document's path."""


class TrackedSource(Source, Protocol):
    """A source that saves. Its snapshot holds what ``counters`` had counted when it was taken."""

    @property
    def counters(self) -> OperationCounters:
        """The operation counters of this process."""


class SavingsCollector(Collector):
    """Collects a tracker's metrics for any registry::

        REGISTRY.register(SavingsCollector(tracker))

    Lifetime counters and operation counters come from the store at each scrape: they are the sum over all processes
    that record in it and go on across restarts. They count only what is durable, and carry no creation time.
    """

    def __init__(self, tracker: TrackedSource) -> None:
        self._tracker = tracker

    def collect(self) -> Iterator[Metric]:
        """All families of the store and of its operations."""
        counters = self._tracker.counters
        exemplars = counters.exemplars()
        snapshot, health = self._tracker.snapshot(), self._tracker.health()
        yield from totals_families(snapshot)
        yield _totals_family(UNPRICED_FAMILY, snapshot)
        yield _gauge(
            "savings_store_healthy", "Whether savings can be kept: 0 if commits or saves fail.", health.healthy
        )
        yield from _space_families(self._tracker.storage_path)
        yield from operation_families(snapshot.operations, exemplars)
        yield from _process_families(snapshot.operations, counters)


class WatchCollector(Collector):
    """Collects the totals of a file that another program saves."""

    def __init__(self, watched: Source) -> None:
        self._watched = watched

    def collect(self) -> Iterator[Metric]:
        """The families of the totals, and whether the file can be read."""
        yield from totals_families(self._watched.snapshot())
        readable = self._watched.health().healthy
        yield _gauge("savings_watched_file_readable", "Whether the watched file can be read: 0 if not.", readable)


def totals_families(snapshot: Snapshot) -> Iterator[Metric]:
    """The families that show what a store holds."""
    for family in TOTALS_FAMILIES:
        yield _totals_family(family, snapshot)
    yield _rejected_family(snapshot.cursors)
    for name, help_text, number in (
        ("tokens_pending", "Tokens saved in records that are accepted and not durable yet.", snapshot.pending_tokens),
        ("records_pending", "Records that are accepted and not durable yet.", snapshot.pending_records),
        (
            "last_save_success_timestamp_seconds",
            "When the document was last saved, 0 if never or not known.",
            snapshot.saved_at.timestamp() if snapshot.saved_at else 0,
        ),
        (
            "last_record_timestamp_seconds",
            "The newest durable record's own time, over all writers, 0 without a record.",
            snapshot.last_record_at.timestamp() if snapshot.last_record_at else 0,
        ),
        ("document_size_bytes", "The document's size.", snapshot.document_bytes),
        ("journal_size_bytes", "How much of the journals' segments is written.", snapshot.journal_bytes),
    ):
        yield _gauge(f"savings_{name}", help_text, number)
    build = {"version": VERSION, "python_version": platform.python_version()}
    # Two exporters may show one store. This label lets queries count it once.
    yield InfoMetricFamily(STORE_INFO, STORE_INFO_HELP, value={"store": snapshot.store_id})
    yield InfoMetricFamily("savings_build", "The exporter that answers.", value=build)


def _totals_family(family: TotalsFamily, snapshot: Snapshot) -> Metric:
    kind = CounterMetricFamily if family.is_counter else GaugeMetricFamily
    metric = kind(family.name, family.help_text, labels=family.labels)
    for labels, totals in totals_by(family.labels, snapshot).items():
        value = family.value_of(totals)
        if value is not None:
            metric.add_metric(labels, value)
    return metric


def totals_by(labels: Labels, snapshot: Snapshot) -> Mapping[Labels, Totals]:
    """The lifetime totals by the values of a family's labels."""
    if labels == _PAIR:
        # This series is always there, so that a sum over models has data for an empty store, too.
        return dict([((UNKNOWN, UNKNOWN), Totals()), *snapshot.by_provider_model.items()])
    if labels == UNPRICED_FAMILY.labels:
        return dict([((UNKNOWN,), Totals()), *(((model,), totals) for model, totals in snapshot.by_model.items())])
    by_name = {"project": snapshot.projects, "agent": snapshot.agents, "source": snapshot.sources}
    return {(name,): totals for name, totals in by_name[labels[0]].items()}


def _rejected_family(cursors: Cursors) -> Metric:
    """The records that were kept out, by the sources that were imported and the reasons that there can be."""
    found: dict[Labels, float] = {}
    names = sorted({cursor.source for cursor in cursors.values()})
    kept = {name: name if position < _MOST_SOURCES else OTHER for position, name in enumerate(names)}
    for cursor in cursors.values():
        for reason in dict.fromkeys((*REASONS, *cursor.rejected)):
            labels: Labels = (kept[cursor.source], reason)
            found[labels] = found.get(labels, 0.0) + cursor.rejected.get(reason, 0)
    metric = CounterMetricFamily(
        "savings_rejected_records",
        "Records of imported sources that were kept out of the totals, by reason.",
        labels=["source", "reason"],
    )
    for labels, number in found.items():
        metric.add_metric(labels, number)
    return metric


def operation_families(operations: OperationCounts, exemplars: Mapping[str, Exemplar]) -> Iterator[Metric]:
    """The families that show what happened to a store's commits and saves, over all its writers."""
    counts = _Counts(operations.counts, exemplars)
    commits, saves = counts.observed(COMMIT_SECONDS), counts.observed(SAVE_SECONDS)
    yield CounterMetricFamily("savings_commits", "Commits to a journal that were tried.", value=commits)
    yield counts.failures(
        "savings_commit_failures",
        "Commits to a journal that failed, by the step and the error (an errno's symbol).",
        COMMIT_FAILURES,
        COMMIT_STEPS,
    )
    yield counts.histogram("savings_commit_duration_seconds", "Duration of one commit to a journal.", COMMIT_SECONDS)
    yield counts.histogram("savings_commit_records", "Records in one commit.", COMMIT_RECORDS, bounds=RECORDS_BOUNDS)
    yield CounterMetricFamily("savings_saves", "Saves of the document that were tried.", value=saves)
    yield counts.failures(
        "savings_save_failures",
        "Saves of the document that failed, by the step and the error (an errno's symbol).",
        SAVE_FAILURES,
        SAVE_STEPS,
    )
    yield counts.histogram("savings_save_duration_seconds", "Duration of a whole save of the document.", SAVE_SECONDS)
    yield counts.histogram(
        "savings_save_step_duration_seconds", "Duration of one step of a save.", SAVE_STEP_SECONDS, steps=SAVE_STEPS
    )
    yield counts.events(
        "savings_fsync_failures", "Syncs that failed, by what was synced.", "target", FSYNC_FAILURES, FSYNC_TARGETS
    )
    yield counts.events(
        "savings_recoveries", "Repairs made when the store was opened, by kind.", "kind", RECOVERIES, _RECOVERY_KINDS
    )


def _space_families(path: str) -> Iterator[Metric]:
    free = free_space(path)
    if free is None:
        return
    yield _gauge("savings_store_free_bytes", "Free bytes of the store's file system.", free.bytes)
    if free.inodes is not None:
        yield _gauge("savings_store_free_inodes", "Free inodes of the store's file system.", free.inodes)


def _process_families(operations: OperationCounts, counters: OperationCounters) -> Iterator[Metric]:
    latest = {name: value for name, (_when, value) in operations.latest.items()}
    yield GaugeMetricFamily(
        "savings_dir_fsync_supported",
        "Whether the store's file system has directory fsync; without it (0) a power loss can undo a save.",
        value=latest.get(DIR_FSYNC_SUPPORTED, 1.0),
    )
    yield GaugeMetricFamily(
        "savings_last_dir_fsync_success",
        "Whether the latest directory fsync did not fail.",
        value=0.0 if counters.simulates_dir_fsync_failure else latest.get(DIR_FSYNC_SUCCESS, 1.0),
    )
    ages = GaugeMetricFamily(
        "savings_last_fsync_failure_age_seconds",
        "Time since the latest failed sync, by the clock of this host. No sample if none is known.",
        labels=["target"],
    )
    now = time.time()
    for target in FSYNC_TARGETS:
        failed_at, _ = operations.latest.get(flat_name(FSYNC_FAILURES, target), (math.inf, 0.0))
        if failed_at <= now:  # otherwise none is known, or the clock was set back
            ages.add_metric([target], now - failed_at)
    yield ages
    drills = GaugeMetricFamily(
        "savings_drill_active",
        "Whether a drill simulates this failure in this process now.",
        labels=["drill"],
    )
    for drill in DRILLS:
        drills.add_metric([drill], float(drill in counters.active_drills))
    yield drills


class _Counts:
    """Flat counts by their family and labels."""

    def __init__(self, counts: Mapping[str, float], exemplars: Mapping[str, Exemplar]) -> None:
        self._exemplars = exemplars
        self._groups: dict[str, dict[str, float]] = defaultdict(dict)
        for name, value in counts.items():
            group, _, last = name.rpartition("/")
            self._groups[group][last] = value

    def observed(self, group: str) -> float:
        return sum(value for last, value in self._groups.get(group, {}).items() if last != SUM)

    def failures(self, name: str, help_text: str, family: str, steps: Sequence[str]) -> Metric:
        """Failures by step and error. Series of likely errors exist from the start, at 0."""
        metric = CounterMetricFamily(name, help_text, labels=["step", "error"])
        expected = [(PREPARE, error) for error in _PREPARE_ERRORS]
        expected += [(step, error) for step in steps for error in _LIKELY_ERRORS]
        found: dict[Labels, float] = dict.fromkeys(expected, 0.0)
        for group, errors in self._groups.items():
            if group.startswith(f"{family}/"):
                found.update({(group.removeprefix(f"{family}/"), error): value for error, value in errors.items()})
        for labels, value in found.items():
            metric.add_metric(labels, value)
        return metric

    def events(self, name: str, help_text: str, label: str, family: str, expected: Iterable[str]) -> Metric:
        """Events by one label. Series of the ``expected`` values exist from the start, at 0."""
        metric = CounterMetricFamily(name, help_text, labels=[label])
        for value, count in {**dict.fromkeys(expected, 0.0), **self._groups.get(family, {})}.items():
            metric.add_metric([value], count)
        return metric

    def histogram(
        self,
        name: str,
        help_text: str,
        family: str,
        *,
        bounds: Sequence[float] = LATENCY_BOUNDS,
        steps: Sequence[str] | None = None,
    ) -> Metric:
        """A histogram, or one for each step."""
        metric = HistogramMetricFamily(name, help_text, labels=["step"] if steps is not None else [])
        if steps is None:
            metric.add_metric([], self._buckets(family, bounds), self._sum(family))
        for step in steps or ():
            group = flat_name(family, step)
            metric.add_metric([step], self._buckets(group, bounds), self._sum(group))
        return metric

    def _buckets(self, group: str, bounds: Sequence[float]) -> list[Bucket]:
        """Cumulative buckets. A bound that this version does not know counts at the next larger one."""
        buckets = [0.0] * len(bounds)
        for last, count in self._groups.get(group, {}).items():
            if last != SUM:
                buckets[bisect_left(bounds, float(last))] += count
        return [
            (text, total, exemplar) if (exemplar := self._exemplars.get(flat_name(group, text))) else (text, total)
            for text, total in zip(map(bound_text, bounds), accumulate(buckets), strict=True)
        ]

    def _sum(self, group: str) -> float:
        return self._groups.get(group, {}).get(SUM, 0.0)


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help_text, value=float(value))
