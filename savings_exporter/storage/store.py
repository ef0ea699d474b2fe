"""One process's access to one store: opens and closes it, and publishes one view of what is durable."""

from __future__ import annotations

import errno
import logging
import os
import shlex
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any, NamedTuple

import msgspec

from savings_exporter.errors import StoreError
from savings_exporter.formats.frame import Group
from savings_exporter.model.crowds import Crowd, Crowds
from savings_exporter.model.keys import KeyEntry
from savings_exporter.model.operations import OperationCounts
from savings_exporter.model.totals import Ledger, Limits
from savings_exporter.storage import checkpoint
from savings_exporter.storage.atomic_file import AtomicFile, Directory
from savings_exporter.storage.filesystem import FileSystem
from savings_exporter.storage.journal import Frame, Journal
from savings_exporter.storage.lock import CLOSING_PATIENCE_SECONDS, PATIENCE_SECONDS, StoreLock, read_lock
from savings_exporter.storage.observers import Observer
from savings_exporter.storage.operation import COMMIT, PREPARE, ROTATE, SAVE, Operation, error_symbol
from savings_exporter.storage.reader import Reader
from savings_exporter.storage.recovery import (
    BusyStoreError,
    Findings,
    earlier_segments,
    examine,
    refuse_losses,
    refuse_other_file,
)
from savings_exporter.storage.segment import NO_DIRECT_IO, SyncMethod
from savings_exporter.storage.view import View
from savings_exporter.storage.writers import Writer

logger = logging.getLogger(__name__)

_ATTEMPTS_TO_OPEN = 10


_ATTEMPTS = 5


class Committed(NamedTuple):
    """The records are durable."""


class Failed(NamedTuple):
    """An operation failed at a step."""

    step: str
    error: Exception


