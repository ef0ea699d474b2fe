"""Prometheus's metrics in OpenTelemetry's data model."""

from __future__ import annotations

import time
from typing import Any

from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.sdk.metrics.export import MetricsData
from opentelemetry.sdk.resources import Resource
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.samples import Exemplar

from savings_exporter.telemetry.otlp import metrics_data

CREATED, STARTED = 10**18, 2 * 10**18


def converted(*families: Any) -> MetricsData:
    return metrics_data(families, CREATED, STARTED, Resource({}))


def metrics_of(data: MetricsData) -> dict[str, Any]:
    ((scope,),) = (resource.scope_metrics for resource in data.resource_metrics)
    # Everything that is converted can be sent.
    encode_metrics(data)
    return {metric.name: metric.data for metric in scope.metrics}


def test_start_times() -> None:
    """What the process counts starts with it, everything else with the store."""
    names = ("savings_tokens_saved", "savings_http_requests", "process_cpu_seconds")
    found = metrics_of(converted(*(CounterMetricFamily(name, "", value=1) for name in names)))
    assert {name: data.data_points[0].start_time_unix_nano for name, data in found.items()} == {
        "savings_tokens_saved": CREATED,
        "savings_http_requests": STARTED,
        "process_cpu_seconds": STARTED,
    }
    assert all(data.is_monotonic for data in found.values())


def test_clock_that_was_set_back() -> None:
    """No point is older than its start."""
    ahead = time.time_ns() + 10**12
    data = metrics_data([CounterMetricFamily("savings_requests", "", value=1)], ahead, ahead, Resource({}))
    (point,) = metrics_of(data)["savings_requests"].data_points
    assert point.time_unix_nano >= point.start_time_unix_nano == ahead


def test_number_of_more_than_64_bits() -> None:
    (point,) = metrics_of(converted(CounterMetricFamily("savings_requests", "", value=2**70)))[
        "savings_requests"
    ].data_points
    assert point.value == float(2**70)
    (point,) = metrics_of(converted(CounterMetricFamily("savings_requests", "", value=2**62 + 1)))[
        "savings_requests"
    ].data_points
    assert point.value == 2**62 + 1


def test_kinds() -> None:
    """Families without a sample are left out."""
    info = InfoMetricFamily("savings_store", "", value={"store": "s"})
    found = metrics_of(converted(info, GaugeMetricFamily("savings_pending", "", value=3), CounterMetricFamily("e", "")))
    assert found.keys() == {"savings_store_info", "savings_pending"}
    assert not found["savings_store_info"].is_monotonic
    assert found["savings_store_info"].data_points[0].attributes == {"store": "s"}


def test_histograms() -> None:
    """Each label set is a point. Counts of buckets are not cumulative."""
    family = HistogramMetricFamily("savings_seconds", "", labels=["step"])
    exemplar = Exemplar({"trace_id": "0" * 31 + "1", "span_id": "0" * 15 + "2"}, 0.2, 12.5)
    family.add_metric(["write"], [("0.1", 2.0), ("0.5", 5.0, exemplar), ("+Inf", 6.0)], 3.5)
    family.add_metric(["replace"], [("0.1", 0.0), ("0.5", 1.0), ("+Inf", 1.0)], 0.25)
    write, replace = metrics_of(converted(family))["savings_seconds"].data_points
    assert (write.attributes, write.bucket_counts, write.count, write.sum) == ({"step": "write"}, [2, 3, 1], 6, 3.5)
    assert list(write.explicit_bounds) == [0.1, 0.5]
    assert (replace.attributes, replace.bucket_counts, replace.sum) == ({"step": "replace"}, [0, 1, 0], 0.25)
    assert [(one.trace_id, one.span_id, one.value, one.time_unix_nano) for one in write.exemplars] == [
        (1, 2, 0.2, 12_500_000_000)
    ]
