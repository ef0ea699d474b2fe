"""The mapping of columns, and how their values are read."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import pytest

from savings_exporter.sources.fields import parse_mapping, value_at

NOON = datetime(2026, 1, 31, 12, 0, 0, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("columns", "constants", "problem"),
    [
        ([], [], "the column of tokens_saved is missing, or those of input_before and input_tokens"),
        ([], ["tokens_saved=5"], "the column of tokens_saved is missing"),
        (["input_before=a"], [], "the column of tokens_saved is missing"),
        (["saved"], [], "'saved' is not FIELD=COLUMN, such as tokens_saved=saved"),
        (["tokens_saved="], [], "'tokens_saved=' is not FIELD=COLUMN"),
        (["=saved"], [], "'=saved' is not FIELD=COLUMN"),
        (["saved=tokens_saved"], [], "'saved' is not a field; the fields are tokens_saved, input_tokens, "),
        (["tokens_saved=a", "tokens_saved=b"], [], "tokens_saved is given twice"),
        (["tokens_saved=a", "model=b"], ["model=gpt-5"], "model has both a column and a constant"),
        (["tokens_saved=a", "input_tokens=b", "input_before=c"], [], "give two of tokens_saved, input_before and"),
        (["tokens_saved=a"], ["input_tokens=many"], "input_tokens: 'many' is not a whole number"),
        (["tokens_saved=a"], ["timestamp=today"], "timestamp: 'today' is not a time"),
        (["tokens_saved=a", "\x1b[31m=b"], [], r"'\\x1b\[31m' is not a field"),
    ],
)
def test_mapping_that_cannot_be_used(columns: Sequence[str], constants: Sequence[str], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_mapping(columns, constants)


def test_name_of_a_column_may_contain_an_equals_sign() -> None:
    assert parse_mapping(["tokens_saved = a=b"]).columns == {"tokens_saved": "a=b"}


@pytest.mark.parametrize(
    ("value", "number"), [("5", 5), (" 5 ", 5), ("+5", 5), ("5.0", 5), (5, 5), (5.0, 5), ("000", 0), (10**12, 10**12)]
)
def test_whole_numbers(value: Any, number: int) -> None:
    assert parse_mapping(["tokens_saved=a"]).parsed({"tokens_saved": value}, "x").record.tokens_saved == number


@pytest.mark.parametrize(
    "value",
    [
        "1,234",
        "1.234",
        "1.000",
        "1 234",
        "1_234",
        "1'234",
        "5.5",
        "1e3",
        "٣",
        "five",
        "-",
        "9" * 400,
        5.5,
        True,
        [5],
        {},
    ],
)
def test_what_is_no_whole_number(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^tokens_saved: .* is not a whole number, which has"):
        parse_mapping(["tokens_saved=a"]).parsed({"tokens_saved": value}, "x")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("-5", "tokens_saved must not be negative"),
        (10**13, "tokens_saved must be at most"),
        (None, "tokens_saved is missing"),
        (" ", "tokens_saved is missing"),
    ],
)
def test_savings_that_cannot_be(value: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_mapping(["tokens_saved=a"]).parsed({"tokens_saved": value}, "x")


@pytest.mark.parametrize(
    ("value", "amount"), [("0.5", 0.5), (".5", 0.5), ("-2", -2.0), ("1e-3", 0.001), (0.5, 0.5), (3, 3.0), ("", None)]
)
def test_amounts(value: Any, amount: float | None) -> None:
    fields = parse_mapping(["tokens_saved=a", "savings_usd=b"])
    assert fields.parsed({"tokens_saved": 1, "savings_usd": value}, "x").record.savings_usd == amount


@pytest.mark.parametrize("value", ["0,5", "1,234.5", "$5", "nan", "inf", "1e999", "1_0", True, [0.5]])
def test_what_is_no_amount(value: Any) -> None:
    with pytest.raises(ValueError, match=r"savings_usd: .* is not a number"):
        parse_mapping(["tokens_saved=a", "savings_usd=b"]).parsed({"tokens_saved": 1, "savings_usd": value}, "x")


@pytest.mark.parametrize(
    "value",
    [
        "2026-01-31T12:00:00Z",
        "2026-01-31 12:00",
        "2026-01-31T12:00:00,0",
        "2026-01-31T12:00:00.000000000+00:00",
        "2026-01-31T13:00:00+0100",
        "2026-01-31T13:00:00 +01",
        "2026-01-31T06:30:00.000-05:30",
        "1769860800",
        "1769860800.0",
        "1769860800000",
        1769860800,
        1769860800000,
        1769860800.0,
    ],
)
def test_times(value: Any) -> None:
    fields = parse_mapping(["tokens_saved=a", "timestamp=b"])
    assert fields.parsed({"tokens_saved": 1, "timestamp": value}, "x").record.timestamp == NOON


def test_fractions_and_days() -> None:
    fields = parse_mapping(["tokens_saved=a", "timestamp=b"])
    for value, microseconds in [("2026-01-31T12:00:00.5Z", 500_000), ("2026-01-31T12:00:00.123456789Z", 123_456)]:
        moment = fields.parsed({"tokens_saved": 1, "timestamp": value}, "x").record.timestamp
        assert moment == NOON.replace(microsecond=microseconds)
    moment = fields.parsed({"tokens_saved": 1, "timestamp": "2026-01-31"}, "x").record.timestamp
    assert moment == NOON.replace(hour=0)


@pytest.mark.parametrize(
    "value",
    ["31.01.2026", "01/31/2026 12:00", "20260131", "2026-02-31", "12:00", "1", "-5", 10**14, 1e300, True, "soon"],
)
def test_what_is_no_time(value: Any) -> None:
    with pytest.raises(ValueError, match=r"timestamp: .* is not a time in ISO 8601, or in Unix seconds"):
        parse_mapping(["tokens_saved=a", "timestamp=b"]).parsed({"tokens_saved": 1, "timestamp": value}, "x")


def test_missing_time() -> None:
    with pytest.raises(ValueError, match="timestamp is missing"):
        parse_mapping(["tokens_saved=a", "timestamp=b"]).parsed({"tokens_saved": 1, "timestamp": None}, "x")


def test_input_follows_from_the_input_before() -> None:
    fields = parse_mapping(["tokens_saved=a", "tool_search_saved=b", "input_before=c"])
    parsed = fields.parsed({"tokens_saved": 60, "tool_search_saved": 10, "input_before": 100}, "x")
    assert (parsed.record.input_tokens, parsed.before) == (30, 100)
    parsed = fields.parsed({"tokens_saved": 60, "input_before": None}, "x")
    assert (parsed.record.input_tokens, parsed.before) == (0, None)


def test_saving_follows_from_the_input_before_and_after() -> None:
    fields = parse_mapping(["input_before=a", "input_tokens=b"])
    assert fields.parsed({"input_before": 100, "input_tokens": 30}, "x").record.tokens_saved == 70
    with pytest.raises(ValueError, match="input_before is missing"):
        fields.parsed({"input_tokens": 30}, "x")
    with pytest.raises(ValueError, match="input_tokens is missing"):
        fields.parsed({"input_before": 30}, "x")


def test_names_and_constants() -> None:
    fields = parse_mapping(["tokens_saved=a", "project=b"], ["provider=openai", "output_tokens=3"])
    record = fields.parsed({"tokens_saved": 1, "project": 42}, "squeeze").record
    assert (record.model, record.provider, record.project, record.agent) == ("unknown", "openai", "42", "unknown")
    assert (record.source, record.output_tokens) == ("squeeze", 3)
    assert fields.parsed({"tokens_saved": 1, "project": ""}, "squeeze").record.project is None
    with pytest.raises(ValueError, match=r"project: .* is not a name"):
        fields.parsed({"tokens_saved": 1, "project": ["a"]}, "squeeze")


def test_paths_in_json() -> None:
    value = {"a": {"b": 1, "c.d": 2}, "a.x": 3, "e": None}
    assert [value_at(value, path) for path in ("a.b", "a.c.d", "a.x", "e", "e.f", "a.b.c", "z")] == [
        *(1, 2, 3),
        *(None, None, None, None),
    ]
