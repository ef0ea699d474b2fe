"""Headroom: its document ``proxy_savings.json``, and the ledger ``savings_events.jsonl`` beside it.

The document is the measure of what Headroom's proxy saved. Headroom's proxy saves it after each 25 requests, so the
newest savings are only in the ledger, and a crash loses them in the document for good. A line of the ledger therefore
counts at once, as an *event*. When the document contains a point with the same model and the same savings, this event
is left out of what the document adds. Lines of Headroom's MCP server are only in the ledger, and all of them count.
"""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

import msgspec

from savings_exporter.formats.headroom import MOST_BYTES
from savings_exporter.model.cursors import JUMP
from savings_exporter.model.record import parse_timestamp, shifted
from savings_exporter.model.totals import Row, Sums
from savings_exporter.sources import headroom_document
from savings_exporter.sources.building import StepBuilder
from savings_exporter.sources.headroom_document import KIND, Change, Event, Seen, event_of
from savings_exporter.sources.headroom_ledger import PROXY, HeadroomLedger, LedgerReading, Line, ledger_blocks
from savings_exporter.sources.lines import place_of
from savings_exporter.sources.source import Progress, SourceError, Step
from savings_exporter.storage.filesystem import LOCAL, Identity

DOCUMENT_NAME = "proxy_savings.json"
LEDGER_NAME = "savings_events.jsonl"

# Lines that are older than the document's last point by this much are in the document.
_LATEST = timedelta(minutes=2)
# How much later than its point a line can be. Both belong to the same request.
_DELAY = timedelta(minutes=1)
# A line that the document does not contain after this time was lost by Headroom.
_LOST = timedelta(hours=1)

# How many events wait for their counterpart. While more lines wait for the document, the ledger is not read further.
_MOST_EVENTS = 1000


class _Waiting(msgspec.Struct, frozen=True, omit_defaults=True):
    """The state of the events.

    Attributes:
        lines: events of the ledger that count and that the document does not contain yet.
        points: events of the document whose line was not read yet, from ``since`` on.
        since: lines before this second are in the document.
    """

    lines: list[Event] = []
    points: list[Event] = []
    since: str = ""


class Headroom:
    """The savings of one Headroom, from its document and its ledger.

    Args:
        document: the path of ``proxy_savings.json``.
        ledger: the path of the ledger; None for the one beside the document.
    """

    kind = KIND

    def __init__(self, document: str, ledger: str | None = None) -> None:
        self.path = document
        self.name = f"headroom:{os.path.realpath(document)}"
        self._ledger = ledger or os.path.join(os.path.dirname(document), LEDGER_NAME)
        self._identity: Identity | None = None
        # The document, and what was seen of it, when it had nothing new.
        self._unchanged: tuple[Identity | None, Any] | None = None

    def steps(self, state: Mapping[str, Any] | None, *, is_complete: bool) -> Iterator[Step]:
        """What the document and the ledger have more than before.

        Raises:
            SourceError: one of the files cannot be read. The other one is read all the same.
        """
        problem = None
        try:
            step = self._document_step(state)
            if step is not None:
                identity = self._identity
                yield step
                state = step.state
                self._unchanged = identity, state["seen"]
        except SourceError as error:
            problem = error
        if state is not None and os.path.exists(self._ledger):
            yield from self._ledger_steps(state, is_complete=is_complete)
        if problem is not None:
            raise problem

    def _document_step(self, state: Mapping[str, Any] | None) -> Step | None:
        try:
            identity = LOCAL.identity(self.path)
            if identity is None and state is not None:
                # Headroom has not begun again yet.
                return None
            if state is not None and (identity, state["seen"]) == self._unchanged:
                return None
            if identity is not None and identity.size > MOST_BYTES:
                said = f"has {identity.size:,} bytes, and at most {MOST_BYTES:,} are read"
                raise SourceError(f"{self.path}: {said}", path=self.path)
            data, self._identity = LOCAL.read(self.path)
        except OSError as error:
            raise SourceError(f"{self.path}: cannot be read: {error.strerror}", path=self.path) from None
        version = headroom_document.read(self.path, data)
        seen = msgspec.convert(state["seen"], Seen) if state is not None and "seen" in state else None
        waiting = _waiting(state)
        change = headroom_document.change_of(seen, version, waiting.lines, datetime.now(timezone.utc))
        if state is not None and change.seen == seen and not change.rows and not change.projects:
            self._unchanged = self._identity, state["seen"]
            return None
        builder = StepBuilder(state)
        rows = _merged(change.rows)
        if seen is not None and builder.is_jump(sum(row.counts[0] for row in rows)):
            builder.keep_out(f"the change of {change.seen.stamp or 'the document'}", JUMP, rows)
            projects: Sequence[Row] = ()
        else:
            builder.add_rows(rows)
            projects = change.projects
        members = {
            **(state or {}),
            "seen": msgspec.to_builtins(change.seen),
            "waiting": msgspec.to_builtins(_after(waiting, change)),
        }
        return builder.build(members, Progress(len(data), len(data)), projects)

    def _ledger_steps(self, state: Mapping[str, Any], *, is_complete: bool) -> Iterator[Step]:
        waiting, reading = _LedgerEvents(_waiting(state)), None
        for block in ledger_blocks(self._ledger, place_of(state), is_complete=is_complete):
            reading = reading or LedgerReading(state, waiting.chosen)
            reading.add(block)
            if reading.is_large:
                step = reading.step({**state, "waiting": msgspec.to_builtins(waiting.waiting())})
                yield step
                state, reading = step.state, None
            if waiting.is_full:
                break
        if reading is not None:
            yield reading.step({**state, "waiting": msgspec.to_builtins(waiting.waiting())})


