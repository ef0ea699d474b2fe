"""The command line: thin, one line of error a mistake, exit status 0, 1 (it failed) or 2 (wrong usage)."""

from __future__ import annotations

import csv
import io
import os
import signal
import sys
import tempfile
from contextlib import ExitStack
from datetime import datetime
from importlib.metadata import version
from typing import Annotated, Any, Literal, NoReturn

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from savings_exporter import doctor as disk_doctor
from savings_exporter.errors import StoreError
from savings_exporter.model.record import SavingsRecord
from savings_exporter.model.snapshot import Snapshot
from savings_exporter.service import server, settings, views
from savings_exporter.service.app import Service
from savings_exporter.service.demo import DemoTraffic
from savings_exporter.service.drill import KINDS, LONGEST_SECONDS, DrillError, taking_drills
from savings_exporter.service.drill import ask as ask_for_drill
from savings_exporter.service.paths import HEALTHY_PATH, READY_PATH, SAVINGS_PATH
from savings_exporter.storage.observers import Observers
from savings_exporter.storage.repair import inspect, is_begun, repair
from savings_exporter.telemetry.metrics import SavingsCollector, WatchCollector
from savings_exporter.tracker import DOCUMENT_NAME, SavingsTracker, default_path
from savings_exporter.watched import WatchedFile

_BAR_WIDTH = 16

# What a shell gives for a command that Ctrl-C ended.
_INTERRUPTED = 128 + signal.SIGINT

app = typer.Typer(
    name="savings-exporter",
    help="Keeps the LLM tokens you saved, durably, and shows every step of it.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class CommandError(Exception):
    """What was asked for failed; the message is the line to print."""

    status = 1


class WrongUsageError(CommandError):
    """What was asked for makes no sense."""

    status = 2


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"savings-exporter {version('savings-exporter')}")
        raise typer.Exit


