"""Spans of operations: one of a fast commit, children of everything else, and what each carries."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import NonRecordingSpan, SpanContext, StatusCode, TraceFlags

from savings_exporter.storage.operation import COMMIT, FSYNC_DIR, SAVE, SAVE_STEPS, Operation
from savings_exporter.telemetry.tracing import MAX_LINKS, SLOW_SECONDS, StoreTracing
from tests.unit.telemetry.operations import run


class Recorded:
    """Tracing whose spans are kept."""

    def __init__(self, **arguments: Any) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider(**arguments)
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracing = StoreTracing(self.provider)

    def spans(self) -> dict[str, ReadableSpan]:
        """The spans by name; each name was used once."""
        found = {span.name: span for span in self._exporter.get_finished_spans()}
        assert len(found) == len(self._exporter.get_finished_spans())
        return found


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


def test_a_fast_commit_is_one_span(recorded: Recorded) -> None:
    operation = Operation(COMMIT, recorded.tracing)
    operation.writer = "00112233445566aa"
    with operation:
        operation.records, operation.sequence = 3, 41
        with operation.step("append") as append:
            append.size = 4096
        with operation.step("fsync_journal", "journal") as sync:
            pass
    (span,) = recorded.spans().values()
    assert span.attributes == {
        "savings.records": 3,
        "savings.sequence": 41,
        "savings.writer": "00112233445566aa",
        "savings.append.seconds": append.duration,
        "savings.fsync_journal.seconds": sync.duration,
    }
    assert span.status.status_code == StatusCode.UNSET
    assert span.end_time is not None
    assert span.start_time == operation.entered_ns
    assert span.end_time - span.start_time == round(operation.duration * 1e9)
    assert operation.trace == span.context


@pytest.mark.parametrize(("seconds", "children"), [(SLOW_SECONDS * 0.999, 0), (SLOW_SECONDS, 2)])
def test_a_slow_commit_has_children(seconds: float, children: int, recorded: Recorded) -> None:
    class Slow(StoreTracing):
        def ended(self, operation: Operation) -> None:
            operation.duration = seconds
            super().ended(operation)

    run(Slow(recorded.provider))
    assert len(recorded.spans()) == 1 + children


def test_a_failed_commit_has_children(recorded: Recorded) -> None:
    run(recorded.tracing, failing="append", number=errno.ENOSPC)
    spans = recorded.spans()
    assert set(spans) == {"savings.commit", "savings.commit.append"}
    for span in spans.values():
        assert span.attributes is not None
        assert span.attributes["error.type"] == "ENOSPC"
        assert span.status.status_code == StatusCode.ERROR
        assert [event.name for event in span.events] == ["exception"]
    commit, child = spans["savings.commit"], spans["savings.commit.append"]
    assert commit.context is not None
    assert child.parent is not None
    assert child.parent.span_id == commit.context.span_id


def test_a_failure_after_the_steps(recorded: Recorded) -> None:
    operation = Operation(COMMIT, recorded.tracing)
    with operation.step("append"):
        pass
    with pytest.raises(KeyboardInterrupt), operation:
        raise KeyboardInterrupt
    assert set(recorded.spans()) == {"savings.commit", "savings.commit.append"}


def test_a_save_has_children(recorded: Recorded) -> None:
    operation = run(recorded.tracing, SAVE)
    spans = recorded.spans()
    assert set(spans) == {"savings.save", *(f"savings.save.{step}" for step in SAVE_STEPS)}
    assert [step.trace for step in operation.steps] == [spans[f"savings.save.{step}"].context for step in SAVE_STEPS]


@pytest.mark.parametrize("name", [SAVE, COMMIT])
def test_unsupported_is_no_error(name: str, recorded: Recorded) -> None:
    operation = Operation(name, recorded.tracing)
    with operation, operation.step(FSYNC_DIR, "directory") as step:
        step.outcome = "unsupported"
    span = recorded.spans()[f"savings.{name}.fsync_dir"]
    assert span.attributes == {"savings.dir_fsync.result": "unsupported"}
    assert span.status.status_code == StatusCode.UNSET


def test_a_drill_is_marked(recorded: Recorded) -> None:
    run(recorded.tracing, SAVE, steps=[FSYNC_DIR], failing=FSYNC_DIR, drill=True)
    assert all(span.attributes and span.attributes["savings.drill"] == "true" for span in recorded.spans().values())


def test_parent_and_links(recorded: Recorded) -> None:
    parent = recorded.provider.get_tracer("proxy").start_span("request")
    contexts = [SpanContext(7, number, False, TraceFlags(1)) for number in range(1, MAX_LINKS + 20)]
    run(recorded.tracing, parent=parent, links=contexts)
    span = recorded.spans()["savings.commit"]
    assert span.parent == parent.get_span_context()
    assert [link.context for link in span.links] == contexts[:MAX_LINKS]


@pytest.mark.parametrize("parent", [None, trace.INVALID_SPAN])
def test_a_root_ignores_the_current_span(parent: Any, recorded: Recorded) -> None:
    with recorded.provider.get_tracer("proxy").start_as_current_span("request"):
        run(recorded.tracing, parent=parent)
    assert recorded.spans()["savings.commit"].parent is None


@pytest.mark.parametrize("sampled", [False, True])
def test_the_parent_decides(sampled: bool) -> None:
    recorded = Recorded(sampler=ParentBased(TraceIdRatioBased(0.01)))
    parent = NonRecordingSpan(SpanContext(1, 2, False, TraceFlags(int(sampled))))
    for name in (COMMIT, SAVE):
        operation = run(recorded.tracing, name, parent=parent)
        assert (operation.trace is not None) == sampled
    assert bool(recorded.spans()) == sampled


def test_without_an_sdk() -> None:
    tracing = StoreTracing(trace.NoOpTracerProvider())
    for failing in (None, "append"):
        assert run(tracing, failing=failing).trace is None
