"""``POST /v1/metrics``: token usage as OpenTelemetry metrics, by OTLP/HTTP.

The encodings, the answers and which errors a client retries follow the OpenTelemetry protocol specification.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import TypeVar

from google.protobuf.json_format import MessageToJson, Parse, ParseError
from google.protobuf.message import DecodeError, Message
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from savings_exporter.errors import StoreError
from savings_exporter.service.intake import Intake, Reception
from savings_exporter.service.problems import RETRY_AFTER_SECONDS, RefusedError
from savings_exporter.service.requests import REASON
from savings_exporter.sources.otlp import REJECTED, MetricMap, Outcome, points_of
from savings_exporter.sources.otlp_import import OtlpImport

_PROTOBUF, _JSON = "application/x-protobuf", "application/json"
# The library reads JSON in Python, some hundred times slower than protobuf.
_MOST_JSON_BYTES = 2 * 1024 * 1024
_GZIP = 16 + zlib.MAX_WBITS

Read = TypeVar("Read", bound=Message)


class OtlpRoute:
    """Answers requests with metrics. ``closed`` says why no request is taken; None if requests are taken."""

    def __init__(
        self,
        otlp: OtlpImport,
        metrics: Mapping[str, MetricMap],
        intake: Intake,
        closed: Callable[[], RefusedError | None],
    ) -> None:
        self._otlp = otlp
        self._metrics = metrics
        self._intake = intake
        self._closed = closed
        # Not the turn of large bodies of savings: these messages take longer.
        self._decoding = asyncio.Lock()

    async def answer(self, request: Request) -> Response:
        """Answer when all that is new is durable."""
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type not in (_PROTOBUF, _JSON):
            detail = f"the Content-Type must be {_PROTOBUF} or {_JSON}"
            raise RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, detail)
        try:
            if (refusal := self._closed()) is not None:
                raise refusal
            return _encoded(content_type, await self._answered(request, content_type))
        except RefusedError as error:
            request.scope[REASON] = error.detail
            return _refused(content_type, error)

    async def _answered(self, request: Request, content_type: str) -> ExportMetricsServiceResponse:
        with Reception(self._intake, time.perf_counter()) as reception:
            body = await reception.read(request.receive)
            encoding = request.headers.get("content-encoding", "identity").strip().lower()
            most = self._intake.limits.body_bytes
            if content_type == _JSON:
                most = min(most, _MOST_JSON_BYTES)
            # In a thread, and one at a time: a message takes many times the memory of its bytes.
            async with self._decoding:
                message = await run_in_threadpool(_decoded, body, encoding, content_type, most)
            outcome = Outcome()
            try:
                is_durable = await run_in_threadpool(self._add, message, outcome)
            except StoreError as error:
                raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, str(error), retry=True) from None
        if not is_durable:
            detail = "the points are not durable yet; send them again, and they count once"
            raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, detail, retry=True)
        answer = ExportMetricsServiceResponse()
        if outcome.counts[REJECTED]:
            answer.partial_success.rejected_data_points = outcome.counts[REJECTED]
            answer.partial_success.error_message = "; ".join(outcome.problems)
        return answer

    def _add(self, message: ExportMetricsServiceRequest, outcome: Outcome) -> bool:
        points = list(points_of(message, self._metrics, outcome))
        return self._otlp.add(points, outcome)


def _decoded(body: bytes, encoding: str, content_type: str, most: int) -> ExportMetricsServiceRequest:
    if len(body) > most:
        raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body is larger than {most} bytes")
    if encoding == "gzip":
        body = _unzipped(body, most)
    elif encoding not in ("", "identity"):
        raise RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the Content-Encoding must be gzip or none")
    # Protobuf's parser takes a string or a list without any field for an empty message.
    if content_type == _JSON and not body.lstrip().startswith(b"{"):
        raise RefusedError(HTTPStatus.BAD_REQUEST, "the body is no ExportMetricsServiceRequest: it is no JSON object")
    message = ExportMetricsServiceRequest()
    try:
        if content_type == _PROTOBUF:
            message.ParseFromString(body)
        else:
            Parse(body, message, ignore_unknown_fields=True)
    except (DecodeError, ParseError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise RefusedError(HTTPStatus.BAD_REQUEST, f"the body is no ExportMetricsServiceRequest: {why}") from None
    return message


def _unzipped(body: bytes, most: int) -> bytes:
    decompressor = zlib.decompressobj(wbits=_GZIP)
    try:
        data = decompressor.decompress(body, most + 1)
    except zlib.error as error:
        raise RefusedError(HTTPStatus.BAD_REQUEST, f"the body is not gzip: {error}") from None
    if len(data) > most:
        raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body is larger than {most} bytes")
    if not decompressor.eof:
        raise RefusedError(HTTPStatus.BAD_REQUEST, "the body is not complete gzip")
    return data


def _encoded(content_type: str, message: Message, status: int = HTTPStatus.OK) -> Response:
    if content_type == _PROTOBUF:
        return Response(message.SerializeToString(), status, media_type=_PROTOBUF)
    return Response(MessageToJson(message, indent=None) + "\n", status, media_type=_JSON)


def _refused(content_type: str, error: RefusedError) -> Response:
    response = _encoded(content_type, Status(message=error.detail), error.status)
    if error.retry:
        response.headers["Retry-After"] = RETRY_AFTER_SECONDS
    if error.close:
        response.headers["Connection"] = "close"
    return response
