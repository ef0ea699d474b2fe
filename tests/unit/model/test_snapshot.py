"""A snapshot shows its ledger."""

from __future__ import annotations

from datetime import datetime, timezone

from savings_exporter.model.operations import OperationCounts
from savings_exporter.model.snapshot import Health, Snapshot
from savings_exporter.model.totals import Ledger
from tests.unit.model.samples import counted, one

READ_AT = datetime(2026, 1, 1, tzinfo=timezone.utc)


def test_snapshot_of_a_ledger() -> None:
    ledger = counted(Ledger(), [one(project="x", agent="a", source="s", saved=3)])
    snapshot = Snapshot(ledger=ledger, store_id="s", saved_at=None, read_at=READ_AT, document_bytes=5, writers=2)
    assert (snapshot.sequence, snapshot.lifetime.tokens_saved) == (1, 3)
    assert snapshot.by_model["m"] == snapshot.projects["x"] == snapshot.agents["a"] == snapshot.lifetime
    assert snapshot.sources["s"] == snapshot.lifetime
    assert snapshot.by_provider_model == {("p", "m"): snapshot.lifetime}
    assert [point["total_tokens_saved"] for point in snapshot.history] == [3]
    assert snapshot.operations == OperationCounts()


def test_healthy() -> None:
    assert Health(healthy=True).reason is None
