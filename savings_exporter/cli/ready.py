"""``savings-exporter ready``."""

from __future__ import annotations

import http.client
import socket
import ssl
from contextlib import closing, suppress
from http import HTTPStatus
from typing import Any

import click

from savings_exporter import configfile
from savings_exporter.cli.errors import CommandError
from savings_exporter.cli.options import listen_address_option, web_config_file_option
from savings_exporter.service.paths import READY_PATH

_PATIENCE_SECONDS = 4
# The first byte of what a server sends that takes up a handshake.
_TLS_HANDSHAKE = b"\x16"
_ANY_ADDRESS = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


@click.command()
@listen_address_option
@web_config_file_option
def ready(listen_address: tuple[str, int], web_config_file: str | None) -> None:
    """Check whether a service on this host takes requests.

    It is for health checks of containers. The exit status is 0 if the service takes requests. If the service asks for
    certificates of clients, the check ends within the TLS handshake.
    """
    host, port = listen_address
    host = _ANY_ADDRESS.get(host, host)
    tls = _tls(web_config_file) if web_config_file is not None else None
    try:
        if tls is not None and str(tls.get("client_auth_type", "")).startswith("Require"):
            _shake_hands(host, port)
            return
        status = _asked(host, port, has_tls=tls is not None)
    except (OSError, http.client.HTTPException) as error:
        raise CommandError(f"{host}:{port}: no service answers: {getattr(error, 'strerror', None) or error}") from None
    if status != HTTPStatus.OK:
        raise CommandError(f"{host}:{port}: the service answers {status} at {READY_PATH}")


def _tls(web_config_file: str) -> dict[str, Any] | None:
    content = configfile.read_yaml(web_config_file)
    tls = content.get("tls_server_config") if isinstance(content, dict) else None
    return tls if isinstance(tls, dict) else None


def _context() -> ssl.SSLContext:
    # The service of this host is asked, whatever name its certificate has.
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _asked(host: str, port: int, *, has_tls: bool) -> int:
    connection = (
        http.client.HTTPSConnection(host, port, timeout=_PATIENCE_SECONDS, context=_context())
        if has_tls
        else http.client.HTTPConnection(host, port, timeout=_PATIENCE_SECONDS)
    )
    with closing(connection):
        connection.request("GET", READY_PATH)
        return connection.getresponse().status


def _shake_hands(host: str, port: int) -> None:
    """Begin a handshake, and end it when the service has answered: it would refuse one without a certificate, and log
    that.
    """
    answers, asks = ssl.MemoryBIO(), ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        _context().wrap_bio(answers, asks, server_hostname=host).do_handshake()
    with socket.create_connection((host, port), _PATIENCE_SECONDS) as connection:
        connection.sendall(asks.read())
        if connection.recv(1) != _TLS_HANDSHAKE:
            raise ConnectionError("not in TLS")
