"""The record of one saving, with validation."""

from __future__ import annotations

import math
import operator
from datetime import datetime, timedelta, timezone
from functools import lru_cache, partial
from typing import Annotated, Any

import msgspec

from savings_exporter.model.names import UNKNOWN, clean_name, clean_project, is_clean

MAX_TOKENS = 10**12
"""The maximum number of tokens in a field of a record. No request has more, so a larger number is a mistake."""

MAX_USD = 1e9
"""The maximum amount in a field of a record, in US dollars, positive or negative."""

# These are checked where JSON is decoded. Records that are built in Python are checked in ``__post_init__``.
_Tokens = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)]
_Usd = Annotated[float, msgspec.Meta(ge=0, le=MAX_USD)]
_SignedUsd = Annotated[float, msgspec.Meta(ge=-MAX_USD, le=MAX_USD)]

_set_field = msgspec.structs.force_setattr

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

    The field names and their meanings are those of Headroom's ``record_request``, which has no ``source``. Names come
    from clients of the proxy, so they are cleaned instead of refused: characters that cannot be printed are removed,
    and at most 128 bytes in UTF-8 are kept.

    Attributes:
        model: the model that answered, as the provider names it; ``unknown`` when nothing of the name is left.
        tokens_saved: input tokens that compression removed from the request.
        input_tokens: input tokens that were sent to the model, after all savings. Before the savings, the request had
            ``input_tokens + tokens_saved + tool_search_saved``.
        tool_search_saved: input tokens saved by deferring tool schemas. They are not part of ``tokens_saved``.
        output_tokens_saved: output tokens that the model did not have to write, by the proxy's estimate.
        output_tokens: output tokens that the model wrote.
        provider: the provider of the model, such as ``anthropic``; ``unknown`` when it is not given.
        agent: the program that made the request, such as ``claude-code``; ``unknown`` when it is not given.
        project: the project that the request belongs to; None when it belongs to no project.
        source: the layer that saved, such as ``headroom``, ``rtk`` or ``litellm``; None when it is not given. Layers
            can overlap: the output of one can be the input of another.
        cache_read_tokens: input tokens that the provider read from its prompt cache.
        cache_write_tokens: input tokens that the provider wrote to its prompt cache.
        uncached_input_tokens: input tokens that were neither read from nor written to the prompt cache.
        timestamp: when the request was made, in UTC. A time without a zone is interpreted as UTC. If no time is given,
            it is the current time.
        savings_usd: what the saved input tokens would have cost, in US dollars; None when it is unknown. It is negative
            when rewriting the request cost more than it saved, because it invalidated a prompt cache.
        cache_savings_usd: what reading ``cache_read_tokens`` from the prompt cache saved, in US dollars; None when it
            is unknown.
        input_cost_usd: what the input cost, in US dollars; None when it is unknown.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a number is negative, not finite or beyond ``MAX_TOKENS`` or ``MAX_USD``, or a timestamp is not
            in ISO 8601.
    """

    model: str
    tokens_saved: _Tokens
    input_tokens: _Tokens = 0
    tool_search_saved: _Tokens = 0
    output_tokens_saved: _Tokens = 0
    output_tokens: _Tokens = 0
    provider: str | None = None
    agent: str | None = None
    project: str | None = None
    source: str | None = None
    cache_read_tokens: _Tokens = 0
    cache_write_tokens: _Tokens = 0
    uncached_input_tokens: _Tokens = 0
    timestamp: datetime | None = None
    savings_usd: _SignedUsd | None = None
    cache_savings_usd: _Usd | None = None
    input_cost_usd: _Usd | None = None

    def __post_init__(self) -> None:
        # This runs on every request. Nearly all fields are valid already, and for these only the checks run.
        if not (
            type(self.input_tokens) is int
            and 0 <= self.input_tokens <= MAX_TOKENS
            and type(self.tokens_saved) is int
            and 0 <= self.tokens_saved <= MAX_TOKENS
            and type(self.tool_search_saved) is int
            and 0 <= self.tool_search_saved <= MAX_TOKENS
            and type(self.output_tokens_saved) is int
            and 0 <= self.output_tokens_saved <= MAX_TOKENS
            and type(self.output_tokens) is int
            and 0 <= self.output_tokens <= MAX_TOKENS
            and type(self.cache_read_tokens) is int
            and 0 <= self.cache_read_tokens <= MAX_TOKENS
            and type(self.cache_write_tokens) is int
            and 0 <= self.cache_write_tokens <= MAX_TOKENS
            and type(self.uncached_input_tokens) is int
            and 0 <= self.uncached_input_tokens <= MAX_TOKENS
        ):
            for name in _TOKEN_FIELDS:
                _set_field(self, name, _token_count(name, getattr(self, name)))
        _check_rest(self)


class DecodedRecord(SavingsRecord, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A record that msgspec decodes. The decoder has checked the numbers of tokens, and set what is missing."""

    provider: str | None = UNKNOWN
    agent: str | None = UNKNOWN
    timestamp: datetime | None = msgspec.field(default_factory=partial(datetime.now, timezone.utc))

    def __post_init__(self) -> None:
        _check_rest(self)


