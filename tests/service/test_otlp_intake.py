"""Token usage that OpenTelemetry exporters send is durable and exact, whatever fails in between."""

from __future__ import annotations

import gzip
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from google.rpc.status_pb2 import Status
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.sdk.metrics import Counter, MeterProvider
from opentelemetry.sdk.metrics.export import AggregationTemporality, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource

from savings_exporter import SavingsTracker
from tests.support.paths import DATA
from tests.support.service import Service, free_port, running

PROTOBUF, JSON = "application/x-protobuf", "application/json"
PAYLOAD: Any = json.loads((DATA / "sources" / "otlp" / "claude_code_token_usage_delta.json").read_text())
MESSAGE = ParseDict(PAYLOAD, ExportMetricsServiceRequest())


def sent(service: Service, body: bytes, content_type: str, **headers: str) -> tuple[int, bytes, str]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(
        f"{service.url}/v1/metrics", data=body, headers={"Content-Type": content_type, **named}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read(), response.headers["Content-Type"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), error.headers["Content-Type"]


def written(service: Service) -> int:
    tokens: int = json.loads(service.get("/v1/savings")[1])["lifetime"]["total_output_tokens"]
    return tokens


@pytest.mark.parametrize("temporality", [AggregationTemporality.DELTA, AggregationTemporality.CUMULATIVE])
def test_real_sdk_across_kills(store_path: Path, temporality: AggregationTemporality) -> None:
    """An exporter that goes on while the service is killed and restarted: the total is what it counted."""
    address = f"127.0.0.1:{free_port()}"
    exporter = OTLPMetricExporter(
        endpoint=f"http://{address}/v1/metrics", preferred_temporality={Counter: temporality}, timeout=20
    )
    reader = PeriodicExportingMetricReader(exporter, export_interval_millis=60 * 60 * 1000)
    resource = Resource.create({"service.name": "agent", "service.instance.id": "1"})
    provider = MeterProvider([reader], resource)
    counter = provider.get_meter("test").create_counter("gen_ai.client.inference.usage.output_tokens")
    model = {"gen_ai.request.model": "m", "gen_ai.provider.name": "p"}
    total = 0
    for number in range(1, 4):
        with running("serve", "--store", str(store_path), address=address) as service:
            for _ in range(3):
                counter.add(number, model)
                total += number
                assert provider.force_flush(20_000)
            assert written(service) == total
            assert service.metrics()['savings_otlp_points_total{outcome="counted"}'] == 3
            # The next process continues with what this one made durable.
            service.process.kill()
            service.process.wait()
    with running("serve", "--store", str(store_path), address=address):
        provider.shutdown()
    with SavingsTracker(store_path) as tracker:
        snapshot = tracker.snapshot()
        assert snapshot.by_provider_model["p", "m"].total_output_tokens == total
        assert list(snapshot.agents) == ["agent"]


def test_answer_that_is_lost(store_path: Path) -> None:
    """The service is killed after the points are durable, and the sender sends them again to the next one."""
    body = MESSAGE.SerializeToString()
    for _ in range(3):
        with running("serve", "--store", str(store_path)) as service:
            assert sent(service, body, PROTOBUF)[0] == 200
            service.process.kill()
            service.process.wait()
    with running("serve", "--store", str(store_path)) as service:
        assert sent(service, body, PROTOBUF) == (200, b"", PROTOBUF)
        assert written(service) == 426
        assert service.metrics()['savings_otlp_points_total{outcome="duplicate"}'] == 4


@pytest.mark.needs("root")
@pytest.mark.slow
def test_disk_that_fails(store_path: Path) -> None:
    """The answer is 503 until the points are durable, and a sender that repeats them to the next process is counted."""
    body = MESSAGE.SerializeToString()
    others = (DATA / "sources" / "otlp" / "gen_ai_inference_usage_cumulative.json").read_bytes()
    with running("serve", "--store", str(store_path), faulty=True) as service:
        assert sent(service, others, JSON)[0] == 200
        before = written(service)
        service.tell("fail fsync_journal")
        service.tell("fail fsync_file")
        for _ in range(2):
            request = urllib.request.Request(f"{service.url}/v1/metrics", data=body, headers={"Content-Type": PROTOBUF})
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request, timeout=30)
            with refused.value as error:
                assert (error.code, error.headers["Retry-After"]) == (503, "5")
                assert "not durable yet" in Status.FromString(error.read()).message
        service.process.kill()
        service.process.wait()
    with running("serve", "--store", str(store_path)) as service:
        for _ in range(2):
            assert sent(service, body, PROTOBUF)[0] == 200
        assert written(service) == before + 426


def test_encodings(store_path: Path) -> None:
    text, message = json.dumps(PAYLOAD).encode(), MESSAGE.SerializeToString()
    with running("serve", "--store", str(store_path)) as service:
        status, body, content_type = sent(service, gzip.compress(text), JSON, Content_Encoding="gzip")
        assert (status, json.loads(body), content_type) == (200, {}, JSON)
        assert sent(service, gzip.compress(message), PROTOBUF, Content_Encoding="gzip")[0] == 200
        assert sent(service, text, f"{JSON}; charset=utf-8")[0] == 200
        assert written(service) == 426


