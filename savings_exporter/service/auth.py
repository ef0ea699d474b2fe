"""The bearer token (RFC 6750) that callers of the service must send."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from http import HTTPStatus

from starlette.types import ASGIApp, Receive, Scope, Send

from savings_exporter.service import problems
from savings_exporter.service.paths import DOCUMENTS_PATH, HEALTHY_PATH, READY_PATH, route_path
from savings_exporter.service.problems import RefusedError


class BearerToken:
    """Which requests need the token, and whether they have it. Health, readiness and the documents need none.

    Args:
        token: the token that is asked for at present; None when none is.
    """

    def __init__(self, token: Callable[[], str | None]) -> None:
        self._token = token

    def refusal(self, scope: Scope) -> RefusedError | None:
        """Why a request is refused; None if it is not."""
        token = self._token()
        if token is None or _is_public(route_path(scope)):
            return None
        scheme, _, shown = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(shown.strip(), token.encode()):
            return None
        detail = "bearer token missing or wrong"
        return RefusedError(HTTPStatus.UNAUTHORIZED, detail, headers={"WWW-Authenticate": "Bearer"})


class Guarded:
    """Middleware that answers requests that are refused."""

    def __init__(self, app: ASGIApp, refusal: Callable[[Scope], RefusedError | None]) -> None:
        self._app = app
        self._refusal = refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        error = self._refusal(scope) if scope["type"] == "http" else None
        await (self._app if error is None else problems.refusal(error))(scope, receive, send)


def _is_public(path: str) -> bool:
    # The links of alerts lead to the documents, and must work in a browser.
    return path in (HEALTHY_PATH, READY_PATH) or path.startswith(DOCUMENTS_PATH)
