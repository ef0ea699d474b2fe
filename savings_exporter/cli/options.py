"""Options that several commands share."""

from __future__ import annotations

import os

import click

from savings_exporter.cli.errors import WrongUsageError
from savings_exporter.service import settings
from savings_exporter.service.paths import DOCUMENTS_PATH, HEALTHY_PATH, READY_PATH, SAVINGS_PATH

_OTHER_PATHS = ("/", SAVINGS_PATH, HEALTHY_PATH, READY_PATH)


def expanded(_context: click.Context, _option: click.Parameter, path: str | None) -> str | None:
    """A path whose ``~`` is expanded.

    Raises:
        WrongUsageError: it is empty.
    """
    if path == "":
        raise WrongUsageError("an empty PATH; name the document, or leave it out for the default one")
    return os.path.expanduser(path) if path is not None else None


def _address(_context: click.Context, _option: click.Parameter, text: str) -> str:
    try:
        settings.listen_address(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    return text


def _metrics_path(_context: click.Context, _option: click.Parameter, text: str) -> str:
    if not text.startswith("/") or "{" in text or text in _OTHER_PATHS or text.startswith(DOCUMENTS_PATH):
        raise click.BadParameter(f"{text!r} must begin with / and must not be the path of another page")
    return text


store_option = click.option(
    "--store",
    metavar="PATH",
    envvar="SAVINGS_EXPORTER_STORE",
    show_envvar=True,
    callback=expanded,
    help="The document. Default: in the user's state directory.",
)
listen_address_option = click.option(
    "--web.listen-address",
    "listen_address",
    metavar="HOST:PORT",
    default="127.0.0.1:9478",
    envvar="SAVINGS_EXPORTER_WEB_LISTEN_ADDRESS",
    show_envvar=True,
    callback=_address,
    help="Where to listen; port 0 takes a free one.",
)
telemetry_path_option = click.option(
    "--web.telemetry-path",
    "telemetry_path",
    metavar="PATH",
    default="/metrics",
    envvar="SAVINGS_EXPORTER_WEB_TELEMETRY_PATH",
    show_envvar=True,
    callback=_metrics_path,
    help="Where the metrics are.",
)
web_config_file_option = click.option(
    "--web.config.file",
    "web_config_file",
    metavar="PATH",
    envvar="SAVINGS_EXPORTER_WEB_CONFIG_FILE",
    show_envvar=True,
    help="YAML with tls_server_config (cert_file, key_file) and authorization (credentials_file).",
)
sync_method_option = click.option(
    "--store.sync-method",
    "sync_method",
    type=click.Choice(["auto", "direct", "fdatasync"]),
    default="auto",
    envvar="SAVINGS_EXPORTER_SYNC_METHOD",
    show_envvar=True,
    help="How the journal is written; doctor measures both.",
)
log_level_option = click.option(
    "--log.level",
    "log_level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    envvar="SAVINGS_EXPORTER_LOG_LEVEL",
    show_envvar=True,
    help="What to log to standard error.",
)
log_format_option = click.option(
    "--log.format",
    "log_format",
    type=click.Choice(["logfmt", "json"]),
    default="logfmt",
    envvar="SAVINGS_EXPORTER_LOG_FORMAT",
    show_envvar=True,
    help="How to log it.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="As JSON.")
