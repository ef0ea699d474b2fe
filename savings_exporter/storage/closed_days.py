"""The file of closed days: ``proxy_savings.json.days.NUMBER``.

A file is never changed. When days have closed, a save writes a new file with the next number, and the document that
follows it names this number. Both documents therefore always have the file that belongs to them. A file that neither
document names is removed.
"""

from __future__ import annotations

import logging
import math
import operator
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import datetime

import msgspec

from savings_exporter.errors import CorruptStoreError, StoreError
from savings_exporter.formats.days import ClosedDays, decode_closed, encode_closed, total
from savings_exporter.model.days import DAYS_KEPT, Dated, Day, DayRow, Days
from savings_exporter.model.figures import AMOUNTS, COUNTS, ZERO, Numbers, added, iso_utc, numbers_of, units_of, usd_of
from savings_exporter.model.totals import Ledger
from savings_exporter.storage.atomic_file import Directory
from savings_exporter.storage.filesystem import FileSystem, unused_name
from savings_exporter.storage.observers import Observer
from savings_exporter.storage.operation import FSYNC_DIR, FSYNC_FILE, WRITE, Operation
from savings_exporter.storage.reader import previous_document
from savings_exporter.storage.view import View

logger = logging.getLogger(__name__)

MOST_OPEN_ROWS = 2000
"""When the document holds more rows of closed days, they are moved at the next save, and otherwise once an hour."""

_ATTEMPTS = 5
_HEADER_BYTES = 200
_NAME = re.compile(r"\.days\.(\d{8})")


def days_path(document: str, number: int) -> str:
    """The path of a file of closed days."""
    return f"{document}.days.{number:08d}"


def numbers_beside(fs: FileSystem, document: str) -> list[int]:
    """The numbers of the files of closed days beside a document.

    Raises:
        OSError: the directory cannot be read.
    """
    length = len(os.path.basename(document))
    names = (name[length:] for name in fs.names_beside(document))
    return [int(found[1]) for name in names if (found := _NAME.fullmatch(name))]


def read_closed(fs: FileSystem, path: str, view: View) -> ClosedDays:
    """The closed days of a view.

    Raises:
        FileNotFoundError: the file is missing, perhaps because saves have replaced the document in the meantime.
        OSError: the file cannot be read.
        CorruptStoreError: the file is damaged.
    """
    number = view.document.days_file
    if not number:
        return ClosedDays({})
    return decode_closed(fs.read(days_path(path, number))[0], view.store.hex())


def problem_of_days(fs: FileSystem, path: str, view: View) -> str:
    """Why the days of a view are incomplete; empty when they add up to the lifetime totals."""
    file, ledger = days_path(path, view.document.days_file), view.ledger
    try:
        closed = read_closed(fs, path, view)
        days = [*map(closed.day, closed.lines), *ledger.days.values()]
    except FileNotFoundError:
        return f"{file}: is missing"
    except CorruptStoreError as error:
        return f"{file}: {error}"
    except OSError as error:
        return f"{file}: cannot be read: {error.strerror}"
    differences = map(operator.sub, numbers_of(ledger.lifetime), added(ledger.undated, total(days)))
    if any(abs(difference) > most for difference, most in zip(differences, _rounding(ledger, days), strict=True)):
        return f"{path}: the days do not add up to the lifetime totals"
    return ""


def mended(fs: FileSystem, path: str, view: View) -> View:
    """The view with days that add up: what is missing from them belongs to no day."""
    try:
        return _with_undated(view, read_closed(fs, path, view).sum())
    except (OSError, CorruptStoreError):
        return _without_closed(view)


def _without_closed(view: View) -> View:
    document = msgspec.structs.replace(view.document, days_file=0)
    return _with_undated(msgspec.structs.replace(view, document=document), ZERO)


def _with_undated(view: View, closed: Numbers) -> View:
    """The view in which all that is neither in the closed days nor in the open ones belongs to no day."""
    ledger = view.ledger
    dated = added(closed, total(ledger.days.values()))
    undated = tuple(map(operator.sub, numbers_of(ledger.lifetime), dated))
    return msgspec.structs.replace(view, ledger=msgspec.structs.replace(ledger, undated=undated))


def _rounding(ledger: Ledger, days: Iterable[Day]) -> Iterator[float]:
    """How far each number of the lifetime may be from the exact sum. Its amounts are floats, rounded at each addition
    to the precision that the sum has at that time.
    """
    yield from (0 for _ in COUNTS)
    rows = [numbers for day in days for numbers in day.values()]
    for place, name in enumerate(AMOUNTS, len(COUNTS)):
        largest = abs(getattr(ledger.lifetime, name)) + usd_of(sum(abs(numbers[place]) for numbers in rows))
        yield units_of((ledger.lifetime.requests + 1) * math.ulp(largest)) + 1


