"""OpenTelemetry spans around each save and each of its steps."""

from __future__ import annotations

from contextvars import Token
from importlib.metadata import version
from typing import TYPE_CHECKING

from opentelemetry import context, trace
from opentelemetry.trace import Span, Status, StatusCode

from savings_exporter.storage.steps import FSYNC_DIR, Operation, error_symbol

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import TracerProvider


class SaveTracing:
    """Observes a store: ``savings.save`` with a child span for each step, in the thread that leads the save.

    A save is a child of that thread's current span, and root where there is none.
    """

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._tracer = trace.get_tracer("savings_exporter", version("savings-exporter"), tracer_provider=provider)
        self._spans: dict[Operation, tuple[Span, Token[Context]]] = {}

    def begin(self, operation: Operation) -> None:
        """Start a span and make it current."""
        parent = operation.parent.name + "." if operation.parent else ""
        span = self._tracer.start_span(f"savings.{parent}{operation.name}")
        self._spans[operation] = span, context.attach(trace.set_span_in_context(span))

    def end(self, operation: Operation) -> None:
        """End it, with what is known now."""
        span, token = self._spans.pop(operation)
        context.detach(token)
        if span.is_recording():
            _describe(span, operation)
        span.end()

    def recovered(self, kind: str) -> None:
        """Say so on the current span."""
        trace.get_current_span().add_event("savings.recovered", {"savings.recovery.kind": kind})


def _describe(span: Span, operation: Operation) -> None:
    if operation.parent is None:
        span.set_attribute("savings.records", operation.records)
    if operation.sequence is not None:
        span.set_attribute("savings.sequence", operation.sequence)
    if operation.size is not None:
        span.set_attribute("file.size", operation.size)
    if operation.name == FSYNC_DIR:
        span.set_attribute("savings.dir_fsync.result", operation.outcome)
    if operation.error is not None:
        span.set_attribute("error.type", error_symbol(operation.error))
        span.record_exception(operation.error)
        span.set_status(Status(StatusCode.ERROR, str(operation.error)))
