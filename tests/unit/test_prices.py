"""Prices of records: the arithmetic, the names of providers and models, and the file of a user."""

from __future__ import annotations

import itertools
import logging
import os
import sys
import tracemalloc
from datetime import datetime, timedelta, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from genai_prices import Usage
from genai_prices.data import providers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from savings_exporter.errors import SettingsError
from savings_exporter.model.pricing import MOST_BASES, PriceBasis, merged_bases
from savings_exporter.model.record import MAX_TOKENS, SavingsRecord
from savings_exporter.prices import Prices, load_prices

NOW = datetime(2026, 6, 15, 12, 30, tzinfo=timezone.utc)

Amounts = tuple[float | None, float | None, float | None]


@pytest.fixture(scope="module")
def library() -> Prices:
    return loaded(None)


def loaded(path: Path | None) -> Prices:
    prices = load_prices(None if path is None else str(path))
    assert prices is not None
    return prices


def file_of(directory: Path, text: str) -> Path:
    path = directory / "prices.yml"
    path.write_text(text)
    return path


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the extra was not installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "genai_prices"]:
        monkeypatch.setitem(sys.modules, name, None)


def record(
    model: str = "m", provider: str | None = None, tokens_saved: int = 1_000_000, **fields: Any
) -> SavingsRecord:
    return SavingsRecord(
        **{"timestamp": NOW, **fields, "model": model, "provider": provider, "tokens_saved": tokens_saved}
    )


def amounts(prices: Prices, priced: SavingsRecord) -> Amounts:
    """``savings_usd``, ``cache_savings_usd`` and ``input_cost_usd``."""
    (result,) = prices.priced([priced])
    return result.savings_usd, result.cache_savings_usd, result.input_cost_usd


# The arithmetic. The rates are those that the providers publish, in US dollars per million tokens.


def test_model_with_cache(library: Prices) -> None:
    """Claude Sonnet 4.5: 3 for input, 0.30 for reading from the cache, 3.75 for writing to it."""
    sent = record(
        "claude-sonnet-4-5", "anthropic", 4096, input_tokens=12_000, cache_read_tokens=2000, cache_write_tokens=1000
    )
    # 4096 x 3; 2000 x (3 - 0.30); 9000 x 3 + 2000 x 0.30 + 1000 x 3.75
    assert amounts(library, sent) == (0.012288, 0.0054, 0.03135)


def test_model_with_tiers(library: Prices) -> None:
    """Gemini 2.5 Pro: 1.25 for input and 10 for output, in requests of more than 200,000 tokens 2.50 and 15."""
    below = record(
        "gemini-2.5-pro", "google", 40_000, tool_search_saved=10_000, input_tokens=150_000, output_tokens=1000
    )
    # 50,000 x 1.25: with 200,000 tokens, the request is not above the limit.
    assert amounts(library, below) == (0.0625, None, 0.1875)
    across = record(
        "gemini-2.5-pro", "google", 60_000, tool_search_saved=10_000, input_tokens=150_000, output_tokens=1000
    )
    # (220,000 x 2.50 + 1000 x 15) - (150,000 x 1.25 + 1000 x 10)
    assert amounts(library, across) == (0.3675, None, 0.1875)
    above = record("gemini-2.5-pro", "google", 50_000, input_tokens=250_000, output_tokens=1000)
    assert amounts(library, above) == (0.125, None, 0.625)


def test_model_without_a_price(library: Prices) -> None:
    unknown = record("some-private-model", "openai", input_tokens=5, cache_read_tokens=5)
    assert library.priced([unknown])[0] is unknown


def test_model_without_a_rate_of_input_tokens(library: Prices) -> None:
    """Whisper is paid by the minute."""
    assert amounts(library, record("whisper-1", "openai")) == (None, None, None)


def test_saving_of_nothing_costs_nothing(library: Prices) -> None:
    assert amounts(library, record("gpt-5", "openai", 0, output_tokens_saved=9)) == (0.0, None, None)


def test_input_that_is_not_known(library: Prices) -> None:
    """GPT-5: 1.25 for input, 0.125 for reading from the cache."""
    assert amounts(library, record("gpt-5", "openai", 8000)) == (0.01, None, None)
    # The parts that the provider reported are at least what was sent.
    parts = record("gpt-5", "openai", 8000, input_tokens=10, cache_read_tokens=4000, uncached_input_tokens=2000)
    assert amounts(library, parts) == (0.01, 0.0045, 0.003)


def test_given_amounts_stay(library: Prices) -> None:
    given_saving = record("gpt-5", "openai", 8000, input_tokens=10, savings_usd=-0.5)
    assert library.priced([given_saving])[0] is given_saving
    others = {"cache_savings_usd": 0.25, "input_cost_usd": 0.5}
    assert amounts(library, record("gpt-5", "openai", 8000, cache_read_tokens=8, **others)) == (0.01, 0.25, 0.5)


def test_amount_beyond_the_limit_of_records(tmp_path: Path) -> None:
    prices = loaded(file_of(tmp_path, "models: {m: {input: 1000000}}"))
    assert amounts(prices, record(tokens_saved=MAX_TOKENS)) == (None, None, None)


