"""Which requests are refused before anything looks at what they ask for."""

from __future__ import annotations

from http import HTTPStatus

from starlette.types import ASGIApp, Receive, Scope, Send

from savings_exporter.service import problems
from savings_exporter.service.auth import UncheckedPasswordError
from savings_exporter.service.browsers import Headers, host_refusal, origin_refusal
from savings_exporter.service.paths import DOCUMENTS_PATH, HEALTHY_PATH, ICON_PATH, OPENAPI_PATH, READY_PATH, route_path
from savings_exporter.service.problems import RefusedError
from savings_exporter.service.webconfig import WebConfig

_READING = ("GET", "HEAD", "OPTIONS")
_CHECKED = {
    b"host": "Host",
    b"authorization": "Authorization",
    b"origin": "Origin",
    b"sec-fetch-site": "Sec-Fetch-Site",
}


class Guard:
    """Checks the Host, the Origin and the credentials of requests, as the web configuration says at present."""

    def __init__(self, web_config: WebConfig) -> None:
        self._web_config = web_config

    def headers(self) -> Headers:
        """The security headers of answers."""
        return self._web_config.headers

    def receipt_headers(self) -> Headers:
        """The security headers of the answers to a POST that is taken."""
        return self._web_config.receipt_headers

    def refusal(self, scope: Scope) -> RefusedError | None:
        """Why a request is refused, at first sight; None if it is not. ``confirmed`` makes sure of a refusal."""
        writes = scope["method"] not in _READING
        return self._refusal(
            scope["headers"],
            writes=writes,
            is_public=not writes and _is_public(route_path(scope)),
            # HTTP/1.0 has no Host, and browsers do not send it.
            has_host=scope.get("http_version") == "1.1",
        )

    def refusal_of_post(self, headers: Headers) -> RefusedError | None:
        """The same for a POST over HTTP/1.1."""
        return self._refusal(headers, writes=True, is_public=False, has_host=True)

    def _refusal(self, headers: Headers, *, writes: bool, is_public: bool, has_host: bool) -> RefusedError | None:
        shown: dict[bytes, bytes] = {}
        for name, value in headers:
            if name in _CHECKED:
                if name in shown:
                    detail = f"the request has more than one {_CHECKED[name]} header"
                    return RefusedError(HTTPStatus.BAD_REQUEST, detail)
                shown[name] = value
        host = shown.get(b"host")
        refusal = None
        if host is not None or has_host:
            refusal = host_refusal(host, None if is_public else self._web_config.names)
        if refusal is None and writes:
            refusal = origin_refusal(host, shown.get(b"origin"), shown.get(b"sec-fetch-site"))
        credentials = self._web_config.credentials
        if refusal is not None or credentials is None or is_public:
            return refusal
        return credentials.refusal(shown.get(b"authorization"), writes=writes)

    async def confirmed(self, refusal: RefusedError) -> RefusedError | None:
        """The refusal, or None if it was one of an unchecked password that turns out to be right."""
        if isinstance(refusal, UncheckedPasswordError):
            return await refusal.credentials.check(refusal)
        return refusal


class Guarded:
    """Middleware that answers requests that are refused."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app = app
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        error = self._guard.refusal(scope) if scope["type"] == "http" else None
        if error is not None:
            error = await self._guard.confirmed(error)
        await (self._app if error is None else problems.refusal(error))(scope, receive, send)


def _is_public(path: str) -> bool:
    # The links of alerts lead to the documents, and must work in a browser, under any name that leads here. What these
    # paths answer is no secret.
    return path in (HEALTHY_PATH, READY_PATH, OPENAPI_PATH, ICON_PATH) or path.startswith(DOCUMENTS_PATH)
