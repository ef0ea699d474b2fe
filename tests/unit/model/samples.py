"""What the tests of the model share: made-up records, and how to count them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta, timezone
from itertools import pairwise

from hypothesis import strategies as st

from savings_exporter.model.names import OTHER
from savings_exporter.model.record import SavingsRecord
from savings_exporter.model.totals import Ledger, Limits, Sums, iso_utc

NOW = datetime(2026, 6, 15, 12, 30, tzinfo=timezone.utc)
ROOMY = Limits(max_models=1000, max_projects=1000, max_agents=1000, max_sources=1000)

names = st.sampled_from([OTHER, "unknown", *"abcdefgh"])
tokens = st.integers(0, 10**6)
nanodollars = st.integers(-(10**10), 10**10)
moments = st.integers(0, 10**7).map(lambda seconds: NOW - timedelta(seconds=seconds))
records = st.builds(
    SavingsRecord,
    model=names,
    provider=st.none() | st.sampled_from([OTHER, "anthropic", "openai"]),
    project=st.none() | names,
    agent=st.none() | names,
    source=st.none() | names,
    tokens_saved=tokens,
    input_tokens=tokens,
    output_tokens=tokens,
    tool_search_saved=tokens,
    cache_read_tokens=tokens,
    savings_usd=nanodollars.map(lambda number: number / 1e9),
    cache_savings_usd=nanodollars.map(lambda number: abs(number) / 1e9),
    input_cost_usd=nanodollars.map(lambda number: abs(number) / 1e9),
    timestamp=moments,
)
many_records = st.lists(records, max_size=30)


def one(
    model: str = "m",
    *,
    saved: int = 1,
    at: datetime = NOW,
    project: str | None = None,
    agent: str | None = None,
    source: str | None = None,
    usd: float | None = None,
) -> SavingsRecord:
    """One record."""
    return SavingsRecord(
        model=model,
        tokens_saved=saved,
        timestamp=at,
        project=project,
        agent=agent,
        source=source,
        provider="p",
        savings_usd=usd,
    )


def sums_of(records: Iterable[SavingsRecord], most_rows: int | None = None) -> Sums:
    """Records added up."""
    sums = Sums(most_rows)
    sums.add_all(records)
    return sums


def counted(ledger: Ledger, records: Iterable[SavingsRecord], limits: Limits = ROOMY, now: datetime = NOW) -> Ledger:
    """A ledger with more records."""
    return ledger.plus(sums_of(records), limits, now)


def split(records: Sequence[SavingsRecord], cuts: Iterable[int]) -> list[Sequence[SavingsRecord]]:
    """Records in groups, in their order."""
    edges = sorted({0, len(records), *(cut for cut in cuts if cut < len(records))})
    return [records[start:end] for start, end in pairwise(edges)]


def stamps_of(ledger: Ledger) -> list[str]:
    """The timestamps of a ledger's history."""
    return [str(point["timestamp"]) for point in ledger.history.points]


def saved_of(ledger: Ledger) -> list[tuple[str, int]]:
    """The points of a ledger's history: when, and the tokens saved up to then."""
    return [(str(point["timestamp"]), point["total_tokens_saved"]) for point in ledger.history.points]


def at(moment: datetime) -> str:
    """A moment as a point has it."""
    return iso_utc(moment)
