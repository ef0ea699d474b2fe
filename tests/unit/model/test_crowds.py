"""Which names have a place, and what is known of the others."""

from __future__ import annotations

import random

from hypothesis import example, given
from hypothesis import strategies as st

from savings_exporter.model.crowds import MOST_CANDIDATES, PROJECT, Crowd
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


# Names that save tokens, and names that an operator lets in (0 tokens).
streams = st.lists(st.tuples(st.integers(0, 120), st.integers(0, 1000)), max_size=400)

# A name drops out of the sketch, and comes back when another one was let in.
comes_back = [(0, 5), *((number, 6) for number in range(1, MOST_CANDIDATES + 1)), (10, 0), (0, 1)]


@given(streams)
@example(comes_back)
def test_bounds_of_the_sketch_hold(stream: list[tuple[int, int]]) -> None:
    crowd, truth, total = Crowd(), {str(number): 0 for number in range(121)}, 0
    for number, tokens in stream:
        name = str(number)
        if name not in truth:
            continue
        if tokens:
            crowd = crowd.with_saved({name: tokens})
            truth[name] += tokens
            total += tokens
        elif len(crowd.admitted) < 20:
            crowd = crowd.with_place_for(name)
            del truth[name]
    assert len(crowd.candidates) <= MOST_CANDIDATES
    for name, candidate in crowd.candidates.items():
        assert candidate.least <= truth[name] <= candidate.most
    for name in truth.keys() - crowd.candidates.keys():
        assert truth[name] <= crowd.unseen
    large = {name for name, tokens in truth.items() if tokens > total / MOST_CANDIDATES}
    assert large <= crowd.candidates.keys()


def test_name_that_was_in_other_before_the_sketch() -> None:
    """The ledger of an earlier version does not say which names are in other."""
    limits = limits_of(1)
    earlier = Ledger(projects=counted(Ledger(), [one(project="a"), one(project="b", saved=70)], limits).projects)
    ledger = counted(earlier, [one(project="b", saved=5)], limits)
    candidate = ledger.crowds[PROJECT].candidates["b"]
    assert (candidate.least, candidate.most) == (5, 75)


def test_name_that_takes_a_free_place() -> None:
    """A place becomes free when a name is folded. The next one to take it is no longer listed among those in other."""
    limits = limits_of(1)
    ledger = counted(Ledger(), [one(project="a")], limits)
    ledger = counted(ledger, [one(project="b", saved=70)], limits)
    assert [outsider.name for outsider in ledger.outsiders(PROJECT)] == ["b"]
    ledger = counted(ledger.folding(PROJECT, "a"), [one(project="b", saved=5)], limits)
    assert ledger.projects["b"].tokens_saved == 5
    assert ledger.projects[OTHER].tokens_saved == 71
    assert ledger.outsiders(PROJECT) == []
    assert ledger.crowds[PROJECT].candidates == {}