USAGES = [
    {"input_tokens": input_tokens, "cache_read_tokens": reads, "cache_write_tokens": writes, "output_tokens": 700}
    for input_tokens, reads, writes in ((90_000, 0, 0), (190_000, 20_000, 3000), (600_000, 20_000, 0))
]
TIMES = [NOW.replace(year=2024, hour=20), datetime(2027, 2, 1, tzinfo=timezone.utc)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["anthropic", "aws", "azure", "deepseek", "google", "openai", "x-ai"])
def test_same_price_as_the_library(library: Prices, name: str) -> None:
    """The library's own arithmetic, for each model at times with different prices."""
    compared = 0
    (provider,) = [provider for provider in providers if provider.id == name]
    for model, usage, moment in itertools.product(provider.models, USAGES, TIMES):
        # One name can match two models. Some models are priced by other things than tokens.
        if provider.find_model(model.id) is not model or model.get_prices(moment).input_mtok is None:
            continue
        more = {**usage, "input_tokens": usage["input_tokens"] + 40_000}
        before, after = (
            model.calc_price(Usage(**each), provider, genai_request_timestamp=moment) for each in (more, usage)
        )
        saved, _, cost = amounts(library, record(model.id, provider.id, 40_000, **usage, timestamp=moment))
        assert saved == pytest.approx(float(before.total_price - after.total_price), abs=2e-9), (model.id, usage)
        assert cost == pytest.approx(float(after.input_price), abs=2e-9), (model.id, usage)
        compared += 1
    assert compared


# Names.


@pytest.mark.parametrize(
    ("provider", "model", "usd"),
    [
        (None, "claude-sonnet-4-5", 3.0),
        ("unknown", "claude-sonnet-4-5-20250929", 3.0),
        ("Anthropic", "claude-sonnet-4-5", 3.0),
        ("anthropic", "anthropic/claude-sonnet-4-5", 3.0),
        ("bedrock", "anthropic.claude-3-haiku-20240307-v1:0", 0.25),
        ("bedrock", "bedrock/anthropic.claude-3-haiku-20240307-v1:0", 0.25),
        ("aws.bedrock", "anthropic.claude-3-haiku-20240307-v1:0", 0.25),
        ("vertex_ai", "claude-3-haiku@20240307", 0.25),
        ("openai", "gpt-4o-mini", 0.15),
        ("openai", "openai/gpt-4o-mini", 0.15),
        ("azure", "gpt-4o-mini", 0.15),
        ("azure", "azure/gpt-4o-mini", 0.15),
        ("azure_ai", "gpt-4o-mini", 0.15),
        ("azure.ai.openai", "gpt-4o-mini", 0.15),
        (None, "azure/gpt-4o-mini", 0.15),
        ("litellm_proxy", "gpt-4o-mini", 0.15),
        # With a million tokens, the rate of large requests applies.
        ("google", "gemini-2.5-pro", 2.5),
        ("gemini", "gemini/gemini-2.5-pro", 2.5),
        ("vertex_ai", "gemini-2.5-pro", 2.5),
        ("gcp.gemini", "gemini-2.5-pro", 2.5),
        # The provider is another one than the name says, so its price is not known.
        ("ollama", "gpt-4o-mini", None),
        ("anthropic", "openai/gpt-4o-mini", None),
    ],
)
def test_names_of_proxies(library: Prices, provider: str | None, model: str, usd: float | None) -> None:
    tokens = 1_000_000 if model.endswith("pro") else 100_000
    saved, _, _ = amounts(library, record(model, provider, tokens))
    assert saved == (None if usd is None else usd * tokens / 1e6)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(),
    st.none() | st.text() | st.sampled_from([provider.id for provider in providers]),
    st.sampled_from(["", "claude-", "gpt-4o", "gemini-", "azure/", "openai/gpt-4o", "-20251399", "us.anthropic."]),
    st.datetimes(timezones=st.just(timezone.utc)),
    st.lists(st.integers(0, MAX_TOKENS), min_size=6, max_size=6),
)
def test_any_record(
    library: Prices,
    caplog: pytest.LogCaptureFixture,
    name: str,
    provider: str | None,
    part: str,
    at: datetime,
    tokens: list[int],
) -> None:
    fields = ("input_tokens", "tool_search_saved", "output_tokens", "cache_read_tokens", "cache_write_tokens")
    for model in (name + part, part + name):
        given_record = record(model, provider, tokens[0], timestamp=at, **dict(zip(fields, tokens[1:], strict=True)))
        (priced,) = library.priced([given_record])
        assert (priced.model, priced.tokens_saved) == (given_record.model, given_record.tokens_saved)
    assert not caplog.records


def test_memory_for_names(library: Prices) -> None:
    """The library itself would remember them all."""

    def after(first: int, last: int) -> int:
        for number in range(first, last):
            library.priced([record(f"made-up-{number}", "openai")])
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        assert after(1500, 5000) - after(0, 1500) < 100_000
    finally:
        tracemalloc.stop()


