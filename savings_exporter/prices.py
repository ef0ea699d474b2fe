"""What a record saved in US dollars, from the prices of genai-prices and of a file of the user.

The library is an extra. It knows the models' names, the providers' names and the rates; the arithmetic is here, because
a file of the user needs no library.
"""

from __future__ import annotations

import fnmatch
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import lru_cache
from hashlib import sha256
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec

from savings_exporter.configfile import converted, read_yaml
from savings_exporter.errors import SettingsError
from savings_exporter.model.figures import iso_utc
from savings_exporter.model.names import UNKNOWN, clean_name
from savings_exporter.model.pricing import PriceBasis
from savings_exporter.model.record import MAX_USD, SavingsRecord
from savings_exporter.wording import WrongValue

if TYPE_CHECKING:
    from genai_prices.types import ModelInfo, ModelPrice, Provider

logger = logging.getLogger(__name__)

LIBRARY = "genai-prices"

# How many pairs of provider and model are remembered, with or without a price. Clients can send any number of names.
_MOST_FOUND = 1024

_MTOK = 1_000_000
# A store keeps amounts in billionths of a dollar.
_DIGITS = 9
_MOST_SHOWN = 64

# Providers that the library knows under another name only: those of LiteLLM and of OpenTelemetry's conventions.
_PROVIDERS = {"azure_ai": "azure", "fireworks_ai": "fireworks", "litellm_proxy": "litellm", "x_ai": "x-ai"}
# With this provider, the library takes the provider from the model's name.
_ANY_PROVIDER = "litellm"

_HIGHEST_RATE = 1_000_000


class Rates(NamedTuple):
    """US dollars per million tokens, in requests with more than ``above`` input tokens."""

    above: int
    input: float
    cache_read: float
    cache_write: float
    output: float


Price = Sequence[Rates]
"""A model's rates at one time, in ascending order of ``above``. The first one has ``above`` -1."""


class _OwnPrice(msgspec.Struct, forbid_unknown_fields=True):
    input: float
    cache_read: float | None = None
    cache_write: float | None = None
    output: float = 0.0

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            rate = getattr(self, name)
            if rate is not None and not 0 <= rate <= _HIGHEST_RATE:
                raise ValueError(f"{name} must be 0 to {_HIGHEST_RATE:,} US dollars per million tokens, not {rate}")

    def price(self) -> Price:
        return [_rates_of(-1, self.input, self.cache_read, self.cache_write, self.output)]


class _OwnFile(msgspec.Struct, forbid_unknown_fields=True):
    models: dict[Any, Any]


class _Found(NamedTuple):
    """The prices of a model: each with the condition under which it applies. The last one that applies counts."""

    prices: Sequence[tuple[Callable[[datetime], bool] | None, Price]]

    def at(self, moment: datetime) -> Price:
        for applies, price in reversed(self.prices):
            if applies is None or applies(moment):
                return price
        return self.prices[0][1]


class _Prices(Protocol):
    """One origin of prices."""

    name: str

    def find(self, provider: str, model: str) -> _Found | None: ...


class Prices:
    """Prices, and the amounts of records that follow from them. ``load_prices`` makes one.

    Attributes:
        basis: which prices these are.
    """

    def __init__(self, origins: Sequence[_Prices]) -> None:
        self.basis = PriceBasis(", then ".join(origin.name for origin in origins), iso_utc(datetime.now(timezone.utc)))
        self._origins = origins
        self._found = lru_cache(_MOST_FOUND)(self._find)
        self._has_failed = False

    def priced(self, records: Sequence[SavingsRecord]) -> Sequence[SavingsRecord]:
        """The records, with amounts where ``savings_usd`` is not given and the model has a price. Never raises."""
        return [record if record.savings_usd is not None else self._priced(record) for record in records]

    def _priced(self, record: SavingsRecord) -> SavingsRecord:
        assert record.timestamp is not None  # a record without a time gets the current one
        try:
            found = self._found(record.provider or UNKNOWN, record.model)
            return record if found is None else with_amounts(record, found.at(record.timestamp))
        except Exception:
            # The library is given names and times of clients. Without a price, the record is counted all the same.
            if not self._has_failed:
                self._has_failed = True
                logger.exception("a record was not priced; further errors of this kind are not logged")
            return record

    def _find(self, provider: str, model: str) -> _Found | None:
        return next((found for origin in self._origins if (found := origin.find(provider, model)) is not None), None)


