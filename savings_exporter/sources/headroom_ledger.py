"""Headroom's ledger ``savings_events.jsonl``: a line for each request of the proxy and each call of its MCP server.

Headroom appends lines under a lock (flock). Once the file has more than a megabyte, it removes lines older than 30
days. A line has its time in UTC. ``saved`` includes ``saved_tool_schema``, the tokens of deferred tool schemas.
"""

from __future__ import annotations

import math
import operator
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Annotated, Any, NamedTuple

import msgspec

from savings_exporter.model.figures import ZERO, Numbers, units_of
from savings_exporter.model.names import UNKNOWN, clean_name
from savings_exporter.model.record import MAX_TOKENS, MAX_USD, SavingsRecord, parse_timestamp
from savings_exporter.model.totals import AMOUNTS, COUNTS, Row
from savings_exporter.sources.building import LEAST_JUMP_TOKENS, StepBuilder
from savings_exporter.sources.lines import Block, Place, blocks, place_of
from savings_exporter.sources.source import Step

KIND = "headroom"

PROXY = "proxy"
"""The ``source`` of a line whose request is in the document, too."""

_NO_CLIENT = frozenset({UNKNOWN, PROXY, ""})
_UTC = "+00:00"
_END_OF_TIME = b'+00:00"'
_SECOND = len("2026-01-01T00:00:00")
_HOUR = len("2026-01-01T00")
_MOST_ROWS = 2000
_MOST_BYTES = 32 * 1024 * 1024


class _Cache(msgspec.Struct, gc=False):
    cr: int = 0
    cw: int = 0
    cw5: int = 0
    cw1h: int = 0
    un: int = 0


class Line(msgspec.Struct, gc=False):
    """A line of the ledger, as Headroom 0.30 to 0.42 write it."""

    ts: str
    saved: int = 0
    before: int = 0
    after: int = 0
    cost_usd: float = 0.0
    cost_effective_usd: float | None = None
    model: str = UNKNOWN
    client: str = UNKNOWN
    source: str = UNKNOWN
    provider: str | None = None
    saved_tool_schema: int = 0
    cache: _Cache | None = None

    @property
    def second(self) -> str:
        """The time, without the fraction of a second and the zone."""
        return self.ts[:_SECOND]


_Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)]
_Usd = Annotated[float, msgspec.Meta(ge=-MAX_USD, le=MAX_USD)]


class _PlainLine(Line, gc=False):
    """A line whose figures are in their usual ranges."""

    saved: Annotated[int, msgspec.Meta(ge=0, lt=LEAST_JUMP_TOKENS)] = 0
    before: _Count = 0
    after: _Count = 0
    cost_usd: _Usd = 0.0
    cost_effective_usd: _Usd | None = None
    saved_tool_schema: _Count = 0


class Numbered(NamedTuple):
    """A line with its number in the file."""

    number: int
    line: Line


_Names = tuple[str | None, str, str]

# The figures of ``Totals`` that a line has.
_FIGURES = (
    "requests",
    "tokens_saved",
    "tool_tokens_saved",
    "cache_read_tokens",
    "cache_write_tokens",
    "uncached_input_tokens",
    "total_input_tokens",
    "compared_tokens_saved",
    "priced_requests",
    "compression_savings_usd",
    "compression_savings_list_usd",
)

_DECODER = msgspec.json.Decoder(Line)
_PLAIN_DECODER = msgspec.json.Decoder(_PlainLine)
_TIMES: Callable[[Line], str] = operator.attrgetter("ts")
_NAMES: Callable[[Line], _Names] = operator.attrgetter("provider", "model", "client")
_COLUMNS: Callable[[Line], tuple[int, int, int, float, float | None, _Cache | None]] = operator.attrgetter(
    "saved", "saved_tool_schema", "after", "cost_usd", "cost_effective_usd", "cache"
)
_SAVED: Callable[[Line], int] = operator.attrgetter("saved")
_BEFORE: Callable[[Line], int] = operator.attrgetter("before")
_TOOLS: Callable[[Line], int] = operator.attrgetter("saved_tool_schema")
_TO_HOUR = operator.itemgetter(slice(0, _HOUR))


