"""Many hostile names: their number is bounded, and no token is lost."""

from __future__ import annotations

from savings_exporter.model.names import OTHER
from savings_exporter.model.record import SavingsRecord
from savings_exporter.model.totals import OTHER_PAIR, Ledger, Limits, total_of
from tests.support.hostile import DIFFERENT, LIMIT, NAMES
from tests.unit.model.samples import NOW, sums_of

LIMITS = Limits(max_models=LIMIT, max_projects=LIMIT, max_agents=LIMIT)


def hostile_records() -> list[SavingsRecord]:
    """Each name of a model with another one of a project and an agent, saving 0, 1, 2, ... tokens."""
    return [
        SavingsRecord(
            model=NAMES[n],
            project=NAMES[n * 7 % DIFFERENT],
            provider=NAMES[n * 13 % DIFFERENT],
            agent=NAMES[n * 17 % DIFFERENT],
            tokens_saved=n,
            input_tokens=2 * n,
            savings_usd=n / 1000,
            timestamp=NOW,
        )
        for n in range(DIFFERENT)
    ]


def test_hostile_names() -> None:
    records, ledger = hostile_records(), Ledger()
    sums = sums_of(records, most_rows=1000)
    assert len(sums) <= 2004
    for _ in range(3):
        ledger = ledger.plus(sums, LIMITS, NOW)
    assert ledger.lifetime.requests == 3 * DIFFERENT
    assert ledger.lifetime.tokens_saved == 3 * sum(range(DIFFERENT))
    assert ledger.lifetime.compression_savings_usd == 3 * sum(range(DIFFERENT)) / 1000
    for names in (ledger.by_model, ledger.projects, ledger.agents):
        assert len(names.keys() - {OTHER}) == LIMIT
    assert len(ledger.by_provider_model.keys() - {OTHER_PAIR}) == LIMIT
    assert total_of(ledger.by_model.values()) == total_of(ledger.by_provider_model.values()) == ledger.lifetime
    in_projects = [record for record in records if record.project is not None]
    assert total_of(ledger.projects.values()).requests == 3 * len(in_projects)
    assert total_of(ledger.projects.values()).tokens_saved == 3 * sum(record.tokens_saved for record in in_projects)
