"""Importing from sources: what was read becomes durable together with the cursor up to which it was read.

One process at a time imports into a store. Otherwise two processes could read the same records from the same cursor,
and both would count. A process that was killed may have written a frame that is not counted yet. The next process to
import therefore waits until that process has ended, and has its journal adopted, before it looks at a cursor.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from savings_exporter.errors import StoreError
from savings_exporter.formats.frame import Group
from savings_exporter.model.cursors import MOST_CURSORS, Cursor, Cursors
from savings_exporter.model.pricing import PriceBasis
from savings_exporter.model.totals import Row
from savings_exporter.storage.store import Store
from savings_exporter.storage.writers import WRITER_BYTES
from savings_exporter.tracking.background import Background
from savings_exporter.tracking.receipt import Receipt

_NO_WRITER = bytes(WRITER_BYTES)
_PATIENCE_SECONDS = 10.0
_PAUSE_SECONDS = 0.02


class Importer:
    """Imports into one store, while it is entered as a context manager. Several threads may have entered it, to import
    different sources.

    Raises:
        StoreError: on entry: another process imports into this store, or the store cannot be written now.
    """

    def __init__(self, store: Store, background: Background) -> None:
        self._store = store
        self._background = background
        self._descriptor = -1
        self._last: Receipt | None = None
        self._entering = threading.Lock()
        self._entered = 0

    def __enter__(self) -> Importer:
        with self._entering:
            if not self._entered:
                self._take()
            self._entered += 1
        return self

    def __exit__(self, *_exception: object) -> None:
        with self._entering:
            self._entered -= 1
            if not self._entered:
                self._release()

    def _take(self) -> None:
        fs, path = self._store.reader.fs, import_lock_path(self._store.path)
        try:
            descriptor = fs.open_lock(path, like=self._store.path)
        except OSError as error:
            raise StoreError(f"{path}: cannot be opened: {error.strerror}", path=path) from None
        try:
            if not fs.try_lock(descriptor):
                raise StoreError(
                    f"{self._store.path}: another process imports into this store, or follows sources for it",
                    "Wait for it to end, or stop it",
                    path=self._store.path,
                )
            self._descriptor = descriptor
            self._begin()
        except BaseException:
            self._descriptor = -1
            fs.close(descriptor)
            raise

    def _release(self) -> None:
        fs, descriptor = self._store.reader.fs, self._descriptor
        self._descriptor = -1
        try:
            if self._last is None or self._last.durable:
                with suppress(OSError):
                    fs.write_at(descriptor, _NO_WRITER, 0)
        finally:
            fs.close(descriptor)

    def cursors(self) -> Cursors:
        """The cursors of all sources, as of what is durable."""
        return self._store.refresh().cursors

    def add(
        self,
        cursor: Cursor | None,
        *,
        name: str,
        source: str,
        state: Mapping[str, Any],
        rows: Sequence[Row] = (),
        projects: Sequence[Row] = (),
        rejected: Mapping[str, int] | None = None,
        prices: PriceBasis | None = None,
    ) -> tuple[Cursor, Receipt]:
        """Add what was read from a source since a cursor. It counts together with the cursor that follows.

        Add nothing more from this source before the receipt is durable.

        Args:
            cursor: the last cursor of the source; None for a new source.
            name, source, state: as in ``Cursor``.
            rows: sums of the records.
            projects: sums that count only in the totals by project.
            rejected: how many records were kept out since the last cursor, by reason.
            prices: the prices that were used for records without an amount.

        Raises:
            StoreError: the store has too many sources.
            RuntimeError: the tracker is closed.
        """
        if cursor is None and len(self.cursors()) >= MOST_CURSORS:
            raise StoreError(
                f"{self._store.path}: cannot import {name}: {MOST_CURSORS} sources were imported into this store, and "
                "each is remembered, so that it is not imported twice",
                "Import it into another store",
                path=self._store.path,
            )
        counts = dict(cursor.rejected) if cursor is not None else {}
        for reason, number in (rejected or {}).items():
            counts[reason] = counts.get(reason, 0) + number
        following = Cursor(
            name=name,
            source=source,
            number=cursor.number + 1 if cursor is not None else 1,
            state=state,
            rejected=counts,
        )
        group = Group(sums=rows, projects=projects, cursor=following, prices=prices)
        self._last = self._background.group.record(group, None, wait=True)
        return following, self._last

    def _begin(self) -> None:
        """Make sure that each record that was ever imported is counted or lost for good."""
        store = self._store
        try:
            own = store.own_journal().writer.id
            before = store.reader.fs.read_at(self._descriptor, WRITER_BYTES, 0)
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while before not in (b"", _NO_WRITER, own) and store.reader.is_alive(before):
                if time.monotonic() > deadline:
                    raise StoreError(
                        f"{store.path}: the process that imported last has not ended, and what it imported is not "
                        "durable yet",
                        "Mend the disk, or stop that process",
                        path=store.path,
                    )
                time.sleep(_PAUSE_SECONDS)
            # A save also adopts the journals of dead writers.
            group = self._background.group
            group.commit()
            last = group.last()
            is_durable = last is None or last.wait(_PATIENCE_SECONDS)
            if not self._background.save() or not is_durable:
                raise StoreError(f"{store.path}: cannot be written now", path=store.path)
            store.reader.fs.write_at(self._descriptor, own, 0)
        except OSError as error:
            raise StoreError(f"{store.path}: cannot be imported into now: {error.strerror}", path=store.path) from None


def import_lock_path(document: str) -> str:
    """The path of the file whose lock the importing process holds."""
    return os.fspath(document) + ".import"
