"""Sends spans and metrics to a collector, as the standard ``OTEL_*`` environment variables say."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple

from savings_exporter.errors import SettingsError
from savings_exporter.version import VERSION

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import MetricExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from prometheus_client.core import Metric as Family

    from savings_exporter.model.snapshot import Snapshot

logger = logging.getLogger(__name__)

_STARTED_NS = time.time_ns()
_LONGEST_CLOSE_SECONDS = 0.8
_LONGEST_COMMAND_CLOSE_SECONDS = 0.4
_USUAL_INTERVAL_MS = 60_000


class Export:
    """The exporters that the environment configures. As a context manager it sends what is left at the end.

    Args:
        instance: the name of this instance of the service, as the resource attribute ``service.instance.id``; None for
            a command that ends at once, and pushes no metrics.

    Attributes:
        tracer_provider: where to make spans; None when no exporter of spans is configured.

    Raises:
        SettingsError: a variable names something that is not supported, or has a value that OpenTelemetry refuses.
    """

    def __init__(self, instance: str | None = None) -> None:
        self.tracer_provider: TracerProvider | None = None
        # A hook may run a command for each prompt.
        self._close_seconds = _LONGEST_CLOSE_SECONDS if instance is not None else _LONGEST_COMMAND_CLOSE_SECONDS
        self._metrics: _Metrics | None = None
        self._push: _Push | None = None
        names = ", ".join(sorted(name for name in os.environ if name.startswith("OTEL_")))
        complaints = _Complaints()
        with complaints:
            try:
                self._set_up(instance)
            except SettingsError:
                raise
            except Exception as error:
                # A value that OpenTelemetry does not expect can raise any exception.
                complaints.lines.append(str(error))
        if complaints.lines:
            said = " ".join(complaints.lines[0].split())
            if "header" in said.lower():
                # The complaint repeats the value, which may be a secret.
                said = "the headers are not NAME=VALUE,NAME=VALUE, with values percent-encoded"
            raise SettingsError(f'OpenTelemetry cannot be set up: it says "{said}"; correct or unset one of {names}')

    def push_metrics(self, collect: Callable[[], Iterable[Family]], snapshot: Callable[[], Snapshot]) -> None:
        """Push metrics at an interval and at the end, if the environment asks for that.

        Args:
            collect: the families of a Prometheus registry.
            snapshot: the store whose metrics these are. Its creation is the start time of what it counts.
        """
        if self._metrics is not None:
            self._push = _Push(self._metrics, collect, snapshot)

    def __enter__(self) -> Export:
        return self

    def __exit__(self, *_exception: object) -> None:
        """Send what is left, for at most 0.8 seconds, or 0.4 in a command that ends at once: a collector that does not
        answer must not delay the end.
        """
        endings = [self.tracer_provider.shutdown] if self.tracer_provider is not None else []
        if self._push is not None:
            endings.append(self._push.close)
        # The exporters' own ends wait for up to 30 s.
        threads = [threading.Thread(target=end, daemon=True) for end in endings]
        deadline = time.monotonic() + self._close_seconds
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0))

    def _set_up(self, instance: str | None) -> None:
        if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
            return
        traces, metrics = _wanted_traces(), _wanted_metrics() if instance is not None else "none"
        if traces == metrics == "none":
            return
        # The exporters' HTTP client imports it when it sends, and Python may be upgraded until then.
        import netrc  # noqa: F401

        resource = _resource(instance)
        if metrics != "none":
            self._metrics = _Metrics(_metric_exporter(metrics), resource, _interval_seconds())
        if traces != "none":
            self.tracer_provider = _tracer_provider(traces, resource)


class _Metrics(NamedTuple):
    exporter: MetricExporter
    resource: Resource
    interval: float


class _Push:
    """A thread that exports metrics at an interval. The start time of a store's sums stays the same, because a receiver
    takes another start time for a reset to zero.
    """

    def __init__(
        self, metrics: _Metrics, collect: Callable[[], Iterable[Family]], snapshot: Callable[[], Snapshot]
    ) -> None:
        # Imported here and not when it is used: the package may be upgraded while the service runs.
        from savings_exporter.telemetry.otlp import metrics_data

        self._converted = metrics_data
        self._exporter, self._resource, self._interval = metrics
        self._collect = collect
        self._snapshot = snapshot
        self._created: dict[str, int] = {}
        self._closing = threading.Event()
        self._exporting = threading.Lock()
        threading.Thread(target=self._run, name="metrics push", daemon=True).start()

    def close(self) -> None:
        """Export once more, after an export that is under way."""
        self._closing.set()
        self._export()
        self._exporter.shutdown()

    def _created_ns(self) -> int:
        snapshot = self._snapshot()
        if snapshot.store_id not in self._created:
            self._created[snapshot.store_id] = _start_of(snapshot.created_at)
        return self._created[snapshot.store_id]

    def _run(self) -> None:
        while not self._closing.wait(self._interval):
            self._export()

    def _export(self) -> None:
        with self._exporting:
            try:
                # The exporter logs why an export fails.
                created_ns = self._created_ns()
                self._exporter.export(self._converted(self._collect(), created_ns, _STARTED_NS, self._resource))
            except Exception:
                logger.warning("metrics could not be exported", exc_info=True)


def _start_of(created_at: datetime | None) -> int:
    created_ns = round(created_at.timestamp() * 1e9) if created_at is not None else 0
    # A time that is not known, before 1970 or in the future is no start time.
    return created_ns if 0 < created_ns <= time.time_ns() else _STARTED_NS


def _resource(instance: str | None) -> Resource:
    # The stable names of HTTP attributes, in place of the old ones.
    os.environ.setdefault("OTEL_SEMCONV_STABILITY_OPT_IN", "http")
    # Imported here, because the import reads some of the variables, and may refuse their values.
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource

    given = OTELResourceDetector().detect().attributes
    ours = {"service.name": "savings-exporter", "service.version": VERSION, "service.instance.id": instance}
    return Resource.create({name: value for name, value in ours.items() if value and not given.get(name)})


def _tracer_provider(wanted: str, resource: Resource) -> TracerProvider:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(shutdown_on_exit=False, resource=resource)
    provider.add_span_processor(BatchSpanProcessor(_span_exporter(wanted)))
    return provider


def _wanted_traces() -> str:
    has_endpoint = any(map(os.environ.get, ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")))
    return os.environ.get("OTEL_TRACES_EXPORTER", "").strip() or ("otlp" if has_endpoint else "none")


def _wanted_metrics() -> str:
    """Metrics are pushed only where this is asked for, because Prometheus scrapes them anyway."""
    wanted = os.environ.get("OTEL_METRICS_EXPORTER", "").strip()
    if wanted == "prometheus":
        return "none"
    return wanted or ("otlp" if os.environ.get("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT") else "none")


def _interval_seconds() -> float:
    name = "OTEL_METRIC_EXPORT_INTERVAL"
    text = os.environ.get(name, "").strip() or str(_USUAL_INTERVAL_MS)
    if not (text.isascii() and text.isdigit() and int(text)):
        raise SettingsError(f"{name} is {text!r}; use a whole number of milliseconds, such as {_USUAL_INTERVAL_MS}")
    return min(int(text) / 1000, threading.TIMEOUT_MAX)


def _span_exporter(wanted: str) -> SpanExporter:
    from opentelemetry.sdk.trace.export import ConsoleSpanExporter

    if wanted == "console":
        return ConsoleSpanExporter(out=sys.stderr)
    if wanted != "otlp":
        raise SettingsError(f"OTEL_TRACES_EXPORTER is {wanted!r}; use otlp, console or none")
    if _uses_grpc("TRACES"):
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcSpanExporter

        return GrpcSpanExporter()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()


def _metric_exporter(wanted: str) -> MetricExporter:
    from opentelemetry.sdk.metrics.export import ConsoleMetricExporter

    if wanted == "console":
        return ConsoleMetricExporter(out=sys.stderr)
    if wanted != "otlp":
        raise SettingsError(f"OTEL_METRICS_EXPORTER is {wanted!r}; use otlp, console, prometheus or none")
    name = "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE"
    temporality = os.environ.get(name, "").strip() or "cumulative"
    if temporality.lower() != "cumulative":
        raise SettingsError(
            f"{name} is {temporality!r}; lifetime totals are cumulative, so use cumulative, or unset it"
        )
    if _uses_grpc("METRICS"):
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as GrpcMetricExporter

        return GrpcMetricExporter()
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

    return OTLPMetricExporter()


def _uses_grpc(signal: str) -> bool:
    """Whether OTLP goes over gRPC.

    Raises:
        SettingsError: the protocol is unknown, or is not installed.
    """
    names = (f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    name = next((name for name in names if os.environ.get(name, "").strip()), names[1])
    protocol = os.environ.get(name, "").strip() or "http/protobuf"
    for endpoint in ("OTEL_EXPORTER_OTLP_ENDPOINT", f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT"):
        address = os.environ.get(endpoint, "").strip()
        if protocol == "http/protobuf" and address and not address.startswith(("http://", "https://")):
            raise SettingsError(f"{endpoint} is {address!r}; begin it with http:// or https://")
    if protocol not in ("http/protobuf", "grpc"):
        raise SettingsError(f"{name} is {protocol!r}; use http/protobuf or grpc")
    if protocol == "grpc":
        # Its core writes its own lines to standard error, for every attempt.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        try:
            import opentelemetry.exporter.otlp.proto.grpc  # noqa: F401
        except ImportError:
            raise SettingsError(
                f"{name} is grpc, and OTLP over gRPC is not installed: install the extra otlp-grpc, or use "
                "http/protobuf and the collector's port for it, usually 4318"
            ) from None
    return protocol == "grpc"


class _Complaints(logging.Handler):
    """Collects what OpenTelemetry logs in the block: for most invalid values it only logs and uses its defaults."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> None:
        logger = logging.getLogger("opentelemetry")
        self._before = logger.level, logger.propagate
        logger.addHandler(self)
        logger.setLevel(logging.WARNING)
        logger.propagate = False

    def __exit__(self, *_exception: object) -> None:
        logger = logging.getLogger("opentelemetry")
        logger.removeHandler(self)
        logger.level, logger.propagate = self._before
