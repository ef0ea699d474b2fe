"""Builds the steps of a source: adds up its records, and keeps implausible ones out of the totals.

A rejected record is remembered in the state of the cursor, so that it can be let in later, even when the other program
has removed it in the meantime.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from savings_exporter.model.cursors import DAMAGED, JUMP, SAVED_MORE_THAN_INPUT
from savings_exporter.model.record import SavingsRecord
from savings_exporter.model.totals import Row, Sums
from savings_exporter.sources.source import MOST_KEPT_OUT, MOST_PROBLEMS, Progress, Step

MOST_TIMES_THE_REST = 100
"""A record that saved more than this many times the rest of its source is a mistake: one outlier would be the total."""

LEAST_JUMP_TOKENS = 10_000_000
"""A smaller record is never a jump: the first records of a source have little to be compared with."""

# Members of the state that this module keeps.
_KEPT_OUT, _TOKENS = "kept_out", "tokens_saved"


class KeptOut(msgspec.Struct, frozen=True):
    """A rejected record. ``id`` names it in its source, such as ``line 17``."""

    id: str
    reason: str
    rows: list[Row]


class StepBuilder:
    """Builds one step.

    Args:
        state: the state of the last step; None at the beginning.
    """

    def __init__(self, state: Mapping[str, Any] | None) -> None:
        self._sums = Sums()
        self._rows: list[Row] = []
        self._kept_out = kept_out_of(state)
        self._tokens = int((state or {}).get(_TOKENS, 0))
        self._rejected: Counter[str] = Counter()
        self._problems: list[str] = []

    def add(self, record: SavingsRecord, place: str, *, before: int | None = None, reason: str = "") -> None:
        """Add a record, or keep it out if it is not plausible.

        Args:
            record: the record.
            place: what names it in its source, such as ``line 17``.
            before: how many input tokens the request had before the saving; None when that is not known.
            reason: why a rule of the source keeps it out; empty when it does not.
        """
        alone = Sums()
        alone.add_all((record,))
        (row,) = alone.rows()
        self.add_sum(row, place, before=before, reason=reason)

    def add_sum(self, row: Row, place: str, *, before: int | None = None, reason: str = "") -> None:
        """Add a record that is a row, or keep it out. The arguments are those of ``add``."""
        saved, tools = row.counts[:2]
        if not reason and before is not None and saved + tools > before:
            reason = SAVED_MORE_THAN_INPUT
        if not reason and self.is_jump(saved):
            reason = JUMP
        if reason:
            self.keep_out(place, reason, [row])
        else:
            self._sums.add_rows([row])
            self._tokens += saved

    def add_rows(self, rows: Iterable[Row]) -> None:
        """Add sums of records that were found plausible. Rows with the same names and hour are not added up again."""
        added = list(rows)
        self._rows += added
        self._tokens += _tokens_of(added)

    def is_jump(self, tokens_saved: int) -> bool:
        """Whether savings are far more than the rest of the source."""
        return tokens_saved >= LEAST_JUMP_TOKENS and tokens_saved > MOST_TIMES_THE_REST * self._tokens

    def keep_out(self, place: str, reason: str, rows: Sequence[Row]) -> None:
        """Keep records out of the totals, and remember them."""
        tokens = _tokens_of(rows)
        self._kept_out = [*self._kept_out, KeptOut(place, reason, list(rows))][-MOST_KEPT_OUT:]
        self._note(reason, f"{place}: {tokens:,} tokens saved are kept out: {reason}")

    def reject(self, place: str, problem: str) -> None:
        """Count a record that cannot be read."""
        self._note(DAMAGED, f"{place}: {problem}")

    def __len__(self) -> int:
        """How many rows were added, and how many records were rejected."""
        return len(self._sums) + len(self._rows) + self._rejected.total()

    def build(self, state: Mapping[str, Any], progress: Progress, projects: Sequence[Row] = ()) -> Step:
        """The step, whose cursor has this state."""
        return Step(
            state=_with_members(state, self._tokens, self._kept_out),
            rows=[*self._sums.rows(), *self._rows],
            projects=projects,
            rejected=dict(self._rejected),
            problems=self._problems,
            progress=progress,
        )

    def _note(self, reason: str, problem: str) -> None:
        self._rejected[reason] += 1
        if len(self._problems) < MOST_PROBLEMS:
            self._problems.append(problem)


def kept_out_of(state: Mapping[str, Any] | None) -> list[KeptOut]:
    """The rejected records that a state remembers, oldest first."""
    return msgspec.convert((state or {}).get(_KEPT_OUT, []), list[KeptOut])


def let_in(state: Mapping[str, Any], names: Sequence[str]) -> Step | None:
    """A step that adds rejected records after all. None without such records.

    Args:
        state: the state of the source.
        names: reasons, or what names single records in their source.
    """
    kept_out = kept_out_of(state)
    chosen = [kept for kept in kept_out if kept.id in names or kept.reason in names]
    if not chosen:
        return None
    rows = [row for kept in chosen for row in kept.rows]
    remaining = [kept for kept in kept_out if kept not in chosen]
    return Step(state=_with_members(state, int(state.get(_TOKENS, 0)) + _tokens_of(rows), remaining), rows=rows)


def _with_members(state: Mapping[str, Any], tokens: int, kept_out: Sequence[KeptOut]) -> Mapping[str, Any]:
    """A state with the members that this module keeps."""
    own = {_TOKENS: tokens, _KEPT_OUT: msgspec.to_builtins(kept_out)}
    others = {name: value for name, value in state.items() if name not in own}
    return {**others, **{name: value for name, value in own.items() if value}}


def _tokens_of(rows: Iterable[Row]) -> int:
    return sum(row.counts[0] for row in rows)
