"""What keeps pages of other sites from using the service through a browser: the Host, the Origin, and headers."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from http import HTTPStatus
from typing import NamedTuple

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from savings_exporter.service.problems import RefusedError

Headers = list[tuple[bytes, bytes]]

_LONGEST_HOST = 300
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[\w.-]+)(?::[0-9]{1,5})?", re.ASCII)

_HEADERS_OF_ALL = {"X-Content-Type-Options": "nosniff"}
_HEADERS_OF_CONTENT = {
    **_HEADERS_OF_ALL,
    "X-Frame-Options": "deny",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def security_headers(configured: Mapping[str, str], *, of_receipts: bool = False) -> Headers:
    """The headers that each answer has. An empty one is left out. With ``of_receipts``, those of answers to a POST: a
    browser shows and embeds no such answer, and each header costs as much as decoding a record.
    """
    headers = {**(_HEADERS_OF_ALL if of_receipts else _HEADERS_OF_CONTENT), **configured}
    return [(name.lower().encode("latin-1"), text.encode("latin-1")) for name, text in headers.items() if text]


class WithHeaders:
    """Middleware that adds the security headers to answers. They replace headers of the same names."""

    def __init__(self, app: ASGIApp, headers: Callable[[], Headers]) -> None:
        self._app = app
        self._headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and add the headers to its answer."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = self._headers()
                names = {name for name, _ in added}
                own = [(name, text) for name, text in message.get("headers", ()) if name.lower() not in names]
                message["headers"] = own + added
            await send(message)

        await self._app(scope, receive, send_with_headers)


def host_refusal(host: bytes | None, names: Collection[str] | None) -> RefusedError | None:
    """Why a request for this host is refused; None if it is not.

    A page of another site can make its own name lead to this service (DNS rebinding), and is then of the same origin.
    The name in ``Host`` shows that.

    Args:
        names: the names of the service; None if any name is right.
    """
    asked = _asked(host)
    if asked is None:
        return RefusedError(HTTPStatus.BAD_REQUEST, "the request needs one Host header with a name or an address")
    if names is None or asked.leads_here_only or asked.name in names:
        return None
    detail = (
        f"{asked.name} is not known as a name of this service; if it is one, allow it with --web.allowed-host "
        f"{asked.name}"
    )
    return RefusedError(HTTPStatus.MISDIRECTED_REQUEST, detail)


def origin_refusal(host: bytes | None, origin: bytes | None, site: bytes | None) -> RefusedError | None:
    """Why a request that changes something is refused; None if it is not.

    A browser tells where the page comes from in ``Origin`` and ``Sec-Fetch-Site``. Other programs send neither.
    """
    is_elsewhere = origin is not None and (host is None or origin.lower().partition(b"://")[2] != host.lower())
    if is_elsewhere or site not in (None, b"same-origin", b"none"):
        return RefusedError(HTTPStatus.FORBIDDEN, "pages of other sites may not send savings")
    return None


class _Asked(NamedTuple):
    """The name or address that a request asks for, and whether no other site can have it."""

    name: str
    leads_here_only: bool


@lru_cache(maxsize=256)
def _asked(host: bytes | None) -> _Asked | None:
    """What a Host header asks for, without the port; None if it is malformed."""
    if host is None or len(host) > _LONGEST_HOST:
        return None
    found = _HOST.fullmatch(host.decode("latin-1"))
    if found is None:
        return None
    name = found[1].lower().removesuffix(".")
    return _Asked(name, "." not in name or name.endswith(".localhost") or _is_address(name.strip("[]")))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
