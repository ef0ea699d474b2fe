"""``savings-exporter record``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from savings_exporter.cli.errors import CommandError, WrongUsageError
from savings_exporter.cli.options import Store, SyncMethodOption
from savings_exporter.errors import KeyConflictError
from savings_exporter.model.record import SavingsRecord
from savings_exporter.service import settings
from savings_exporter.tracker import SavingsTracker


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
    idempotency_key: Annotated[
        str | None, typer.Option(help="A name for this saving: recorded again under the same name, it counts once.")
    ] = None,
    store: Store = None,
    sync_method: SyncMethodOption = "auto",
) -> None:
    """Record one saving, also beside a running service."""
    arguments: dict[str, Any] = {**locals()}
    del arguments["store"], arguments["sync_method"], arguments["idempotency_key"]
    settings.be_quiet()
    try:
        saving = SavingsRecord(**arguments)
    except (TypeError, ValueError) as error:
        raise WrongUsageError(str(error)) from None
    provider_of_spans = settings.tracer_provider()
    try:
        with SavingsTracker(store, tracer_provider=provider_of_spans, sync_method=sync_method) as tracker:
            try:
                receipt = tracker.record_many([saving], idempotency_key=idempotency_key)
            except ValueError as error:
                kind = CommandError if isinstance(error, KeyConflictError) else WrongUsageError
                raise kind(str(error).replace("idempotency_key", "--idempotency-key", 1)) from None
            reason = tracker.health().reason
        # Checked after closing, which tries once more: a caller that is told of a failure records the saving again.
        if not receipt.durable:
            raise CommandError(reason or f"{tracker.storage_path}: could not be saved")
        what = "counted before" if receipt.duplicate else "recorded"
        print(f"{what}: {tracker.snapshot().lifetime.tokens_saved:,} tokens saved in total", flush=True)
    finally:
        if provider_of_spans is not None:
            settings.flush_spans(provider_of_spans)
