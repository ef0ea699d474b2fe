"""Options that several commands share."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from savings_exporter.cli.errors import WrongUsageError
from savings_exporter.service.paths import (
    DOCUMENTS_PATH,
    HEALTHY_PATH,
    HISTORY_PATH,
    ICON_PATH,
    OPENAPI_PATH,
    OTLP_PATH,
    READY_PATH,
    SAVINGS_PATH,
)
from savings_exporter.tracker import DOCUMENT_NAME

_Command = TypeVar("_Command", bound=Callable[..., Any])
_LAST_PORT = 65535
_HOST_NAME = re.compile(r"[\w.-]+", re.ASCII)
_OTHER_PATHS = ("/", SAVINGS_PATH, HISTORY_PATH, OTLP_PATH, HEALTHY_PATH, READY_PATH, OPENAPI_PATH, ICON_PATH)


class _NamedPath(click.Path):
    """A path that is not empty: a variable of a shell that is not set must not name the working directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the path is empty; name one", param, ctx)
        return super().convert(value, param, ctx)


NAMED_PATH = _NamedPath()


def expanded(_context: click.Context, option: click.Parameter, path: str | None) -> str | None:
    """A path whose ``~`` is expanded.

    Raises:
        WrongUsageError: it is empty.
    """
    if path == "":
        raise WrongUsageError(
            f"an empty PATH; name the document{', or leave it out for the default one' if not option.required else ''}"
        )
    return os.path.expanduser(path) if path is not None else None


def store_path(context: click.Context, option: click.Parameter, path: str | None) -> str | None:
    """The path that was given, or that in the state directory of a systemd unit; None for the user's default."""
    # A command of a command has None: the store of the outer one is its object.
    if path is None and context.obj is None and (directory := os.environ.get("STATE_DIRECTORY", "").partition(":")[0]):
        return os.path.join(directory, DOCUMENT_NAME)
    return expanded(context, option, path)


def _address(_context: click.Context, _option: click.Parameter, text: str) -> tuple[str, int]:
    """``HOST:PORT``, ``[IPV6]:PORT`` or ``:PORT`` (all addresses) as a host and a port."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    if not colon or not port.isascii() or not port.isdigit() or int(port) > _LAST_PORT:
        raise click.BadParameter(f"{text!r} is not HOST:PORT with a port up to {_LAST_PORT}")
    return host, int(port)


def _host_names(_context: click.Context, _option: click.Parameter, names: tuple[str, ...]) -> tuple[str, ...]:
    """Names, as they are in ``Host``; a URL would never be one."""
    for name in names:
        if not _HOST_NAME.fullmatch(name):
            raise click.BadParameter(f"{name!r} is not a name such as savings.example.org, without https:// and port")
    return names


def _metrics_path(_context: click.Context, _option: click.Parameter, text: str) -> str:
    if not text.startswith("/") or "{" in text or text in _OTHER_PATHS or text.startswith(DOCUMENTS_PATH):
        raise click.BadParameter(f"{text!r} must begin with / and must not be the path of another page")
    return text


def option(*names: str, variable: str, **attributes: Any) -> Callable[[_Command], _Command]:
    """An option that an environment variable sets as well. The help names the variable."""
    return click.option(*names, envvar=f"SAVINGS_EXPORTER_{variable}", show_envvar=True, **attributes)


store_option = option(
    "--store",
    metavar="PATH",
    type=click.Path(),
    variable="STORE",
    callback=store_path,
    help="The document. Default: in $STATE_DIRECTORY (systemd), or in the user's state directory.",
)
listen_address_option = option(
    "--web.listen-address",
    "listen_address",
    metavar="HOST:PORT",
    default="127.0.0.1:9478",
    variable="WEB_LISTEN_ADDRESS",
    callback=_address,
    help="The address of the service. With port 0, serve and watch take a free one.",
)
telemetry_path_option = option(
    "--web.telemetry-path",
    "telemetry_path",
    metavar="PATH",
    default="/metrics",
    variable="WEB_TELEMETRY_PATH",
    callback=_metrics_path,
    help="Where the metrics are.",
)
web_config_file_option = option(
    "--web.config.file",
    "web_config_file",
    metavar="PATH",
    type=NAMED_PATH,
    variable="WEB_CONFIG_FILE",
    help="YAML with TLS, tokens, users and headers, in the terms of Prometheus's exporters.",
)
allow_insecure_option = option(
    "--web.allow-insecure",
    "allow_insecure",
    is_flag=True,
    variable="WEB_ALLOW_INSECURE",
    help="Allow other hosts to use the service without a token and TLS.",
)
allowed_hosts_option = option(
    "--web.allowed-host",
    "allowed_hosts",
    metavar="NAME",
    multiple=True,
    variable="WEB_ALLOWED_HOST",
    callback=_host_names,
    help="A name of the service, for browsers and proxies; can be repeated.",
)
sync_method_option = option(
    "--store.sync-method",
    "sync_method",
    type=click.Choice(["auto", "direct", "fdatasync"]),
    default="auto",
    variable="SYNC_METHOD",
    help="How the journal is written; doctor measures both.",
)
prices_option = option(
    "--prices",
    metavar="FILE",
    type=NAMED_PATH,
    variable="PRICES",
    help="YAML with your own prices, for requests without --savings-usd or savings_usd.",
)
log_level_option = option(
    "--log.level",
    "log_level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    variable="LOG_LEVEL",
    help="What to log to standard error.",
)
log_format_option = option(
    "--log.format",
    "log_format",
    type=click.Choice(["logfmt", "json"]),
    default="logfmt",
    variable="LOG_FORMAT",
    help="How to log it.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="As JSON.")
