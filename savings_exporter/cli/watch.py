"""``savings-exporter watch``."""

from __future__ import annotations

import click

from savings_exporter.cli.errors import CommandError
from savings_exporter.cli.options import (
    allow_insecure_option,
    allowed_hosts_option,
    expanded,
    listen_address_option,
    log_format_option,
    log_level_option,
    telemetry_path_option,
    web_config_file_option,
)
from savings_exporter.cli.output import announce, announcement
from savings_exporter.errors import StoreError
from savings_exporter.service import logs, server
from savings_exporter.service.app import Service
from savings_exporter.service.log_metrics import LogCollector
from savings_exporter.service.webconfig import WebConfig
from savings_exporter.telemetry.export import Export
from savings_exporter.telemetry.metrics import WatchCollector
from savings_exporter.watched import OWNER_HAS_TO_FIX_IT, WatchedFile


@click.command()
@click.argument("path", metavar="PATH", type=click.Path(), callback=expanded)
@listen_address_option
@telemetry_path_option
@web_config_file_option
@allow_insecure_option
@allowed_hosts_option
@log_level_option
@log_format_option
def watch(
    path: str,
    listen_address: tuple[str, int],
    telemetry_path: str,
    web_config_file: str | None,
    allow_insecure: bool,
    allowed_hosts: tuple[str, ...],
    log_level: str,
    log_format: str,
) -> None:
    """Serve the totals of another program's file.

    PATH is a proxy_savings.json, for example Headroom's. It is only read.
    """
    log = logs.configure(log_level, log_format)
    web_config = WebConfig(web_config_file, (*allowed_hosts, listen_address[0]))
    try:
        watched = WatchedFile(path)
    except StoreError as error:
        raise CommandError(f"{error.problem}. Check the path. {OWNER_HAS_TO_FIX_IT}") from None
    with server.listen(*listen_address) as listener, Export(server.instance_of(listener)) as export:
        web_config.check_address(listener, allows_insecure=allow_insecure)
        service = Service(
            watched,
            WatchCollector(watched),
            telemetry_path=telemetry_path,
            web_config=web_config,
            tracer_provider=export.tracer_provider,
        )
        service.registry.register(LogCollector(log))
        url = server.url_of(listener, tls=web_config.tls is not None)
        lines = announcement("watches", watched.storage_path, url, f"metrics: {url}{telemetry_path}")
        export.push_metrics(service.registry.collect, watched.snapshot)
        server.run(service, listener, web_config, started=lambda: announce(lines))