class Store:
    """The store at one path. One thread at a time commits. Any thread may save, refresh and look up keys."""

    def __init__(
        self,
        reader: Reader,
        lock: StoreLock,
        view: View,
        observer: Observer,
        counts: Callable[[], OperationCounts],
        method: SyncMethod,
    ) -> None:
        self.reader = reader
        self.view = view
        self.read_at = datetime.now(timezone.utc)
        self.journal: Journal | None = None
        self._lock = lock
        self._observer = observer
        self._counts = counts
        self._method = method
        self._directory = Directory(reader.fs, reader.path)
        self._reading = threading.RLock()
        self._saving = threading.RLock()
        self._creating = threading.RLock()
        self._publishing = threading.RLock()
        self._published = OperationCounts()
        self._keeps_lock = False
        self._others = view.document.operations

    @classmethod
    def open(
        cls,
        path: str,
        fs: FileSystem,
        limits: Limits,
        observer: Observer,
        counts: Callable[[], OperationCounts],
        method: SyncMethod = "auto",
    ) -> Store:
        """Open a store, and count the records that dead writers left.

        Raises:
            StoreError: the store cannot be used; CorruptStoreError: it is damaged; NewerSchemaError: a newer program
                wrote it.
        """
        path = fs.resolved(path)
        reader = Reader(fs, path, limits)
        with suppress(OSError):
            # A file that cannot be read is reported below.
            refuse_other_file(reader)
        lock = _opened_lock(path, fs)
        try:
            return _recovered(reader, lock, observer, counts, method)
        except BaseException as error:
            lock.close()
            if isinstance(error, OSError):
                raise _cannot("read", path, error) from None
            raise

    @property
    def path(self) -> str:
        """The document's path."""
        return self.reader.path

    def refresh(self) -> View:
        """The view of what is durable now, including records of other processes; the last view if reading fails."""
        with self._reading:
            try:
                self._publish(self.reader.refresh(self.view))
                self.read_at = datetime.now(timezone.utc)
            except (OSError, StoreError) as error:
                # The next save fails for the same reason and reports it.
                logger.debug("%s: could not be read: %s", self.path, error)
            return self.view

    def key_entry(self, digest: bytes) -> KeyEntry | None:
        """The entry of an idempotency key that any process recorded; None when the key is new.

        ``remember`` adds this process's own keys, so its own journal need not be read.
        """
        with self._reading:
            self.refresh()
            return self.view.keys.get(digest)

    def commit(self, frame: Frame, parent: Any = None, links: Sequence[Any] = ()) -> Committed | Failed:
        """Make a frame durable. After a failure the same frame has to be committed again."""
        operation = Operation(COMMIT, self._observer, parent, links)
        operation.records, operation.sequence = frame.records, frame.last
        try:
            with operation:
                journal = self.journal or self.own_journal()
                operation.writer = journal.writer.name
                journal.commit(frame, operation)
        except Exception as error:
            return Failed(operation.failed_step or PREPARE, error)
        return Committed()

    def remember(self, frame: Frame, groups: Sequence[Group]) -> None:
        """Add the keys of a durable frame to the view, before the journal is read again."""
        journal = self.own_journal()
        with self._reading:
            for group in groups:
                if group.key:
                    entry = KeyEntry(bytes.fromhex(group.print), journal.writer.id, frame.first + group.at - 1)
                    self.view.keys.claim(bytes.fromhex(group.key), entry)

    def own_journal(self) -> Journal:
        """This process's journal. The first call creates the journal and its writer.

        Raises:
            OSError: the writer's file cannot be created, or another process uses a store that allows only one process.
        """
        if self.journal is not None:
            return self.journal
        self._name_store()
        # Not under the lock of readers: on a disk that hangs, the file of the writer is never created.
        with self._creating:
            if self.journal is None:
                if self._keeps_lock:
                    self._lock.take(0)
                store, fs = self.view.store, self.reader.fs
                writer = Writer(fs, self.path, store)
                journal = Journal(fs, self.path, self._directory, store, writer, self._method)
                with self._reading:
                    self.reader.own = writer
                    self.journal = journal
            return self.journal

    def wants_segment(self) -> bool:
        """Whether to create the journal's next segment now."""
        return self.journal is not None and self.journal.wants_segment()

    def make_segment(self) -> bool:
        """Create the journal's next segment before it is needed. Returns whether this succeeded, or was not needed.

        A failure is reported when the segment is needed.
        """
        try:
            if self.journal is not None and self.journal.wants_segment():
                self.journal.make_next(self._observer)
        except OSError:
            return False
        return True

    def repair_names(self) -> None:
        """Recreate this process's files if they were removed or renamed, because readers open them by name.

        Only the thread that may commit calls this. A failure is reported by the save that needs the files.
        """
        if self.journal is not None:
            with suppress(OSError):
                if not self.journal.is_in_place():
                    with Operation(ROTATE, self._observer) as operation:
                        self.journal.repair_names(operation)

    def save(self, parent: Any = None, *, closing: bool = False) -> Failed | None:
        """Save the document with everything that is durable.

        ``closing`` means that this process has ended its journal. Its segments are then removed.
        """
        if self._saving._is_owned():  # type: ignore[attr-defined]
            # A signal handler calls this during a save by the same thread.
            return Failed(PREPARE, BlockingIOError(errno.EAGAIN, "a save of this thread is under way"))
        operation = Operation(SAVE, self._observer, parent)
        try:
            # Observers are notified after the lock is released, because an exporter may be slow.
            with operation, self._saving:
                try:
                    self._lock.take(CLOSING_PATIENCE_SECONDS if closing else PATIENCE_SECONDS)
                    self._agree_on_store()
                    self._checkpoint(operation, self.view, closing=closing)
                finally:
                    self._let_go()
        except Exception as error:
            return Failed(operation.failed_step or PREPARE, error)
        return None

    def change_ledger(self, change: Callable[[Ledger], Ledger]) -> None:
        """Change the totals' names, and save the document with them. Other processes take the change from the document.

        The change is applied to everything that is counted, while the store's lock is held. Records that are not in
        the document yet are counted after it.

        Raises:
            ValueError: the change cannot be made.
            OSError: the save failed, or its outcome is unknown.
            StoreError: the store cannot be used.
        """
        operation = Operation(SAVE, self._observer)
        with operation, self._saving:
            try:
                self._lock.take(CLOSING_PATIENCE_SECONDS)
                self._agree_on_store()
                view = self.reader.refresh(self.view)
                changed = msgspec.structs.replace(view, ledger=change(view.ledger))
                self._checkpoint(operation, changed, both=True)
            finally:
                self._let_go()

    def saved_at(self) -> datetime | None:
        """The time of the last save by any process, or None when it is unknown. Does not read the journals."""
        with self._reading, suppress(OSError, StoreError):
            found = self.reader.with_document(self.view)
            if self._holds_all(found):
                self._publish(found)
            return found.document.saved_at
        return None

    def is_being_saved(self) -> bool:
        """Whether another process holds the store's lock, most likely for a save."""
        with self._saving:
            try:
                return not self._lock.take_if_free()
            except OSError:
                return False
            finally:
                self._let_go()

    def is_saved(self) -> bool:
        """Whether the document holds everything, as far as this process knows."""
        journal, view = self.journal, self.view
        if not view.is_whole or (view.identity is None and bool(view.ledger.records)):
            return False
        own = journal.sequence if journal is not None else 0
        state = view.document.writers.get(journal.writer.name) if journal is not None else None
        return view.is_saved() and own == (state.through if state is not None else 0)

    def operations(self) -> OperationCounts:
        """The operation counters of all writers, those of this process as of its last attempt to publish them.

        While the counters of other writers cannot be read, their last values are used: a counter must not decrease.
        """
        # Newer values are not shown: another worker may give the next answer, and that must not be lower. What could
        # not be written is shown all the same, because the failures of a full disk are what an alert needs.
        own = self._published
        with suppress(OSError):
            self._others = self._operations_of_others()
        return self._others.plus(own)

    def has_unpublished_counts(self) -> bool:
        """Whether operations have been counted since the last publication."""
        return self._counts() != self._published

    def publish_counts(self) -> None:
        """Write this process's operation counters, so that other processes can read them, even after this process ends.

        On a disk that hangs, this hangs. It holds no lock that reading the store needs.
        """
        with suppress(OSError, StoreError):
            if self._counts() != OperationCounts():
                self.own_journal()
        with self._publishing:
            counts = self._counts()
            if self.journal is not None:
                with suppress(OSError):
                    self.journal.writer.publish(counts)
            self._published = counts

    def forked(self, observer: Observer, counts: Callable[[], OperationCounts]) -> Store:
        """The store in a forked child: the same view, a new writer, no lock. Pending records belong to the parent."""
        self._lock.abandon()
        if self.journal is not None:
            self.journal.close()
        reader = Reader(self.reader.fs, self.path, self.reader.limits)
        lock = StoreLock(self.reader.fs, self.path, opened=False)
        child = Store(reader, lock, self.view, observer, counts, self._method)
        child._keeps_lock = self._keeps_lock
        return child

    def close(self) -> None:
        """Close all files and release the locks. This does not save the document."""
        # A thread that publishes must not find another file under the descriptor. One that hangs keeps its file.
        is_free = self._publishing.acquire(timeout=CLOSING_PATIENCE_SECONDS)
        try:
            if self.journal is not None and is_free:
                self.journal.close()
            self._lock.close()
        finally:
            if is_free:
                self._publishing.release()

    def _holds_all(self, found: View) -> bool:
        """Whether a document's view without the journals holds all records that this process knows of."""
        if found.document is self.view.document:
            return True
        positions = {writer: position.sequence for writer, position in self.view.positions.items()}
        if self.journal is not None:
            positions[self.journal.writer.id] = self.journal.sequence
        return all(sequence <= found.position_of(writer).sequence for writer, sequence in positions.items())

    def _publish(self, view: View) -> None:
        """Publish a view, unless a newer view was published in the meantime."""
        if not view.is_older_than(self.view):
            crowds, self.view = self.view.ledger.crowds, view
            if view.ledger.crowds is not crowds:
                _log_folded(self.path, crowds, view.ledger.crowds)

    def _operations_of_others(self) -> OperationCounts:
        for _ in range(_ATTEMPTS):
            view = self.view
            total = self.reader.operations(view)
            if self.reader.is_current(view):
                return total
            # During the read, a save moved counters into the document and removed their file.
            self.refresh()
        return self._others

    def _checkpoint(self, operation: Operation, view: View, *, closing: bool = False, both: bool = False) -> None:
        if not self.view.document.is_ours:
            # From here on, another program may read a document of ours and write its own document from it.
            self._lock.write(self.view.store, is_saved=self._lock.content().is_saved, is_begun=True)
        view = checkpoint.save(self.reader, self._file(), view, self._observer, operation, closing=closing, both=both)
        with self._reading, suppress(OSError, StoreError):
            self._publish(self.reader.follow(view))
        with suppress(OSError):
            self._lock.write(view.store, is_saved=True)

    def _file(self) -> AtomicFile:
        return AtomicFile(self.reader.fs, self.path, self._directory)

    def _agree_on_store(self) -> None:
        """Make sure that the lock file holds this store's name. Write the name if the lock file holds none.

        Raises:
            StoreError: a process of an earlier version writes to the store, or the lock file names another store.
        """
        content = self._lock.content()
        if content.earlier_records is not None:
            raise StoreError(f"{self.path}: an earlier version of savings-exporter uses this store; stop that version")
        if content.store == self.view.store:
            return
        if self.journal is None:
            # Another process named or saved the store after this process read it.
            found = examine(self.reader, content)
            refuse_losses(self.path, found)
            with self._reading:
                self.view = found.view
        elif content.store:
            raise StoreError(f"{self.path}: was replaced by another store while it was open; stop this process")
        if content.store != self.view.store:
            self._write_name(self.view)

    def _name_store(self) -> None:
        """Make sure that all processes use the same store name before anything is recorded under it.

        Raises:
            OSError: the lock file cannot be written, or another process holds the lock for too long.
            StoreError: for the reasons in ``_agree_on_store``.
        """
        is_saving = self._saving._is_owned()  # type: ignore[attr-defined]
        if is_saving or read_lock(self.reader.fs, self.path).store == self.view.store:
            return
        with self._saving:
            try:
                self._lock.take()
                self._agree_on_store()
            finally:
                self._let_go()

    def _write_name(self, view: View) -> None:
        is_ours = view.document.is_ours
        is_foreign = not is_ours and view.identity is not None
        self._lock.write(view.store, is_saved=is_ours, is_foreign=is_foreign, created_at=view.document.created_at)

    def _let_go(self) -> None:
        if not self._keeps_lock:
            self._lock.release()


