"""Keep spans in memory."""

from __future__ import annotations

from pathlib import Path

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from savings_exporter import SavingsTracker
from savings_exporter.storage.filesystem import FileSystem
from savings_exporter.telemetry.metrics import SavingsCollector
from tests.support.scrape import samples


class Traced:
    """A tracker with its spans kept in memory."""

    def __init__(self, path: Path, filesystem: FileSystem | None = None, save_interval: float = 5.0) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracker = SavingsTracker(
            path, tracer_provider=self.provider, filesystem=filesystem, save_interval=save_interval
        )

    def clear(self) -> None:
        """Discard the spans so far."""
        self._exporter.clear()

    def saves(self) -> list[tuple[ReadableSpan, list[ReadableSpan]]]:
        """The span of each save with its children, ordered by start time."""
        return self._with_children("savings.save")

    def commits(self) -> list[tuple[ReadableSpan, list[ReadableSpan]]]:
        """The span of each commit with its children, ordered by start time."""
        self.tracker.flush()
        return self._with_children("savings.commit")

    def samples(self) -> dict[str, float]:
        """The tracker's metrics."""
        return samples(SavingsCollector(self.tracker))

    def _with_children(self, name: str) -> list[tuple[ReadableSpan, list[ReadableSpan]]]:
        spans = sorted(self._exporter.get_finished_spans(), key=lambda span: span.start_time or 0)
        return [
            (parent, [span for span in spans if span.parent and span.parent.span_id == parent.context.span_id])
            for parent in spans
            if parent.name == name
        ]
