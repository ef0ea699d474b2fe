"""A real OTLP receiver gets the spans and the metrics of the running service."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from savings_exporter import SavingsTracker
from savings_exporter.version import VERSION
from tests.support.faults import failing_directory_fsync
from tests.support.paths import DATA
from tests.support.service import Service, free_port, run_cli, running
from tests.support.wait import eventually

pytestmark = pytest.mark.needs("oteltap")

STEPS = ["savings.save.write", "savings.save.fsync_file", "savings.save.replace", "savings.save.fsync_dir"]
ERROR = 2  # opentelemetry.proto.trace.v1.Status.STATUS_CODE_ERROR


def received(store: Path, while_serving: Any) -> list[Any]:
    """The spans that a receiver gets from a service, from its start to its end, in the order of their beginning."""
    return sorted(taken(store, while_serving, "stream_traces", {}), key=lambda span: span.start_time_unix_nano)


def pushed(store: Path, while_serving: Any, *command: str) -> dict[str, Any]:
    """The last state of each metric that a receiver gets from a service."""
    env = {"OTEL_METRICS_EXPORTER": "otlp", "OTEL_METRIC_EXPORT_INTERVAL": "100"}
    return {metric.name: metric for metric in taken(store, while_serving, "stream_metrics", env, *command)}


def taken(store: Path, while_serving: Any, stream: str, variables: dict[str, str], *command: str) -> list[Any]:
    """What a receiver gets in one of its streams, in the order of its arrival."""
    from oteltap import OtelTapHttpProtobufReceiver, OtelTapHttpProtobufReceiverSettings

    port = free_port()

    def serve() -> None:
        env = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}", "OTEL_BSP_SCHEDULE_DELAY": "100"}
        with running(*(command or ("serve", "--store", str(store))), env={**env, **variables}) as service:
            while_serving(service)
            assert service.process.poll() is not None or service.stop()[0] == 0

    async def receive() -> list[Any]:
        items: list[Any] = []
        settings = OtelTapHttpProtobufReceiverSettings(http_port=port)
        async with OtelTapHttpProtobufReceiver(settings) as receiver:

            async def collect() -> None:
                async for item in getattr(receiver, stream)():
                    items.append(item)

            collecting = asyncio.ensure_future(collect())
            await asyncio.to_thread(serve)
            # The service flushed before it ended, so all is received; what remains is to take it from the queue.
            while True:
                seen = len(items)
                await asyncio.sleep(1)
                if seen == len(items) and seen:
                    break
            collecting.cancel()
        return items

    return asyncio.run(asyncio.wait_for(receive(), 120))


def attributes(span: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


def points(metric: Any) -> list[Any]:
    """The data points of a metric."""
    return list(getattr(metric, metric.WhichOneof("data")).data_points)


def samples_of(metrics: dict[str, Any]) -> dict[str, float]:
    """The metrics as the samples that Prometheus scrapes."""
    samples: dict[str, float] = {}
    for name, metric in metrics.items():
        for point in points(metric):
            labels = attributes(point)
            if metric.HasField("histogram"):
                bounds = [*map(str, point.explicit_bounds), "+Inf"]
                for bound, count in zip(bounds, accumulate(point.bucket_counts), strict=True):
                    samples[sample(f"{name}_bucket", {**labels, "le": bound})] = count
                samples[sample(f"{name}_sum", labels)] = point.sum
                samples[sample(f"{name}_count", labels)] = point.count
            else:
                suffix = "_total" if metric.sum.is_monotonic else ""
                samples[sample(name + suffix, labels)] = getattr(point, point.WhichOneof("value"))
    return samples


def sample(name: str, labels: dict[str, str]) -> str:
    shown = ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
    return f"{name}{{{shown}}}" if shown else name


def children(spans: list[Any], parent: Any) -> list[Any]:
    return [span for span in spans if span.parent_span_id == parent.span_id]


@pytest.fixture
def saved(store_path: Path) -> Path:
    """A store with a document, so that its next save is no first one."""
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_request(model="m", tokens_saved=1)
    return store_path


def test_save_with_its_steps(saved: Path) -> None:
    before, sizes = saved.stat().st_ino, []

    def post(service: Service) -> None:
        assert service.post({"model": "m", "tokens_saved": 4096})[0] == 200
        eventually(lambda: saved.stat().st_ino != before, "the service to save the document")
        sizes.append(saved.stat().st_size)

    spans = received(saved, post)
    # The last save of the service writes the previous document, too.
    save, last = [span for span in spans if span.name == "savings.save"]
    assert [span.name for span in children(spans, save)] == STEPS
    assert [span.name for span in children(spans, last)] == [*STEPS[:2], *STEPS]
    assert attributes(save)["savings.sequence"] == 2
    assert attributes(save)["file.size"] == sizes[0]
    for earlier, later in zip(children(spans, save), children(spans, save)[1:], strict=False):
        assert earlier.end_time_unix_nano <= later.start_time_unix_nano


@pytest.mark.needs("strace")
def test_injected_failure_is_an_error(saved: Path) -> None:
    failures = 'savings_save_failures_total{error="EIO",step="fsync_dir"}'

    def post(service: Service) -> None:
        # The first commit makes a segment, whose name is synced, too.
        assert service.post({"model": "m", "tokens_saved": 1})[0] == 200
        with failing_directory_fsync(service, saved.parent, "when=1"):
            eventually(lambda: service.metrics()[failures] == 1, "the save to fail")
        metrics = service.metrics()
        assert metrics['savings_fsync_failures_total{target="directory"}'] == 1
        eventually(lambda: service.metrics()["savings_store_healthy"] == 1, "the document to be saved again")

    spans = received(saved, post)
    saves = [span for span in spans if span.name == "savings.save"]
    (failed,) = [save for save in saves if save.status.code == ERROR]
    assert attributes(failed)["error.type"] == "EIO"
    steps = children(spans, failed)
    assert [step.name for step in steps] == STEPS
    assert [step.status.code for step in steps] == [0, 0, 0, ERROR]
    assert attributes(steps[3])["error.type"] == "EIO"
    assert [event.name for event in steps[3].events] == ["exception"]
    assert attributes(saves[-1])["savings.sequence"] == 2
    assert saves[-1].status.code == 0


def test_commits_with_their_steps(store_path: Path) -> None:
    def post(service: Service) -> None:
        for _ in range(2):
            assert service.post({"model": "m", "tokens_saved": 4096})[0] == 200

    spans = received(store_path, post)
    commits = [span for span in spans if span.name == "savings.commit"]
    assert [attributes(commit)["savings.sequence"] for commit in commits] == [1, 2]
    assert [attributes(commit)["savings.records"] for commit in commits] == [1, 1]
    assert len({attributes(commit)["savings.writer"] for commit in commits}) == 1
    for commit in commits:
        # A fast one carries the durations of its steps, a slow one has a span for each.
        names = [span.name for span in children(spans, commit)]
        assert "savings.commit.fsync_journal" in names or "savings.fsync_journal.seconds" in attributes(commit)


@pytest.mark.needs("strace")
@pytest.mark.parametrize("variables", ["", "OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:9 OTEL_SDK_DISABLED=true"])
def test_nothing_is_sent_unless_it_is_asked_for(store_path: Path, tmp_path: Path, variables: str) -> None:
    log = tmp_path / "connections"
    program = [sys.executable, "-m", "savings_exporter", "record", "--store", str(store_path)]
    subprocess.run(
        ["strace", "-f", "-e", "trace=connect", "-o", str(log), *program, "--model", "m", "--tokens-saved", "1"],
        env={**os.environ, **dict(variable.split("=", 1) for variable in variables.split())},
        check=True,
    )
    assert "AF_INET" not in log.read_text()


@contextmanager
def grpc_receiver() -> Iterator[tuple[int, list[Any]]]:
    """A receiver of OTLP over gRPC: its port, and the requests that it gets."""
    import grpc  # type: ignore[import-untyped]
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

    requests: list[Any] = []

    class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
            requests.append(request)
            return trace_service_pb2.ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Receiver(), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port, requests
    finally:
        server.stop(None).wait()


@contextmanager
def http_receiver(signal: str = "traces") -> Iterator[tuple[int, list[Any]]]:
    """A receiver of OTLP over HTTP: its port, and the requests that it gets."""
    from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

    requests: list[Any] = []
    kinds: dict[str, Any] = {
        "traces": trace_service_pb2.ExportTraceServiceRequest,
        "metrics": metrics_service_pb2.ExportMetricsServiceRequest,
    }

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers["Content-Encoding"] == "gzip":
                body = gzip.decompress(body)
            requests.append(kinds[signal].FromString(body))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1], requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


RECEIVERS = {"grpc": grpc_receiver, "http/protobuf": http_receiver}


def exported(store: Path, protocol: str, **variables: str) -> list[tuple[str, dict[str, Any]]]:
    """The names of the spans of one ``record``, each with the attributes of its resource."""
    with RECEIVERS[protocol]() as (port, requests):
        env = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}", "OTEL_EXPORTER_OTLP_PROTOCOL": protocol}
        done = run_cli("record", "--store", str(store), "--model", "m", "--tokens-saved", "1", env={**env, **variables})
        assert (done.returncode, done.stderr) == (0, "")
    return [
        (span.name, attributes(resource.resource))
        for request in requests
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


@pytest.mark.parametrize("protocol", RECEIVERS)
def test_standard_variables(store_path: Path, protocol: str) -> None:
    spans = exported(store_path, protocol)
    assert {name for name, _ in spans} >= {"savings.commit", "savings.save"}
    assert {resource["service.name"] for _, resource in spans} == {"savings-exporter"}
    assert {resource["service.version"] for _, resource in spans} == {VERSION}
    named = exported(store_path, protocol, OTEL_SERVICE_NAME="mine", OTEL_RESOURCE_ATTRIBUTES="deployment=eu,a=b")
    assert {(r["service.name"], r["deployment"], r["a"]) for _, r in named} == {("mine", "eu", "b")}
    by_attribute = exported(store_path, protocol, OTEL_RESOURCE_ATTRIBUTES="service.name=theirs")
    assert {resource["service.name"] for _, resource in by_attribute} == {"theirs"}
    versioned = exported(store_path, protocol, OTEL_RESOURCE_ATTRIBUTES="service.version=7")
    assert {resource["service.version"] for _, resource in versioned} == {"7"}
    assert exported(store_path, protocol, OTEL_TRACES_SAMPLER="always_off") == []
    unset = exported(store_path, protocol, OTEL_SERVICE_NAME="", OTEL_RESOURCE_ATTRIBUTES="peer.service.name=x")
    assert {resource["service.name"] for _, resource in unset} == {"savings-exporter"}
    ratio = exported(store_path, protocol, OTEL_TRACES_SAMPLER="traceidratio", OTEL_TRACES_SAMPLER_ARG="0")
    assert ratio == []
    assert exported(store_path, protocol, OTEL_TRACES_SAMPLER="parentbased_traceidratio", OTEL_TRACES_SAMPLER_ARG="1")
    assert exported(store_path, protocol, OTEL_SDK_DISABLED="TRUE") == []
    assert exported(store_path, protocol, OTEL_TRACES_EXPORTER="none") == []


@pytest.mark.parametrize("name", ["OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"])
def test_grpc_that_is_not_installed(store_path: Path, tmp_path: Path, name: str) -> None:
    """One line at the start, instead of retries against a port that speaks another protocol."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules['opentelemetry.exporter.otlp.proto.grpc'] = None"
    )
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", name: "grpc", "PYTHONPATH": str(tmp_path)}
    done = run_cli("serve", "--store", str(store_path), "--web.listen-address", "127.0.0.1:0", env=env)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert f"{name} is grpc" in done.stderr
    assert "install the extra otlp-grpc" in done.stderr
    wrong = run_cli("serve", "--store", str(store_path), env={**env, name: "http/json"})
    assert (wrong.returncode, wrong.stderr.count("\n")) == (1, 1)
    assert f"{name} is 'http/json'; use http/protobuf or grpc" in wrong.stderr


