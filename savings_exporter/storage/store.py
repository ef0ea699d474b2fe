"""One store, as one process has it: opens it, closes it, and publishes one view of what is durable."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any, NamedTuple

from savings_exporter.errors import StoreError
from savings_exporter.formats.frame import Group
from savings_exporter.model.keys import KeyEntry
from savings_exporter.model.operations import OperationCounts
from savings_exporter.model.totals import Limits
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
    """Records are durable."""


class Failed(NamedTuple):
    """An operation failed at a step."""

    step: str
    error: Exception


class Store:
    """The store at one path. One thread at a time commits; any thread may save, refresh and look keys up."""

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
        """Open a store, and count what dead writers left.

        Raises:
            StoreError: the store cannot be used; CorruptStoreError: it is damaged; NewerSchemaError: a newer program
                wrote it.
        """
        path = fs.resolved(path)
        reader = Reader(fs, path, limits)
        with suppress(OSError):
            # What cannot be read is reported below.
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
        """The document."""
        return self.reader.path

    def refresh(self) -> View:
        """What is durable now, with what other processes recorded. While that cannot be read, the last view."""
        with self._reading:
            try:
                self._publish(self.reader.refresh(self.view))
                self.read_at = datetime.now(timezone.utc)
            except (OSError, StoreError) as error:
                # The next save meets the same and reports it.
                logger.debug("%s: could not be read: %s", self.path, error)
            return self.view

    def key_entry(self, digest: bytes) -> KeyEntry | None:
        """What an idempotency key was counted as, by any process; None when it is new.

        This process's own keys are known without reading its journal (see ``remember``).
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
        """Note the keys of a frame that is durable, before its journal is read again."""
        journal = self.own_journal()
        with self._reading:
            for group in groups:
                if group.key:
                    entry = KeyEntry(bytes.fromhex(group.print), journal.writer.id, frame.first + group.at - 1)
                    digest = bytes.fromhex(group.key)
                    if self.view.keys.get(digest) is None:
                        self.view.keys.add(digest, entry)

    def own_journal(self) -> Journal:
        """This process's journal; its writer begins with its first use.

        Raises:
            OSError: the writer's file cannot be made, or another process has the store where only one may.
        """
        if self.journal is not None:
            return self.journal
        self._name_store()
        with self._reading:
            if self.journal is None:
                if self._keeps_lock:
                    self._lock.take(0)
                store, fs = self.view.store, self.reader.fs
                writer = Writer(fs, self.path, store)
                self.reader.own = writer
                self.journal = Journal(fs, self.path, self._directory, store, writer, self._method)
            return self.journal

    def wants_segment(self) -> bool:
        """Whether the journal's next segment should be made now."""
        return self.journal is not None and self.journal.wants_segment()

    def make_segment(self) -> None:
        """Make the journal's next segment before it is needed. A failure shows when the segment is needed."""
        if self.journal is not None and self.journal.wants_segment():
            with suppress(OSError):
                self.journal.make_next(self._observer)

    def repair_names(self) -> None:
        """Make this process's files again if they were removed or renamed: what is durable is read by their names.

        Called by the thread that may commit. A failure shows in the save that needs the files.
        """
        if self.journal is not None:
            with suppress(OSError):
                if not self.journal.is_in_place():
                    with Operation(ROTATE, self._observer) as operation:
                        self.journal.repair_names(operation)

    def save(self, parent: Any = None, *, closing: bool = False) -> Failed | None:
        """Save the document with all that is durable.

        ``closing``: this process has ended its journal; its segments are removed.
        """
        if self._saving._is_owned():  # type: ignore[attr-defined]
            # A signal handler within a save of this thread.
            return Failed(PREPARE, BlockingIOError(errno.EAGAIN, "a save of this thread is under way"))
        operation = Operation(SAVE, self._observer, parent)
        try:
            # Observers are told when the lock is free again: an exporter may be slow.
            with operation, self._saving:
                try:
                    self._lock.take(CLOSING_PATIENCE_SECONDS if closing else PATIENCE_SECONDS)
                    self._agree_on_store()
                    self._checkpoint(operation, closing=closing)
                finally:
                    self._let_go()
        except Exception as error:
            return Failed(operation.failed_step or PREPARE, error)
        return None

    def saved_at(self) -> datetime | None:
        """When the document was saved last, by whichever process; None when that is not known. Reads no journal."""
        with self._reading, suppress(OSError, StoreError):
            found = self.reader.with_document(self.view)
            if self._holds_all(found):
                self.view = found
            return found.document.saved_at
        return None

    def is_being_saved(self) -> bool:
        """Whether another process holds the store's lock, most likely because it saves."""
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
        """The operation counters of all writers. This process's are published first, so that every worker shows them.

        While the others' cannot be read, theirs stay as they were: a counter must not go back.
        """
        # What is shown is what was published: the next answer may come from another worker, and must not be lower.
        own = self.publish_counts()
        with suppress(OSError):
            self._others = self._operations_of_others()
        return self._others.plus(own)

    def publish_counts(self) -> OperationCounts:
        """Write this process's operation counters, for other processes and for after its end; return them."""
        with suppress(OSError, StoreError):
            if self._counts() != OperationCounts():
                self.own_journal()
        with self._reading:
            counts = self._counts()
            if self.journal is not None:
                with suppress(OSError):
                    self.journal.writer.publish(counts)
            return counts

    def forked(self, observer: Observer, counts: Callable[[], OperationCounts]) -> Store:
        """The store in a forked child: the same view, a new writer, no lock. What was pending is the parent's."""
        self._lock.abandon()
        if self.journal is not None:
            self.journal.close()
        reader = Reader(self.reader.fs, self.path, self.reader.limits)
        lock = StoreLock(self.reader.fs, self.path, opened=False)
        child = Store(reader, lock, self.view, observer, counts, self._method)
        child._keeps_lock = self._keeps_lock
        return child

    def close(self) -> None:
        """Close all files and release the locks. Saves nothing."""
        if self.journal is not None:
            self.journal.close()
        self._lock.close()

    def _holds_all(self, found: View) -> bool:
        """Whether the view of a document, of which no journal was read yet, holds all that this process knows of."""
        if found.document is self.view.document:
            return True
        positions = {writer: position.sequence for writer, position in self.view.positions.items()}
        if self.journal is not None:
            positions[self.journal.writer.id] = self.journal.sequence
        return all(sequence <= found.position_of(writer).sequence for writer, sequence in positions.items())

    def _publish(self, view: View) -> None:
        """Publish a view, unless a newer one was published while it was read."""
        if not view.is_older_than(self.view):
            self.view = view

    def _operations_of_others(self) -> OperationCounts:
        for _ in range(_ATTEMPTS):
            view = self.view
            total = self.reader.operations(view)
            if self.reader.is_current(view):
                return total
            # A save took counters into the document, and removed their file, while these were read.
            self.refresh()
        return self._others

    def _checkpoint(self, operation: Operation, *, closing: bool) -> None:
        if not self.view.document.is_ours:
            # From here on a document of ours may be seen, of which another program's may be made.
            self._lock.write(self.view.store, is_saved=self._lock.content().is_saved, is_begun=True)
        view = checkpoint.save(self.reader, self._file(), self.view, self._observer, operation, closing=closing)
        with self._reading, suppress(OSError, StoreError):
            self._publish(self.reader.follow(view))
        with suppress(OSError):
            self._lock.write(view.store, is_saved=True)

    def _file(self) -> AtomicFile:
        return AtomicFile(self.reader.fs, self.path, self._directory)

    def _agree_on_store(self) -> None:
        """Write the store's name into the lock file, if it was removed.

        Raises:
            StoreError: a process of an earlier version writes to the store.
        """
        content = self._lock.content()
        if content.earlier_records is not None:
            raise StoreError(f"{self.path}: an earlier version of savings-exporter uses this store; stop that one")
        if content.store == self.view.store:
            return
        if self.journal is None:
            # Another process named the store, or saved it, since this one read it.
            found = examine(self.reader, content)
            refuse_losses(self.path, found)
            with self._reading:
                self.view = found.view
        elif content.store:
            raise StoreError(f"{self.path}: became another store while this process had it open; stop this process")
        if content.store != self.view.store:
            self._write_name(self.view)

    def _name_store(self) -> None:
        """Agree with all processes on the store's name before anything is recorded under it.

        Raises:
            OSError: the lock file cannot be written, or is locked for long.
            StoreError: as ``_agree_on_store``.
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
        self._lock.write(view.store, is_saved=is_ours, is_foreign=not is_ours and view.identity is not None)

    def _let_go(self) -> None:
        if not self._keeps_lock:
            self._lock.release()


def _recovered(
    reader: Reader, lock: StoreLock, observer: Observer, counts: Callable[[], OperationCounts], method: SyncMethod
) -> Store:
    """Read what a store holds; with the lock, adopt dead writers and name a new store."""
    fs, path = reader.fs, reader.path
    is_exclusive = not fs.is_shared or fs.is_network(os.path.dirname(path))
    _take_to_open(lock, path, is_exclusive)
    if method == "direct":
        _refuse_without_direct_io(fs, lock)
    elif is_exclusive:
        # Whether direct writes of such a file system reach the disk is for its server to say.
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
    """Raise where the journal cannot be written directly, rather than let every commit fail.

    Raises:
        StoreError: this file system has no direct I/O.
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
    """What the store holds. While others save it all the time, the lock is free now and then: wait for that."""
    for _ in range(_ATTEMPTS_TO_OPEN):
        with suppress(BusyStoreError):
            return examine(reader, lock.content() if lock.held else read_lock(reader.fs, reader.path))
        with suppress(BlockingIOError):
            lock.take()
    return examine(reader, lock.content() if lock.held else read_lock(reader.fs, reader.path))


