"""``savings-exporter serve``."""

from __future__ import annotations

import os
import shlex
import signal
import tempfile
from contextlib import ExitStack
from typing import NoReturn

import click
from click.core import ParameterSource

from savings_exporter.cli.errors import INTERRUPTED, CommandError, WrongUsageError
from savings_exporter.cli.options import (
    NAMED_PATH,
    allow_insecure_option,
    allowed_hosts_option,
    listen_address_option,
    log_format_option,
    log_level_option,
    option,
    prices_option,
    store_option,
    sync_method_option,
    telemetry_path_option,
    web_config_file_option,
)
from savings_exporter.cli.output import announce, announcement
from savings_exporter.cli.sources import most_rtk_tokens_option
from savings_exporter.cli.standard_streams import print_error
from savings_exporter.prices import Prices, load_prices
from savings_exporter.service import logs, server
from savings_exporter.service.app import Service
from savings_exporter.service.demo import DemoTraffic
from savings_exporter.service.drill import taking_drills
from savings_exporter.service.log_metrics import LogCollector
from savings_exporter.service.paths import SAVINGS_PATH
from savings_exporter.service.webconfig import WebConfig
from savings_exporter.sources.discovery import usual_sources
from savings_exporter.sources.following import Following, FollowingCollector
from savings_exporter.sources.otlp import metric_maps
from savings_exporter.sources.otlp_import import OtlpImport
from savings_exporter.storage.segment import SyncMethod
from savings_exporter.telemetry.export import Export
from savings_exporter.telemetry.metrics import SavingsCollector
from savings_exporter.tracker import DOCUMENT_NAME, SavingsTracker


@click.command()
@store_option
@sync_method_option
@listen_address_option
@telemetry_path_option
@web_config_file_option
@allow_insecure_option
@allowed_hosts_option
@prices_option
@log_level_option
@log_format_option
@option(
    "--discover",
    "follows_sources",
    is_flag=True,
    variable="DISCOVER",
    help="Also follow the savings of other programs in their usual places.",
)
@most_rtk_tokens_option
@option(
    "--otlp.map",
    "otlp_map",
    metavar="FILE",
    type=NAMED_PATH,
    variable="OTLP_MAP",
    help="YAML with more OpenTelemetry metrics of token usage to take.",
)
@click.option("--demo", is_flag=True, help="Record made-up traffic; without --store, in a temporary store.")
@option(
    "--enable-drill",
    is_flag=True,
    variable="ENABLE_DRILL",
    help="Allow drill for this service: simulated failures, to test alerts.",
)
def serve(
    store: str | None,
    sync_method: SyncMethod,
    listen_address: tuple[str, int],
    telemetry_path: str,
    web_config_file: str | None,
    allow_insecure: bool,
    allowed_hosts: tuple[str, ...],
    prices: str | None,
    log_level: str,
    log_format: str,
    follows_sources: bool,
    most_rtk_tokens: int,
    otlp_map: str | None,
    demo: bool,
    enable_drill: bool,
) -> None:
    """Take savings over HTTP, and serve metrics and totals."""
    log = logs.configure(log_level, log_format)
    web_config = WebConfig(web_config_file, (*allowed_hosts, listen_address[0]))
    loaded, otlp_metrics = load_prices(prices), metric_maps(otlp_map)
    with ExitStack() as stack:
        listener = stack.enter_context(server.listen(*listen_address))
        web_config.check_address(listener, allows_insecure=allow_insecure)
        url = server.url_of(listener, tls=web_config.tls is not None)
        export = stack.enter_context(Export(server.instance_of(listener)))
        # Not in the state directory of a systemd unit either.
        is_default = click.get_current_context().get_parameter_source("store") is ParameterSource.DEFAULT
        if demo and is_default:
            store = os.path.join(stack.enter_context(tempfile.TemporaryDirectory()), DOCUMENT_NAME)
        elif demo and store is not None and os.path.isfile(store):
            # Checked before the tracker opens the store, because opening saves it.
            raise WrongUsageError(f"{store} exists already: --demo would add made-up savings to its totals.")
        tracker = SavingsTracker(store, tracer_provider=export.tracer_provider, sync_method=sync_method, prices=loaded)
        stack.callback(tracker.close)
        if enable_drill:
            stack.enter_context(taking_drills(tracker))
        if demo:
            stack.enter_context(DemoTraffic(tracker))
        following = stack.enter_context(_following(tracker, most_rtk_tokens)) if follows_sources else None
        service = Service(
            tracker,
            SavingsCollector(tracker),
            telemetry_path=telemetry_path,
            web_config=web_config,
            tracer_provider=export.tracer_provider,
            otlp=stack.enter_context(OtlpImport(tracker)),
            otlp_metrics=otlp_metrics,
            is_demo=demo,
        )
        service.registry.register(LogCollector(log))
        if following is not None:
            service.registry.register(FollowingCollector(following))
        what = "keeps made-up savings in" if demo else "keeps savings in"
        more = _prices_line(loaded), f"record one: {_first_saving(url, web_config)}", f"metrics: {url}{telemetry_path}"
        lines = announcement(what, tracker.storage_path, url, *more)
        export.push_metrics(service.registry.collect, tracker.snapshot)
        # Schedules a save of what a killed process left in its journal, so that a copy of the document holds it.
        tracker.snapshot()
        try:
            server.run(service, listener, web_config, started=lambda: announce(lines))
            if following is not None:
                following.stop()
            is_saved = tracker.close()
        except KeyboardInterrupt:
            _end_at_once(tracker)
        if not is_saved:
            raise CommandError(f"stopped, but {tracker.health().reason}")


def _following(tracker: SavingsTracker, most_rtk_tokens: int) -> Following:
    return Following(tracker, lambda: usual_sources(os.environ, most_rtk_tokens=most_rtk_tokens))


def _prices_line(prices: Prices | None) -> str:
    if prices is None:
        return "prices: none; pip install genai-prices, or give --prices FILE, to have US dollars calculated"
    return f"prices: {prices.basis.prices}"


def _first_saving(url: str, web_config: WebConfig) -> str:
    body = '{"model": "claude-sonnet-4-5", "provider": "anthropic", "input_tokens": 12000, "tokens_saved": 4096}'
    trust = f" --cacert {shlex.quote(web_config.tls.cert_file)}" if web_config.tls else ""
    if web_config.tls and web_config.tls.client_auth_type == "RequireAndVerifyClientCert":
        trust += " --cert client.crt --key client.key"
    token = web_config.authorization.for_writing if web_config.authorization else None
    show = ""
    if token is not None:
        show = f' -H "Authorization: Bearer $(cat {shlex.quote(token)})"'
    elif web_config.users:
        show = f" --user {shlex.quote(min(web_config.users))}"
    return f"curl{trust}{show} -H 'Content-Type: application/json' -d '{body}' {url}{SAVINGS_PATH}"


def _end_at_once(tracker: SavingsTracker) -> NoReturn:
    """End before the last save has ended: a second Ctrl-C does not wait for a disk that hangs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    health = tracker.health()
    lost = "nothing is lost, the next start saves what is in the journal"
    if health.pending_records:
        lost = (
            f"{health.pending_records} records ({health.pending_tokens} tokens saved) were not durable and may be lost"
        )
    line = f"savings-exporter: {tracker.storage_path}: interrupted before the last save had ended; {lost}"
    print_error(line)
    # Any other way to exit waits for that save again.
    os._exit(INTERRUPTED)