def test_trace_of_the_caller_goes_on(saved: Path) -> None:
    """A server span is a child of the caller's, the commit is linked to it, and the log names it."""
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    logged = []

    def post(service: Service) -> None:
        header = {"traceparent": f"00-{trace}-{parent}-01"}
        assert service.post({"model": "m", "tokens_saved": 1}, headers=header)[0] == 200
        assert service.post({"model": "m"}, headers=header)[0] == 422
        assert service.get("/metrics")[0] == service.get("/-/ready")[0] == 200
        logged.append(service.stop()[2])

    spans = received(saved, post)
    served = [span for span in spans if span.name == "POST /v1/savings"]
    assert [span.trace_id.hex() for span in served] == [trace, trace]
    assert [span.parent_span_id.hex() for span in served] == [parent, parent]
    assert [attributes(span)["http.response.status_code"] for span in served] == [200, 422]
    commit = next(span for span in spans if span.name == "savings.commit")
    assert served[0].span_id in [link.span_id for link in commit.links] or commit.parent_span_id == served[0].span_id
    assert not [span for span in spans if "/metrics" in span.name or "/-/ready" in span.name]
    assert f"trace_id={trace} span_id={served[1].span_id.hex()}" in logged[0]


CUMULATIVE = 2  # opentelemetry.proto.metrics.v1.AGGREGATION_TEMPORALITY_CUMULATIVE
# They change between a scrape and a push.
MOVING = ("process_", "savings_http_", "savings_store_free", "savings_document_size", "savings_journal_size")
OF_SAVES = re.compile(r"savings_(saves|save|last_save|fsync|last_dir)_")


