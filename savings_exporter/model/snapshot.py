"""The content and the health of a store at one moment."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec

from savings_exporter.model.cursors import Cursors
from savings_exporter.model.operations import OperationCounts
from savings_exporter.model.pricing import PriceBasis
from savings_exporter.model.record import parse_timestamp
from savings_exporter.model.totals import Ledger, Pair, Totals


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The durable content of a store at one moment, and how many records are not durable yet.

    Attributes:
        ledger: all totals of the durable records.
        store_id: the store's name. It is permanent, even if the file is moved.
        saved_at: when the document was saved; None when it was never saved, or does not contain the time.
        created_at: when the store began to count; None when the document of another program does not show it.
        read_at: when the totals were read successfully for the last time.
        document_bytes: the size of the document.
        journal_bytes: the size of the journal segments, up to the last counted frame.
        pending_records: how many records are accepted but not yet durable. They are not part of the totals.
        pending_tokens: the ``tokens_saved`` of those records.
        operations: the operation counters of all writers.
        cursors: how far each source has been imported, by the sources' names.
        writers: how many writers are alive, which is the number of open trackers in all processes.
    """

    ledger: Ledger
    store_id: str
    saved_at: datetime | None
    created_at: datetime | None = None
    read_at: datetime
    document_bytes: int
    journal_bytes: int = 0
    pending_records: int = 0
    pending_tokens: int = 0
    operations: OperationCounts = OperationCounts()
    cursors: Cursors = {}
    writers: int = 0

    @property
    def sequence(self) -> int:
        """How many records the totals hold."""
        return self.ledger.records

    @property
    def last_record_at(self) -> datetime | None:
        """The timestamp of the newest durable record; None without records, or when the document contains no time."""
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
        """The totals of each project. Records without a project are not included."""
        return self.ledger.projects

    @property
    def agents(self) -> Mapping[str, Totals]:
        """The totals of each agent. Records without an agent are not included."""
        return self.ledger.agents

    @property
    def sources(self) -> Mapping[str, Totals]:
        """The totals of each source. Records without a source are not included."""
        return self.ledger.sources

    @property
    def by_provider_model(self) -> Mapping[Pair, Totals]:
        """The totals of each provider and model."""
        return self.ledger.by_provider_model

    @property
    def price_bases(self) -> tuple[PriceBasis, ...]:
        """The prices that were used for records without ``savings_usd``, in the order in which they came into use."""
        return self.ledger.bases

    @property
    def history(self) -> tuple[Mapping[str, Any], ...]:
        """Cumulative points, oldest first. They are computed on access."""
        return self.ledger.history.points


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """Whether saving works.

    Attributes:
        healthy: False while a commit or a save fails.
        reason: a description of the failure; None while healthy.
        error: the symbol of the errno, such as ``ENOSPC``; None when there is none.
        pending_records, pending_tokens: as in ``Snapshot``.
        pending_since: when the oldest pending record was accepted; None when none is.
    """

    healthy: bool
    reason: str | None = None
    error: str | None = None
    pending_records: int = 0
    pending_tokens: int = 0
    pending_since: datetime | None = None
