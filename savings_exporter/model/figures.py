"""Totals, and the integers in which they are added up."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from datetime import datetime, timezone
from typing import Any, NamedTuple

import msgspec

Numbers = tuple[int, ...]
"""The counts of ``COUNTS``, then the amounts of ``AMOUNTS`` in billionths of a dollar."""

# Amounts have a resolution of a billionth of a dollar and are added as integer billionths. The sum is then the exact
# decimal sum in any order, and 0.1 + 0.2 is not 0.30000000000000004. This holds up to about nine million dollars, the
# limit of a float's precision.
_USD_UNITS = 10**9


class Totals(msgspec.Struct, frozen=True):
    """Sums over a set of records. The field names are those of the document. Construct it with keyword arguments.

    Attributes:
        requests: how many records there are.
        tokens_saved: input tokens that compression removed.
        tool_tokens_saved: input tokens saved by deferring tool schemas; not part of ``tokens_saved``.
        output_tokens_saved: output tokens that the model did not have to write.
        cache_read_tokens, cache_write_tokens, uncached_input_tokens: input tokens read from the provider's prompt
            cache, written to it, and neither.
        total_input_tokens: input tokens that were sent to the model, after saving.
        total_output_tokens: output tokens that the model wrote.
        compared_tokens_saved: input tokens saved by compression and by deferring tool schemas, counted only for records
            that have ``input_tokens``. Only for these records is the share of the input known.
        priced_requests: how many records have ``savings_usd``.
        costed_requests: how many records have ``input_cost_usd``.
        untold_tool_requests: how many requests come from another program's document that does not state their share of
            ``tool_tokens_saved``.
        unpriced_requests: how many records saved input tokens and have no ``savings_usd``.
        compression_savings_usd: what compression saved, in US dollars, at the prices that were paid; can be negative.
        compression_savings_list_usd: the same at list prices.
        tool_schema_savings_usd, cache_savings_usd, output_savings_usd: US dollars saved in the other ways.
        total_input_cost_usd, total_output_cost_usd: US dollars paid.
        last_activity_at: the newest record's timestamp in UTC, ISO 8601; None when there was no record.
    """

    requests: int = 0
    tokens_saved: int = 0
    tool_tokens_saved: int = 0
    output_tokens_saved: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    uncached_input_tokens: int = 0
    total_input_tokens: int = 0
    total_output_tokens: int = 0
    compared_tokens_saved: int = 0
    priced_requests: int = 0
    costed_requests: int = 0
    untold_tool_requests: int = 0
    unpriced_requests: int = 0
    compression_savings_usd: float = 0.0
    compression_savings_list_usd: float = 0.0
    tool_schema_savings_usd: float = 0.0
    cache_savings_usd: float = 0.0
    output_savings_usd: float = 0.0
    total_input_cost_usd: float = 0.0
    total_output_cost_usd: float = 0.0
    last_activity_at: str | None = None

    @property
    def is_empty(self) -> bool:
        """Whether every figure is zero. The time of the last activity does not count as a figure."""
        return self == Totals(last_activity_at=self.last_activity_at)

    def __add__(self, other: Totals) -> Totals:
        return self._plus(numbers_of(other), other.last_activity_at)

    def plus(self, numbers: Numbers, last_activity_at: str | None) -> Totals:
        """Add the numbers of records and the time of the newest of these records. Usage alone, without a record that
        saved anything, is no activity.
        """
        requests, tokens_saved = numbers[:2]
        return self._plus(numbers, last_activity_at if requests or tokens_saved else None)

    def _plus(self, numbers: Numbers, last_activity_at: str | None) -> Totals:
        old = msgspec.structs.astuple(self)
        values: list[Any] = list(map(operator.add, old, numbers[:_COUNTS]))
        for usd, units in zip(old[_COUNTS:], numbers[_COUNTS:], strict=False):
            values.append(usd_of(units_of(usd) + units) if units else usd)
        values.append(_later(self.last_activity_at, last_activity_at))
        return Totals(*values)

    def beyond(self, part: Totals) -> Totals:
        """These totals minus ``part``. Negative counts become zero."""
        rest = list(map(operator.sub, numbers_of(self), numbers_of(part)))
        values: list[Any] = [max(count, 0) for count in rest[:_COUNTS]]
        values += [*map(usd_of, rest[_COUNTS:]), self.last_activity_at]
        return Totals(*values)

    @property
    def headline_tokens_saved(self) -> int:
        """Input tokens that were not sent because of compression and deferred tool schemas."""
        return self.tokens_saved + self.tool_tokens_saved

    @property
    def savings_percent(self) -> float | None:
        """The share of the input that was saved, in percent, rounded to two digits. Only records that have
        ``input_tokens`` are included; None when there is no such record.
        """
        if not self.total_input_tokens:
            return None
        return round(self.compared_tokens_saved / (self.compared_tokens_saved + self.total_input_tokens) * 100, 2)

    @property
    def savings_usd(self) -> float | None:
        """``compression_savings_usd``; None when no record has it."""
        return self.compression_savings_usd if self.priced_requests else None

    @property
    def input_cost_usd(self) -> float | None:
        """``total_input_cost_usd``; None when no record has it."""
        return self.total_input_cost_usd if self.costed_requests else None

    @property
    def known_tool_tokens_saved(self) -> int | None:
        """``tool_tokens_saved``; None when the document does not state it for any of the requests."""
        return None if 0 < self.requests <= self.untold_tool_requests else self.tool_tokens_saved

    def with_records_of(self, parts: Totals) -> Totals:
        """These totals with ``compared_tokens_saved`` and the numbers of priced, unpriced and costed records from
        ``parts``, the sum of their parts.
        """
        return msgspec.structs.replace(
            self,
            compared_tokens_saved=parts.compared_tokens_saved,
            priced_requests=parts.priced_requests,
            costed_requests=parts.costed_requests,
            unpriced_requests=parts.unpriced_requests,
        )

    def with_assumed_records(self) -> Totals:
        """These totals with assumed numbers of priced, unpriced and costed records, for a document that does not
        contain these numbers. If a figure is zero, it is assumed that no record has it, otherwise that all records have
        it. An amount without requests and without saved tokens is a rounding difference, so no record is assumed for
        it.
        """
        records = self.requests or (1 if self.headline_tokens_saved else 0)
        return msgspec.structs.replace(
            self,
            compared_tokens_saved=self.headline_tokens_saved if self.total_input_tokens else 0,
            priced_requests=records if self.compression_savings_usd else 0,
            costed_requests=records if self.total_input_cost_usd else 0,
            unpriced_requests=records if self.headline_tokens_saved and not self.compression_savings_usd else 0,
        )


COUNTS = tuple(field.name for field in msgspec.structs.fields(Totals) if field.type is int)
AMOUNTS = tuple(field.name for field in msgspec.structs.fields(Totals) if field.type is float)
_COUNTS = len(COUNTS)

ZERO: Numbers = (0,) * (len(COUNTS) + len(AMOUNTS))
"""The numbers of zero records."""


class Part(NamedTuple):
    """The sum of some records: their numbers, and the newest timestamp in the format of ``iso_utc``."""

    numbers: Numbers
    newest: str

    def plus(self, other: Part) -> Part:
        """The sum of both parts."""
        return Part(added(self.numbers, other.numbers), max(self.newest, other.newest))


def added(some: Numbers, more: Numbers) -> Numbers:
    """The element-wise sum of two rows of numbers."""
    return tuple(map(operator.add, some, more))


def numbers_of(totals: Totals) -> Numbers:
    """Totals as integers."""
    values = msgspec.structs.astuple(totals)
    return (*values[:_COUNTS], *map(units_of, values[_COUNTS:-1]))


def units_of(usd: float) -> int:
    """US dollars as integer billionths."""
    return round(usd * _USD_UNITS)


def usd_of(units: int) -> float:
    """Billionths of a dollar as US dollars."""
    return units / _USD_UNITS


def total_of(parts: Iterable[Totals]) -> Totals:
    """The sum of several totals."""
    return sum(parts, Totals())


def iso_utc(moment: datetime) -> str:
    """A time in the format of documents: UTC, whole seconds, with ``Z``."""
    if moment.tzinfo is not timezone.utc:
        moment = moment.astimezone(timezone.utc)
    return moment.isoformat(timespec="seconds")[:19] + "Z"


def _later(one: str | None, another: str | None) -> str | None:
    return max(one or "", another or "") or None
