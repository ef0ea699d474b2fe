"""Token usage in OpenTelemetry metrics: which fields of a record the points are, and what is new in them.

A point is new or not by what is known of its series, which is kept in cursors. Points of delta temporality count once
for each interval, those of cumulative temporality count what they grew by. What is new is therefore exact when a
sender repeats a request, and when either side restarts.

The rules for points follow the OpenTelemetry metrics data model (Sums, Resets and Gaps, Temporality, Single-Writer).
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any, NamedTuple

import msgspec
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality, DataPointFlags

from savings_exporter import configfile
from savings_exporter.errors import SettingsError
from savings_exporter.model.names import UNKNOWN
from savings_exporter.model.record import MAX_TOKENS, SavingsRecord
from savings_exporter.model.totals import Row, Sums

SOURCE = "otlp"
"""The source of all records from OpenTelemetry metrics."""

BUCKETS = 64
"""In how many cursors the series are kept. A frame holds the cursors of the buckets that a request changes."""

MOST_SERIES = 512
"""How many series of a bucket are remembered."""

COUNTED, DUPLICATE, IGNORED, REJECTED = "counted", "duplicate", "ignored", "rejected"
OUTCOMES = (COUNTED, DUPLICATE, IGNORED, REJECTED)
"""What becomes of a point: it adds to the totals (0 is an addition, too); it is known already; its metric is none of
token usage; it cannot be counted.
"""

_MOST_PROBLEMS = 5
_MOST_RANGES = 4
_LEAST_IDLE_NANOSECONDS = 3600 * 10**9
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_DIGEST_BYTES = 8

_TOKEN_FIELDS = (
    *("input_tokens", "tokens_saved", "tool_search_saved", "output_tokens_saved", "output_tokens"),
    *("cache_read_tokens", "cache_write_tokens", "uncached_input_tokens"),
)
_MODELS = ("gen_ai.response.model", "gen_ai.request.model", "model")
_PROVIDERS = ("gen_ai.provider.name", "gen_ai.system", "provider")


class MetricMap(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which fields of a record the points of a metric are.

    Attributes:
        fields: the fields to which each point adds; empty with ``by``.
        by: the attribute that says what a point counts.
        values: the fields for each value of that attribute. Points with other values are ignored.
        provider: the provider of the models, if the points do not name it.
    """

    fields: list[str] = []
    by: str = ""
    values: dict[str, list[str]] = {}
    provider: str = ""


class _MapFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    metrics: dict[str, MetricMap]


_USAGE = "gen_ai.client.inference.usage."
METRICS: Mapping[str, MetricMap] = {
    # Anthropic counts cached input apart from "input"; the fields of a record count it in the input.
    "claude_code.token.usage": MetricMap(
        by="type",
        values={
            "input": ["input_tokens", "uncached_input_tokens"],
            "output": ["output_tokens"],
            "cacheRead": ["input_tokens", "cache_read_tokens"],
            "cacheCreation": ["input_tokens", "cache_write_tokens"],
        },
        provider="anthropic",
    ),
    "gen_ai.client.token.usage": MetricMap(
        by="gen_ai.token.type", values={"input": ["input_tokens"], "output": ["output_tokens"]}
    ),
    # Of these, the input includes what was cached.
    f"{_USAGE}input_tokens": MetricMap(fields=["input_tokens"]),
    f"{_USAGE}output_tokens": MetricMap(fields=["output_tokens"]),
    f"{_USAGE}cache_read.input_tokens": MetricMap(fields=["cache_read_tokens"]),
    f"{_USAGE}cache_write.input_tokens": MetricMap(fields=["cache_write_tokens"]),
    f"{_USAGE}cache_creation.input_tokens": MetricMap(fields=["cache_write_tokens"]),
}
"""The metrics that are known without a file."""


def metric_maps(path: str | None) -> Mapping[str, MetricMap]:
    """The known metrics, and those of a YAML file, which take precedence.

    Raises:
        SettingsError: the file cannot be read, or something in it is wrong.
    """
    if path is None:
        return METRICS
    given = configfile.converted(path, configfile.read_yaml(path), _MapFile).metrics
    for name, metric in given.items():
        if bool(metric.by) == bool(metric.fields) or bool(metric.by) != bool(metric.values):
            raise SettingsError(f"{path}: metrics.{name} needs either fields, or by and values")
        for field in (*metric.fields, *(field for fields in metric.values.values() for field in fields)):
            if field not in _TOKEN_FIELDS:
                known = ", ".join(_TOKEN_FIELDS)
                raise SettingsError(f"{path}: metrics.{name}: {field} is no field; the fields are {known}")
    return {**METRICS, **given}


class Point(NamedTuple):
    """A point of token usage.

    Attributes:
        series: the digest of what identifies the series.
        bucket: the number of the cursor that keeps the series. The kinds of tokens of one sender share a bucket.
        fields: the fields of a record to which it adds.
        names: the names of the record, as its arguments.
        is_delta: whether it counts its interval only, rather than everything since ``start``.
        start, end: the interval in nanoseconds since 1970.
        value: how many tokens.
    """

    series: str
    bucket: int
    fields: Sequence[str]
    names: Mapping[str, str | None]
    is_delta: bool
    start: int
    end: int
    value: int


