"""``savings-exporter record``."""

from __future__ import annotations

from typing import Any

import click

from savings_exporter.cli import standard_streams
from savings_exporter.cli.errors import CommandError, WrongUsageError
from savings_exporter.cli.options import prices_option, store_option, sync_method_option
from savings_exporter.errors import KeyConflictError
from savings_exporter.model.record import SavingsRecord
from savings_exporter.prices import load_prices
from savings_exporter.service import logs
from savings_exporter.service.views import tokens
from savings_exporter.storage.segment import SyncMethod
from savings_exporter.telemetry.export import Export
from savings_exporter.tracker import SavingsTracker


@click.command()
@click.option("--model", metavar="NAME", required=True, help="The model, as its provider names it.")
@click.option("--tokens-saved", metavar="N", type=int, required=True, help="Input tokens that compression saved.")
@click.option("--input-tokens", metavar="N", type=int, default=0, help="Input tokens that were sent; 0: unknown.")
@click.option(
    "--tool-search-saved", metavar="N", type=int, default=0, help="Input tokens that deferred tool schemas saved."
)
@click.option("--output-tokens-saved", metavar="N", type=int, default=0, help="Output tokens that were saved.")
@click.option("--output-tokens", metavar="N", type=int, default=0, help="Output tokens that came back.")
@click.option("--provider", metavar="NAME", help="The provider of the model.")
@click.option("--agent", metavar="NAME", help="The program that made the request.")
@click.option("--project", metavar="NAME", help="The project of the request.")
@click.option("--source", metavar="NAME", help="The layer that saved, such as headroom or rtk.")
@click.option("--cache-read-tokens", metavar="N", type=int, default=0, help="Input tokens read from a prompt cache.")
@click.option("--cache-write-tokens", metavar="N", type=int, default=0, help="Input tokens written to a prompt cache.")
@click.option(
    "--uncached-input-tokens", metavar="N", type=int, default=0, help="Input tokens neither read nor written there."
)
@click.option("--timestamp", metavar="TIME", help="When, ISO 8601, such as 2026-01-31T23:59:00Z. Default: now.")
@click.option("--savings-usd", metavar="USD", type=float, help="US dollars saved; may be negative.")
@click.option("--cache-savings-usd", metavar="USD", type=float, help="US dollars that a prompt cache saved.")
@click.option("--input-cost-usd", metavar="USD", type=float, help="US dollars paid for input.")
@click.option(
    "--idempotency-key",
    metavar="KEY",
    help="A name for this saving: recorded again under the same name, it counts once.",
)
@store_option
@sync_method_option
@prices_option
def record(
    store: str | None, sync_method: SyncMethod, prices: str | None, idempotency_key: str | None, **fields: Any
) -> None:
    """Record one saving, also beside a running service."""
    logs.be_quiet()
    try:
        saving = SavingsRecord(**fields)
    except (TypeError, ValueError) as error:
        field, _, problem = str(error).partition(" ")
        raise WrongUsageError(f"--{field.replace('_', '-')} {problem}") from None
    # Loading the library takes a tenth of a second.
    loaded = load_prices(prices) if saving.savings_usd is None else None
    with Export() as export:
        with SavingsTracker(
            store, tracer_provider=export.tracer_provider, sync_method=sync_method, prices=loaded
        ) as tracker:
            try:
                receipt = tracker.record_many([saving], idempotency_key=idempotency_key)
            except ValueError as error:
                kind = CommandError if isinstance(error, KeyConflictError) else WrongUsageError
                raise kind(str(error).replace("idempotency_key", "--idempotency-key", 1)) from None
            reason = tracker.health().reason
        # Checked after closing, which tries once more: a caller that is told of a failure records the saving again.
        if not receipt.durable:
            raise CommandError(
                f"{reason or f'{tracker.storage_path}: could not be saved'}. The saving may be lost: fix this, and "
                "record it again; with the same --idempotency-key it counts once"
            )
        what = "counted before" if receipt.duplicate else "recorded"
        _report(f"{what}: {tokens(tracker.snapshot().lifetime.tokens_saved)} saved in total")


def _report(line: str) -> None:
    """Print the result. The saving is durable: a caller that is told of a failure would record it again."""
    try:
        print(line, flush=True)
    except OSError as error:
        standard_streams.print_error(f"savings-exporter: {line} (standard output: {error.strerror})")
        standard_streams.discard()
