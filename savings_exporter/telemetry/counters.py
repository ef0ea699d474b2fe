"""Operation counters: commits, saves and failures of this process, in the form that the store adds up over its writers.

The store publishes ``OperationCounters.counts()`` and adds up those of all its writers, living and dead. A flat name is
``family/label/.../last``, where the last part of a histogram's name is a bucket's upper bound or ``sum``. Buckets hold
their own observations only (they are not cumulative), so that bounds can change between versions.
"""

from __future__ import annotations

import math
import threading
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from opentelemetry.trace import SpanContext, format_span_id, format_trace_id

from savings_exporter.model.operations import OperationCounts
from savings_exporter.storage.operation import (
    COMMIT,
    FSYNC_DIR,
    PREPARE,
    SAVE,
    SAVE_STEPS,
    Operation,
    Step,
    error_symbol,
)

if TYPE_CHECKING:
    from prometheus_client.samples import Exemplar

COMMIT_SECONDS, COMMIT_RECORDS = "commit_seconds", "commit_records"
SAVE_SECONDS, SAVE_STEP_SECONDS = "save_seconds", "save_step_seconds"
COMMIT_FAILURES, SAVE_FAILURES, FSYNC_FAILURES = "commit_failures", "save_failures", "fsync_failures"
RECOVERIES = "recoveries"
SUM = "sum"
"""Parts of flat names. How often a histogram was observed is the sum of its buckets: commits and saves tried."""

DIR_FSYNC_SUCCESS, DIR_FSYNC_SUPPORTED = "dir_fsync_success", "dir_fsync_supported"
"""The result of the latest directory fsync, 1 or 0. Drills do not change it."""

# In seconds: from an fsync of a fast NVMe disk to a disk that hangs.
LATENCY_BOUNDS = (
    *(0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01),
    *(0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, math.inf),
)
RECORDS_BOUNDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0, 16384.0, math.inf)


def flat_name(*parts: str) -> str:
    """The flat name of a count."""
    return "/".join(parts)


def bound_text(bound: float) -> str:
    """A bucket's upper bound as Prometheus writes it, which for these bounds is as Python writes it."""
    return "+Inf" if bound == math.inf else repr(bound)


