"""Which names have a place, and what is known of the others."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from savings_exporter.model.names import OTHER
from savings_exporter.model.record import SavingsRecord
from savings_exporter.model.totals import OTHER_PAIR, Ledger, Limits, total_of
from tests.unit.model.samples import NOW, counted, one, split

# Half of the records save nothing.
some_records = st.lists(
    st.builds(
        lambda name, saved: one(name, saved=saved, project=name, agent=name, source=name),
        st.sampled_from("abcdefgh"),
        st.integers(0, 3).map(lambda saved: max(saved - 1, 0)),
    ),
    max_size=30,
)
cuts = st.lists(st.integers(0, 30), max_size=5)


def limits_of(limit: int) -> Limits:
    return Limits(max_models=limit, max_projects=limit, max_agents=limit, max_sources=limit)


@given(some_records, cuts, st.randoms(use_true_random=False))
def test_names_do_not_depend_on_batches(records: list[SavingsRecord], cuts: list[int], random: random.Random) -> None:
    """As long as there are enough places, any order and any batches give the same names, and the same totals."""
    # Eight names, and half of the places for those that have saved nothing.
    limits = limits_of(16)
    whole = counted(Ledger(), records, limits)
    shuffled = random.sample(records, len(records))
    in_parts = Ledger()
    for group in split(shuffled, cuts):
        in_parts = counted(in_parts, group, limits)
    assert in_parts.by_model == whole.by_model
    assert in_parts.by_provider_model == whole.by_provider_model
    assert in_parts.projects == whole.projects
    assert in_parts.agents == whole.agents
    assert in_parts.sources == whole.sources
    assert OTHER not in whole.projects


@given(some_records, cuts, st.integers(1, 6))
def test_sums_do_not_depend_on_places(records: list[SavingsRecord], cuts: list[int], limit: int) -> None:
    ledger = Ledger()
    for group in split(records, cuts):
        ledger = counted(ledger, group, limits_of(limit))
    for named in (ledger.by_model, ledger.projects, ledger.agents, ledger.sources):
        assert total_of(named.values()) == ledger.lifetime
        assert len(named.keys() - {OTHER}) <= limit
        unsaved = {name for name, totals in named.items() if name != OTHER and not totals.tokens_saved}
        assert len(unsaved) <= limit // 2
    assert total_of(ledger.by_provider_model.values()) == ledger.lifetime
    assert len(ledger.by_provider_model.keys() - {OTHER_PAIR}) <= limit
    assert ledger.lifetime == counted(Ledger(), records, now=NOW).lifetime
