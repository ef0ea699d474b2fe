"""Finds out which document another program started from, when it has written its own document over ours.

Headroom reads the document once, when it starts, and keeps the points of its history. A document that it writes later
therefore begins with the points of the document that it read, and its own points follow. The document that it read is
one of three: the last document of this store, which is the previous document with a part of the journals; a document of
the other program that is in our totals, of which a copy is kept; or none of ours, when its points show nothing of ours.
"""

from __future__ import annotations

import hashlib
import operator
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from typing import Any

import msgspec

from savings_exporter.errors import StoreError
from savings_exporter.formats.document import Document, decode
from savings_exporter.formats.frame import Frame, decode_groups, scan
from savings_exporter.model.figures import AMOUNTS, COUNTS, Numbers, Totals, added, iso_utc, numbers_of
from savings_exporter.model.history import NAMES_OF_POINT, POINT_KEYS
from savings_exporter.model.names import UNKNOWN
from savings_exporter.model.record import parse_timestamp, shifted
from savings_exporter.model.totals import Ledger, Sums
from savings_exporter.storage.filesystem import NO_SUCH_FILE, FileSystem
from savings_exporter.storage.reader import Reader, bounded
from savings_exporter.storage.view import View, counted, view_of

MOST_POINTS = 5000
"""How many points Headroom keeps."""

_DAYS_OF_POINTS = 365
_DIGEST_DIGITS = 16
_COPY = re.compile(r"\.other-program-([0-9a-f]{16})")
# How many states of the journals are compared with a document, and how many of them are examined closely.
_MOST_STATES = 200_000
_MOST_CLOSE = 20

# Headroom writes amounts with this many digits after the point.
_DIGITS = 6

_Point = tuple[Any, ...]
_SIGNED = "compression_savings_usd"
_COUNTS_OF_POINT = tuple(name for name in POINT_KEYS if name in COUNTS)
_PLACES = tuple(COUNTS.index(name) for name in _COUNTS_OF_POINT)
_counts_of: Any = operator.itemgetter(*_PLACES)
_AT_COUNTS = slice(1 + len(NAMES_OF_POINT), None)


def digest_of(data: bytes) -> str:
    """The digest that names a document of another program."""
    return hashlib.sha256(data).hexdigest()[:_DIGEST_DIGITS]


def copy_path(path: str, digest: str) -> str:
    """Where the copy of a document of another program is kept."""
    return f"{path}.other-program-{digest}"


def discard_copies(fs: FileSystem, path: str, digest: str) -> None:
    """Remove the copies of documents of another program that are in the totals, except the one with this digest. Files
    that a repair kept aside have shorter names and remain.
    """
    name = os.path.basename(path)
    for entry in fs.names_beside(path):
        found = _COPY.fullmatch(entry, len(name))
        if found and found[1] != digest:
            fs.discard(copy_path(path, found[1]))


def started_from(reader: Reader, theirs: Document, previous: Document, store: bytes) -> Ledger | None:
    """The totals of the document that another program started from; None when it cannot be determined.

    Args:
        reader: reads the store.
        theirs: the other program's document, as it was read.
        previous: our last remaining document; an empty one when none remains.
        store: the name of the store.

    Raises:
        OSError: the store cannot be read.
    """
    points = _points(theirs)
    if not points:
        return None
    ours = view_of(previous if previous.is_ours else bounded(previous, reader.limits), None, store)
    known = [view.ledger for view in _states(reader, ours, points)]
    copy = included_in(reader.fs, reader.path, previous)
    if copy is not None:
        known.append(copy)
    found = [ledger for ledger in known if _is_start(ledger, theirs, points)]
    if found:
        return found[0] if all(_figures(ledger) == _figures(found[0]) for ledger in found) else None
    return Ledger() if _shows_nothing_of(previous, copy, points) else None


def continues(theirs: Document, previous: Document) -> bool | None:
    """Whether another program's document was made from the previous document; None when its points do not show it."""
    points, ours = _points(theirs), _points(previous)
    if not points or not ours:
        return None
    if ours[-1] not in points and (len(points) >= MOST_POINTS or ours[-1][0] < _oldest_kept(points)):
        return None
    return _beyond(ours, points) is not None and _holds(theirs.ledger, previous.ledger)


def included_in(fs: FileSystem, path: str, document: Document) -> Ledger | None:
    """The totals of the other program's document that is in ours; None without one, or without a copy of it.

    Raises:
        OSError: the copy cannot be read.
    """
    if not document.is_ours:
        return document.ledger if document.ledger.records else None
    with suppress(StoreError, *NO_SUCH_FILE):
        data = fs.read(copy_path(path, document.included))[0] if document.included else b""
        if data and digest_of(data) == document.included:
            return decode(data).ledger
    return None


def _is_start(ledger: Ledger, theirs: Document, points: Sequence[_Point]) -> bool:
    """Whether a document with these points can have been made from a document with these totals."""
    rest = _beyond(_normalised(ledger.history.points), points)
    return rest is not None and all(map(_is_named, rest)) and _holds(theirs.ledger, ledger)