def _take_to_open(lock: StoreLock, path: str, is_exclusive: bool) -> None:
    if is_exclusive and not lock.take_if_free():
        raise StoreError(
            f"{path}: another process has it open, and here only one may (a network file system, or a platform whose "
            "locks are not shared); stop that one, send savings to its service, or use a store on a local disk",
            path=path,
        )
    with suppress(BlockingIOError):
        # Its holder may be waiting for a disk. What is durable can be read without it.
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
        # A disk that is full or fails. What is acknowledged counts already; the next save tries again.
        logger.warning("%s: dead writers' journals could not be taken over yet: %s", reader.path, error)


def _convert(store: Store) -> None:
    """Save a document of an earlier version in the format of this one before anything is recorded.

    A process of that version that still runs reads the document again when the lock file is not as it left it. It
    refuses the new format, so its commits fail instead of going to a journal that this version does not read.
    """
    path, lock = store.path, store._lock
    if not lock.held:
        raise StoreError(
            f"{path}: an earlier version of savings-exporter is saving this store; stop that process first", path=path
        )
    # Before the document: a process of the earlier version never finds the new format under a lock file of its own.
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
        # All of it is in the document, and in the one before it.
        store.reader.fs.discard(segment)


def _discard_temporaries(fs: FileSystem, path: str) -> None:
    """Remove temporary files: those of a document live only while the lock is held, those of a writer are locked."""
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
        raise StoreError(
            f"{path}: the directory does not exist; make it first: mkdir -p {directory}", path=path
        ) from None
    except OSError as error:
        raise _cannot("use", path, error) from None


def _remedy(error: OSError) -> str:
    """What to do about an error, where that is clear."""
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