class HeadroomLedger:
    """A ledger without the document that Headroom keeps beside it: each line counts.

    Args:
        path: the ledger.
    """

    kind = KIND

    def __init__(self, path: str) -> None:
        self.path = path
        self.name = f"headroom-ledger:{os.path.realpath(path)}"

    def steps(self, state: Mapping[str, Any] | None, *, is_complete: bool) -> Iterator[Step]:
        """The lines that follow a state.

        Raises:
            SourceError: the file cannot be read.
        """
        reading = LedgerReading(state)
        for block in ledger_blocks(self.path, place_of(state), is_complete=is_complete):
            reading.add(block)
            if reading.is_large:
                step = reading.step()
                yield step
                reading = LedgerReading(step.state)
        if reading.block is not None:
            yield reading.step()


class LedgerReading:
    """Adds up blocks of a ledger for one step.

    Args:
        state: the state of the last step; None at the beginning.
        chosen: what of a line counts, or None if nothing does; without this function, all lines count.
    """

    def __init__(self, state: Mapping[str, Any] | None, chosen: Callable[[Line], Line | None] | None = None) -> None:
        self.block: Block | None = None
        self._bytes = 0
        self._newest = str((state or {}).get("newest", ""))
        self._builder = StepBuilder(state)
        self._sums = LineSums()
        self._chosen = chosen

    def add(self, block: Block) -> None:
        """Add the lines of a block."""
        self.block = block
        self._bytes += len(block.data)
        lines = _plain_lines(block) if self._chosen is None and not block.is_restart else None
        if lines:
            newest = self._sums.add(lines)
            self._newest = max(self._newest, newest[:_SECOND])
            return
        before = self._newest
        for number, line in _numbered(block, self._builder):
            # After Headroom has begun the file again, only later lines are new.
            if block.is_restart and line.second <= before:
                continue
            self._newest = max(self._newest, line.second)
            counted = line if self._chosen is None else self._chosen(line)
            if counted is not None:
                _add(self._builder, number, counted)

    def step(self, state: Mapping[str, Any] | None = None) -> Step:
        """The step with the blocks so far. Its state has further members."""
        assert self.block is not None
        self._builder.add_rows(self._sums.rows())
        members = {"place": msgspec.to_builtins(self.block.place), "newest": self._newest}
        return self._builder.build({**(state or {}), **members}, self.block.progress)

    @property
    def is_large(self) -> bool:
        """Whether the step should end here, so that memory and frames are bounded."""
        return len(self._sums) + len(self._builder) > _MOST_ROWS or self._bytes > _MOST_BYTES


def ledger_blocks(path: str, place: Place, *, is_complete: bool) -> Iterator[Block]:
    """The blocks of a ledger.

    Raises:
        SourceError: the file cannot be read.
    """
    return blocks(path, place, is_complete=is_complete, locked=True)


def row_of(provider: str | None, model: str, client: str, stamp: str, numbers: Numbers) -> Row:
    """A row with the names and the time of a line."""
    moment = parse_timestamp(stamp)
    if moment is None:
        raise ValueError(f"ts is not a time: {stamp[:40]!r}")
    return Row(
        provider=clean_name("provider", provider) or UNKNOWN,
        model=clean_name("model", model) or UNKNOWN,
        agent=_agent(client),
        source=KIND,
        newest=moment,
        requests=numbers[0],
        counts=numbers[1 : len(COUNTS)],
        units=numbers[len(COUNTS) :],
    )


def numbers_with(**figures: int) -> Numbers:
    """Numbers in which only some figures of ``Totals`` are not zero. Amounts are in billionths of a dollar."""
    values = dict(zip((*COUNTS, *AMOUNTS), ZERO, strict=True)) | figures
    return tuple(values.values())