def _address(text: str) -> str:
    try:
        settings.listen_address(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return text


def _metrics_path(text: str) -> str:
    if not text.startswith("/") or "{" in text or text in ("/", SAVINGS_PATH, HEALTHY_PATH, READY_PATH):
        raise typer.BadParameter(f"{text!r} must begin with / and be no other page's path")
    return text


def _expanded(path: str | None) -> str | None:
    if path == "":
        raise WrongUsageError("an empty PATH; name the document, or leave it out for the default one")
    return os.path.expanduser(path) if path is not None else None


Store = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="PATH",
        envvar="SAVINGS_EXPORTER_STORE",
        callback=_expanded,
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


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def serve(
    store: Store = None,
    sync_method: SyncMethodOption = "auto",
    listen_address: ListenAddress = "127.0.0.1:9478",
    telemetry_path: TelemetryPath = "/metrics",
    web_config_file: WebConfigFile = None,
    log_level: LogLevel = "info",
    log_format: LogFormat = "logfmt",
    demo: Annotated[
        bool, typer.Option("--demo", help="Record made-up traffic; without --store, in a temporary store.")
    ] = False,
    enable_drill: Annotated[
        bool,
        typer.Option(
            "--enable-drill",
            envvar="SAVINGS_EXPORTER_ENABLE_DRILL",
            help="Take fire drills from this user on this host.",
        ),
    ] = False,
) -> None:
    """Keep the savings that proxies POST, and show them to Prometheus."""
    settings.configure_logging(log_level, log_format)
    config = settings.web_config(web_config_file)
    token = config.token()
    with ExitStack() as stack:
        listener = stack.enter_context(server.listen(*settings.listen_address(listen_address)))
        url = server.url_of(listener, tls=config.tls_server_config is not None)
        provider = settings.tracer_provider()
        if provider is not None:
            stack.callback(settings.flush_spans, provider)
        if demo and store is None:
            store = os.path.join(stack.enter_context(tempfile.TemporaryDirectory()), DOCUMENT_NAME)
        elif demo and store is not None and os.path.isfile(store):
            # Asked before the tracker opens it, because opening saves it.
            raise WrongUsageError(f"{store} exists already: --demo would add made-up savings to its totals.")
        tracker = SavingsTracker(store, tracer_provider=provider, sync_method=sync_method)
        stack.callback(tracker.close)
        if enable_drill:
            stack.enter_context(taking_drills(tracker))
        if demo:
            stack.enter_context(DemoTraffic(tracker))
        service = Service(tracker, SavingsCollector(tracker), telemetry_path=telemetry_path, token=token)
        what = "keeps made-up savings in" if demo else "keeps savings in"
        line = _announcement(what, tracker.storage_path, url, _first_saving(url, config))
        try:
            server.run(service, listener, config.tls_server_config, started=lambda: print(line, flush=True))
            is_saved = tracker.close()
        except KeyboardInterrupt:
            _end_at_once(tracker)
        if not is_saved:
            raise CommandError(f"stopped, but {tracker.health().reason}")


@app.command()
def watch(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A proxy_savings.json that another program writes.")],
    listen_address: ListenAddress = "127.0.0.1:9478",
    telemetry_path: TelemetryPath = "/metrics",
    web_config_file: WebConfigFile = None,
    log_level: LogLevel = "info",
    log_format: LogFormat = "logfmt",
) -> None:
    """Show the totals of a file that another program owns, Headroom's included. Never writes to it."""
    settings.configure_logging(log_level, log_format)
    config = settings.web_config(web_config_file)
    token = config.token()
    watched = WatchedFile(path)
    with server.listen(*settings.listen_address(listen_address)) as listener:
        service = Service(watched, WatchCollector(watched), telemetry_path=telemetry_path, token=token)
        url = server.url_of(listener, tls=config.tls_server_config is not None)
        line = _announcement("watches", watched.storage_path, url, f"metrics: {url}{telemetry_path}")
        server.run(service, listener, config.tls_server_config, started=lambda: print(line, flush=True))


@app.command()
def record(
    model: Annotated[str, typer.Option(help="The model that was asked.")],
    tokens_saved: Annotated[int, typer.Option(help="Input tokens that compression saved.")],
    input_tokens: Annotated[int, typer.Option(help="Input tokens that were sent.")] = 0,
    tool_search_saved: Annotated[int, typer.Option(help="Input tokens that deferred tool schemas saved.")] = 0,
    output_tokens_saved: Annotated[int, typer.Option(help="Output tokens that were saved.")] = 0,
    output_tokens: Annotated[int, typer.Option(help="Output tokens that came back.")] = 0,
    provider: Annotated[str | None, typer.Option(help="Who runs the model.")] = None,
    agent: Annotated[str | None, typer.Option(help="The agent that asked.")] = None,
    project: Annotated[str | None, typer.Option(help="The project it asked for.")] = None,
    cache_read_tokens: Annotated[int, typer.Option(help="Input tokens read from a prompt cache.")] = 0,
    cache_write_tokens: Annotated[int, typer.Option(help="Input tokens written to a prompt cache.")] = 0,
    uncached_input_tokens: Annotated[int, typer.Option(help="Input tokens neither read nor written there.")] = 0,
    timestamp: Annotated[str | None, typer.Option(help="When, ISO 8601. Default: now.")] = None,
    savings_usd: Annotated[float | None, typer.Option(help="US dollars saved; may be negative.")] = None,
    input_cost_usd: Annotated[float | None, typer.Option(help="US dollars paid for input.")] = None,
    store: Store = None,
    sync_method: SyncMethodOption = "auto",
) -> None:
    """Record one saving in a store, also while a service keeps it."""
    arguments: dict[str, Any] = {**locals()}
    del arguments["store"], arguments["sync_method"]
    settings.be_quiet()
    try:
        saving = SavingsRecord(**arguments)
    except (TypeError, ValueError) as error:
        raise WrongUsageError(str(error)) from None
    provider_of_spans = settings.tracer_provider()
    try:
        with SavingsTracker(store, tracer_provider=provider_of_spans, sync_method=sync_method) as tracker:
            receipt = tracker.record_many([saving])
            reason = tracker.health().reason
        # Closing tries once more, and whoever is told of a failure records the saving again.
        if not receipt.durable:
            raise CommandError(reason or f"{tracker.storage_path}: could not be saved")
        print(f"record {receipt.sequence}: {tracker.snapshot().lifetime.tokens_saved} tokens saved so far", flush=True)
    finally:
        if provider_of_spans is not None:
            settings.flush_spans(provider_of_spans)


@app.command()
def show(
    store: Store = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="As CSV.")] = False,
) -> None:
    """Print a store's totals. Only reads; also reads a document that Headroom wrote."""
    settings.be_quiet()
    if as_json and as_csv:
        raise WrongUsageError("give --json or --csv, not both")
    path = store if store is not None else default_path()
    if not is_begun(path):
        given = f" --store {store}" if store is not None else ""
        raise CommandError(
            f"{path}: there are no savings yet; record the first with: savings-exporter record --model NAME "
            f"--tokens-saved N{given}"
        )
    watched = WatchedFile(path)
    snapshot = watched.snapshot()
    if as_json:
        content = views.as_json(snapshot, watched.health(), watched.storage_path)
        _print_json(content)
    elif as_csv:
        rows = list(views.as_rows(snapshot))
        writer = csv.DictWriter(sys.stdout, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        _print_tables(snapshot, watched.storage_path)


@app.command()
def verify(
    store: Store = None,
    mend: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Save what is whole, keep damaged files aside, and report what is lost. Exits with 0 when the store "
            "can be opened again, with 1 when it left out records that another program's document holds.",
        ),
    ] = False,
) -> None:
    """Report what a store holds and what is wrong with it; exit 1 when something has to be done."""
    settings.be_quiet()
    path = store if store is not None else default_path()
    if mend:
        repaired = repair(path, Observers())
        if repaired.leaves_out:
            raise CommandError(repaired.text)
        print(repaired.text)
        return
    found = inspect(path)
    if found.ledger is not None:
        lifetime = found.ledger.lifetime
        print(f"{path}: {lifetime.tokens_saved} tokens saved in {lifetime.requests} records{_saved(found.saved_at)}")
    for note in found.notes:
        print(note)
    if found.problems:
        raise CommandError("; ".join(found.problems))


