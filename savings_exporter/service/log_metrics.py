"""A metric of the log."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from savings_exporter.service.logs import LogHandler


class LogCollector(Collector):
    """Collects how many log lines were dropped."""

    def __init__(self, handler: LogHandler) -> None:
        self._handler = handler

    def collect(self) -> Iterator[Metric]:
        """The family of dropped lines."""
        yield CounterMetricFamily(
            "savings_log_lines_dropped",
            "Log lines that were dropped, because nothing read them or they could not be written.",
            value=self._handler.dropped,
        )