class _LedgerEvents:
    """Compares lines of the ledger with the points of the document."""

    def __init__(self, waiting: _Waiting) -> None:
        self._since = waiting.since
        self._lines = list(waiting.lines)
        self._points: defaultdict[tuple[str, int, int], list[Event]] = defaultdict(list)
        for event in waiting.points:
            self._points[event.kind].append(event)

    @property
    def is_full(self) -> bool:
        """Whether too many lines wait for the document."""
        return len(self._lines) >= _MOST_EVENTS

    def chosen(self, line: Line) -> Line | None:
        """What of a line counts. The document adds the other figures of the proxy's requests when it contains them."""
        if line.source != PROXY:
            return line
        if not line.saved:
            return None
        event = event_of(line.second, line.model, line.saved - line.saved_tool_schema, line.saved_tool_schema)
        points = self._points[event.kind]
        earliest = _second(shifted(_moment(event.second), -_DELAY))
        for position, point in enumerate(points):
            if earliest <= point.second <= event.second:
                del points[position]
                return None
        if event.second < self._since:
            return None
        self._lines.append(event)
        return msgspec.structs.replace(
            line, before=max(line.before, line.saved), after=0, cost_usd=0.0, cost_effective_usd=None, cache=None
        )

    def waiting(self) -> _Waiting:
        """The events that still wait."""
        points = sorted(itertools.chain.from_iterable(self._points.values()))
        return _Waiting(self._lines, points, self._since)


def _after(waiting: _Waiting, change: Change) -> _Waiting:
    """The events that wait after the document was read."""
    newest = parse_timestamp(change.seen.stamp)
    if newest is None:
        return waiting
    since = max(waiting.since, _second(shifted(newest, -_LATEST)))
    lines = list(waiting.lines)
    for event in change.counted:
        lines.remove(event)
    # Events that Headroom has lost. They stay counted.
    lines = [event for event in lines if event.second >= _second(shifted(newest, -_LOST))]
    points = sorted([*waiting.points, *change.events])
    if len(points) > _MOST_EVENTS:
        points = points[-_MOST_EVENTS:]
        since = max(since, _second(shifted(_moment(points[0].second), _DELAY)))
    # A line can be a little later than its point.
    points = [event for event in points if event.second >= _second(shifted(_moment(since), -_DELAY))]
    return _Waiting(lines, points, since)


def _waiting(state: Mapping[str, Any] | None) -> _Waiting:
    return msgspec.convert((state or {}).get("waiting", {}), _Waiting)


def _merged(rows: Sequence[Row]) -> list[Row]:
    sums = Sums()
    sums.add_rows(rows)
    return sums.rows()


def _second(moment: datetime) -> str:
    # strftime() does not pad the year everywhere.
    return moment.replace(tzinfo=None).isoformat(timespec="seconds")


def _moment(second: str) -> datetime:
    moment = parse_timestamp(second)
    assert moment is not None
    return moment


__all__ = ["DOCUMENT_NAME", "LEDGER_NAME", "Headroom", "HeadroomLedger"]