@app.command()
def drill(
    name: Annotated[
        Literal["dir-fsync", "file-fsync", "journal-fsync", "save-latency"],
        typer.Argument(metavar="|".join(KINDS), help="What is simulated to fail, or with save-latency to be slow."),
    ],
    seconds: Annotated[
        float | None,
        typer.Option(
            "--seconds",
            min=1,
            max=LONGEST_SECONDS,
            help="For how long: longer than Prometheus's scrape interval. Default: until somebody should be called.",
        ),
    ] = None,
    store: Store = None,
) -> None:
    """Have the running service behave as if a step failed, to test your paging. Its store is not touched."""
    settings.be_quiet()
    kind, path = KINDS[name], store if store is not None else default_path()
    lasts = kind.usual_seconds if seconds is None else seconds
    ask_for_drill(path, name, lasts)
    print(f"{path}: drill {name} has begun and lasts {lasts:g} s; {kind.alert} should fire")


@app.command()
def doctor(
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="PATH",
            envvar="SAVINGS_EXPORTER_STORE",
            callback=_expanded,
            help="A directory, or a document in one. Default: the default store's directory.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Measure what a saving costs on a disk, for some seconds; say what is wrong with that disk for a store."""
    settings.be_quiet()
    directory = disk_doctor.directory_of(path)
    # Raised where the command is, so that what it made is removed on its way out.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    with Console(stderr=True).status(f"measuring {escape(directory)}"):
        report = disk_doctor.examine(directory)
    if as_json:
        _print_json(report)
    else:
        _print_report(report)


def main() -> NoReturn:
    """Run the command line and exit with its status."""
    if sys.stdout is None:  # Python's word for one that was closed before the start
        _exit(1, "standard output is closed; redirect it to /dev/null if it is not needed")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names and paths may hold what the output's encoding does not.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = app(standalone_mode=False, prog_name="savings-exporter")
        sys.stdout.flush()
    except CommandError as error:
        _exit(error.status, str(error))
    except (StoreError, settings.SettingsError, DrillError) as error:
        _exit(1, str(error))
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(_INTERRUPTED)
    except typer.TyperException as error:
        _exit(error.exit_code, f"{' '.join(error.format_message().split())} (--help says more)")
    except BrokenPipeError:
        # Whoever read our output has seen enough. Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _exit(1, f"{error.filename or ''}: {error.strerror or error}".lstrip(": "))
    sys.exit(status if isinstance(status, int) else 0)


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
    print(line, file=sys.stderr, flush=True)
    # Leaving in any other way waits for that save again.
    os._exit(_INTERRUPTED)


def _exit(status: int, line: str) -> NoReturn:
    print(f"savings-exporter: {line}", file=sys.stderr)
    sys.exit(status)


def _print_json(content: Any) -> None:
    # JSON is UTF-8 (RFC 8259), whatever the output's encoding is.
    sys.stdout.flush()
    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(content)) + b"\n")


