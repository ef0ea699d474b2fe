"""Reads a document, with or without journals, that another program (Headroom or a tracker) writes. Never writes."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from savings_exporter.errors import StoreError
from savings_exporter.formats.headroom import MOST_BYTES
from savings_exporter.model.days import LAST_DAY, Dated
from savings_exporter.model.snapshot import Health, Snapshot
from savings_exporter.model.totals import Ledger, Limits
from savings_exporter.storage.closed_days import read_with_days
from savings_exporter.storage.filesystem import LOCAL, FileSystem, Identity, place
from savings_exporter.storage.lock import LockContent, read_lock
from savings_exporter.storage.operation import error_symbol
from savings_exporter.storage.other_program import included_in
from savings_exporter.storage.reader import Reader
from savings_exporter.storage.recovery import examine, refuse_losses
from savings_exporter.storage.view import View

logger = logging.getLogger(__name__)

_Files = tuple[tuple[str, Identity | None], ...]

OWNER_HAS_TO_FIX_IT = "This process only reads the file: the program that writes it, or its operator, has to fix it"


class WatchedFile:
    """The totals of a store that another program changes. The store is read again when it has changed.

    If the store cannot be read or no longer exists, the last totals stay and ``health`` says why: a counter must not
    disappear because its source is temporarily unavailable.

    Raises:
        StoreError: there is no document at the path, or it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], fs: FileSystem = LOCAL) -> None:
        self.storage_path = os.path.expanduser(path)
        self._fs = fs
        self._reading = threading.Lock()
        self._health = Health(healthy=True)
        self._refused: _Files | None = None
        self._problems: tuple[str, ...] = ()
        self._reader = self._reader_now()
        try:
            self._view, self._read_at = self._examined(), _now()
        except OSError as error:
            raise StoreError(self._problem(error), path=self._reader.path) from error
        self._log_problems()

    def snapshot(self) -> Snapshot:
        """The current totals, or the last ones if reading fails or another thread is still reading the store."""
        if self._reading.acquire(blocking=False):
            try:
                self._update()
            finally:
                self._reading.release()
        return self._snapshot_of(self._view)

    def days(self, first: str = "", last: str = LAST_DAY) -> Dated:
        """What was saved from one day to another, both included, such as ``2026-01-31``.

        Raises:
            StoreError: the file of closed days cannot be read.
        """
        return read_with_days(self._fs, self._view_now, first, last)[1]

    def snapshot_and_days(self) -> tuple[Snapshot, Dated]:
        """The totals, and what was saved on all days up to the same record.

        Raises:
            StoreError: the file of closed days cannot be read.
        """
        view, dated = read_with_days(self._fs, self._view_now, "", LAST_DAY)
        return self._snapshot_of(view), dated

    def kept(self) -> Mapping[str, Any]:
        """What the document has of another program that this program does not use, as it was read last."""
        return self._view.document.kept

    def included(self) -> Ledger | None:
        """The totals of the other program's document that is in the totals; None when no copy of it is beside them.

        Raises:
            OSError: the copy cannot be read.
        """
        return included_in(self._fs, self._reader.path, self._view.document)

    def health(self) -> Health:
        """Whether the last attempt to read the document succeeded, and if not, why."""
        return self._health

    def _view_now(self) -> tuple[str, View]:
        with self._reading:
            self._update()
            return self._reader.path, self._view

    def _snapshot_of(self, view: View) -> Snapshot:
        return self._reader.snapshot(view, view.document.operations, self._read_at, store_id=self._store_id())

    def _update(self) -> None:
        """Read the store again. The caller holds the lock."""
        files = self._files()
        if files is not None and files == self._refused:
            # They have not changed since they were refused, and reading them can take long.
            return
        self._refused = None
        try:
            self._view, self._read_at = self._refreshed(), _now()
            if not self._health.healthy:
                logger.info("%s: can be read again", self._reader.path)
            self._health = Health(healthy=True)
            self._log_problems()
        except (OSError, StoreError) as error:
            self._refused = files if isinstance(error, StoreError) else None
            self._note_unreadable(self._problem(error))

    def _log_problems(self) -> None:
        """Log what was left out of the document, unless it is the same as before."""
        problems = self._view.document.problems
        if problems != self._problems:
            for problem in problems:
                logger.warning("%s: %s", self._reader.path, problem)
        self._problems = problems

    def _files(self) -> _Files | None:
        """The files of the store as they are now; None when that cannot be determined."""
        try:
            path = self._fs.resolved(self.storage_path)
            directory = os.path.dirname(path)
            names = sorted(self._fs.names_beside(path))
            return tuple((name, self._fs.identity(os.path.join(directory, name))) for name in names)
        except OSError:
            return None

    def _store_id(self) -> str:
        """The store's name in the document, or before the first save in the lock file. Otherwise a name of the path."""
        if self._view.document.store:
            return self._view.document.store
        try:
            lock = read_lock(self._fs, self._reader.path)
        except OSError:
            lock = LockContent()
        return (lock.store.hex() if not lock.is_foreign else "") or place(self._reader.path)

    def _reader_now(self) -> Reader:
        # The path is resolved each time, because a symlink may refer to another file now.
        return Reader(self._fs, self._fs.resolved(self.storage_path), Limits())

    def _refreshed(self) -> View:
        reader = self._reader_now()
        self._refuse_large(reader.path)
        if reader.path != self._reader.path:
            self._reader = reader
            return self._examined()
        if self._fs.identity(reader.path) is None and not self._reader.listing().segments:
            if self._view.identity is not None:
                raise StoreError(f"{reader.path}: there is no such file", path=reader.path)
            return self._examined()
        try:
            view = self._reader.refresh(self._view)
        except StoreError:
            return self._examined()
        if not view.is_whole:
            # The reader goes on with an older document. A watched file that is damaged is reported: this raises.
            self._reader.read_document()
        return self._examined() if self._reader.has_refused_document() else view

    def _examined(self) -> View:
        path = self._reader.path
        self._refuse_large(path)
        found = examine(self._reader, read_lock(self._fs, path))
        if not found.exists:
            raise StoreError(f"{path}: there is no such file", path=path)
        refuse_losses(path, found)
        return found.view

    def _refuse_large(self, path: str) -> None:
        identity = self._fs.identity(path)
        if identity is not None and identity.size > MOST_BYTES:
            raise StoreError(f"{path}: has {identity.size:,} bytes, and at most {MOST_BYTES:,} are read", path=path)

    def _problem(self, error: OSError | StoreError) -> str:
        """A description of the problem. It omits the remedy, because the file belongs to another program."""
        if isinstance(error, StoreError):
            return error.problem
        return f"{error.filename or self._reader.path}: cannot be read: {error.strerror} ({error_symbol(error)})"

    def _note_unreadable(self, problem: str) -> None:
        read_at = f"{self._read_at:%Y-%m-%d %H:%M:%S} UTC"
        reason = f"{problem}. The totals read at {read_at} are still shown. {OWNER_HAS_TO_FIX_IT}"
        if reason != self._health.reason:
            logger.error("%s", reason)
        self._health = Health(healthy=False, reason=reason)


def _now() -> datetime:
    return datetime.now(timezone.utc)
