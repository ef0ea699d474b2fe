"""OpenTelemetry spans around each commit and save, and each of their steps."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, Status, StatusCode

from savings_exporter.storage.steps import FSYNC_DIR, Operation, Step, error_symbol

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider


class StoreTracing:
    """Observes a store: ``savings.commit`` and ``savings.save`` with a child span for each step.

    Each is a child of the span that its ``parent`` is, root where there is none, and a commit is linked to the spans of
    the records that it carries. A ``trace`` is the span's context, None where nobody records it.
    """

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._tracer = trace.get_tracer("savings_exporter", version("savings-exporter"), tracer_provider=provider)

    def ended(self, operation: Operation) -> None:
        """Make spans of an operation and its steps. Made when it has ended, they hold up no step of it."""
        above = Context() if operation.parent is None else trace.set_span_in_context(operation.parent, Context())
        links = [Link(context) for context in operation.links]
        name = f"savings.{operation.name}"
        attributes: dict[str, str | int] = {"savings.records": operation.records}
        if operation.sequence is not None:
            attributes["savings.sequence"] = operation.sequence
        span = self._tracer.start_span(
            name, above, links=links, start_time=operation.began_ns, attributes=_described(operation, attributes)
        )
        if not span.is_recording():
            return
        context = trace.set_span_in_context(span, Context())
        for step in operation.steps:
            attributes = _described(step, {})
            child = self._tracer.start_span(
                f"{name}.{step.name}", context, start_time=step.began_ns, attributes=attributes
            )
            _end(child, step)
        _end(span, operation)

    def recovered(self, kind: str) -> None:
        """Say so on the current span."""
        trace.get_current_span().add_event("savings.recovered", {"savings.recovery.kind": kind})


def _described(step: Step, attributes: dict[str, str | int]) -> dict[str, str | int]:
    if step.size is not None:
        attributes["file.size"] = step.size
    if step.name == FSYNC_DIR:
        attributes["savings.dir_fsync.result"] = step.outcome
    if step.is_drill:
        attributes["drill"] = "true"
    if step.error is not None:
        attributes["error.type"] = error_symbol(step.error)
    return attributes


def _end(span: Span, step: Step) -> None:
    step.trace = span.get_span_context()
    end_ns = step.began_ns + round(step.duration * 1e9)
    if step.error is not None:
        span.record_exception(step.error, timestamp=end_ns)
        span.set_status(Status(StatusCode.ERROR, str(step.error)))
    span.end(end_ns)