def _plain_lines(block: Block) -> Sequence[Line] | None:
    """All lines of a block, decoded in one call; None when one of them needs a check of its own."""
    try:
        lines = _PLAIN_DECODER.decode_lines(block.data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    saved = list(map(_SAVED, lines))
    is_plain = (
        block.data.count(_END_OF_TIME) >= len(lines)
        and all(map(operator.le, saved, map(_BEFORE, lines)))
        and all(map(operator.le, map(_TOOLS, lines), saved))
    )
    return lines if is_plain else None


def _numbered(block: Block, builder: StepBuilder) -> Iterator[Numbered]:
    """The lines that can be read. Others are rejected."""
    for number, data in block.numbered():
        if not data.strip():
            continue
        try:
            line = _DECODER.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            builder.reject(f"line {number}", f"cannot be read: {error}")
            continue
        if parse_timestamp(line.ts) is None or not line.ts.endswith((_UTC, "Z")):
            builder.reject(f"line {number}", f"ts is not a time in UTC: {line.ts[:40]!r}")
            continue
        yield Numbered(number, line)


class LineSums:
    """Adds up plain lines by names and hour. Names are cleaned and times are read once for each row."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, _Names], Sequence[int]] = {}
        self._newest: dict[tuple[str, _Names], str] = {}

    def add(self, lines: Sequence[Line]) -> str:
        """Add lines, whose figures and times have been checked. Returns the time of the newest one."""
        position, latest = 0, ""
        for hour, stamps in groupby(map(_TIMES, lines), _TO_HOUR):
            times = list(stamps)
            end = position + len(times)
            newest = max(times)
            latest = max(latest, newest)
            named: defaultdict[_Names, list[Line]] = defaultdict(list)
            of_hour = lines[position:end]
            position = end
            for names, line in zip(map(_NAMES, of_hour), of_hour, strict=True):
                named[names].append(line)
            for names, group in named.items():
                key, figures = (hour, names), _figures(group)
                before = self._sums.get(key)
                self._sums[key] = figures if before is None else list(map(operator.add, before, figures))
                self._newest[key] = max(newest, self._newest.get(key, ""))
        return latest

    def rows(self) -> Iterator[Row]:
        """The sums as rows."""
        for key, figures in self._sums.items():
            _hour, names = key
            yield row_of(*names, self._newest[key], numbers_with(**dict(zip(_FIGURES, figures, strict=True))))

    def __len__(self) -> int:
        return len(self._sums)


def _figures(lines: Sequence[Line]) -> Sequence[int]:
    """The figures of some lines, in the order of ``_FIGURES``."""
    saved, tools, after, costs, effective, caches = zip(*map(_COLUMNS, lines), strict=True)
    tokens, tool_tokens = sum(saved), sum(tools)
    read = written = uncached = 0
    for cache in caches:
        if cache is not None:
            read += cache.cr
            uncached += cache.un
            split = cache.cw5 + cache.cw1h
            written += split if split > cache.cw else cache.cw
    if None in effective:
        pairs = zip(costs, effective, strict=True)
        effective = tuple([cost if exact is None else exact for cost, exact in pairs])
    return (
        len(lines),
        tokens - tool_tokens,
        tool_tokens,
        read,
        written,
        uncached,
        sum(after),
        tokens if all(after) else sum([line.saved for line in lines if line.after]),
        # A model without a price, and a line that lacks the amount, have zero.
        len(effective) - effective.count(0.0),
        _usd(effective),
        _usd(costs),
    )


def _effective_usd(line: Line) -> float:
    return line.cost_usd if line.cost_effective_usd is None else line.cost_effective_usd


def _usd(amounts: Iterable[float]) -> int:
    # Headroom rounds each amount to a millionth of a dollar, so that the sum has no error at a billionth.
    return units_of(math.fsum(amounts))


def _add(builder: StepBuilder, number: int, line: Line) -> None:
    """Add a line after checking each of its figures."""
    place, cache = f"line {number}", line.cache or _Cache()
    try:
        # The record checks the figures; what counts is the row, which also has the savings at list prices.
        SavingsRecord(
            model=line.model,
            tokens_saved=line.saved,
            tool_search_saved=line.saved_tool_schema,
            input_tokens=line.after,
            cache_read_tokens=cache.cr,
            cache_write_tokens=max(cache.cw, cache.cw5 + cache.cw1h),
            uncached_input_tokens=cache.un,
            savings_usd=_effective_usd(line),
        )
        if line.saved_tool_schema > line.saved or not -MAX_USD <= line.cost_usd <= MAX_USD:
            raise ValueError("saved_tool_schema must be at most saved")
    except (TypeError, ValueError) as error:
        builder.reject(place, str(error))
        return
    sums = LineSums()
    sums.add([line])
    (row,) = sums.rows()
    builder.add_sum(row, place, before=line.before)


def _agent(client: str) -> str | None:
    agent = clean_name("client", client)
    return None if agent in _NO_CLIENT else agent
