"""Which prices a store used, and since when."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

MOST_BASES = 50
"""How many price bases a store remembers. It keeps those that came into use last."""


class PriceBasis(msgspec.Struct, frozen=True):
    """The prices from which the amounts of records without ``savings_usd`` were calculated.

    Attributes:
        prices: the library with its version, or the user's file with its date and a checksum, or both.
        since: when a tracker began to use them, in UTC, ISO 8601.
    """

    prices: str
    since: str


def merged_bases(*groups: Iterable[PriceBasis]) -> tuple[PriceBasis, ...]:
    """Price bases in the order in which they came into use, each once. The result does not depend on the order of the
    groups.
    """
    first: dict[str, str] = {}
    for basis in (basis for group in groups for basis in group):
        first[basis.prices] = min(first.get(basis.prices, basis.since), basis.since)
    newest = sorted(first.items(), key=lambda item: item[::-1])[-MOST_BASES:]
    return tuple(PriceBasis(*item) for item in newest)
