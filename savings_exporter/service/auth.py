"""The bearer token (RFC 6750) that callers of the service must send."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from http import HTTPStatus

from starlette.types import ASGIApp, Receive, Scope, Send

from savings_exporter.service.paths import DOCUMENTS_PATH, HEALTHY_PATH, READY_PATH
from savings_exporter.service.problems import problem


class BearerToken:
    """Middleware that refuses requests without the token. Health, readiness and the documents need none.

    Args:
        token: the token that is asked for at present; None when none is.
    """

    def __init__(self, app: ASGIApp, token: Callable[[], str | None]) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with 401."""
        if scope["type"] == "http" and not _is_public(scope["path"]) and not self._is_allowed(scope):
            response = problem(HTTPStatus.UNAUTHORIZED, "bearer token missing or wrong")
            response.headers["WWW-Authenticate"] = "Bearer"
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        token = self._token()
        if token is None:
            return True
        scheme, _, shown = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(shown.strip(), token.encode())


def _is_public(path: str) -> bool:
    # The links of alerts lead to the documents, and must work in a browser.
    return path in (HEALTHY_PATH, READY_PATH) or path.startswith(DOCUMENTS_PATH)
