"""One saving, validated, and the receipt for it."""

from __future__ import annotations

import math
import operator
import re
from datetime import datetime, timezone
from typing import Any, Protocol

import msgspec

MAX_TOKENS = 10**12
"""The most tokens one record may name. Above it a number is a mistake, not a request."""

MAX_USD = 1e9
"""The largest amount of money one record may name, in US dollars, either sign."""

MAX_NAME_LENGTH = 128
"""Longest name of a model, provider, agent or project, in characters (Headroom's limit too)."""

UNKNOWN = "unknown"

# A name longer than this is cut before it is cleaned, so that cleaning a hostile one costs little.
_MAX_RAW_NAME_LENGTH = 2 * MAX_NAME_LENGTH

# Nobody's name is percent-encoded more often than this. Without a bound, a name of 128 characters can be made to take
# sixty rounds to decode.
_MOST_DECODINGS = 3

_ENCODED = re.compile(r"(?:%[0-9A-Fa-f]{2})+")

_TOKEN_FIELDS = (
    "input_tokens",
    "tokens_saved",
    "tool_search_saved",
    "output_tokens_saved",
    "output_tokens",
    "cache_read_tokens",
    "cache_write_tokens",
    "uncached_input_tokens",
)


class SavingsRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What one LLM request saved.

    The names and meanings are those of Headroom's ``record_request``. Tokens are counts, money is US
    dollars. ``tool_search_saved`` (deferred tool schemas) and ``tokens_saved`` (compression) do not overlap.
    ``savings_usd`` may be negative: a rewrite that broke a prompt cache costs more than it saved.

    Names are cleaned rather than refused, because they come from clients of the proxy: what cannot be
    printed is dropped, and at most 128 characters stay. A model or provider without a name becomes
    ``unknown``; a project without one is nobody's.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a number is negative, not finite or absurdly large, or a timestamp is no timestamp.
    """

    model: str
    tokens_saved: int
    input_tokens: int = 0
    tool_search_saved: int = 0
    output_tokens_saved: int = 0
    output_tokens: int = 0
    provider: str | None = None
    agent: str | None = None
    project: str | None = None
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    uncached_input_tokens: int = 0
    timestamp: datetime | None = None
    savings_usd: float | None = None
    input_cost_usd: float | None = None

    def __post_init__(self) -> None:
        set_field = msgspec.structs.force_setattr
        # Costs a record a fifth of what looking at them by name does.
        for count in (
            *(self.input_tokens, self.tokens_saved, self.tool_search_saved, self.output_tokens_saved),
            *(self.output_tokens, self.cache_read_tokens, self.cache_write_tokens, self.uncached_input_tokens),
        ):
            if type(count) is not int or not 0 <= count <= MAX_TOKENS:
                for name in _TOKEN_FIELDS:
                    set_field(self, name, _token_count(name, getattr(self, name)))
                break
        if self.model is None:
            raise TypeError("model must be a string, not NoneType")
        for name, value in (("model", self.model), ("provider", self.provider), ("agent", self.agent)):
            if value is None or (clean := clean_name(name, value) or UNKNOWN) is not value:
                set_field(self, name, UNKNOWN if value is None else clean)
        if self.project is not None:
            set_field(self, "project", clean_project(self.project))
        set_field(self, "timestamp", _utc("timestamp", self.timestamp))
        if self.savings_usd is not None:
            set_field(self, "savings_usd", _usd("savings_usd", self.savings_usd, least=-MAX_USD))
        if self.input_cost_usd is not None:
            set_field(self, "input_cost_usd", _usd("input_cost_usd", self.input_cost_usd, least=0))


class Receipt:
    """What a record call returns: whether the saving is safe, and where it stands in the store.

    A receipt is true when it is durable. One that is not durable yet may become so later: the record
    is pending, and the tracker goes on trying until it is saved or closed.
    """

    __slots__ = ("_batch", "_position")

    def __init__(self, batch: PendingBatch, position: int) -> None:
        self._batch = batch
        self._position = position

    @property
    def durable(self) -> bool:
        """Whether the record survives a power loss from now on."""
        return self._batch.durable

    @property
    def sequence(self) -> int | None:
        """The record's number in the store, counted from 1 (a batch's: its last record's); None until durable."""
        return self._batch.sequence_of(self._position)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the record is durable, ``timeout`` seconds at most (None: as long as it takes).

        Returns:
            Whether it is durable now. Also False, at once, when the tracker was closed without saving it.
        """
        return self._batch.wait(timeout)

    def __bool__(self) -> bool:
        return self.durable

    def __repr__(self) -> str:
        return f"Receipt(durable={self.durable}, sequence={self.sequence})"


class PendingBatch(Protocol):
    """What a receipt asks of the batch that carries its record."""

    @property
    def durable(self) -> bool:
        """Whether the batch is on the disk for good."""

    def sequence_of(self, position: int) -> int | None:
        """The sequence number of the record at this position of the batch, once it is known."""

    def wait(self, timeout: float | None) -> bool:
        """Wait for the batch to become durable."""


def clean_name(field: str, value: Any) -> str:
    """A name as it may stand in a document and in a label, or "" when nothing is left of it.

    Cleaning a cleaned name changes nothing, so that a name read back from a document is the same name.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(f"{field} must be a string, not {type(value).__name__}")
    # The journal's encoder takes no subclass.
    name: str = value if type(value) is str else str.__str__(value)
    if len(name) <= MAX_NAME_LENGTH and name.isprintable() and name == name.strip():
        return name
    printable = name[:_MAX_RAW_NAME_LENGTH]
    if not printable.isprintable():
        printable = "".join(filter(str.isprintable, printable))
    return printable.strip()[:MAX_NAME_LENGTH].strip()