def _log_folded(path: str, before: Crowds, now: Crowds) -> None:
    """Log which names an operator has folded."""
    for kind, crowd in now.items():
        for name in sorted(crowd.folded - before.get(kind, Crowd()).folded):
            logger.warning(
                "%s: the %s %s was folded into other: its counters disappear, and other grows by the same amounts",
                path,
                kind,
                ascii(name),
            )


def _recovered(
    reader: Reader, lock: StoreLock, observer: Observer, counts: Callable[[], OperationCounts], method: SyncMethod
) -> Store:
    """Examine a store. If the lock is held, adopt dead writers and name a new store."""
    fs, path = reader.fs, reader.path
    is_exclusive = not fs.is_shared or fs.is_network(os.path.dirname(path))
    _take_to_open(lock, path, is_exclusive)
    if method == "direct":
        _refuse_without_direct_io(fs, lock)
    elif is_exclusive:
        # On a network file system, only the server decides whether direct writes reach the disk.
        method = "fdatasync"
    if lock.held:
        _discard_temporaries(fs, path)
    found = _examined(reader, lock)
    refuse_losses(path, found)
    for problem in (*found.view.document.problems, *found.harmless):
        logger.warning("%s: %s", path, problem)
    if found.damage:
        logger.error(
            "%s: %s; nothing is lost: the previous document and the journals hold everything", path, found.damage
        )
        observer.recovered("previous_document")
    store = Store(reader, lock, found.view, observer, counts, method)
    store._keeps_lock = is_exclusive
    if found.view.document.legacy is not None:
        _convert(store)
    elif lock.held:
        _adopt(store)
        store._let_go()
    return store


