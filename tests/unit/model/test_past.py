"""The totals of each name on each day agree with the lifetime totals, whatever names the limits leave out."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from savings_exporter import SavingsRecord
from savings_exporter.model.days import MOST_ROWS, rows_of
from savings_exporter.model.figures import COUNTS, ZERO, Numbers, added, numbers_of
from savings_exporter.model.past import Name, Past, past_by
from savings_exporter.model.totals import Ledger, Limits, Sums, Totals

NOW = datetime(2026, 3, 1, tzinfo=timezone.utc)


def ledger_of(records: list[SavingsRecord], limits: Limits, ledger: Ledger | None = None) -> Ledger:
    """A ledger to which the records are added one by one, so that their order decides which names are left out."""
    ledger = ledger or Ledger()
    for record in records:
        sums = Sums()
        sums.add_all([record])
        ledger = ledger.plus(sums, limits, NOW)
    return ledger


def record(
    day: int, model: str, tokens: int = 1, project: str | None = None, usd: float | None = None
) -> SavingsRecord:
    moment = NOW - timedelta(days=day)
    return SavingsRecord(
        model=model, provider="p", tokens_saved=tokens, project=project, savings_usd=usd, timestamp=moment
    )


def lifetime_of(ledger: Ledger) -> Mapping[Name, Totals]:
    return dict(ledger.by_provider_model.items())


def past_of(ledger: Ledger) -> dict[Name, Past]:
    return past_by(("provider", "model"), lifetime_of(ledger), rows_of(ledger.days))


def tokens(past: Past) -> list[tuple[str, int]]:
    """The tokens saved before the first day, and after each day."""
    return [("", past.before.tokens_saved), *((day, totals.tokens_saved) for day, totals in past.after)]


def assert_agrees(ledger: Ledger) -> None:
    """Each name ends with its lifetime totals and no counter goes back; the sum over the names is exact each day."""
    pasts = past_of(ledger)
    expected, of_day = ledger.undated, {}
    for day in sorted(ledger.days):
        for numbers in ledger.days[day].values():
            expected = added(expected, numbers)
        of_day[day] = expected
    assert pasts.keys() == ledger.by_provider_model.keys()
    before = ZERO
    changes: dict[str, Numbers] = dict.fromkeys(ledger.days, ZERO)
    for name, past in pasts.items():
        assert (past.after[-1][1] if past.after else past.before) == lifetime_of(ledger)[name]
        before = added(before, numbers_of(past.before))
        latest = numbers_of(past.before)
        assert min(latest[: len(COUNTS)]) >= 0
        for day, totals in past.after:
            change = tuple(map(operator.sub, numbers_of(totals), latest))
            assert min(change[: len(COUNTS)]) >= 0
            changes[day] = added(changes[day], change)
            latest = numbers_of(totals)
    assert before == ledger.undated
    for day in sorted(changes):
        before = added(before, changes[day])
        assert before == of_day[day]


RECORDS = st.lists(
    st.builds(
        record,
        st.sampled_from([0, 1, 2, 5, 1000]),
        st.sampled_from("abcdef"),
        st.integers(0, 9),
        st.none(),
        st.none() | st.integers(-50, 50).map(lambda cents: cents / 100),
    ),
    max_size=25,
)


@settings(max_examples=200, deadline=None)
@given(RECORDS, RECORDS)
def test_names_beyond_the_limit(some: list[SavingsRecord], more: list[SavingsRecord]) -> None:
    """Also when the limit is raised, so that a name has a part that counts as other."""
    ledger = ledger_of(some, Limits(max_models=2))
    assert_agrees(ledger)
    assert_agrees(ledger_of(more, Limits(max_models=4), ledger))


def test_a_name_that_counts_as_other() -> None:
    ledger = ledger_of([record(5, "a"), record(4, "b", 2), record(3, "a", 3), record(2, "c", 4)], Limits(max_models=1))
    pasts = past_of(ledger)
    assert tokens(pasts["p", "a"]) == [("", 0), ("2026-02-24", 1), ("2026-02-26", 4)]
    assert tokens(pasts["other", "other"]) == [("", 0), ("2026-02-25", 2), ("2026-02-27", 6)]


def test_days_with_too_many_combinations() -> None:
    """The lifetime totals do not have ``other``. Its part of a day is divided by what the names lack."""
    many = [record(3, "a", 1, f"x{number}") for number in range(MOST_ROWS)]
    beyond = [record(3, "a", 30, "y", usd=-3), record(3, "b", 10, "y", usd=-1), record(3, "c", 20, "y")]
    ledger = ledger_of([*many, *beyond, record(1, "b", 5)], Limits())
    assert ("other", "other", "other", None, None) in ledger.days["2026-02-26"]
    assert_agrees(ledger)
    pasts = past_of(ledger)
    assert tokens(pasts["p", "a"]) == [("", 0), ("2026-02-26", 230)]
    assert tokens(pasts["p", "b"]) == [("", 0), ("2026-02-26", 10), ("2026-02-28", 15)]
    assert tokens(pasts["p", "c"]) == [("", 0), ("2026-02-26", 20)]
    assert [pasts["p", name].after[0][1].savings_usd for name in "abc"] == [-3, -1, None]


@pytest.mark.parametrize("usd", [None, 0.25, -0.25])
def test_folded_on_several_days(usd: float | None) -> None:
    """The order of names differs between the days."""
    records = []
    for day in (9, 5, 4):
        records += [record(day, f"m{n % 7}", n + day, f"x{n % (60 + day)}", usd) for n in range(300 + 20 * day)]
    ledger = ledger_of([record(1000, "old", 7), *records, *(record(1, f"m{n}") for n in range(3))], Limits())
    assert any("other" in names for names in ledger.days["2026-02-20"])
    assert_agrees(ledger)


def test_nothing_is_left_out_without_days() -> None:
    ledger = ledger_of([record(1000, "a", 7)], Limits())
    assert past_of(ledger) == {("p", "a"): Past(ledger.by_provider_model["p", "a"], [])}