class Outcome:
    """What became of the points of a request: how many of each outcome, and the first reasons for rejections."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []

    def reject(self, what: str, number: int = 1) -> None:
        """Count rejected points."""
        self.counts[REJECTED] += number
        if len(self.problems) < _MOST_PROBLEMS and what not in self.problems:
            self.problems.append(what)


def points_of(
    request: ExportMetricsServiceRequest, metrics: Mapping[str, MetricMap], outcome: Outcome
) -> Iterator[Point]:
    """The points of token usage. Others are counted in ``outcome``."""
    for of_resource in request.resource_metrics:
        resource = _attributes(of_resource.resource.attributes)
        for of_scope in of_resource.scope_metrics:
            for metric in of_scope.metrics:
                kind = metric.WhichOneof("data") or "gauge"
                data = getattr(metric, kind)
                known = metrics.get(metric.name)
                if known is None:
                    outcome.counts[IGNORED] += len(data.data_points)
                    continue
                problem = _problem_of(kind, data)
                if problem:
                    outcome.reject(f"{metric.name}: {problem}", len(data.data_points))
                    continue
                is_delta = data.aggregation_temporality == AggregationTemporality.AGGREGATION_TEMPORALITY_DELTA
                place = (resource, of_scope.scope.name, metric.name, known)
                for point in data.data_points:
                    made = _point(point, kind, place, outcome, is_delta=is_delta)
                    if made is not None:
                        yield made


def _problem_of(kind: str, data: Any) -> str:
    """Why the points of a metric cannot be counted; empty if they can."""
    if kind not in ("sum", "histogram", "exponential_histogram"):
        return f"a {kind} does not count tokens; a sum or a histogram does"
    if kind == "sum" and not data.is_monotonic:
        return "the sum is not monotonic"
    if data.aggregation_temporality == AggregationTemporality.AGGREGATION_TEMPORALITY_UNSPECIFIED:
        return "the aggregation temporality is not given"
    return ""


def _point(
    point: Any,
    kind: str,
    place: tuple[Mapping[str, AnyValue], str, str, MetricMap],
    outcome: Outcome,
    *,
    is_delta: bool,
) -> Point | None:
    resource, scope, name, known = place
    if point.flags & DataPointFlags.DATA_POINT_FLAGS_NO_RECORDED_VALUE_MASK:
        outcome.counts[IGNORED] += 1
        return None
    attributes = _attributes(point.attributes)
    fields = known.values.get(_text(attributes.get(known.by))) if known.by else known.fields
    if fields is None:
        outcome.counts[IGNORED] += 1
        return None
    value = _value(point, kind)
    start, end = point.start_time_unix_nano, point.time_unix_nano
    problem = ""
    if value is None:
        problem = f"a value must be a number from 0 to {MAX_TOKENS}"
    elif _moment(end) is None or start > end:
        problem = "a point needs a time, at or after its start time"
    elif is_delta and not start:
        problem = "a point of delta temporality needs a start time"
    if problem or value is None:
        outcome.reject(f"{name}: {problem}")
        return None
    sender = {key: text for key, text in attributes.items() if key != known.by}
    names: dict[str, str | None] = {
        "model": _first(attributes, _MODELS) or UNKNOWN,
        "provider": _first(attributes, _PROVIDERS) or known.provider or None,
        "agent": _text(resource.get("service.name")) or None,
        "project": _first(attributes, ("project",)) or _text(resource.get("project")) or None,
        "source": SOURCE,
    }
    return Point(
        series=_digest(resource, (scope, name, kind), attributes),
        bucket=int(_digest(resource, (scope,), sender), 16) % BUCKETS,
        fields=fields,
        names=names,
        is_delta=is_delta,
        start=start,
        end=end,
        value=value,
    )


def _attributes(given: Iterable[KeyValue]) -> Mapping[str, AnyValue]:
    return {attribute.key: attribute.value for attribute in given}


def _first(attributes: Mapping[str, AnyValue], names: Iterable[str]) -> str:
    return next((text for name in names if (text := _text(attributes.get(name)))), "")


def _text(value: AnyValue | None) -> str:
    return value.string_value if value is not None else ""


def _value(point: Any, kind: str) -> int | None:
    """How many tokens a point counts; None if that makes no sense. A fraction of a token is left out."""
    if kind != "sum":
        number = point.sum
    elif point.WhichOneof("value") == "as_int":
        number = point.as_int
    else:
        number = point.as_double
    return int(number) if math.isfinite(number) and 0 <= number <= MAX_TOKENS else None


def _digest(resource: Mapping[str, AnyValue], between: Sequence[str], attributes: Mapping[str, AnyValue]) -> str:
    made = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in (resource, attributes):
        for name, value in sorted(part.items()):
            for data in (name.encode(), value.SerializeToString(deterministic=True)):
                made.update(b"%d:%b" % (len(data), data))
        made.update(b"|")
    for text in between:
        made.update(b"%d:%b" % (len(text.encode()), text.encode()))
    return made.hexdigest()


def _moment(nanoseconds: int) -> datetime | None:
    try:
        return _EPOCH + timedelta(microseconds=nanoseconds // 1000) if nanoseconds else None
    except OverflowError:
        return None


class Bucket:
    """The series of one cursor, to which points are added. The state that it was made from does not change.

    Args:
        state: the state of the cursor; None for a new one.
    """

    def __init__(self, state: Mapping[str, Any] | None) -> None:
        given = state or {}
        # The ranges of time that are counted, as a list of starts and ends.
        self._deltas: dict[str, list[int]] = dict(given.get("deltas", {}))
        # The start, the end and the value of the newest point.
        self._cumulatives: dict[str, list[int]] = dict(given.get("cumulatives", {}))
        self._forgotten_to = int(given.get("forgotten_to", 0))
        self._sums = Sums()
        self.has_changed = False

    def state(self) -> Mapping[str, Any]:
        """The state of the cursor that follows."""
        return {"deltas": self._deltas, "cumulatives": self._cumulatives, "forgotten_to": self._forgotten_to}

    def rows(self) -> list[Row]:
        """What is new. Points are not requests."""
        return [msgspec.structs.replace(row, requests=0) for row in self._sums.rows()]

    def add(self, point: Point, outcome: Outcome) -> None:
        """Add what is new in a point."""
        known = self._deltas if point.is_delta else self._cumulatives
        if point.series not in known and not self._make_room(point):
            outcome.reject("too many series; leave out attributes that change, or send to another store")
            return
        new = self._new_in_delta(point) if point.is_delta else self._new_in_cumulative(point)
        if isinstance(new, str):
            outcome.reject(new)
            return
        outcome.counts[DUPLICATE if new is None else COUNTED] += 1
        if new is not None:
            self.has_changed = True
            moment = _moment(point.end)
            if new:
                counts: dict[str, Any] = dict.fromkeys(point.fields, new)
                self._sums.add_all([SavingsRecord(**{"tokens_saved": 0, **point.names, **counts, "timestamp": moment})])

    def _make_room(self, point: Point) -> bool:
        """Make room for a series by forgetting the one that has been idle longest, if that is long enough."""
        if len(self._deltas) + len(self._cumulatives) < MOST_SERIES:
            return True
        ends = [(ranges[-1], name, self._deltas) for name, ranges in self._deltas.items()]
        ends += [(newest[1], name, self._cumulatives) for name, newest in self._cumulatives.items()]
        end, name, series = min(ends, key=lambda each: each[:2])
        if end > point.end - _LEAST_IDLE_NANOSECONDS:
            return False
        del series[name]
        self._forgotten_to = max(self._forgotten_to, end)
        return True

    def _new_in_delta(self, point: Point) -> int | str | None:
        """How many tokens are new; None if the interval is known; a reason if that cannot be told."""
        ranges = self._deltas.get(point.series, [])
        pairs = list(zip(ranges[::2], ranges[1::2], strict=True))
        if any(start <= point.start and point.end <= end for start, end in pairs):
            return None
        if any(point.start < end and start < point.end for start, end in pairs):
            return (
                "an interval overlaps one that is counted: two senders have the same attributes; tell them apart, "
                "for example by service.instance.id"
            )
        if point.end <= (pairs[0][0] if len(pairs) == _MOST_RANGES else 0) or (
            not pairs and point.end <= self._forgotten_to
        ):
            return "an interval is so old that it may be counted already"
        self._deltas[point.series] = _joined([*pairs, (point.start, point.end)])
        return point.value

    def _new_in_cumulative(self, point: Point) -> int | str | None:
        """How many tokens are new; None if the point is known; a reason if that cannot be told."""
        newest = self._cumulatives.get(point.series)
        new: int | None = point.value
        if newest is None:
            # A series that was forgotten had begun before. What it counted until now may be counted already.
            new = point.value if point.start > self._forgotten_to or not self._forgotten_to else 0
        else:
            start, end, value = newest
            if point.start == start:
                if point.end <= end or point.value == value:
                    return None
                # A sender that restarts and gives the same start begins at 0 again.
                new = point.value - value if point.value >= value else point.value
            elif point.start < start:
                return "a point is of a sender that another one with the same attributes has replaced"
            elif point.start < end:
                return (
                    "a point overlaps others: two senders have the same attributes; tell them apart, for example by "
                    "service.instance.id"
                )
        self._cumulatives[point.series] = [point.start, point.end, point.value]
        return new


def _joined(pairs: Iterable[tuple[int, int]]) -> list[int]:
    """Ranges as one list, with those joined that touch. Beyond a number of them, the gaps between the oldest close."""
    ranges: list[int] = []
    for start, end in sorted(pairs):
        if ranges and start <= ranges[-1]:
            ranges[-1] = max(ranges[-1], end)
        else:
            ranges += [start, end]
    while len(ranges) > 2 * _MOST_RANGES:
        del ranges[1:3]
    return ranges