def test_points_that_are_rejected_are_named(store_path: Path) -> None:
    wrong = json.loads(json.dumps(PAYLOAD))
    wrong["resourceMetrics"][0]["scopeMetrics"][0]["metrics"][0]["sum"]["dataPoints"][1]["asDouble"] = -1
    with running("serve", "--store", str(store_path)) as service:
        status, body, _ = sent(service, json.dumps(wrong).encode(), JSON)
        partial = json.loads(body)["partialSuccess"]
        assert (status, partial["rejectedDataPoints"]) == (200, "1")
        assert partial["errorMessage"].startswith("claude_code.token.usage: a value must be a number from 0")
        message = ParseDict(wrong, ExportMetricsServiceRequest()).SerializeToString()
        answer = ExportMetricsServiceResponse.FromString(sent(service, message, PROTOBUF)[1])
        assert answer.partial_success.rejected_data_points == 1


@pytest.mark.parametrize(
    ("body", "content_type", "encoding", "status", "problem"),
    [
        (b"{", JSON, "identity", 400, "the body is no ExportMetricsServiceRequest"),
        (b"\xff\xff", PROTOBUF, "identity", 400, "the body is no ExportMetricsServiceRequest"),
        (b'{"resourceMetrics": 5}', JSON, "identity", 400, "the body is no ExportMetricsServiceRequest"),
        (b"[" * 100_000, JSON, "identity", 400, "the body is no ExportMetricsServiceRequest"),
        (b"no gzip", PROTOBUF, "gzip", 400, "the body is not gzip"),
        (gzip.compress(MESSAGE.SerializeToString())[:-9], PROTOBUF, "gzip", 400, "the body is not complete gzip"),
        (gzip.compress(b" " * 50_000_000), JSON, "gzip", 413, "the body is larger than 2097152 bytes"),
        (gzip.compress(b" " * 50_000_000), PROTOBUF, "gzip", 413, "the body is larger than 8388608 bytes"),
        (b" " * 3_000_000, JSON, "identity", 413, "the body is larger than 2097152 bytes"),
        (b" " * 9_000_000, JSON, "identity", 413, "the body is larger than 8388608 bytes"),
        (b"{}", JSON, "br", 415, "the Content-Encoding must be gzip or none"),
    ],
)
def test_request_that_is_refused(
    store_path: Path, body: bytes, content_type: str, encoding: str, status: int, problem: str
) -> None:
    """With an error in the encoding of the request. A client does not send it again."""
    with running("serve", "--store", str(store_path)) as service:
        code, answer, answered = sent(service, body, content_type, Content_Encoding=encoding)
        assert (code, answered) == (status, content_type)
        said = json.loads(answer)["message"] if content_type == JSON else Status.FromString(answer).message
        assert said.startswith(problem)
        assert sent(service, b"", "text/plain")[0] == 415
        assert service.get("/v1/metrics")[0] == 405
        log = service.stop()[2]
    assert "Traceback" not in log
    assert f"POST /v1/metrics: refused a request with status {status}: {problem}" in log


def test_store_that_another_process_imports_into(store_path: Path) -> None:
    body = MESSAGE.SerializeToString()
    with running("serve", "--store", str(store_path)) as first, running("serve", "--store", str(store_path)) as second:
        assert sent(first, body, PROTOBUF)[0] == 200
        status, answer, _ = sent(second, body, PROTOBUF)
        assert status == 503
        assert "another process imports into this store" in Status.FromString(answer).message
        assert first.stop()[0] == 0
        assert sent(second, body, PROTOBUF)[0] == 200
        assert written(second) == 426


def test_usage_alone_is_no_saving(store_path: Path) -> None:
    """Otherwise the alert on savings that stopped would stay silent as long as usage arrives."""
    newest = "savings_last_record_timestamp_seconds"
    with running("serve", "--store", str(store_path)) as service:
        assert service.metrics()[newest] == 0
        assert service.post({"model": "m", "tokens_saved": 1, "timestamp": "2025-01-01T00:00:00Z"})[0] == 200
        saved_at = service.metrics()[newest]
        assert saved_at > 0
        assert sent(service, MESSAGE.SerializeToString(), PROTOBUF)[0] == 200
        assert written(service) == 426
        assert service.metrics()[newest] == saved_at


def test_own_metrics(store_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "map.yml"
    path.write_text("metrics: {claude_code.token.usage: {by: type, values: {output: [tokens_saved]}}}")
    with running("serve", "--store", str(store_path), "--otlp.map", str(path)) as service:
        assert sent(service, MESSAGE.SerializeToString(), PROTOBUF)[0] == 200
        assert service.metrics()['savings_source_tokens_saved_total{source="otlp"}'] == 426