def _refuse_without_direct_io(fs: FileSystem, lock: StoreLock) -> None:
    """Raise when the journal cannot be written with direct I/O. Otherwise every commit would fail.

    Raises:
        StoreError: this file system does not support direct I/O.
    """
    try:
        fs.close(fs.open_direct(lock.path))
    except OSError as error:
        if error.errno not in NO_DIRECT_IO:
            raise
        raise StoreError(
            f"{lock.path}: cannot be written directly: this file system has no direct I/O; use the sync method auto or "
            "fdatasync",
            path=lock.path,
        ) from None


def _examined(reader: Reader, lock: StoreLock) -> Findings:
    """Examine the store. If other processes save it too often, wait for the lock and examine it with the lock held."""
    for _ in range(_ATTEMPTS_TO_OPEN):
        with suppress(BusyStoreError):
            return examine(reader, lock.content() if lock.held else read_lock(reader.fs, reader.path))
        with suppress(BlockingIOError):
            lock.take()
    return examine(reader, lock.content() if lock.held else read_lock(reader.fs, reader.path))


def _take_to_open(lock: StoreLock, path: str, is_exclusive: bool) -> None:
    if is_exclusive and not lock.take_if_free():
        raise StoreError(
            f"{path}: another process has it open, and only one process may open it here (a network file system, or a "
            "platform whose locks are not shared); stop that process, send savings to its service, or use a store on a "
            "local disk",
            path=path,
        )
    with suppress(BlockingIOError):
        # The lock's holder may be waiting for a disk. Durable records can be read without the lock.
        lock.take()


