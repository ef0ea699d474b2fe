"""Watching a document that another program owns, Headroom's included. Reads; never writes, never locks."""

from __future__ import annotations

import logging
import os
import threading
from datetime import datetime, timezone

from savings_exporter.documents import decode
from savings_exporter.errors import CorruptStoreError, NewerSchemaError, StoreError
from savings_exporter.storage import filesystem
from savings_exporter.storage.steps import error_symbol
from savings_exporter.totals import Limits
from savings_exporter.tracker import Health, Snapshot

logger = logging.getLogger(__name__)


class WatchedFile:
    """The totals of a document that changes under us, read again when it is another one than last time.

    When it cannot be read, or is gone, the last totals stay and ``health`` says why: a counter must not vanish
    because its source is away for a moment.

    Raises:
        StoreError: there is no document at the path, or it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.storage_path = os.path.expanduser(path)
        self._lock = threading.Lock()
        self._identity: filesystem.Identity | None = None
        self._health = Health(healthy=True)
        self._snapshot = self._read()

    def snapshot(self) -> Snapshot:
        """The document's totals now, or the last ones that could be read."""
        with self._lock:
            try:
                if filesystem.identity(filesystem.resolved(self.storage_path)) != self._identity:
                    self._snapshot = self._read()
                # Also when the very file that was read last is back under its name.
                self._health = Health(healthy=True)
            except (OSError, StoreError) as error:
                self._unreadable(error)
            return self._snapshot

    def health(self) -> Health:
        """Whether the document could be read when it was last looked at, and if not, why."""
        with self._lock:
            return self._health

    def _read(self) -> Snapshot:
        path = filesystem.resolved(self.storage_path)
        try:
            if filesystem.identity(path) is None:
                raise StoreError(f"{path}: there is no such file")
            data, identity = filesystem.read(path)
            document = decode(data)
        except OSError as error:
            raise StoreError(f"{path}: cannot be read: {error.strerror} ({error_symbol(error)})") from error
        except (CorruptStoreError, NewerSchemaError) as error:
            raise type(error)(f"{path}: {error}") from error
        for problem in document.problems:
            logger.warning("%s: %s", path, problem)
        self._identity = identity
        ledger = document.ledger.bounded(Limits())
        return Snapshot(
            sequence=ledger.sequence,
            lifetime=ledger.lifetime,
            by_model=ledger.by_model,
            projects=ledger.projects,
            by_provider_model=ledger.by_provider_model,
            history=ledger.history,
            saved_at=document.saved_at or datetime.fromtimestamp(identity.modified_ns / 1e9, timezone.utc),
            document_bytes=identity.size,
        )

    def _unreadable(self, error: Exception) -> None:
        reason = str(error)
        if reason != self._health.reason:
            logger.error("%s; the last totals stay", reason)
        self._health = Health(healthy=False, reason=reason)
