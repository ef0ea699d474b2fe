"""``savings-exporter watch``."""

from __future__ import annotations

import click

from savings_exporter.cli.errors import CommandError
from savings_exporter.cli.options import (
    expanded,
    listen_address_option,
    log_format_option,
    log_level_option,
    telemetry_path_option,
    web_config_file_option,
)
from savings_exporter.cli.output import announce, announcement
from savings_exporter.errors import StoreError
from savings_exporter.service import server, settings
from savings_exporter.service.app import Service
from savings_exporter.telemetry.metrics import WatchCollector
from savings_exporter.watched import OWNER_HAS_TO_FIX_IT, WatchedFile


@click.command()
@click.argument("path", metavar="PATH", callback=expanded)
@listen_address_option
@telemetry_path_option
@web_config_file_option
@log_level_option
@log_format_option
def watch(
    path: str,
    listen_address: str,
    telemetry_path: str,
    web_config_file: str | None,
    log_level: str,
    log_format: str,
) -> None:
    """Serve the totals of another program's file.

    PATH is a proxy_savings.json, for example Headroom's. It is only read.
    """
    settings.configure_logging(log_level, log_format)
    config = settings.web_config(web_config_file)
    token = config.token()
    try:
        watched = WatchedFile(path)
    except StoreError as error:
        raise CommandError(f"{error.problem}. Check the path. {OWNER_HAS_TO_FIX_IT}") from None
    with server.listen(*settings.listen_address(listen_address)) as listener:
        service = Service(watched, WatchCollector(watched), telemetry_path=telemetry_path, token=token)
        url = server.url_of(listener, tls=config.tls_server_config is not None)
        lines = announcement("watches", watched.storage_path, url, f"metrics: {url}{telemetry_path}")
        server.run(service, listener, config.tls_server_config, started=lambda: announce(lines))