def load_prices(path: str | None = None) -> Prices | None:
    """The prices of a YAML file, and those of the library if it is installed; None when there are neither. The prices
    of the file take precedence.

    Raises:
        SettingsError: the file is wrong, or the library cannot be used.
    """
    origins: list[_Prices] = [_OwnPrices(path)] if path is not None else []
    try:
        origins.append(_Library())
    except ModuleNotFoundError:
        pass
    except ImportError as error:
        raise SettingsError(f"{LIBRARY} {metadata.version(LIBRARY)} cannot be used: {error}") from None
    return Prices(origins) if origins else None


def with_amounts(record: SavingsRecord, price: Price) -> SavingsRecord:
    """A record with the amounts that follow from a price. Amounts that are given stay.

    The saving is the price of the request without the saving, minus its price with it. A rate that depends on the size
    of the request is therefore the right one for both. The saved tokens would have been sent at the rate of uncached
    input.
    """
    if not price:
        return record
    reads, writes = record.cache_read_tokens, record.cache_write_tokens
    # A proxy may count the input itself, and the provider the parts of it.
    tokens = max(record.input_tokens, reads + writes + record.uncached_input_tokens)
    before, after = tokens + record.tokens_saved + record.tool_search_saved, tokens
    rates = _rates(price, after)
    input_cost = _input_cost(rates, after, reads, writes)
    rates_before = _rates(price, before)
    saved = _input_cost(rates_before, before, reads, writes) - input_cost
    saved += (rates_before.output - rates.output) * record.output_tokens
    cached = max(rates.input - rates.cache_read, 0) * reads
    amounts: dict[str, float] = {"savings_usd": saved}
    if record.cache_savings_usd is None and reads:
        amounts["cache_savings_usd"] = cached
    if record.input_cost_usd is None and tokens:
        amounts["input_cost_usd"] = input_cost
    amounts = {name: round(amount / _MTOK, _DIGITS) for name, amount in amounts.items()}
    if max(map(abs, amounts.values())) > MAX_USD:
        return record
    return msgspec.structs.replace(record, **amounts)


def _input_cost(rates: Rates, tokens: int, reads: int, writes: int) -> float:
    """What input costs, in millionths of a dollar."""
    return rates.input * (tokens - reads - writes) + rates.cache_read * reads + rates.cache_write * writes


def _rates(price: Price, tokens: int) -> Rates:
    """The rates of a request with this number of input tokens."""
    rates = price[0]
    for higher in price[1:]:
        if tokens > higher.above:
            rates = higher
    return rates


class _OwnPrices:
    """The prices of a file, by the names of models or by patterns of names."""

    def __init__(self, path: str) -> None:
        path = os.path.expanduser(path)
        models = converted(path, read_yaml(path), _OwnFile).models
        if not models:
            raise SettingsError(f"{path}: models has no entries; name at least one model with its input price")
        prices = {_name(path, name).lower(): _own_price(path, name, entry) for name, entry in models.items()}
        checksum = sha256(msgspec.json.encode(prices)).hexdigest()[:12]
        file_name = clean_name("prices", os.path.basename(path)) or UNKNOWN
        self.name = f"{file_name} of {_day_of_change(path)} (sha256 {checksum})"
        self._exact: Mapping[str, Price] = {name: entry.price() for name, entry in prices.items()}
        self._patterns = [
            (re.compile(fnmatch.translate(name)), entry.price())
            for name, entry in prices.items()
            if set(name) & set("*?[")
        ]

    def find(self, _provider: str, model: str) -> _Found | None:
        name = model.lower()
        price = self._exact.get(name) or next((price for pattern, price in self._patterns if pattern.match(name)), None)
        return None if price is None else _Found([(None, price)])


