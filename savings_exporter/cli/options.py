"""Options and arguments that several commands share."""

from __future__ import annotations

import os
from typing import Annotated, Literal

import typer

from savings_exporter.cli.errors import WrongUsageError
from savings_exporter.service import settings
from savings_exporter.service.paths import HEALTHY_PATH, READY_PATH, SAVINGS_PATH


def expanded(path: str | None) -> str | None:
    """A path whose ``~`` is expanded.

    Raises:
        WrongUsageError: it is empty.
    """
    if path == "":
        raise WrongUsageError("an empty PATH; name the document, or leave it out for the default one")
    return os.path.expanduser(path) if path is not None else None


def _address(text: str) -> str:
    try:
        settings.listen_address(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return text


def _metrics_path(text: str) -> str:
    if not text.startswith("/") or "{" in text or text in ("/", SAVINGS_PATH, HEALTHY_PATH, READY_PATH):
        raise typer.BadParameter(f"{text!r} must begin with / and must not be the path of another page")
    return text


Store = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="PATH",
        envvar="SAVINGS_EXPORTER_STORE",
        callback=expanded,
        help="The document. Default: in the user's state directory.",
    ),
]
ListenAddress = Annotated[
    str,
    typer.Option(
        "--web.listen-address",
        metavar="HOST:PORT",
        envvar="SAVINGS_EXPORTER_WEB_LISTEN_ADDRESS",
        callback=_address,
        help="Where to listen; port 0 takes a free one.",
    ),
]
TelemetryPath = Annotated[
    str,
    typer.Option(
        "--web.telemetry-path",
        metavar="PATH",
        envvar="SAVINGS_EXPORTER_WEB_TELEMETRY_PATH",
        callback=_metrics_path,
        help="Where the metrics are.",
    ),
]
WebConfigFile = Annotated[
    str | None,
    typer.Option(
        "--web.config.file",
        metavar="PATH",
        envvar="SAVINGS_EXPORTER_WEB_CONFIG_FILE",
        help="YAML with tls_server_config (cert_file, key_file) and authorization (credentials_file).",
    ),
]
SyncMethodOption = Annotated[
    Literal["auto", "direct", "fdatasync"],
    typer.Option(
        "--store.sync-method",
        envvar="SAVINGS_EXPORTER_SYNC_METHOD",
        help="How the journal is written; doctor measures both.",
    ),
]
LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"],
    typer.Option("--log.level", envvar="SAVINGS_EXPORTER_LOG_LEVEL", help="What to log to standard error."),
]
LogFormat = Annotated[
    Literal["logfmt", "json"],
    typer.Option("--log.format", envvar="SAVINGS_EXPORTER_LOG_FORMAT", help="How to log it."),
]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]
