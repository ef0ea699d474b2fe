"""The cost of spans. They are created, batched, and discarded instead of being sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased, Sampler, TraceIdRatioBased
from opentelemetry.trace import NoOpTracerProvider

from benchmarks.measuring import Bound, Result, Setup, one_thread
from benchmarks.ours import shared_tracker, traced_caller
from benchmarks.works.rates import rate_of

_SAMPLED = 0.01


def tracing_sampled(setup: Setup) -> Result:
    """A proxy samples one request in a hundred; both sides create the proxy's own spans."""

    def side(*, ours_too: bool) -> float:
        with _provider(ParentBased(TraceIdRatioBased(_SAMPLED))) as provider:
            return rate_of(setup, partial(traced_caller, provider=provider, ours_too=ours_too), one_thread)

    return Result(
        work=f"one thread, {_SAMPLED:.0%} of the callers' spans sampled",
        peer="the same callers' spans, tracing off",
        unit="records/s",
        **setup.taking_turns(lambda: side(ours_too=True), lambda: side(ours_too=False)),
        bound=Bound(0.95, at_least=True),
    )


def tracing_all(setup: Setup) -> Result:
    """Every commit is sampled, and the callers have no spans."""

    def traced() -> float:
        with _provider(ALWAYS_ON) as provider:
            return rate_of(setup, partial(shared_tracker, tracer_provider=provider), one_thread)

    def untraced() -> float:
        return rate_of(setup, partial(shared_tracker, tracer_provider=NoOpTracerProvider()), one_thread)

    return Result(
        work="one thread, every commit sampled",
        peer="the same, tracing off",
        unit="records/s",
        **setup.taking_turns(traced, untraced),
        bound=Bound(0.70, at_least=True),
    )


@contextmanager
def _provider(sampler: Sampler) -> Iterator[TracerProvider]:
    provider = TracerProvider(sampler=sampler)
    provider.add_span_processor(BatchSpanProcessor(_Nowhere()))
    try:
        yield provider
    finally:
        provider.shutdown()


class _Nowhere(SpanExporter):
    def export(self, _spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.SUCCESS