def _adopt(store: Store) -> None:
    reader, view = store.reader, store.view
    try:
        content = store._lock.content()
        if content.store != view.store:
            store._write_name(view)
        dead = checkpoint.dead_writers(reader, view, reader.listing())
        store.view = checkpoint.adopt(reader, store._file(), view, dead, store._observer)
    except OSError as error:
        # The disk is full or failing. Acknowledged records are counted already. The next save tries again.
        logger.warning("%s: dead writers' journals could not be taken over yet: %s", reader.path, error)


def _convert(store: Store) -> None:
    """Convert a document of an earlier version to the current format, before anything is recorded.

    A process of the earlier version that still runs detects the changed lock file and reads the document again. It
    refuses the new format, so its commits fail. Otherwise they would go to a journal that this version does not read.
    """
    path, lock = store.path, store._lock
    if not lock.held:
        raise StoreError(
            f"{path}: an earlier version of savings-exporter is saving this store; stop that process first", path=path
        )
    # Written before the document, so that a process of the earlier version never finds the new format together with its
    # own lock file.
    lock.write(store.view.store, is_saved=True)
    failure = store.save()
    if failure is not None:
        raise StoreError(
            f"{path}: cannot be converted from the format of an earlier version: {failure.step} failed: "
            f"{failure.error} ({error_symbol(failure.error)}); nothing is lost, and the earlier version can still use "
            "the store",
            path=path,
            step=failure.step,
        )
    logger.warning(
        "%s: was converted from the format of an earlier version of savings-exporter. A process of that version that "
        "still has it open cannot record any more: stop it",
        path,
    )
    for segment in earlier_segments(store.reader).values():
        # The document and the previous document hold all records of this segment.
        store.reader.fs.discard(segment)


def _discard_temporaries(fs: FileSystem, path: str) -> None:
    """Remove unused temporary files. This process holds the lock, so no document's temporary file is in use. A writer's
    temporary file is in use while it is locked.
    """
    for temporary in fs.temporaries(path):
        if ".writer." in os.path.basename(temporary):
            with suppress(OSError), fs.opened(temporary) as descriptor:
                if not fs.try_lock(descriptor, shared=True):
                    continue
        fs.discard(temporary)


def _opened_lock(path: str, fs: FileSystem) -> StoreLock:
    directory = os.path.dirname(path)
    try:
        if fs.is_directory(path):
            raise StoreError(f"{path}: is a directory; name a file in it, such as {path}/proxy_savings.json", path=path)
        return StoreLock(fs, path)
    except FileNotFoundError:
        if fs.is_directory(directory):  # such as /proc
            what = f"no file can be made in {directory}; name another store with --store PATH"
        else:
            what = f"the directory does not exist; make it first: mkdir -p {shlex.quote(directory)}"
        raise StoreError(f"{path}: {what}", path=path) from None
    except OSError as error:
        raise _cannot("use", path, error) from None


def _remedy(error: OSError) -> str:
    """What to do about an error; empty when no remedy is known."""
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "; make its directory writable for this user, or name another store with --store PATH"
    return ""


def _cannot(do: str, path: str, error: OSError) -> StoreError:
    reason = error.strerror or str(error)
    return StoreError(
        f"{path}: cannot {do} the store: {reason} ({error_symbol(error)}) on {error.filename or path}{_remedy(error)}",
        path=path,
        errno=error.errno,
    )
