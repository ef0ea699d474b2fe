"""One record: what is refused, with which words, and how names are cleaned."""

from __future__ import annotations

import math
from datetime import datetime, timedelta, timezone
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from savings_exporter.model.names import MAX_NAME_BYTES, clean_name, clean_project
from savings_exporter.model.record import MAX_TOKENS, MAX_USD, SavingsRecord

# Any Python string, halves of surrogate pairs included, and nests of percent-encoding on purpose.
any_text = st.text(st.characters(exclude_categories=())) | st.text(alphabet="%25a0 /e9\x00é", max_size=400)

TOKEN_FIELDS = (
    "input_tokens",
    "tokens_saved",
    "tool_search_saved",
    "output_tokens_saved",
    "output_tokens",
    "cache_read_tokens",
    "cache_write_tokens",
    "uncached_input_tokens",
)


def record(**fields: Any) -> SavingsRecord:
    return SavingsRecord(**{"model": "m", "tokens_saved": 1, **fields})


@pytest.mark.parametrize("field", TOKEN_FIELDS)
@pytest.mark.parametrize(
    ("value", "error"),
    [(value, ValueError) for value in (-1, MAX_TOKENS + 1)]
    + [(value, TypeError) for value in (True, 1.0, math.nan, "1", None, [1])],
)
def test_wrong_count_is_named(field: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{field} must"):
        record(**{field: value})


@pytest.mark.parametrize("field", ["savings_usd", "input_cost_usd"])
@pytest.mark.parametrize(
    ("value", "error"),
    [(value, ValueError) for value in (math.nan, math.inf, -math.inf, 10**400, MAX_USD * 2)]
    + [(value, TypeError) for value in (True, "1", [1])],
)
def test_wrong_amount_is_named(field: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{field} must"):
        record(**{field: value})


@pytest.mark.parametrize("field", ["model", "provider", "agent", "project", "source"])
def test_name_is_text(field: str) -> None:
    with pytest.raises(TypeError, match=rf"^{field} must be a string, not int"):
        record(**{field: 5})


@pytest.mark.parametrize("value", ["yesterday", "", "2026-13-01T00:00:00Z", "0001-01-01T00:00:00+14:00", "9" * 5000])
def test_timestamp_is_iso_8601(value: str) -> None:
    with pytest.raises(ValueError, match=r"^timestamp must be an ISO 8601 timestamp"):
        record(timestamp=value)


def test_timestamp_type() -> None:
    with pytest.raises(TypeError, match=r"^timestamp must be a datetime or an ISO 8601 string, not float"):
        record(timestamp=1.5)


def test_negative_amounts() -> None:
    assert record(savings_usd=-0.25).savings_usd == -0.25
    with pytest.raises(ValueError, match=r"^input_cost_usd must be between 0 and"):
        record(input_cost_usd=-0.25)


def test_count_of_5000_digits() -> None:
    with pytest.raises(ValueError, match=r"^tokens_saved must be at most"):
        record(tokens_saved=10**5000)
    with pytest.raises(ValueError, match=r"^tokens_saved must not be negative"):
        record(tokens_saved=-(10**5000))


def test_largest_numbers() -> None:
    largest = record(tokens_saved=MAX_TOKENS, savings_usd=MAX_USD)
    assert (largest.tokens_saved, largest.savings_usd) == (MAX_TOKENS, MAX_USD)


def test_index_is_an_integer() -> None:
    class Index:
        def __index__(self) -> int:
            return 7

    saved = record(tokens_saved=Index()).tokens_saved
    assert (saved, type(saved)) == (7, int)


def test_timestamps_in_utc() -> None:
    noon = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)
    two_hours_east = noon.astimezone(timezone(timedelta(hours=2)))
    for value in (noon, two_hours_east, noon.replace(tzinfo=None), "2026-03-01T12:00:00Z", "2026-03-01T14:00:00+02:00"):
        assert record(timestamp=value).timestamp == noon
    moment = record().timestamp
    assert moment is not None
    assert moment.tzinfo is timezone.utc


def test_missing_names() -> None:
    nameless = record(model="\x00\u202e\ud800", provider="  ", agent=None, project="\n", source="\x1b")
    assert (nameless.model, nameless.provider, nameless.agent) == ("unknown",) * 3
    assert nameless.project is nameless.source is None
    assert record(source=" head\x1broom ").source == "headroom"


@pytest.mark.parametrize(
    ("given_name", "kept"),
    [
        (" gpt-4o\n", "gpt-4o"),
        ("gpt\u202e-4o\ud800", "gpt-4o"),
        ("x" * 10_000, "x" * MAX_NAME_BYTES),
        ('quo"te\\', 'quo"te\\'),
        ("日本語", "日本語"),
        ("中" * 128, "中" * 42),
        ("a" + "é" * 100, "a" + "é" * 63),
    ],
)
def test_clean_model(given_name: str, kept: str) -> None:
    assert record(model=given_name).model == kept


@pytest.mark.parametrize(
    ("given_name", "kept"),
    [
        ("billing%20api", "billing api"),
        ("a%252520b", "a b"),
        ("100%", "100%"),
        ("donn%C3%A9es", "données"),
        ("%0a%00", None),
        ("%" * 9_999, "%" * MAX_NAME_BYTES),
        ("a%4g%C3b", "a%4g\ufffdb"),
        ("%4%001", "A"),
        ("a%25252520b", "a20b"),
        ("%25252500", "00"),
        ("%" + "25" * 60 + "41", "25" * 57 + "41"),
        ("%3" * 60 + "%32%20", "3" * 58 + "2"),
    ],
)
def test_decoded_project(given_name: str, kept: str | None) -> None:
    assert record(project=given_name).project == kept


@given(any_text)
def test_clean_name_is_stable(text: str) -> None:
    name = clean_name("model", text)
    assert clean_name("model", name) == name
    assert len(name.encode()) <= MAX_NAME_BYTES
    assert name.isprintable()


@given(st.text(alphabet="%2530a4 /e9\x00é", max_size=400), st.integers(0, 3))
def test_encoded_project_is_the_same(text: str, times: int) -> None:
    name = clean_project(text) or "web"
    encoded = name
    for _ in range(times):
        encoded = quote(encoded)
    assert len(encoded) > MAX_NAME_BYTES or clean_project(encoded) == name


@given(any_text)
def test_clean_project_is_stable(text: str) -> None:
    name = clean_project(text)
    assert clean_project(name) == name
    assert name is None or (0 < len(name.encode()) <= MAX_NAME_BYTES and name.isprintable())
