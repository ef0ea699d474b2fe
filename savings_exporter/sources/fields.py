"""What the columns of a table mean: which field of a record each one is, and how its values are read.

A value is text in a CSV file, and any value of JSON in a file of JSON lines. Values are read strictly: a number that
could be meant in two ways, such as ``1,234``, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from typing import Any, NamedTuple

from savings_exporter.model.names import UNKNOWN
from savings_exporter.model.record import SavingsRecord, parse_timestamp

INPUT_BEFORE = "input_before"
"""The field of the input tokens before the saving. A record has those after it."""

_SHOWN_CHARACTERS = 40

_WHOLE = re.compile(r"([+-]?[0-9]{1,18})(?:\.0)?")
_DECIMAL = re.compile(r"[+-]?(?:[0-9]{1,18}(?:\.[0-9]{0,30})?|\.[0-9]{1,30})(?:[eE][+-]?[0-9]{1,2})?")
# Python 3.10 reads neither a fraction of any length nor a zone without a colon.
_ISO = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})"
    r"(?:[T ]([0-9]{2}:[0-9]{2})(:[0-9]{2})?(?:[.,]([0-9]{1,9}))? ?(?:[Zz]|([+-][0-9]{2})(?::?([0-9]{2}))?)?)?"
)
# Unix times in seconds and in milliseconds, each from 1973 to 5138.
_LEAST_SECONDS, _LEAST_MILLISECONDS = 1e8, 1e11


class Parsed(NamedTuple):
    """What a line of a table says. ``before`` are the input tokens before the saving; None if they are not known."""

    record: SavingsRecord
    before: int | None


class FieldMap(NamedTuple):
    """The columns and constants of the fields.

    Attributes:
        columns: the column of a field, or in JSON the path to it.
        constants: the value of a field that is the same in all lines.
    """

    columns: Mapping[str, str]
    constants: Mapping[str, Any]

    @property
    def is_dated(self) -> bool:
        """Whether records have a time."""
        return "timestamp" in self.columns or "timestamp" in self.constants

    def parsed(self, values: Mapping[str, Any], source: str) -> Parsed:
        """The record of a line.

        Args:
            values: the values of the columns, by field. A value that is None or empty is not given.
            source: the layer that saved.

        Raises:
            ValueError: a value cannot be read, or is missing. The message names the field.
        """
        fields = dict(self.constants)
        for field, value in values.items():
            if value is not None and not (isinstance(value, str) and not value.strip()):
                fields[field] = _read(field, value)
        before = fields.pop(INPUT_BEFORE, None)
        if "tokens_saved" not in fields:
            if "tokens_saved" in self.columns:
                raise ValueError("tokens_saved is missing")
            if before is None or "input_tokens" not in fields:
                raise ValueError(f"{INPUT_BEFORE if before is None else 'input_tokens'} is missing")
            fields["tokens_saved"] = before - fields["input_tokens"]
        elif before is not None:
            after = before - fields["tokens_saved"] - fields.get("tool_search_saved", 0)
            fields["input_tokens"] = max(after, 0)
        if self.is_dated and "timestamp" not in fields:
            raise ValueError("timestamp is missing")
        return Parsed(SavingsRecord(**{"model": UNKNOWN, **fields, "source": source}), before)


def parse_mapping(columns: Iterable[str], constants: Iterable[str] = ()) -> FieldMap:
    """The mapping that a user has written.

    Args:
        columns: ``FIELD=COLUMN``, such as ``tokens_saved=saved``.
        constants: ``FIELD=VALUE``, such as ``provider=openai``.

    Raises:
        ValueError: the mapping cannot be used. The message says what it should be.
    """
    named = _pairs(columns, "COLUMN", "tokens_saved=saved")
    fixed = {field: _read(field, value) for field, value in _pairs(constants, "VALUE", "provider=openai").items()}
    if both := sorted(named.keys() & fixed.keys()):
        raise ValueError(f"{both[0]} has both a column and a constant; give one of them")
    if "tokens_saved" not in named and not {INPUT_BEFORE, "input_tokens"} <= named.keys():
        raise ValueError(f"the column of tokens_saved is missing, or those of {INPUT_BEFORE} and input_tokens")
    if {"tokens_saved", INPUT_BEFORE, "input_tokens"} <= {*named, *fixed}:
        raise ValueError(f"give two of tokens_saved, {INPUT_BEFORE} and input_tokens; the third follows from them")
    return FieldMap(named, fixed)


def value_at(value: Any, path: str) -> Any:
    """The value in JSON at a path, such as ``usage.saved``; None without it. A name may contain dots itself."""
    while isinstance(value, Mapping):
        if path in value:
            return value[path]
        name, dot, path = path.partition(".")
        if not dot:
            break
        value = value.get(name)
    return None


def _pairs(texts: Iterable[str], what: str, example: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        field, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not field or not value:
            raise ValueError(f"{_shown(text)} is not FIELD={what}, such as {example}")
        if field not in _READERS:
            raise ValueError(f"{_shown(field)} is not a field; the fields are {', '.join(_READERS)}")
        if field in pairs:
            raise ValueError(f"{field} is given twice")
        pairs[field] = value
    return pairs


def _read(field: str, value: Any) -> Any:
    try:
        return _READERS[field](value.strip() if isinstance(value, str) else value)
    except ValueError as error:
        raise ValueError(f"{field}: {_shown(value)} {error}") from None


def _whole(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and (found := _WHOLE.fullmatch(value)):
        return int(found[1])
    raise ValueError("is not a whole number, which has no separators of thousands")


def _decimal(value: Any) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and _DECIMAL.fullmatch(value):
        return float(value)
    raise ValueError("is not a number, which has a decimal point and no separators of thousands")


def _name(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise ValueError("is not a name")


def _moment(value: Any) -> datetime:
    if isinstance(value, str) and (found := _ISO.fullmatch(value)):
        day, minute, second, fraction, hours, minutes = found.groups()
        zone = f"{hours}:{minutes or '00'}" if hours else "+00:00"
        time = f"{minute or '00:00'}{second or ':00'}.{(fraction or '')[:6]:0<6}"
        moment = parse_timestamp(f"{day}T{time}{zone}")
    else:
        moment = _unix_moment(value)
    if moment is None:
        raise ValueError("is not a time in ISO 8601, or in Unix seconds or milliseconds")
    return moment


def _unix_moment(value: Any) -> datetime | None:
    try:
        seconds = _decimal(value)
    except ValueError:
        return None
    if seconds >= _LEAST_MILLISECONDS:
        seconds /= 1000
    if not _LEAST_SECONDS <= seconds < _LEAST_MILLISECONDS:
        return None
    return datetime.fromtimestamp(seconds, timezone.utc)


def _shown(value: Any) -> str:
    return repr(value[:_SHOWN_CHARACTERS] if isinstance(value, str) else value)[: _SHOWN_CHARACTERS + 2]


_READERS: Mapping[str, Callable[[Any], Any]] = {
    "tokens_saved": _whole,
    "input_tokens": _whole,
    INPUT_BEFORE: _whole,
    "timestamp": _moment,
    "model": _name,
    "provider": _name,
    "project": _name,
    "agent": _name,
    "tool_search_saved": _whole,
    "output_tokens": _whole,
    "output_tokens_saved": _whole,
    "cache_read_tokens": _whole,
    "cache_write_tokens": _whole,
    "uncached_input_tokens": _whole,
    "savings_usd": _decimal,
    "cache_savings_usd": _decimal,
    "input_cost_usd": _decimal,
}