class OperationCounters:
    """Observes one writer and counts what happens to its operations; a forked child makes its own.

    Args:
        failed: called after a failure has been counted, without a lock held, so that it can be published at once.

    Several threads may call it, and a signal handler may interrupt it: each count is changed by one in-place addition
    without a call in it, and CPython runs signal handlers at calls and backward jumps only.
    """

    def __init__(self, failed: Callable[[], None] | None = None) -> None:
        self._failed = failed
        self._lock = threading.RLock()
        self._commit_seconds = _Histogram(LATENCY_BOUNDS)
        self._commit_records = _Histogram(RECORDS_BOUNDS)
        self._save_seconds = _Histogram(LATENCY_BOUNDS)
        self._save_steps = {step: _Histogram(LATENCY_BOUNDS) for step in SAVE_STEPS}
        self._events: dict[str, int] = defaultdict(int)
        self._latest: dict[str, tuple[float, float]] = {}
        self._drills: frozenset[str] = frozenset()
        self._simulates_dir_fsync_failure = False
        self._histograms = {
            COMMIT_SECONDS: self._commit_seconds,
            COMMIT_RECORDS: self._commit_records,
            SAVE_SECONDS: self._save_seconds,
            **{flat_name(SAVE_STEP_SECONDS, step): histogram for step, histogram in self._save_steps.items()},
        }

    def ended(self, operation: Operation) -> None:
        """Count an operation and its steps."""
        has_failed = operation.error is not None
        with self._lock:
            if operation.name == COMMIT:
                self._count_commit(operation)
            elif operation.name == SAVE:
                self._count_save(operation)
            for step in operation.steps:
                if step.outcome == "failed":
                    has_failed = True
                    self._count_failed_step(step)
                if step.name == FSYNC_DIR:
                    self._note_dir_fsync(step)
        if has_failed and self._failed is not None:
            self._failed()

    def recovered(self, kind: str) -> None:
        """Count a repair. The tracker publishes it when the store is open."""
        with self._lock:
            self._events[flat_name(RECOVERIES, kind)] += 1

    def drilling(self, drill: str, *, active: bool) -> None:
        """Note that a drill begins or ends in this process."""
        with self._lock:
            self._drills = self._drills | {drill} if active else self._drills - {drill}
            self._simulates_dir_fsync_failure = False

    def counts(self) -> OperationCounts:
        """The counts of this process, without zeros.

        Takes no lock: a thread that a signal interrupts in ``ended`` would hold it for as long as the handler runs.
        """
        counts: dict[str, float] = {**self._events}
        for name, histogram in self._histograms.items():
            counts.update(histogram.counts(name))
        return OperationCounts(counts=counts, latest=dict(self._latest))

    @property
    def active_drills(self) -> frozenset[str]:
        """The drills that run in this process now."""
        return self._drills

    @property
    def simulates_dir_fsync_failure(self) -> bool:
        """Whether a drill that runs now has simulated a failed directory fsync."""
        return self._simulates_dir_fsync_failure

    def exemplars(self) -> dict[str, Exemplar]:
        """The latest sampled trace in each bucket of this process's histograms, by the bucket's flat name."""
        return {
            name: exemplar
            for family, histogram in self._histograms.items()
            for name, exemplar in histogram.exemplars(family)
        }

    def _count_commit(self, operation: Operation) -> None:
        self._commit_seconds.observe(operation.duration, operation.trace)
        if operation.error is None:
            self._commit_records.observe(operation.records)
        else:
            self._count_failure(COMMIT_FAILURES, operation, operation.error)

    def _count_save(self, operation: Operation) -> None:
        self._save_seconds.observe(operation.duration, operation.trace)
        for step in operation.steps:
            histogram = self._save_steps.get(step.name)
            if histogram is not None:
                histogram.observe(step.duration, step.trace)
        if operation.error is not None:
            self._count_failure(SAVE_FAILURES, operation, operation.error)

    def _count_failure(self, family: str, operation: Operation, error: BaseException) -> None:
        self._events[flat_name(family, operation.failed_step or PREPARE, error_symbol(error))] += 1

    def _count_failed_step(self, step: Step) -> None:
        if step.fsync_target is not None:
            name = flat_name(FSYNC_FAILURES, step.fsync_target)
            self._events[name] += 1
            self._latest[name] = (time.time(), 1.0)

    def _note_dir_fsync(self, step: Step) -> None:
        has_failed = step.outcome == "failed"
        if step.is_drill:
            # A drill's last operation may end after the drill.
            self._simulates_dir_fsync_failure = has_failed and bool(self._drills)
            return
        now = time.time()
        self._latest[DIR_FSYNC_SUCCESS] = (now, float(not has_failed))
        if not has_failed:
            self._latest[DIR_FSYNC_SUPPORTED] = (now, float(step.outcome == "ok"))


class _Histogram:
    """Observations by bucket; of each bucket the latest one whose trace is sampled."""

    __slots__ = ("_bounds", "_buckets", "_sampled", "_sum", "_texts")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._texts = [bound_text(bound) for bound in bounds]
        self._buckets = [0] * len(bounds)
        self._sum = 0.0
        self._sampled: dict[int, tuple[SpanContext, float, float]] = {}

    def observe(self, value: float, trace: Any = None) -> None:
        bucket = bisect_left(self._bounds, value)
        self._buckets[bucket] += 1
        self._sum += value
        if trace is not None and trace.trace_flags.sampled:
            self._sampled[bucket] = (trace, value, time.time())

    def counts(self, name: str) -> Mapping[str, float]:
        counts: dict[str, float] = {
            flat_name(name, text): count for text, count in zip(self._texts, self._buckets, strict=True) if count
        }
        if counts:
            counts[flat_name(name, SUM)] = self._sum
        return counts

    def exemplars(self, name: str) -> list[tuple[str, Exemplar]]:
        return [
            (flat_name(name, self._texts[bucket]), _exemplar(context, value, when))
            for bucket, (context, value, when) in dict(self._sampled).items()
        ]


def _exemplar(context: SpanContext, value: float, when: float) -> Exemplar:
    # Imported here, so that a program that shows no metrics does not load the client.
    from prometheus_client.samples import Exemplar

    labels = {"trace_id": format_trace_id(context.trace_id), "span_id": format_span_id(context.span_id)}
    return Exemplar(labels, value, when)
