"""OpenTelemetry spans around each commit and save, and each of their steps."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.trace import Link, Span, SpanContext, Status, StatusCode

from savings_exporter.storage.steps import FSYNC_DIR, Operation, error_symbol

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider


class StoreTracing:
    """Observes a store: ``savings.commit`` and ``savings.save`` with a child span for each step.

    Each is a child of the current span of the thread that leads it, root where there is none, and a commit is linked to
    the spans of the records that it carries. An operation's ``trace`` is its span, None when nobody records it.
    """

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._tracer = trace.get_tracer("savings_exporter", version("savings-exporter"), tracer_provider=provider)

    def begin(self, operation: Operation) -> None:
        """Start a span, unless nobody would see it."""
        parent = operation.parent
        if parent is None:
            links = [Link(context) for context in operation.links]
            span = self._tracer.start_span(f"savings.{operation.name}", links=links)
        elif parent.trace is None:
            return
        else:
            name = f"savings.{parent.name}.{operation.name}"
            span = self._tracer.start_span(name, trace.set_span_in_context(parent.trace))
        if span.is_recording():
            operation.trace = span

    def end(self, operation: Operation) -> None:
        """End it, with what is known now."""
        if operation.trace is not None:
            _describe(operation.trace, operation)
            operation.trace.end()

    def recovered(self, kind: str) -> None:
        """Say so on the current span."""
        trace.get_current_span().add_event("savings.recovered", {"savings.recovery.kind": kind})


def current_span() -> SpanContext | None:
    """What a commit that carries a record is to be linked to: the current span, where somebody records it."""
    span = trace.get_current_span()
    return span.get_span_context() if span.is_recording() else None


def _describe(span: Span, operation: Operation) -> None:
    attributes: dict[str, str | int] = {}
    if operation.parent is None:
        attributes["savings.records"] = operation.records
    if operation.sequence is not None:
        attributes["savings.sequence"] = operation.sequence
    if operation.size is not None:
        attributes["file.size"] = operation.size
    if operation.name == FSYNC_DIR:
        attributes["savings.dir_fsync.result"] = operation.outcome
    if operation.error is not None:
        attributes["error.type"] = error_symbol(operation.error)
        span.record_exception(operation.error)
        span.set_status(Status(StatusCode.ERROR, str(operation.error)))
    span.set_attributes(attributes)
