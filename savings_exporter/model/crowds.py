"""Which names have a place of their own in the totals, and what is known of the others.

A name takes a place with its first record, and keeps it. Half of the places are kept for names that have saved
something. When the places are used up, further names count as ``other``. The largest of these are known by a sketch of
bounded size, the *space-saving* algorithm of Metwally, Agrawal and El Abbadi (2005): each counter has an upper bound of
what its name has saved and the largest possible error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec

from savings_exporter.model.figures import Numbers
from savings_exporter.model.names import clean_name, clean_project

MODEL, PROJECT, AGENT, SOURCE = "model", "project", "agent", "source"
KINDS = (MODEL, PROJECT, AGENT, SOURCE)
"""The kinds of names."""

MOST_CANDIDATES = 50
"""How many names in ``other`` are known by kind. A name with more than this part of all that is in ``other`` is one."""

MOST_ADMITTED = 100
"""How many names an operator can let in by kind. They take places beyond the limits."""

MOST_FOLDED = 1000
"""How many names an operator can fold by kind."""


class Candidate(msgspec.Struct, frozen=True, array_like=True):
    """A counter of the sketch: a name saved at most ``most`` tokens, and at least ``most - error``."""

    most: int
    error: int

    @property
    def least(self) -> int:
        """The tokens that the name saved at least."""
        return self.most - self.error


class Crowd(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is known about the names of one kind, beside the totals.

    Attributes:
        admitted: names that have a place because an operator let them in.
        folded: names that count as ``other`` because an operator folded them.
        candidates: the largest names in ``other``.
        unseen: the tokens that a name in ``other`` saved at most if it is not a candidate.
    """

    admitted: frozenset[str] = frozenset()
    folded: frozenset[str] = frozenset()
    candidates: Mapping[str, Candidate] = {}
    unseen: int = 0

    def with_saved(self, saved: Mapping[str, int]) -> Crowd:
        """The crowd after names without a place have saved more tokens."""
        candidates, unseen = dict(self.candidates), self.unseen
        for name, tokens in saved.items():
            known = candidates.get(name)
            if known is not None:
                candidates[name] = Candidate(known.most + tokens, known.error)
                continue
            if len(candidates) >= MOST_CANDIDATES:
                smallest = min(candidates, key=lambda each: (candidates[each].most, each))
                unseen = candidates.pop(smallest).most
            candidates[name] = Candidate(unseen + tokens, unseen)
        return msgspec.structs.replace(self, candidates=candidates, unseen=unseen) if saved else self

    def without_candidates(self, names: Iterable[str]) -> Crowd:
        """The crowd after names have taken places of their own."""
        placed = self.candidates.keys() & set(names)
        if not placed:
            return self
        candidates = {name: candidate for name, candidate in self.candidates.items() if name not in placed}
        return msgspec.structs.replace(self, candidates=candidates)

    def with_place_for(self, name: str) -> Crowd:
        """The crowd after an operator let a name in.

        Raises:
            ValueError: too many names were let in.
        """
        if len(self.admitted) >= MOST_ADMITTED:
            raise ValueError(f"{MOST_ADMITTED} names were let in already; fold one of them first")
        crowd = msgspec.structs.replace(self, admitted=self.admitted | {name}, folded=self.folded - {name})
        return crowd.without_candidates([name])

    def without_place_for(self, name: str) -> Crowd:
        """The crowd after an operator folded a name.

        Raises:
            ValueError: too many names were folded.
        """
        if len(self.folded) >= MOST_FOLDED:
            raise ValueError(f"{MOST_FOLDED} names were folded already; let one of them in first")
        return msgspec.structs.replace(self, admitted=self.admitted - {name}, folded=self.folded | {name})


Crowds = Mapping[str, Crowd]
"""The crowds by kind."""


class Outsider(NamedTuple):
    """A name in ``other`` that has saved more than the least of those that have a place."""

    name: str
    candidate: Candidate


def name_in_records(kind: str, name: str) -> str:
    """A name in the form that it has in records.

    Raises:
        ValueError: there is no such kind, or nothing is left of the name.
        TypeError: the name is not a string.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    cleaned = clean_project(name) if kind == PROJECT else clean_name(kind, name)
    if not cleaned:
        raise ValueError("has no character that can be printed")
    return cleaned


def tokens_of(numbers: Numbers) -> int:
    """What a name takes its place by: tokens saved by compression, deferred tool schemas and shorter outputs, and
    tokens read from prompt caches.
    """
    _requests, saved, tools, outputs, cached, *_ = numbers
    return saved + tools + outputs + cached
