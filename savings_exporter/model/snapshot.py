"""What a store holds, and whether it works, at one moment."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec

from savings_exporter.model.operations import OperationCounts
from savings_exporter.model.record import parse_timestamp
from savings_exporter.model.totals import Ledger, Pair, Totals


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What is durable at one moment, and how much is not yet.

    Attributes:
        ledger: all totals of the durable records.
        store_id: the store's name: once it is saved, for good and wherever the file is.
        saved_at: when the document says that it was saved; None when it never was, or does not say so.
        read_at: when the totals were read, or when they were read last, if that fails now.
        document_bytes, journal_bytes: the sizes of the document and of all journal segments.
        pending_records: how many records are accepted and not yet durable. They are not part of the totals.
        pending_tokens: the ``tokens_saved`` of those records.
        operations: what all writers' commits and saves did.
        writers: how many writers are alive: open trackers of any process.
    """

    ledger: Ledger
    store_id: str
    saved_at: datetime | None
    read_at: datetime
    document_bytes: int
    journal_bytes: int = 0
    pending_records: int = 0
    pending_tokens: int = 0
    operations: OperationCounts = OperationCounts()
    writers: int = 0

    @property
    def sequence(self) -> int:
        """How many records the totals hold."""
        return self.ledger.records

    @property
    def last_record_at(self) -> datetime | None:
        """The newest durable record's own time; None without a record, or when a document names none."""
        return parse_timestamp(self.ledger.newest or "")

    @property
    def lifetime(self) -> Totals:
        """The totals of all records."""
        return self.ledger.lifetime

    @property
    def by_model(self) -> Mapping[str, Totals]:
        """The totals of each model."""
        return self.ledger.by_model

    @property
    def projects(self) -> Mapping[str, Totals]:
        """The totals of each project; records without one are in none."""
        return self.ledger.projects

    @property
    def agents(self) -> Mapping[str, Totals]:
        """The totals of each agent; records without one are in none."""
        return self.ledger.agents

    @property
    def by_provider_model(self) -> Mapping[Pair, Totals]:
        """The totals of each provider and model."""
        return self.ledger.by_provider_model

    @property
    def history(self) -> tuple[Mapping[str, Any], ...]:
        """Cumulative points, the oldest first. Computed when it is asked for."""
        return self.ledger.history.points


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """Whether saving works.

    Attributes:
        healthy: False while a commit or a save fails.
        reason: why not, in words; None while healthy.
        error: the symbol of the errno, such as ``ENOSPC``; None when there is none.
        pending_records, pending_tokens: as in ``Snapshot``.
    """

    healthy: bool
    reason: str | None = None
    error: str | None = None
    pending_records: int = 0
    pending_tokens: int = 0
