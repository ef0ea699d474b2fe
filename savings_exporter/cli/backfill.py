"""``savings-exporter backfill``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path

import click

from savings_exporter.cli import standard_streams
from savings_exporter.cli.errors import CommandError, WrongUsageError
from savings_exporter.cli.options import NAMED_PATH, store_option
from savings_exporter.errors import StoreError
from savings_exporter.model.days import COLUMNS
from savings_exporter.model.record import parse_timestamp
from savings_exporter.service import logs
from savings_exporter.service.views import utc
from savings_exporter.storage.repair import is_begun
from savings_exporter.telemetry.backfill import DAY, Backfill
from savings_exporter.tracker import default_path
from savings_exporter.watched import WatchedFile

_UNITS = {"s": timedelta(seconds=1), "m": timedelta(minutes=1), "h": timedelta(hours=1), "d": DAY}
_STEP = re.compile(r"([1-9][0-9]{0,5})([smhd])", re.ASCII)
_LABEL = re.compile(r"(?!__)[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_STANDARD_OUTPUT = "-"


@click.command()
@click.option(
    "--output", metavar="FILE", type=NAMED_PATH, required=True, help="The new file to write; - is standard output."
)
@store_option
@click.option("--job", metavar="NAME", default="savings-exporter", help="The label job of the series.")
@click.option("--instance", metavar="HOST:PORT", default="127.0.0.1:9478", help="The label instance of the series.")
@click.option("--label", "further", metavar="NAME=VALUE", multiple=True, help="A further label; repeatable.")
@click.option("--step", metavar="DURATION", default="5m", help="The distance between samples, such as 30s, 5m or 1h.")
@click.option("--until", metavar="TIME", help="The last sample's time, such as 2026-01-31T12:00:00Z. Default: now.")
def backfill(
    output: str, store: str | None, job: str, instance: str, further: tuple[str, ...], step: str, until: str | None
) -> None:
    """Write the totals of the past as OpenMetrics text for promtool. Only reads the store."""
    logs.be_quiet()
    target, distance, last = _target(job, instance, further), _step(step), _until(until)
    path = store if store is not None else default_path()
    if not is_begun(path):
        raise CommandError(f"{path}: there are no savings yet; savings-exporter show says how to record the first")
    try:
        snapshot, dated = WatchedFile(path).snapshot_and_days()
    except StoreError as error:
        raise CommandError(str(error)) from None
    if not dated.rows:
        raise CommandError(f"{path}: holds no saving of which the day is known, so there is no past to write")
    found = Backfill(snapshot, dated.rows, target, distance, last or snapshot.read_at)
    if not found.times:
        raise WrongUsageError(f"--until {until} is before the first day with savings, {dated.rows[0].day}")
    if output == _STANDARD_OUTPUT:
        standard_streams.write_exactly(found.text())
    else:
        _write(output, found.text())
        first, end = (utc(datetime.fromtimestamp(time, timezone.utc)) for time in (found.times[0], found.times[-1]))
        print(f"{output}: {found.samples:,} samples, from {first} to {end}")


def _write(output: str, pieces: Iterable[bytes]) -> None:
    """Write a new file. It is removed if it is not complete."""
    file = Path(output)
    try:
        with file.open("xb") as opened:
            try:
                opened.writelines(pieces)
                opened.flush()
            except BaseException:
                with suppress(OSError):
                    file.unlink()
                raise
    except FileExistsError:
        raise CommandError(f"{output}: exists already; remove it, or name another file with --output") from None
    except OSError as error:
        raise CommandError(f"{output}: cannot be written: {error.strerror}") from None


def _target(job: str, instance: str, further: Iterable[str]) -> dict[str, str]:
    labels = {"instance": instance, "job": job}
    for given in further:
        name, _, value = given.partition("=")
        if not _LABEL.fullmatch(name) or name in (*COLUMNS, "store"):
            raise WrongUsageError(f"--label must be NAME=VALUE with the name of a target's label, not {given[:64]!r}")
        if name in labels:
            raise WrongUsageError(f"--label {name} is given twice, or has an option of its own")
        labels[name] = value
    empty = [name for name, value in labels.items() if not value]
    if empty:
        raise WrongUsageError(f"the label {empty[0]} must not be empty")
    return labels


def _step(text: str) -> timedelta:
    found = _STEP.fullmatch(text)
    step = int(found[1]) * _UNITS[found[2]] if found else DAY
    # Each day then begins with a sample.
    if not found or step > DAY or DAY % step:
        raise WrongUsageError(f"--step must be a part of a day, such as 30s, 5m or 1h, not {text[:64]!r}")
    return step


def _until(text: str | None) -> datetime | None:
    if text is None:
        return None
    moment = parse_timestamp(text)
    if moment is None:
        raise WrongUsageError(f"--until must be a time such as 2026-01-31T12:00:00Z, not {text[:64]!r}")
    if moment > datetime.now(timezone.utc):
        raise WrongUsageError(f"--until {text} is in the future")
    return moment
