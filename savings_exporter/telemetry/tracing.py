"""OpenTelemetry spans of commits, saves and rotations, made when these have ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, Status, StatusCode

from savings_exporter.storage.operation import COMMIT, FSYNC_DIR, Operation, Step, error_symbol
from savings_exporter.version import VERSION

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

SLOW_SECONDS = 0.01
"""A commit that takes at least so long has child spans."""

MAX_LINKS = 128
"""How many links OpenTelemetry keeps of a span."""

_NO_PARENT = Context()

Attributes = dict[str, str | int | float]


class StoreTracing:
    """Observes a store and makes ``savings.commit``, ``savings.save`` and ``savings.rotate`` spans.

    A span is a child of the operation's ``parent`` and is linked to the spans of the records that a commit carries.
    A commit that succeeds in less than ``SLOW_SECONDS`` is one span, with the durations of its steps as attributes;
    every other operation has a child span for each step. ``trace`` of an operation and of a step that has a span
    becomes that span's context.
    """

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._tracer = trace.get_tracer("savings_exporter", VERSION, tracer_provider=provider)

    def ended(self, operation: Operation) -> None:
        """Make the spans of an operation. Attributes are computed only where a span is recorded."""
        parent = operation.parent
        has_parent = parent is not None and parent is not trace.INVALID_SPAN
        above = trace.set_span_in_context(parent, _NO_PARENT) if has_parent else _NO_PARENT
        name = f"savings.{operation.name}"
        links = [Link(context) for context in operation.links[:MAX_LINKS]] if operation.links else None
        span = self._tracer.start_span(name, above, start_time=operation.entered_ns, links=links)
        if not span.is_recording():
            return
        attributes = self._attributes(operation)
        if _is_fast_commit(operation):
            for step in operation.steps:
                attributes[f"savings.{step.name}.seconds"] = step.duration
        else:
            self._add_children(name, span, operation)
        span.set_attributes(attributes)
        _end(span, operation, operation.entered_ns)

    def recovered(self, kind: str) -> None:
        """Add an event to the current span."""
        trace.get_current_span().add_event("savings.recovered", {"savings.recovery.kind": kind})

    def _attributes(self, operation: Operation) -> Attributes:
        attributes = _described(operation)
        attributes["savings.records"] = operation.records
        if operation.sequence is not None:
            attributes["savings.sequence"] = operation.sequence
        if operation.writer is not None:
            attributes["savings.writer"] = operation.writer
        return attributes

    def _add_children(self, name: str, span: Span, operation: Operation) -> None:
        context = trace.set_span_in_context(span, _NO_PARENT)
        for step in operation.steps:
            began_ns = operation.began_ns(step)
            child = self._tracer.start_span(
                f"{name}.{step.name}", context, start_time=began_ns, attributes=_described(step)
            )
            _end(child, step, began_ns)


def _is_fast_commit(operation: Operation) -> bool:
    return (
        operation.name == COMMIT
        and operation.error is None
        and operation.duration < SLOW_SECONDS
        and all(step.outcome == "ok" for step in operation.steps)
    )


def _described(step: Step) -> Attributes:
    attributes: Attributes = {}
    if step.size is not None:
        attributes["file.size"] = step.size
    if step.name == FSYNC_DIR:
        attributes["savings.dir_fsync.result"] = step.outcome
    if step.is_drill:
        attributes["savings.drill"] = "true"
    if step.error is not None:
        attributes["error.type"] = error_symbol(step.error)
    return attributes


def _end(span: Span, step: Step, began_ns: int) -> None:
    step.trace = span.get_span_context()
    end_ns = began_ns + round(step.duration * 1e9)
    if step.error is not None:
        span.record_exception(step.error, timestamp=end_ns)
        span.set_status(Status(StatusCode.ERROR, str(step.error)))
    span.end(end_ns)