def still(samples: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in samples.items() if not name.startswith(MOVING)}


def test_metrics_are_pushed(saved: Path) -> None:
    """With the names, labels and values of the scrape; they go on from the store's birth."""
    scraped: dict[str, float] = {}

    def post(service: Service) -> None:
        saves = service.metrics()["savings_saves_total"]
        assert service.post({"model": "other", "tokens_saved": 4096})[0] == 200
        eventually(lambda: service.metrics()["savings_saves_total"] > saves, "the service to save the document")
        scraped.update(service.metrics())

    metrics = pushed(saved, post)
    last = samples_of(metrics)
    assert still(last).keys() == still(scraped).keys()
    assert {name: value for name, value in still(last).items() if not OF_SAVES.match(name)} == {
        name: value for name, value in still(scraped).items() if not OF_SAVES.match(name)
    }
    # The last push is made after the last save.
    assert last["savings_saves_total"] == scraped["savings_saves_total"] + 1
    with SavingsTracker(saved) as tracker:
        created_at = tracker.snapshot().created_at
    assert created_at is not None
    for name, metric in metrics.items():
        kind = metric.WhichOneof("data")
        if kind == "gauge":
            continue
        assert getattr(metric, kind).aggregation_temporality == CUMULATIVE
        starts = {point.start_time_unix_nano for point in points(metric)}
        if name.startswith(("process_", "savings_http_")):
            assert min(starts) > created_at.timestamp() * 1e9
        else:
            assert starts == {round(created_at.timestamp() * 1e9)}
        assert all(point.time_unix_nano > min(starts) for point in points(metric))
    exemplars = [
        exemplar for point in points(metrics["savings_commit_duration_seconds"]) for exemplar in point.exemplars
    ]
    assert all(len(exemplar.trace_id) == 16 and exemplar.span_id for exemplar in exemplars)
    assert exemplars