def _announcement(what: str, path: str, url: str, more: str) -> str:
    return f"savings-exporter {version('savings-exporter')} {what} {path}, on {url}; {more}"


def _first_saving(url: str, config: settings.WebConfig) -> str:
    body = '{"model": "claude-sonnet-4-5", "input_tokens": 12000, "tokens_saved": 4096}'
    trust = f" --cacert {config.tls_server_config.cert_file}" if config.tls_server_config else ""
    show = " -H 'Authorization: Bearer TOKEN'" if config.authorization else ""
    return f"record one: curl{trust}{show} -H 'Content-Type: application/json' -d '{body}' {url}{SAVINGS_PATH}"


def _saved(moment: datetime | None) -> str:
    return f", saved {moment:%Y-%m-%d %H:%M:%S} UTC" if moment else ""


def _console() -> Console:
    # Not a terminal: wide enough for names, whatever the file or pipe is for.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def _table(first: str, *headings: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, overflow="fold", min_width=16)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _print_tables(snapshot: Snapshot, path: str) -> None:
    console = _console()
    lifetime = snapshot.lifetime
    console.print(
        Text(
            f"{lifetime.tokens_saved:,} tokens saved in {lifetime.requests:,} requests, "
            f"{lifetime.tool_tokens_saved:,} more by deferred tool schemas: {lifetime.savings_percent} % of the input, "
            f"{lifetime.compression_savings_usd:,.2f} US dollars"
        )
    )
    for kind, rows in views.breakdowns(snapshot):
        if not rows:
            continue
        largest = rows[0][1].tokens_saved
        table = _table(kind, "tokens saved", "tool tokens", "of input", "requests", "US dollars")
        table.add_column("", no_wrap=True, width=_BAR_WIDTH)
        for name, totals in rows:
            bar = views.bar(totals.tokens_saved, largest, _BAR_WIDTH)
            table.add_row(
                Text(name),
                f"{totals.tokens_saved:,}",
                f"{totals.tool_tokens_saved:,}",
                f"{totals.savings_percent} %",
                f"{totals.requests:,}",
                f"{totals.compression_savings_usd:,.2f}",
                Text("#" * len(bar) if console.options.ascii_only else bar, style="green"),
            )
        console.print()
        console.print(table)
    console.print()
    console.print(Text(f"{path}{_saved(snapshot.saved_at)}", style="dim"), soft_wrap=True)


def _print_report(report: disk_doctor.Report) -> None:
    console = _console()
    found = report.filesystem
    where = f", mounted on {found.mount_point} from {found.device}" if found.mount_point else ""
    network = ", a network filesystem" if found.is_network else ""
    console.print(Text(f"{report.directory}: {found.type}{network}{where}"), soft_wrap=True)
    steps = _table("step", "median", "worst", "runs")
    for name, timing in report.steps.items():
        if timing is None:
            steps.add_row(name, "not supported")
        else:
            median, worst = disk_doctor.readable(timing.median_seconds), disk_doctor.readable(timing.worst_seconds)
            steps.add_row(name, median, worst, f"{timing.runs:,}")
    commits = _table("threads", "savings a second")
    for threads, rate in report.commits_per_second.items():
        commits.add_row(str(threads), f"{rate:,.0f}")
    for table in (steps, commits):
        console.print()
        console.print(table)
    console.print()
    console.print(Text(report.verdict))
    for warning in report.warnings:
        console.print(Text(f"Warning: {warning}", style="yellow"))
