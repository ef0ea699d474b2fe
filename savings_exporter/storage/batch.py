"""Records on their way: accepted together, made durable together, each key counted once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from savings_exporter.records import SavingsRecord
from savings_exporter.totals import Delta, Ledger, Limits


class Keyed:
    """Records whose sender may send them again, and the key that tells."""

    __slots__ = ("key", "records", "sequence")

    def __init__(self, key: str, records: Sequence[SavingsRecord]) -> None:
        self.key = key
        self.records = records
        self.sequence: int | None = None
        """What the last of them was counted under, once that is durable."""


class Batch:
    """Records that become durable together: first those without a key, in their order, then those with one.

    ``count`` and ``tokens`` are all of them and what they saved. ``base`` is the store's sequence before them, once
    they are durable. ``links`` is what the observers link a commit to.
    """

    def __init__(self) -> None:
        self.records: list[SavingsRecord] = []
        self.keyed: list[Keyed] = []
        self.folded: Delta | None = None
        self.count = 0
        self.tokens = 0
        self.links: list[Any] = []
        self.base: int | None = None

    @property
    def durable(self) -> bool:
        """Whether the records survive a power loss from now on."""
        return self.base is not None

    @property
    def unkeyed(self) -> int:
        """How many records have no key. Counted when it is asked for: no interrupt can come between two numbers."""
        return len(self.records) + (self.folded.records if self.folded is not None else 0)

    def add(self, records: Sequence[SavingsRecord]) -> int:
        """Take on records without a key; where the last of them stands among those."""
        self.records += records
        self._count(records)
        return self.unkeyed

    def add_keyed(self, keyed: Keyed) -> None:
        """Take on records with a key."""
        self.keyed.append(keyed)
        self._count(keyed.records)

    def fold(self, most: int, ledger: Ledger, limits: Limits) -> None:
        """Keep no more than the sums of the oldest records without a key, of so many at ``most``.

        They take no more memory then, however many they are, and no longer fit into a frame of the journal.
        """
        folded = Delta()
        if self.folded is not None:
            folded.absorb(self.folded, ledger, limits)
        folded.add_all(self.records[:most], ledger, limits)
        self.folded, self.records = folded, self.records[most:]

    def recount(self) -> None:
        """Count anew what is in it, after an interrupt that may have come between its parts."""
        folded, self.count, self.tokens = self.folded, 0, 0
        self._count(self.records)
        for keyed in self.keyed:
            self._count(keyed.records)
        if folded is not None:
            self.count += folded.records
            self.tokens += folded.lifetime.tokens_saved

    def _count(self, records: Sequence[SavingsRecord]) -> None:
        self.count += len(records)
        for record in records:
            self.tokens += record.tokens_saved