def with_closed_days(
    fs: FileSystem,
    path: str,
    view: View,
    directory: Directory,
    operation: Operation,
    observer: Observer,
    now: datetime,
) -> View:
    """The view after the rows of closed days have been moved from the document to a new file, if this is due.

    Raises:
        OSError: the new file was not written.
    """
    today = iso_utc(now)[: len("2026-01-01")]
    closing = {day: rows for day, rows in view.ledger.days.items() if day < today}
    if not _is_due(closing, view.document.saved_at, now):
        return view
    named, is_lost = view.document.days_file, False
    try:
        closed = read_closed(fs, path, view).with_days(closing)
    except (FileNotFoundError, CorruptStoreError):
        _keep_aside(fs, path, view)
        view, closed, is_lost = _without_closed(view), ClosedDays({}).with_days(closing), True
    except OSError as error:
        # The document keeps the rows until days are closed again.
        logger.warning("%s: cannot be read: %s", days_path(path, view.document.days_file), error.strerror)
        return view
    kept, dropped = closed.newest(DAYS_KEPT)
    number = max([*numbers_beside(fs, path), named]) + 1
    # What saves that failed have left. Not if it is not known which file the previous document names.
    with suppress(OSError):
        previous = previous_document(fs, path)
        discard_unused(fs, path, view.store, named, previous.days_file if previous is not None else named)
    _write(fs, days_path(path, number), encode_closed(kept, view.store.hex()), directory, operation)
    if is_lost:
        observer.recovered("closed_days")
    return msgspec.structs.replace(
        view,
        document=msgspec.structs.replace(view.document, days_file=number),
        ledger=_moved(view.ledger, closing, dropped),
    )


def discard_unused(fs: FileSystem, path: str, store: bytes, *used: int) -> None:
    """Remove the store's files of closed days that no document names. Files of another store are left alone."""
    for number in numbers_beside(fs, path):
        if number not in used and _is_of(fs, days_path(path, number), store):
            fs.discard(days_path(path, number))


def _is_of(fs: FileSystem, file: str, store: bytes) -> bool:
    """Whether a file belongs to a store, or was never written to its end."""
    try:
        with fs.opened(file) as descriptor:
            start = fs.read_at(descriptor, _HEADER_BYTES, 0)
    except OSError:
        return False
    return b'"store"' not in start or store.hex().encode("ascii") in start


def _is_due(closing: Days, saved_at: datetime | None, now: datetime) -> bool:
    if not closing:
        return False
    is_first_in_hour = saved_at is None or iso_utc(saved_at)[:13] != iso_utc(now)[:13]
    return is_first_in_hour or sum(map(len, closing.values())) > MOST_OPEN_ROWS


def _moved(ledger: Ledger, closing: Days, dropped: Numbers) -> Ledger:
    days = {day: rows for day, rows in ledger.days.items() if day not in closing}
    return msgspec.structs.replace(ledger, days=days, undated=added(ledger.undated, dropped))


def _write(fs: FileSystem, path: str, data: bytes, directory: Directory, operation: Operation) -> None:
    descriptor = -1
    try:
        with operation.step(WRITE) as step:
            step.size = len(data)
            descriptor = fs.create(path, like=directory.like)
            fs.write_all(descriptor, data)
        with operation.step(FSYNC_FILE, "file"):
            fs.fsync_file(descriptor)
    except BaseException:
        fs.discard(path)
        raise
    finally:
        if descriptor >= 0:
            fs.close(descriptor)
    # The document that names the file must not survive a power loss that the file does not survive.
    with operation.step(FSYNC_DIR, "directory") as step:
        directory.sync(step, path)


def _keep_aside(fs: FileSystem, path: str, view: View) -> None:
    """Keep a copy of a damaged file of closed days under another name, and log it."""
    file = days_path(path, view.document.days_file)
    kept = "is missing"
    if fs.identity(file) is not None:
        aside = unused_name(file, "corrupt")
        fs.keep_copy(file, aside)
        kept = f"is damaged, and kept as {aside}"
    logger.error("%s: %s; what was saved on closed days is known only in total from now on", file, kept)


def dated_rows(fs: FileSystem, path: str, view: View, first: str, last: str) -> list[DayRow]:
    """The rows of a view from one day to another, both included, oldest first.

    Raises:
        FileNotFoundError: saves have replaced the document in the meantime, or the file of closed days is missing.
        OSError: the file cannot be read.
        CorruptStoreError: the file is damaged.
    """
    closed, opened = read_closed(fs, path, view), view.ledger.days
    days = sorted(day for day in closed.lines.keys() | opened.keys() if first <= day <= last)
    merged = closed.with_days({day: opened[day] for day in days if day in opened})
    return [DayRow(day, names, numbers) for day in days for names, numbers in merged.day(day).items()]


def read_days(fs: FileSystem, view_now: Callable[[], tuple[str, View]], first: str, last: str) -> Dated:
    """The rows of a store from one day to another, and what belongs to no day.

    Args:
        view_now: reads the store again, and returns the document's path and the current view.

    Raises:
        StoreError: the file of closed days is missing or damaged, or cannot be read.
    """
    return read_with_days(fs, view_now, first, last)[1]


def read_with_days(
    fs: FileSystem, view_now: Callable[[], tuple[str, View]], first: str, last: str
) -> tuple[View, Dated]:
    """The same, and the view that the rows belong to."""
    for attempt in range(_ATTEMPTS, 0, -1):
        path, view = view_now()
        file = days_path(path, view.document.days_file)
        try:
            return view, Dated(dated_rows(fs, path, view, first, last), view.ledger.undated)
        except FileNotFoundError:
            if attempt == 1:
                raise _unreadable(path, file, "is missing") from None
        except CorruptStoreError as error:
            raise _unreadable(path, file, str(error)) from None
        except OSError as error:
            raise StoreError(f"{file}: cannot be read: {error.strerror}", path=file) from None
    raise AssertionError("the last attempt returns or raises")


def _unreadable(path: str, file: str, problem: str) -> CorruptStoreError:
    return CorruptStoreError(
        f"{file}: {problem}",
        f"The totals are complete, but what was saved on each closed day is not known. Restore the file from a backup, "
        f"or continue without it: savings-exporter verify --repair --store {shlex.quote(path)}",
        path=file,
    )