def test_metrics_of_a_watched_file_are_pushed(store_path: Path) -> None:
    headroom = DATA / "headroom" / "v6-latest" / "proxy_savings.json"
    scraped = {}
    metrics = pushed(store_path, lambda service: scraped.update(service.metrics()), "watch", str(headroom))
    assert still(samples_of(metrics)) == still(scraped)
    history = json.loads(headroom.read_text())["history"]
    began_at = datetime.fromisoformat(history[0]["timestamp"].replace("Z", "+00:00"))
    assert {point.start_time_unix_nano for point in points(metrics["savings_tokens_saved"])} == {
        round(began_at.timestamp() * 1e9)
    }


@pytest.mark.parametrize("exporter", ["otlp", "", "none", "prometheus"])
def test_endpoint_of_metrics(store_path: Path, exporter: str) -> None:
    """It alone asks for a push. The resource names the instance."""
    with http_receiver("metrics") as (port, requests):
        env = {
            "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": f"http://127.0.0.1:{port}/v1/metrics",
            "OTEL_METRICS_EXPORTER": exporter,
        }
        with running("serve", "--store", str(store_path), env=env) as service:
            own_port = service.url.rpartition(":")[2]
            assert service.stop()[0] == 0
    if exporter in ("none", "prometheus"):
        assert requests == []
        return
    resources = [attributes(resource.resource) for request in requests for resource in request.resource_metrics]
    assert [resource["service.instance.id"] for resource in resources] == [f"{socket.gethostname()}:{own_port}"]
    assert resources[0]["service.name"] == "savings-exporter"


