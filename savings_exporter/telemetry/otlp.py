"""Metrics in OpenTelemetry's data model, converted from Prometheus's.

The conversion follows OpenTelemetry's specification "Prometheus and OpenMetrics compatibility": a counter becomes a
monotonic sum, an info metric a sum that is not monotonic. All sums and histograms are cumulative.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby

from opentelemetry.sdk.metrics import Exemplar
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from prometheus_client.core import Metric as Family
from prometheus_client.samples import Exemplar as FamilyExemplar
from prometheus_client.samples import Sample

from savings_exporter.version import VERSION

_SCOPE = InstrumentationScope("savings_exporter", VERSION)
_CUMULATIVE = AggregationTemporality.CUMULATIVE

# These count from the start of the process. All others count from the birth of the store.
_OF_PROCESS = ("process_", "savings_http_")

Labels = Mapping[str, str]


def metrics_data(families: Iterable[Family], created_ns: int, started_ns: int, resource: Resource) -> MetricsData:
    """One export of all families.

    Args:
        families: as a Prometheus registry collects them.
        created_ns: when the store began to count, in nanoseconds since 1970: the start time of what it counts.
        started_ns: when the process started: the start time of what the process counts.
        resource: the program that exports.
    """
    # A clock that was set back must not give a time before the start: receivers drop such points.
    now_ns = max(time.time_ns(), created_ns, started_ns)
    metrics = []
    for family in families:
        start_ns = started_ns if family.name.startswith(_OF_PROCESS) else created_ns
        data = _data_of(family, start_ns, now_ns)
        if data.data_points:
            name = f"{family.name}_info" if family.type == "info" else family.name
            metrics.append(Metric(name, family.documentation, "", data))
    scope = ScopeMetrics(_SCOPE, metrics, "")
    return MetricsData([ResourceMetrics(resource, [scope], "")])


def _data_of(family: Family, start_ns: int, now_ns: int) -> Sum | Gauge | Histogram:
    if family.type == "histogram":
        return Histogram(list(_histogram_points(family.samples, start_ns, now_ns)), _CUMULATIVE)
    # A counter also has samples of its creation time.
    samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
    points = [NumberDataPoint(dict(sample.labels), start_ns, now_ns, _number(sample.value)) for sample in samples]
    if family.type in ("counter", "info"):
        return Sum(points, _CUMULATIVE, is_monotonic=family.type == "counter")
    return Gauge(points)


def _number(value: float) -> float:
    # OTLP has integers of 64 bits. The totals of another program's document can be larger.
    return value if isinstance(value, float) or abs(value) < 2**63 else float(value)


def _histogram_points(samples: Iterable[Sample], start_ns: int, now_ns: int) -> Iterator[HistogramDataPoint]:
    """The points of a histogram. A registry yields the samples of one point one after another."""
    for labels, group in groupby(samples, _labels_of_point):
        bounds, counts, exemplars, below, total = [], [], [], 0.0, 0.0
        for sample in group:
            if sample.name.endswith("_sum"):
                total = sample.value
            elif sample.name.endswith("_bucket"):
                bounds.append(float(sample.labels["le"]))
                counts.append(round(sample.value - below))
                below = sample.value
                if sample.exemplar is not None:
                    exemplars.append(_exemplar(sample.exemplar))
        yield HistogramDataPoint(
            attributes=dict(labels),
            start_time_unix_nano=start_ns,
            time_unix_nano=now_ns,
            count=sum(counts),
            sum=total,
            bucket_counts=counts,
            explicit_bounds=[bound for bound in bounds if not math.isinf(bound)],
            min=None,  # type: ignore[arg-type]  # not known, and optional in OTLP
            max=None,  # type: ignore[arg-type]
            exemplars=exemplars,
        )


def _labels_of_point(sample: Sample) -> tuple[tuple[str, str], ...]:
    return tuple((name, value) for name, value in sample.labels.items() if name != "le")


def _exemplar(exemplar: FamilyExemplar) -> Exemplar:
    trace_id, span_id = (int(exemplar.labels[name], 16) for name in ("trace_id", "span_id"))
    return Exemplar({}, exemplar.value, round(float(exemplar.timestamp or 0) * 1e9), span_id, trace_id)
