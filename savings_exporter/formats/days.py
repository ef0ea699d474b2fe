"""Encodes and decodes days: the open ones in the document, and the closed ones in a file of their own.

::

    {"format": 1, "store": "0123456789abcdef", "checksum": "sha256:..."}
    {"day": "2026-01-31", "rows": [["anthropic", "claude", null, "claude-code", "headroom", [1, 4096], []]]}

The first line has the checksum of all others. A row has the names, then the counts and the amounts of
``model.figures.Numbers``, each without the zeros at its end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import msgspec

from savings_exporter.errors import CorruptStoreError
from savings_exporter.model.days import Day, Days, Names, rows_of, with_rows
from savings_exporter.model.figures import AMOUNTS, COUNTS, ZERO, Numbers, added

FORMAT = 1

_DAY_START = b'{"day": "'
_DAY = slice(len(_DAY_START), len(_DAY_START) + len("2026-01-01"))

_Row = tuple[str, str, str | None, str | None, str | None, tuple[int, ...], tuple[int, ...]]


class _Line(msgspec.Struct):
    day: str
    rows: list[_Row]


class _Header(msgspec.Struct):
    format: int
    store: str
    checksum: str


_ENCODER = msgspec.json.Encoder()


class ClosedDays(NamedTuple):
    """The content of a file of closed days: the line of each day, which is decoded when it is used."""

    lines: Mapping[str, bytes]

    def day(self, day: str) -> Day:
        """The rows of a day.

        Raises:
            CorruptStoreError: they cannot be read.
        """
        line = self.lines.get(day)
        if line is None:
            return {}
        try:
            return dict(map(_read_row, _decoded(line, _Line).rows))
        except (msgspec.MsgspecError, ValueError) as error:
            raise CorruptStoreError(f"the checksum matches, but the day {day} cannot be read: {error}") from None

    def with_days(self, days: Days) -> ClosedDays:
        """These days with others added."""
        lines = dict(self.lines)
        for day, rows in days.items():
            lines[day] = _line(day, with_rows({day: self.day(day)}, rows_of({day: rows}))[day])
        return ClosedDays(lines)

    def newest(self, number: int) -> tuple[ClosedDays, Numbers]:
        """The newest days, and the sum of all older ones. A clock that is wrong for a while therefore drops no day."""
        days = sorted(self.lines)
        first_kept = max(len(days) - number, 0)
        kept = {day: self.lines[day] for day in days[first_kept:]}
        return ClosedDays(kept), total(map(self.day, days[:first_kept]))

    def sum(self) -> Numbers:
        """The sum of all days."""
        return total(map(self.day, self.lines))


def total(days: Iterable[Day]) -> Numbers:
    """The sum of all rows."""
    result = ZERO
    for day in days:
        for numbers in day.values():
            result = added(result, numbers)
    return result


def encode_closed(days: ClosedDays, store: str) -> bytes:
    """Encode a file of closed days."""
    body = b"".join(days.lines[day] for day in sorted(days.lines))
    checksum = f"sha256:{hashlib.sha256(body).hexdigest()}"
    return _json({"format": FORMAT, "store": store, "checksum": checksum}) + b"\n" + body


def decode_closed(data: bytes, store: str) -> ClosedDays:
    """Decode a file of closed days.

    Raises:
        CorruptStoreError: it is damaged, or belongs to another store.
    """
    first, _, body = data.partition(b"\n")
    try:
        header = _decoded(first, _Header)
    except (msgspec.MsgspecError, ValueError):
        raise CorruptStoreError("is not a file of closed days, or its first line is damaged") from None
    if header.format > FORMAT:
        raise CorruptStoreError(f"its format is {header.format}, and this program knows up to {FORMAT}")
    if header.store != store:
        raise CorruptStoreError(f"belongs to the store {header.store}, not to {store}")
    if header.checksum != f"sha256:{hashlib.sha256(body).hexdigest()}":
        raise CorruptStoreError("its checksum does not match: it was damaged, or edited by another program")
    return ClosedDays({line[_DAY].decode("ascii"): line for line in body.splitlines(keepends=True)})


def encode_open(days: Days) -> bytes:
    """Encode open days as a member of the document."""
    parts = [_json(day) + b": " + _rows(days[day]) for day in sorted(days)]
    return b"{" + b",\n  ".join(parts) + b"}"


def decode_open(data: bytes) -> Days:
    """Decode open days.

    Raises:
        msgspec.MsgspecError, ValueError: they cannot be read.
    """
    return {day: dict(map(_read_row, rows)) for day, rows in _decoded(data, dict[str, list[_Row]]).items()}


def encode_numbers(numbers: Numbers) -> bytes:
    """Encode a sum of numbers."""
    return _json([_trimmed(numbers[: len(COUNTS)]), _trimmed(numbers[len(COUNTS) :])])


def decode_numbers(data: bytes) -> Numbers:
    """Decode a sum of numbers.

    Raises:
        msgspec.MsgspecError, ValueError: it cannot be read.
    """
    counts, units = _decoded(data, tuple[tuple[int, ...], tuple[int, ...]])
    return _padded(counts, units)


def _line(day: str, rows: Day) -> bytes:
    return _DAY_START + day.encode("ascii") + b'", "rows": ' + _rows(rows) + b"}\n"


def _rows(rows: Day) -> bytes:
    return b"[" + b", ".join(_json(_row(names, numbers)) for names, numbers in rows.items()) + b"]"


def _row(names: Names, numbers: Numbers) -> list[Any]:
    return [*names, _trimmed(numbers[: len(COUNTS)]), _trimmed(numbers[len(COUNTS) :])]


def _read_row(row: _Row) -> tuple[Names, Numbers]:
    provider, model, project, agent, source, counts, units = row
    return Names(provider, model, project, agent, source), _padded(counts, units)


def _json(value: Any) -> bytes:
    try:
        data = _ENCODER.encode(value)
    except OverflowError:  # an integer of more than 64 bits
        data = b"\xff"
    return data if data.isascii() else json.dumps(value).encode("ascii")


def _decoded(data: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError):
        # It may hold an integer of more than 64 bits.
        return msgspec.convert(json.loads(data), kind)


def _trimmed(numbers: Numbers) -> list[int]:
    trimmed = list(numbers)
    while trimmed and not trimmed[-1]:
        trimmed.pop()
    return trimmed


def _padded(counts: tuple[int, ...], units: tuple[int, ...]) -> Numbers:
    missing, missing_units = len(COUNTS) - len(counts), len(AMOUNTS) - len(units)
    if missing < 0 or missing_units < 0:
        raise ValueError(f"a row with {len(counts)} counts and {len(units)} amounts")
    return (*counts, *(0,) * missing, *units, *(0,) * missing_units)