def clean_project(value: Any) -> str | None:
    """A project's name, percent-decoded as Headroom does it, or None when it names nothing.

    Headroom decodes a name each time it reads one, so decoding goes on until nothing changes: otherwise
    ``a%2520b`` would be another project after each program's turn. A name that is still encoded after
    three rounds loses its percent signs instead, which cannot be decoded any further either.
    """
    if value is None:
        return None
    name = clean_name("project", value)
    for _ in range(_MOST_DECODINGS):
        if not _ENCODED.search(name):
            return name or None
        name = clean_name("project", _ENCODED.sub(_decoded, name))
    if _ENCODED.search(name):
        name = clean_name("project", name.replace("%", ""))
    return name or None


def _decoded(run: re.Match[str]) -> str:
    # As urllib.parse.unquote does it, which costs ten times as much where there are many percent signs.
    return bytes.fromhex(run[0].replace("%", "")).decode("utf-8", "replace")


def parse_timestamp(value: str) -> datetime | None:
    """An ISO 8601 timestamp in UTC (a naive one is taken as UTC), or None when the text is not one."""
    try:
        moment = datetime.fromisoformat(value.replace("Z", "+00:00"))
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).astimezone(timezone.utc)
    except (ValueError, OverflowError):
        return None


def _token_count(field: str, value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{field} must be an integer, not bool")
    try:
        count = int(operator.index(value))
    except TypeError:
        raise TypeError(f"{field} must be an integer, not {type(value).__name__}") from None
    if count < 0:
        raise ValueError(f"{field} must not be negative")
    if count > MAX_TOKENS:
        raise ValueError(f"{field} must be at most {MAX_TOKENS}, got a larger number")
    return count


def _usd(field: str, value: Any, *, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{field} must be a number, not {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{field} must be finite, got {value}")
    if not least <= value <= MAX_USD:
        raise ValueError(f"{field} must be between {least:g} and {MAX_USD:g} US dollars")
    return float(value)


def _utc(field: str, value: Any) -> datetime:
    if value is None:
        return datetime.now(timezone.utc)
    if isinstance(value, datetime):
        value = value.isoformat()
    if not isinstance(value, str):
        raise TypeError(f"{field} must be a datetime or an ISO 8601 string, not {type(value).__name__}")
    moment = parse_timestamp(value)
    if moment is None:
        raise ValueError(f"{field} must be an ISO 8601 timestamp, got {value[:64]!r}")
    return moment
