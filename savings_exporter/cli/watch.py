"""``savings-exporter watch``."""

from __future__ import annotations

from typing import Annotated

import typer

from savings_exporter.cli.errors import CommandError
from savings_exporter.cli.options import ListenAddress, LogFormat, LogLevel, TelemetryPath, WebConfigFile
from savings_exporter.cli.output import announcement
from savings_exporter.errors import StoreError
from savings_exporter.service import server, settings
from savings_exporter.service.app import Service
from savings_exporter.telemetry.metrics import WatchCollector
from savings_exporter.watched import OWNER_HAS_TO_FIX_IT, WatchedFile


def watch(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A proxy_savings.json that another program writes.")],
    listen_address: ListenAddress = "127.0.0.1:9478",
    telemetry_path: TelemetryPath = "/metrics",
    web_config_file: WebConfigFile = None,
    log_level: LogLevel = "info",
    log_format: LogFormat = "logfmt",
) -> None:
    """Serve the totals of another program's file. Only reads it."""
    settings.configure_logging(log_level, log_format)
    config = settings.web_config(web_config_file)
    token = config.token()
    try:
        watched = WatchedFile(path)
    except StoreError as error:
        raise CommandError(f"{error.problem}. {OWNER_HAS_TO_FIX_IT}") from None
    with server.listen(*settings.listen_address(listen_address)) as listener:
        service = Service(watched, WatchCollector(watched), telemetry_path=telemetry_path, token=token)
        url = server.url_of(listener, tls=config.tls_server_config is not None)
        line = announcement("watches", watched.storage_path, url, f"metrics: {url}{telemetry_path}")
        server.run(service, listener, config.tls_server_config, started=lambda: print(line, flush=True))