def _beyond(ours: Sequence[_Point], theirs: Sequence[_Point]) -> Iterable[_Point] | None:
    """The points besides ours; None when theirs do not include ours. Headroom may have removed the oldest.

    The order does not matter: the clients of the other program may have another clock.
    """
    missing = Counter(ours) - Counter(theirs)
    if not ours or ours[-1] in missing or Counter(ours[: missing.total()]) != missing:
        return None
    if missing and len(theirs) < MOST_POINTS and any(point[0] >= _oldest_kept(theirs) for point in missing):
        return None
    return Counter(theirs) - Counter(ours)


def _oldest_kept(points: Sequence[_Point]) -> str:
    newest = parse_timestamp(points[-1][0])
    assert newest is not None
    return iso_utc(shifted(newest, -timedelta(days=_DAYS_OF_POINTS)))


def _shows_nothing_of(ours: Document, copy: Ledger | None, points: Sequence[_Point]) -> bool:
    """Whether points of another program's document have no part in common with this store.

    All its points must be there and name a request: a document of this store has a point that names none. And it must
    be known which other program's points are in this store.
    """
    is_whole = len(points) < MOST_POINTS and points[0][0] > _oldest_kept(points)
    known = [*_points(ours), *(_normalised(copy.history.points) if copy is not None else ())]
    is_all_known = copy is not None or not (ours.kept.keys() - {"lifetime"} or any(map(_is_named, known)))
    return is_whole and is_all_known and all(map(_is_named, points)) and set(known).isdisjoint(points)


def _states(reader: Reader, ours: View, points: Sequence[_Point]) -> Iterator[View]:
    """The states between the previous document and the end of the journals whose last point can be in a document: the
    previous document itself, and those whose counts are those of the last point that is not the other program's own.
    """
    yield ours
    unnamed = [point for point in points if not _is_named(point)]
    if not unnamed:
        return
    wanted = unnamed[-1][_AT_COUNTS][: len(_COUNTS_OF_POINT)]
    segments = reader.listing().segments
    states: list[tuple[Numbers, dict[bytes, int]]] = [(_counts_of(numbers_of(ours.ledger.lifetime)), {})]
    for writer, numbers in segments.items():
        ends = list(_ends(ours.store, writer, reader.read_journal(ours, writer, None, numbers).raw))
        if len(states) * (len(ends) + 1) > _MOST_STATES:
            return
        states += [
            (total, {**state, writer: last})
            for counts, state in states
            for change, last in ends
            if all(map(operator.le, total := added(counts, change), wanted))
        ]
    matching = [state for total, state in states if state and total == wanted]
    for state in matching[:_MOST_CLOSE]:
        readings = [reader.read_journal(ours, writer, last, segments[writer]) for writer, last in state.items()]
        # A table of its own, because a view that is not published must claim no key.
        document = msgspec.structs.replace(ours.document, keys=type(ours.keys).unpack(ours.keys.pack()))
        view = msgspec.structs.replace(ours, document=document)
        yield counted(view, readings, reader.limits, datetime.now(timezone.utc))


def _ends(store: bytes, writer: bytes, frames: Iterable[bytes]) -> Iterator[tuple[Numbers, int]]:
    """For each frame, the counts from the first frame to the end of this one, and its last sequence number."""
    sums = Totals()
    for data in frames:
        for frame in scan(data, store, writer):
            assert isinstance(frame, Frame)
            part = Sums()
            for group in decode_groups([frame])[0]:
                part.add_all(group.records)
                part.add_rows(group.sums)
            for _, numbers, _ in part.parts():
                sums = sums.plus(*numbers)
            yield _counts_of(numbers_of(sums)), frame.last


def _points(document: Document) -> Sequence[_Point]:
    return _normalised(document.ledger.history.points)


def _normalised(points: Iterable[Mapping[str, Any]]) -> Sequence[_Point]:
    """Points as Headroom reads and writes them again: time, names, counts, amounts."""
    return [
        (
            point["timestamp"],
            *(_name(point.get(name)) for name in NAMES_OF_POINT),
            *(point.get(POINT_KEYS[name], 0) for name in _COUNTS_OF_POINT),
            *(_amount(name, point.get(key, 0.0)) for name, key in POINT_KEYS.items() if name in AMOUNTS),
        )
        for point in points
    ]


def _name(value: Any) -> str:
    return (value.strip() if isinstance(value, str) else "") or UNKNOWN


def _amount(name: str, usd: float) -> float:
    return round(usd if name == _SIGNED else max(usd, 0.0), _DIGITS)


def _is_named(point: _Point) -> bool:
    """Whether a point belongs to a request that another program recorded."""
    return any(name != UNKNOWN for name in point[1 : _AT_COUNTS.start])


def _holds(theirs: Ledger, ours: Ledger) -> bool:
    """Whether totals can be other totals with more records added."""
    named = ((theirs.by_model.get(model, Totals()), totals) for model, totals in ours.by_model.items())
    pairs = [(theirs.lifetime, ours.lifetime), *named]
    return all(more.requests >= less.requests and more.tokens_saved >= less.tokens_saved for more, less in pairs)


def _figures(ledger: Ledger) -> tuple[Any, ...]:
    return ledger.lifetime, ledger.by_model, ledger.projects