def test_headers_are_not_repeated(store_path: Path) -> None:
    """A mistake in them must not put a secret into the log."""
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_HEADERS": "Authorization: s3cr3t"}
    done = run_cli("serve", "--store", str(store_path), "--web.listen-address", "127.0.0.1:0", env=env)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "the headers are not NAME=VALUE" in done.stderr
    assert "s3cr3t" not in done.stderr


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (
            {"OTEL_METRICS_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_ENDPOINT": "localhost:4318"},
            "OTEL_EXPORTER_OTLP_ENDPOINT is 'localhost:4318'; begin it with http:// or https://",
        ),
        (
            {"OTEL_METRICS_EXPORTER": "statsd"},
            "OTEL_METRICS_EXPORTER is 'statsd'; use otlp, console, prometheus or none",
        ),
        (
            {"OTEL_METRICS_EXPORTER": "otlp", "OTEL_METRIC_EXPORT_INTERVAL": "1m"},
            "OTEL_METRIC_EXPORT_INTERVAL is '1m'; use a whole number of milliseconds",
        ),
        (
            {"OTEL_METRICS_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": "delta"},
            "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE is 'delta'; lifetime totals are cumulative",
        ),
        (
            {"OTEL_METRICS_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "http/json"},
            "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL is 'http/json'; use http/protobuf or grpc",
        ),
    ],
)
def test_refused_push(store_path: Path, variables: dict[str, str], said: str) -> None:
    done = run_cli("serve", "--store", str(store_path), "--web.listen-address", "127.0.0.1:0", env=variables)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert said in done.stderr
    assert not store_path.exists()


@contextmanager
def silent_receiver() -> Iterator[tuple[int, list[Any]]]:
    """A port where connections are accepted, and requests are never answered."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connections: list[Any] = []

        def accept() -> None:
            with suppress(OSError):
                while True:
                    connections.append(listener.accept()[0])

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield listener.getsockname()[1], connections
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in connections:
                connection.close()


def often(port: int, protocol: str, timeout: float) -> dict[str, str]:
    """The variables for exports of spans and metrics, many a second. An attempt may take ``timeout`` seconds."""
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
        "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
        "OTEL_EXPORTER_OTLP_TIMEOUT": str(timeout),
        "OTEL_METRICS_EXPORTER": "otlp",
        "OTEL_METRIC_EXPORT_INTERVAL": "50",
        "OTEL_BSP_SCHEDULE_DELAY": "50",
    }


@pytest.mark.parametrize("protocol", RECEIVERS)
def test_collector_that_does_not_answer(store_path: Path, protocol: str) -> None:
    """The service neither waits for it at its end, nor logs each attempt."""
    with (
        silent_receiver() as (port, connections),
        running("serve", "--store", str(store_path), env=often(port, protocol, timeout=600)) as service,
    ):
        assert service.post({"model": "m", "tokens_saved": 1})[0] == 200
        eventually(lambda: connections, "something to be sent")
        status, _, logged = service.stop()
    assert status == 0
    assert logged.count("logger=opentelemetry") <= 1
    with SavingsTracker(store_path) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == 1


@pytest.mark.parametrize("protocol", RECEIVERS)
def test_collector_that_is_down(store_path: Path, protocol: str) -> None:
    """Its failures are one line in the log, and one at the end with their number."""
    env = often(free_port(), protocol, timeout=0.3)
    with running("serve", "--store", str(store_path), "--log.level", "debug", env=env) as service:
        for _ in range(20):
            assert service.post({"model": "m", "tokens_saved": 1})[0] == 200
        status, _, logged = service.stop()
    assert status == 0
    assert len([line for line in logged.splitlines() if "logger=opentelemetry" in line]) <= 2