def _name(path: str, name: Any) -> str:
    if not isinstance(name, str):
        raise SettingsError(f"{path}: models: {str(name)[:_MOST_SHOWN]!r}: the name of a model must be text, in quotes")
    return name


def _day_of_change(path: str) -> str:
    try:
        return f"{datetime.fromtimestamp(os.stat(path).st_mtime, timezone.utc).date()}"
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, OverflowError):
        # Some file systems keep times after the year 9999.
        return "an unknown day"


def _own_price(path: str, name: str, entry: Any) -> _OwnPrice:
    try:
        return msgspec.convert(entry, _OwnPrice)
    except msgspec.ValidationError as error:
        raise SettingsError(f"{path}: models: {name[:_MOST_SHOWN]!r}: {WrongValue(error, _OwnPrice).text}") from None


class _Library:
    """The prices that come with the installed version of the library. It publishes no date of them."""

    def __init__(self) -> None:
        # Imported here, because it takes a tenth of a second.
        from genai_prices.data import providers
        from genai_prices.data_snapshot import DataSnapshot, find_provider_by_id

        self.name = f"{LIBRARY} {metadata.version(LIBRARY)}"
        self._providers: list[Provider] = providers
        self._provider = find_provider_by_id
        self._snapshot = DataSnapshot

    def find(self, provider: str, model: str) -> _Found | None:
        known = _ANY_PROVIDER if provider == UNKNOWN else _PROVIDERS.get(provider.lower(), provider)
        info = self._model(known, model)
        if info is None and known != _ANY_PROVIDER and self._names_provider(known, model.partition("/")[0]):
            # LiteLLM writes the provider before the model.
            info = self._model(_ANY_PROVIDER, model)
        return None if info is None else _found(info)

    def _model(self, provider: str, model: str) -> ModelInfo | None:
        try:
            # A new snapshot, because a snapshot remembers every name that it is asked for.
            snapshot = self._snapshot(providers=self._providers, from_auto_update=False)
            return snapshot.find_provider_model(model, None, provider, None)[1]
        except LookupError:
            return None

    def _names_provider(self, provider: str, prefix: str) -> bool:
        named = self._provider(self._providers, prefix)
        return named is not None and named is self._provider(self._providers, provider)


def _found(info: ModelInfo) -> _Found:
    if not isinstance(info.prices, list):
        return _Found([(None, _price(info.prices))])
    return _Found([(each.constraint.active if each.constraint else None, _price(each.prices)) for each in info.prices])


def _price(prices: ModelPrice) -> Price:
    """The library's rates of one model, which have tiers each, as tiers of all rates. Empty when the model has no rate
    per input token, but one per minute, for example.
    """
    given = prices.input_mtok, prices.cache_read_mtok, prices.cache_write_mtok, prices.output_mtok
    if prices.input_mtok is None:
        return ()
    starts = {tier.start for rate in given for tier in getattr(rate, "tiers", ())}
    return [_rates_above(start, given) for start in (-1, *sorted(starts))]


def _rates_above(start: int, given: Sequence[Any]) -> Rates:
    plain, reading, writing, output = (None if rate is None else float(_rate_above(start, rate)) for rate in given)
    assert plain is not None
    return _rates_of(start, plain, reading, writing, output)


def _rates_of(above: int, plain: float, reading: float | None, writing: float | None, output: float | None) -> Rates:
    """Rates with the rate of input in place of those that a prompt cache does not have."""
    reading, writing = (plain if rate is None else rate for rate in (reading, writing))
    return Rates(above, plain, reading, writing, output or 0.0)


def _rate_above(start: int, rate: Any) -> Any:
    if not hasattr(rate, "tiers"):
        return rate
    return next((tier.price for tier in reversed(rate.tiers) if start >= tier.start), rate.base)