class Broken:
    """Prices whose lookup fails."""

    name = "broken"

    def find(self, provider: str, model: str) -> None:
        raise OverflowError(provider)


def test_error_of_a_lookup(caplog: pytest.LogCaptureFixture) -> None:
    given_record = record()
    prices = Prices([Broken()])
    with caplog.at_level(logging.ERROR):
        assert prices.priced([given_record, given_record]) == [given_record, given_record]
    assert [entry.getMessage().partition(";")[0] for entry in caplog.records] == ["a record was not priced"]


# The file of a user.

OWN = """
models:
  gpt-5: {input: 2, cache_read: 0.5, cache_write: 3, output: 4}
  GPT-*: {input: 7}
  "*private*": {input: 0.25}
"""
RANGE = "must be 0 to 1,000,000 US dollars per million tokens"


def test_own_prices(tmp_path: Path) -> None:
    prices = loaded(file_of(tmp_path, OWN))
    sent = record("GPT-5", "any", 8000, input_tokens=10_000, cache_read_tokens=4000, cache_write_tokens=1000)
    # 8000 x 2; 4000 x (2 - 0.5); 5000 x 2 + 4000 x 0.5 + 1000 x 3
    assert amounts(prices, sent) == (0.016, 0.006, 0.015)
    # Without rates for the cache, its tokens cost as much as others.
    assert amounts(prices, record("gpt-4o", "openai", 1000, input_tokens=9, cache_read_tokens=9)) == (
        0.007,
        0,
        0.000063,
    )
    assert amounts(prices, record("my-private-model", tokens_saved=1000)) == (0.00025, None, None)
    # Other models have the library's price.
    assert amounts(prices, record("claude-sonnet-4-5", "anthropic", 1000)) == (0.003, None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the content must be an object, not null"),
        ("models: [", "is not YAML: "),
        ("models: {}", "models has no entries; name at least one model with its input price"),
        ("prices: {}", "the content has an unknown field prices; the fields are models"),
        ("models: {4: {input: 1}}", "models: '4': the name of a model must be text, in quotes"),
        ("models: {m: 3}", "models: 'm': the content must be an object, not an integer"),
        ("models: {m: {output: 3}}", "models: 'm': the content lacks the field input"),
        ("models: {m: {input: free}}", "models: 'm': input must be a number, not text"),
        ("models: {m: {input: true}}", "models: 'm': input must be a number, not true or false"),
        ("models: {m: {input: -1}}", f"models: 'm': input {RANGE}, not -1"),
        ("models: {m: {input: 1, output: .nan}}", f"models: 'm': output {RANGE}, not nan"),
        ("models: {m: {input: 1, cache_read: .inf}}", f"models: 'm': cache_read {RANGE}, not inf"),
        (
            "models: {m: {input: 1, cached: 1}}",
            "models: 'm': the content has an unknown field cached; the fields are input",
        ),
        ('models: {"\\e[2Jm": {}}', "models: '\\x1b[2Jm': the content lacks the field input"),
    ],
)
def test_wrong_file(tmp_path: Path, text: str, message: str) -> None:
    path = file_of(tmp_path, text)
    with pytest.raises(SettingsError) as caught:
        load_prices(str(path))
    assert str(caught.value).startswith(f"{path}: {message}")


def test_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"prices\.yml: cannot be read: No such file"):
        load_prices(str(tmp_path / "prices.yml"))


# The basis.


def test_basis_of_a_file(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path = file_of(tmp_path, OWN)
    os.utime(path, (NOW.timestamp(), NOW.timestamp()))
    with_library = loaded(path).basis.prices
    request.getfixturevalue("no_library")
    alone = loaded(path)
    assert alone.basis.prices.startswith("prices.yml of 2026-06-15 (sha256 ")
    assert with_library == f"{alone.basis.prices}, then genai-prices {version('genai-prices')}"
    assert datetime.now(timezone.utc) - datetime.fromisoformat(alone.basis.since.replace("Z", "+00:00")) < timedelta(
        hours=1
    )
    assert amounts(alone, record("claude-sonnet-4-5", "anthropic")) == (None, None, None)
    path.write_text(OWN.replace("0.25", "0.5"))
    assert loaded(path).basis.prices.rpartition("sha256")[2] != alone.basis.prices.rpartition("sha256")[2]


@pytest.mark.usefixtures("no_library")
def test_without_library_and_file() -> None:
    assert load_prices() is None


def test_bases_are_merged_in_any_order() -> None:
    old, new = PriceBasis("a", "2026-01-01T00:00:00Z"), PriceBasis("b", "2026-02-01T00:00:00Z")
    again = PriceBasis("a", "2026-03-01T00:00:00Z")
    for order in itertools.permutations(([old], [new], [again])):
        assert merged_bases(*order) == (old, new)
    many = [PriceBasis(f"{number}", f"2026-01-01T00:{number:02}:00Z") for number in range(MOST_BASES + 5)]
    assert merged_bases(many) == tuple(many[5:])
