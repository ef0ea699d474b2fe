"""Adding up records: exact in any order and grouping, and never more names than the limits say."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from decimal import Decimal
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from savings_exporter.model.history import History
from savings_exporter.model.names import OTHER, UNKNOWN
from savings_exporter.model.record import SavingsRecord
from savings_exporter.model.totals import (
    AMOUNTS,
    COUNTS,
    OTHER_PAIR,
    Ledger,
    Limits,
    Row,
    Sums,
    Totals,
    total_of,
)
from tests.unit.model.samples import NOW, ROOMY, counted, many_records, one, split, sums_of

cuts = st.lists(st.integers(0, 30))


def without_history(ledger: Ledger) -> Ledger:
    return msgspec.structs.replace(ledger, history=History())


def limits_of(limit: int) -> Limits:
    return Limits(max_models=limit, max_projects=limit, max_agents=limit, max_sources=limit)


def assert_bounded(ledger: Ledger, limits: Limits) -> None:
    assert len(ledger.by_model.keys() - {OTHER}) <= limits.max_models
    assert len(ledger.projects.keys() - {OTHER}) <= limits.max_projects
    assert len(ledger.agents.keys() - {OTHER}) <= limits.max_agents
    assert len(ledger.sources.keys() - {OTHER}) <= limits.max_sources
    assert len(ledger.by_provider_model.keys() - {OTHER_PAIR}) <= limits.max_models
    assert total_of(ledger.by_model.values()) == ledger.lifetime
    assert total_of(ledger.by_provider_model.values()) == ledger.lifetime


def assert_nothing_went_back(before: Ledger, after: Ledger) -> None:
    groups: list[tuple[Mapping[Any, Totals], Mapping[Any, Totals]]] = [
        (before.by_model, after.by_model),
        (before.projects, after.projects),
        (before.agents, after.agents),
        (before.sources, after.sources),
        (before.by_provider_model, after.by_provider_model),
    ]
    for old, new in groups:
        for name, totals in old.items():
            assert all(getattr(new[name], count) >= getattr(totals, count) for count in COUNTS)


FULL = SavingsRecord(
    model="m",
    provider="p",
    project="x",
    agent="a",
    source="s",
    tokens_saved=1,
    tool_search_saved=2,
    output_tokens_saved=3,
    cache_read_tokens=4,
    cache_write_tokens=5,
    uncached_input_tokens=6,
    input_tokens=7,
    output_tokens=8,
    savings_usd=-0.5,
    cache_savings_usd=0.125,
    input_cost_usd=0.25,
    timestamp=NOW,
)


def test_record_in_every_total() -> None:
    expected = Totals(
        requests=1,
        tokens_saved=1,
        tool_tokens_saved=2,
        output_tokens_saved=3,
        cache_read_tokens=4,
        cache_write_tokens=5,
        uncached_input_tokens=6,
        total_input_tokens=7,
        total_output_tokens=8,
        compared_tokens_saved=3,
        priced_requests=1,
        costed_requests=1,
        compression_savings_usd=-0.5,
        compression_savings_list_usd=-0.5,
        cache_savings_usd=0.125,
        total_input_cost_usd=0.25,
        last_activity_at="2026-06-15T12:30:00Z",
    )
    ledger = counted(Ledger(), [FULL])
    assert (ledger.records, ledger.newest) == (1, "2026-06-15T12:30:00Z")
    assert ledger.lifetime == expected
    assert ledger.by_model == {"m": expected}
    assert ledger.projects == {"x": expected}
    assert ledger.agents == {"a": expected}
    assert ledger.sources == {"s": expected}
    assert ledger.by_provider_model == {("p", "m"): expected}


def test_names_that_are_missing() -> None:
    ledger = counted(Ledger(), [SavingsRecord(model="m", tokens_saved=1), one(agent=UNKNOWN)])
    assert ledger.projects == ledger.agents == ledger.sources == {}
    assert ledger.by_provider_model.keys() == {(UNKNOWN, "m"), ("p", "m")}


def test_share_of_records_that_gave_both() -> None:
    without_input = SavingsRecord(model="m", tokens_saved=1_000_000, tool_search_saved=5)
    with_input = SavingsRecord(model="m", tokens_saved=1, tool_search_saved=2, input_tokens=9)
    assert counted(Ledger(), [without_input]).lifetime.savings_percent is None
    assert counted(Ledger(), [with_input]).lifetime.savings_percent == 25.0
    both = counted(Ledger(), [without_input, with_input])
    assert both.lifetime.savings_percent == 25.0
    assert both.lifetime.headline_tokens_saved == 1_000_008
    assert Totals().savings_percent is None


def test_dollars_that_no_record_gave() -> None:
    unpriced, free = SavingsRecord(model="m", tokens_saved=1), SavingsRecord(model="m", tokens_saved=1, savings_usd=0)
    lifetime = counted(Ledger(), [unpriced]).lifetime
    assert (lifetime.savings_usd, lifetime.input_cost_usd) == (None, None)
    lifetime = counted(Ledger(), [unpriced, free]).lifetime
    assert (lifetime.savings_usd, lifetime.input_cost_usd) == (0.0, None)


@pytest.mark.parametrize("missing", [1, 5])
def test_rows_of_an_earlier_version(missing: int) -> None:
    sums = Sums()
    sums.add_all([FULL])
    (row,) = sums.rows()
    earlier, again = msgspec.structs.replace(row, counts=row.counts[:-missing]), Sums()
    again.add_rows([earlier])
    (read,) = again.rows()
    assert read == msgspec.structs.replace(row, counts=(*row.counts[:-missing], *(0,) * missing))
    with pytest.raises(ValueError, match="counts"):
        again.add_rows([msgspec.structs.replace(row, counts=row.counts[: -missing - 1])])


def test_requests_without_a_price() -> None:
    """Those that saved input tokens. The others have nothing to price."""
    nothing = SavingsRecord(model="m", tokens_saved=0, output_tokens_saved=3)
    by_tools = SavingsRecord(model="m", tokens_saved=0, tool_search_saved=5)
    ledger = counted(Ledger(), [FULL, nothing, by_tools, one(), one(usd=0.0), one(model="other")])
    assert ledger.lifetime.unpriced_requests == 3
    assert {name: totals.unpriced_requests for name, totals in ledger.by_model.items()} == {"m": 2, "other": 1}


@given(many_records, cuts, st.randoms(use_true_random=False))
def test_any_order_and_grouping(records: list[SavingsRecord], cuts: list[int], random: Random) -> None:
    at_once = counted(Ledger(), records)
    shuffled = sorted(records, key=lambda _: random.random())
    in_groups = Ledger()
    for group in split(shuffled, cuts):
        in_groups = counted(in_groups, group)
    assert without_history(in_groups) == without_history(at_once)


@given(many_records, cuts)
def test_rows_hold_everything(records: list[SavingsRecord], cuts: list[int]) -> None:
    by_rows = Sums()
    for group in split(records, cuts):
        rows = msgspec.json.decode(msgspec.json.encode(sums_of(group).rows()), type=list[Row])
        by_rows.add_rows(rows)
    at_once = sums_of(records)
    assert by_rows.requests == at_once.requests == len(records)
    assert by_rows.tokens_saved == sum(record.tokens_saved for record in records)
    assert by_rows.newest == max((record.timestamp for record in records if record.timestamp), default=None)
    assert len(by_rows) == len(at_once)
    assert Ledger().plus(by_rows, ROOMY, NOW) == Ledger().plus(at_once, ROOMY, NOW)


def test_row_of_other_length_is_refused() -> None:
    row = sums_of([FULL]).rows()[0]
    for wrong in ({"counts": row.counts[2:]}, {"units": (*row.units, 0)}):
        with pytest.raises(ValueError, match="row"):
            Sums().add_rows([msgspec.structs.replace(row, **wrong)])


def test_rows_are_by_hour() -> None:
    sums = sums_of([one(at=NOW + timedelta(minutes=minutes)) for minutes in (0, 29, 30, -31)])
    assert sorted((row.newest, row.requests) for row in sums.rows()) == [
        (NOW - timedelta(minutes=31), 1),
        (NOW + timedelta(minutes=29), 2),
        (NOW + timedelta(minutes=30), 1),
    ]


@given(many_records)
def test_amounts_are_exact(records: list[SavingsRecord]) -> None:
    exact = sum((Decimal(str(record.savings_usd)) for record in records), Decimal())
    assert counted(Ledger(), records).lifetime.compression_savings_usd == float(exact)


@given(st.lists(st.integers(-(10**15), 10**15), max_size=8))
def test_millions_of_dollars(billionths: list[int]) -> None:
    parts = [Totals(compression_savings_usd=number / 1e9) for number in billionths]
    assert total_of(parts).compression_savings_usd == sum(billionths) / 1e9
    whole = total_of([*parts, Totals(compression_savings_usd=0.25)])
    assert whole.beyond(total_of(parts)).compression_savings_usd == 0.25


@given(many_records, cuts, st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))
def test_names_stay_within_limits(
    records: list[SavingsRecord], cuts: list[int], max_models: int, max_projects: int, max_agents: int
) -> None:
    limits = Limits(max_models=max_models, max_projects=max_projects, max_agents=max_agents)
    ledger = Ledger()
    for group in split(records, cuts):
        before = ledger
        ledger = counted(ledger, group, limits)
        assert_bounded(ledger, limits)
        assert_nothing_went_back(before, ledger)
    in_projects = [record for record in records if record.project is not None]
    by_agents = [record for record in records if record.agent != UNKNOWN]
    assert total_of(ledger.projects.values()) == counted(Ledger(), in_projects).lifetime
    assert total_of(ledger.agents.values()) == counted(Ledger(), by_agents).lifetime
    by_sources = [record for record in records if record.source]
    assert total_of(ledger.sources.values()) == counted(Ledger(), by_sources).lifetime


def test_agents_beyond_limit() -> None:
    limits = Limits()
    ledger = counted(Ledger(), [one(agent=f"agent-{n}") for n in range(60)], limits)
    assert len(ledger.agents) == 51
    assert ledger.agents[OTHER].requests == 10
    ledger = counted(ledger, [one(agent="agent-3"), one(agent="agent-70"), one(agent=OTHER)], limits)
    assert (ledger.agents["agent-3"].requests, ledger.agents[OTHER].requests) == (2, 12)


@given(many_records, st.integers(1, 6))
def test_bounded_ledger(records: list[SavingsRecord], limit: int) -> None:
    whole = counted(Ledger(), records)
    cut = whole.bounded(limits_of(limit))
    assert_bounded(cut, limits_of(limit))
    assert total_of(cut.projects.values()) == total_of(whole.projects.values())
    assert total_of(cut.agents.values()) == total_of(whole.agents.values())
    assert total_of(cut.sources.values()) == total_of(whole.sources.values())
    kept = cut.by_model.keys() - {OTHER}
    dropped = whole.by_model.keys() - kept - {OTHER}
    assert all(cut.by_model[name] == whole.by_model[name] for name in kept)
    assert all(
        whole.by_model[small].tokens_saved <= whole.by_model[large].tokens_saved for small in dropped for large in kept
    )


@pytest.mark.parametrize("limit", [1, 3, 200])
def test_known_names_in_a_flood(limit: int) -> None:
    limits = limits_of(limit)
    ledger = counted(Ledger(), [one(f"old{n}", project=f"old{n}", agent=f"old{n}") for n in range(limit)], limits)
    flood = [one(f"new{n}", project=f"new{n}", agent=f"new{n}") for n in range(limit * 3)]
    old = [one(f"old{n}", project=f"old{n}", agent=f"old{n}") for n in range(limit)]
    ledger = counted(ledger, flood + old, limits)
    for grouped in (ledger.by_model, ledger.projects, ledger.agents):
        assert {name: totals.requests for name, totals in grouped.items()} == {
            **{f"old{n}": 2 for n in range(limit)},
            OTHER: limit * 3,
        }


@given(many_records, cuts, st.integers(0, 6))
def test_sums_with_few_rows(records: list[SavingsRecord], cuts: list[int], most_rows: int) -> None:
    sums = Sums(most_rows)
    for group in split(records, cuts):
        sums.add_all(group)
    assert len(sums) <= 2 * most_rows + 8
    assert sums.requests == len(records)
    ledger, exact = Ledger().plus(sums, ROOMY, NOW), counted(Ledger(), records)
    assert ledger.lifetime == exact.lifetime
    assert total_of(ledger.by_model.values()) == exact.lifetime
    assert total_of(ledger.projects.values()) == total_of(exact.projects.values())
    assert total_of(ledger.agents.values()) == total_of(exact.agents.values())
    assert total_of(ledger.sources.values()) == total_of(exact.sources.values())


def test_folded_rows_keep_their_hour() -> None:
    hours = [NOW - timedelta(hours=n) for n in range(10)]
    sums = sums_of([one(f"{n}", at=hours[n % 10]) for n in range(30)], most_rows=10)
    assert {row.newest: row.requests for row in sums.rows() if row.model == OTHER} == dict.fromkeys(hours, 2)


def test_rows_have_a_limit_in_any_hours() -> None:
    sums = sums_of([one("m", at=NOW - timedelta(hours=n)) for n in range(1000)], most_rows=10)
    assert len(sums) <= 24
    assert sums.requests == sum(row.requests for row in sums.rows()) == 1000


def test_no_count_below_zero_beyond() -> None:
    whole, part = Totals(tokens_saved=5, compression_savings_usd=-0.3), Totals(tokens_saved=7, requests=1)
    assert whole.beyond(part) == Totals(compression_savings_usd=-0.3)
    assert set(COUNTS) & set(AMOUNTS) == set()


def test_nothing_to_add() -> None:
    ledger = counted(Ledger(), [FULL])
    assert ledger.plus(Sums(), ROOMY, NOW) is ledger
    assert not Sums()