def _check_rest(record: SavingsRecord) -> None:
    """Check the amounts, clean the names, and make the time one in UTC."""
    usd = record.savings_usd
    if usd is not None and not (type(usd) is float and -MAX_USD <= usd <= MAX_USD):
        _set_field(record, "savings_usd", _usd("savings_usd", usd, least=-MAX_USD))
    usd = record.cache_savings_usd
    if usd is not None and not (type(usd) is float and 0 <= usd <= MAX_USD):
        _set_field(record, "cache_savings_usd", _usd("cache_savings_usd", usd, least=0))
    usd = record.input_cost_usd
    if usd is not None and not (type(usd) is float and 0 <= usd <= MAX_USD):
        _set_field(record, "input_cost_usd", _usd("input_cost_usd", usd, least=0))
    try:
        _refuse_unclean(record.model, record.provider, record.agent, record.project, record.source)
    except (TypeError, ValueError):
        if record.model is None:
            raise TypeError("model must be a string, not None") from None
        _set_field(record, "model", clean_name("model", record.model) or UNKNOWN)
        _set_field(record, "provider", clean_name("provider", record.provider) or UNKNOWN)
        _set_field(record, "agent", clean_name("agent", record.agent) or UNKNOWN)
        _set_field(record, "project", clean_project(record.project))
        _set_field(record, "source", clean_name("source", record.source) or None)
    if record.provider is None:
        _set_field(record, "provider", UNKNOWN)
    if record.agent is None:
        _set_field(record, "agent", UNKNOWN)
    moment = record.timestamp
    if moment is None:
        _set_field(record, "timestamp", datetime.now(timezone.utc))
    elif not (type(moment) is datetime and moment.tzinfo is timezone.utc):
        _set_field(record, "timestamp", _utc("timestamp", moment))


# Most records have names that earlier ones had. Names that are refused, which may be long, are not kept. A subclass of
# str is another name than the equal str, because msgspec does not encode it.
@lru_cache(maxsize=1024, typed=True)
def _refuse_unclean(
    model: str, provider: str | None, agent: str | None, project: str | None, source: str | None
) -> None:
    """Raise ValueError if a name would be changed by cleaning, and TypeError if it cannot be one."""
    for name in (model, provider, agent, project, source):
        if not (name is None or is_clean(name)):
            raise ValueError
    if model is None or (project is not None and "%" in project):
        raise ValueError


def parse_timestamp(value: str) -> datetime | None:
    """Parse an ISO 8601 timestamp as UTC. One without a zone is interpreted as UTC. None when the text is invalid."""
    try:
        moment = datetime.fromisoformat(value.replace("Z", "+00:00"))
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).astimezone(timezone.utc)
    except (ValueError, OverflowError):
        return None


def shifted(moment: datetime, by: timedelta) -> datetime:
    """A time in UTC that is earlier or later than another one; the first or the last one that there is, if it would be
    before or after that.
    """
    try:
        return moment + by
    except OverflowError:
        return (datetime.min if by < timedelta() else datetime.max).replace(tzinfo=timezone.utc)


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
        raise ValueError(f"{field} must be at most {MAX_TOKENS}")
    return count


def _usd(field: str, value: Any, *, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{field} must be a number, not {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{field} must be finite, got {value}")
    if not least <= value <= MAX_USD:
        raise ValueError(f"{field} must be between {least:,.0f} and {MAX_USD:,.0f} US dollars")
    return float(value)


def _utc(field: str, value: Any) -> datetime:
    if isinstance(value, datetime):
        value = value.isoformat()
    if not isinstance(value, str):
        raise TypeError(f"{field} must be a datetime or an ISO 8601 string, not {type(value).__name__}")
    moment = parse_timestamp(value)
    if moment is None:
        raise ValueError(f"{field} must be an ISO 8601 timestamp such as 2026-01-31T23:59:00Z, got {value[:64]!r}")
    return moment
