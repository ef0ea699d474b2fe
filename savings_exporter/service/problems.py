"""Errors of the service as ``application/problem+json`` (RFC 9457)."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ExceptionHandler

from savings_exporter.service.paths import SAVINGS_PATH
from savings_exporter.service.views import printable

# An answer repeats no more than this of what a client sent.
_MAX_SHOWN = 500

RETRY_AFTER_SECONDS = "5"


class RefusedError(Exception):
    """A request that is refused.

    Attributes:
        status: the status of the answer.
        detail: the reason, for people, of bounded length.
        field: the field of the request that is wrong, None when it is not one field.
        retry: whether the client may try again soon.
        close: whether the connection is closed, because the rest of the request is not read.
        headers: more headers of the answer.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        field: str | None = None,
        retry: bool = False,
        close: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = HTTPStatus(status)
        self.detail = _cut(detail)
        self.field = field
        self.retry = retry
        self.close = close
        self.headers = headers or {}


def problem(status: HTTPStatus, detail: str, field: str | None = None) -> Response:
    """The answer for an error."""
    body = {"title": status.phrase, "status": int(status), "detail": printable(_cut(detail))}
    if field is not None:
        body["field"] = _cut(field)
    return Response(msgspec.json.encode(body) + b"\n", status, media_type="application/problem+json")


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


def refusal(error: RefusedError) -> Response:
    """The answer to a request that is refused."""
    response = problem(error.status, error.detail, error.field)
    response.headers.update(error.headers)
    if error.retry:
        response.headers["Retry-After"] = RETRY_AFTER_SECONDS
    if error.close:
        response.headers["Connection"] = "close"
    return response


def unexpected() -> Response:
    """The answer to a request at which an exception was raised that nothing expects."""
    return problem(HTTPStatus.INTERNAL_SERVER_ERROR, "the request failed; the service's log says why")


async def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return refusal(error)


async def _http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = error.detail
    if error.status_code == HTTPStatus.NOT_FOUND:
        detail = f"there is no such path; the page / links to the metrics, and savings are at {SAVINGS_PATH}"
    elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED and detail == HTTPStatus.METHOD_NOT_ALLOWED.phrase:
        detail = f"use {(error.headers or {}).get('Allow', 'GET')} for this path"
    response = problem(HTTPStatus(error.status_code), detail)
    response.headers.update(error.headers or {})
    return response


async def _unexpected(_request: Request, _error: Exception) -> Response:
    # Starlette raises the error again after this answer, and the server logs it.
    return unexpected()


HANDLERS: dict[type[Exception], ExceptionHandler] = {
    HTTPException: _http_error,
    RefusedError: _refused,
    Exception: _unexpected,
}
"""What answers each kind of error, for Starlette."""
