"""Watching a document, with or without a journal, that another program owns: Headroom, or a tracker. Never writes."""

from __future__ import annotations

import logging
import os
import threading
from datetime import datetime, timezone

from savings_exporter.errors import StoreError
from savings_exporter.storage import filesystem
from savings_exporter.storage.lock import Mark, read_mark
from savings_exporter.storage.recovery import read
from savings_exporter.storage.steps import error_symbol
from savings_exporter.totals import Limits
from savings_exporter.tracker import Health, Snapshot

logger = logging.getLogger(__name__)


class WatchedFile:
    """The totals of a store that changes under us, read again when it is another than last time.

    When it cannot be read, or is gone, the last totals stay and ``health`` says why: a counter must not vanish
    because its source is away for a moment.

    Raises:
        StoreError: there is no document at the path, or it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.storage_path = os.path.expanduser(path)
        self._reading = threading.Lock()
        self._version: tuple[filesystem.Identity | None, Mark | None] | None = None
        self._health = Health(healthy=True)
        self._limits = Limits()
        self._snapshot = self._read()

    def snapshot(self) -> Snapshot:
        """The totals now, or the last ones that could be read, also while another thread waits for the disk."""
        if self._reading.acquire(blocking=False):
            try:
                if self._version_now() != self._version:
                    self._snapshot = self._read()
                # Also when the very file that was read last is back under its name.
                self._health = Health(healthy=True)
            except (OSError, StoreError) as error:
                self._unreadable(error)
            finally:
                self._reading.release()
        return self._snapshot

    def health(self) -> Health:
        """Whether the document could be read when it was last looked at, and if not, why."""
        return self._health

    def _version_now(self) -> tuple[filesystem.Identity | None, Mark | None]:
        path = filesystem.resolved(self.storage_path)
        return filesystem.identity(path), read_mark(path)

    def _read(self) -> Snapshot:
        path = filesystem.resolved(self.storage_path)
        try:
            version = self._version_now()
            found = read(path, self._limits)
            if not found.exists:
                raise StoreError(f"{path}: there is no such file")
        except OSError as error:
            raise StoreError(f"{path}: cannot be read: {error.strerror} ({error_symbol(error)})") from error
        for problem in found.document.problems:
            logger.warning("%s: %s", path, problem)
        ledger = found.totals(self._limits)
        if not found.document.is_ours:
            ledger = ledger.bounded(self._limits)
        # What has a name keeps it, however it ranks later: a counter must not vanish.
        self._version, identity = version, found.identity
        modified = datetime.fromtimestamp(identity.modified_ns / 1e9, timezone.utc) if identity else None
        return Snapshot(
            sequence=ledger.sequence,
            store_id=found.document.store or filesystem.place(path),
            lifetime=ledger.lifetime,
            by_model=ledger.by_model,
            projects=ledger.projects,
            by_provider_model=ledger.by_provider_model,
            history=ledger.history,
            saved_at=found.document.saved_at or modified,
            document_bytes=identity.size if identity else 0,
            journal_bytes=found.journal_bytes,
        )

    def _unreadable(self, error: Exception) -> None:
        reason = str(error)
        if reason != self._health.reason:
            logger.error("%s; the last totals stay", reason)
        self._health = Health(healthy=False, reason=reason)
