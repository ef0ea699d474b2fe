"""A store on the disk: open it, catch up with other processes, save it, and say what is wrong with it."""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import threading
import time
from datetime import datetime, timezone
from typing import NamedTuple

import msgspec

from savings_exporter.documents import Document, decode, encode
from savings_exporter.errors import CorruptStoreError, NewerSchemaError, StoreError
from savings_exporter.storage import filesystem
from savings_exporter.storage.atomic_file import AtomicFile
from savings_exporter.storage.steps import PREPARE, SAVE, Observer, error_symbol, observed
from savings_exporter.totals import Delta, Ledger, Limits, thinned

logger = logging.getLogger(__name__)

# How long to wait for another process to finish its save before calling it a failure and trying again later.
_LOCK_PATIENCE_SECONDS = 2.0
_LOCK_POLL_SECONDS = 0.002


class State(NamedTuple):
    """What a store holds: durable totals, when they were saved (by any process; None when never), in how many bytes."""

    ledger: Ledger
    saved_at: datetime | None
    document_bytes: int


class Store:
    """The document at one path, and what is known to be durable of it.

    One save runs at a time, in whichever process holds the lock. Each save starts from what the others saved, so
    several processes may share a store.

    Raises:
        StoreError: the store cannot be used; CorruptStoreError when it is damaged, NewerSchemaError when a newer
            program wrote it.
    """

    def __init__(self, path: str, observer: Observer, limits: Limits) -> None:
        self.path = filesystem.resolved(path)
        self._observer = observer
        self._limits = limits
        self._file = AtomicFile(self.path, previous_path(self.path))
        self._attempts: set[str] = set()
        self._saving = threading.Lock()
        self._lock = _opened_lock(self.path)
        self._locked = False
        self.failed_step = PREPARE
        """The step at which the last save that failed did so."""
        try:
            self._document, self._identity = self._load()
        except BaseException:
            self.close()
            raise

    @property
    def ledger(self) -> Ledger:
        """The totals that are durable."""
        return self._document.ledger

    @property
    def state(self) -> State:
        """What is durable, and when and how large it was saved, as one consistent piece."""
        document, identity = self._document, self._identity
        saved_at = document.saved_at
        if saved_at is None and identity is not None:
            saved_at = datetime.fromtimestamp(identity.modified_ns / 1e9, timezone.utc)
        return State(document.ledger, saved_at, identity.size if identity else 0)

    @property
    def exists(self) -> bool:
        """Whether there is a document yet."""
        return self._identity is not None

    def save(self, delta: Delta) -> None:
        """Save the document with a delta counted in.

        Raises:
            OSError: it is not durable. The delta is not counted in, whatever a reader of the file may see, and the
                next save has to carry it.
        """
        with self._saving, observed(self._observer, SAVE) as operation:
            operation.records = delta.records
            self.failed_step = PREPARE
            self._take_lock()
            try:
                self._catch_up()
                now = datetime.now(timezone.utc)
                document = msgspec.structs.replace(
                    self._document,
                    ledger=self._document.ledger.plus(delta, self._limits, now),
                    save=secrets.token_hex(8),
                    saved_at=now,
                )
                data = encode(document)
                operation.sequence, operation.size = document.ledger.sequence, len(data)
                self._attempts.add(document.save)
                self._file.save(data, self._observer, operation)
                self._document, self._identity = document, filesystem.identity(self.path)
                self._attempts.clear()
            finally:
                self.failed_step = operation.failed_step or PREPARE
                # While nobody can know which version a power loss would bring back, nobody else may build on it.
                if not self._file.outcome_unknown:
                    self._release_lock()

    def refresh(self) -> None:
        """See what other processes saved. Costs one ``stat`` when they saved nothing; never fails."""
        if self._saving.acquire(blocking=False):
            try:
                if not self._file.outcome_unknown:
                    self._catch_up()
            except (OSError, StoreError) as error:
                # The next save meets the same and reports it.
                logger.debug("%s: could not be read again: %s", self.path, error)
            finally:
                self._saving.release()

    def close(self) -> None:
        """Let go of the lock and its file. Saves nothing."""
        self._release_lock()
        descriptor, self._lock = self._lock, -1
        if descriptor >= 0:
            filesystem.close(descriptor)

    def _load(self) -> tuple[Document, filesystem.Identity | None]:
        try:
            if self._wait_for_lock():
                # Temporary files live only while the lock is held, so these were left by a process that died.
                for temporary in filesystem.temporaries(self.path):
                    filesystem.discard(temporary)
            document, identity = load(self.path, self._observer)
        except OSError as error:
            raise _cannot("read", self.path, error) from None
        finally:
            self._release_lock()
        for problem in document.problems:
            logger.warning("%s: %s", self.path, problem)
        if not document.is_ours:
            history = thinned(document.ledger.history, datetime.now(timezone.utc))
            ledger = msgspec.structs.replace(document.ledger.bounded(self._limits), history=history)
            document = msgspec.structs.replace(document, ledger=ledger, store=secrets.token_hex(8))
        return document, identity

    def _catch_up(self) -> None:
        """Take over what another process saved since.

        Raises:
            OSError: ESTALE when the file is not a later save of this store.
        """
        current = filesystem.identity(self.path)
        if current is None or current == self._identity:
            # A document that was taken away is written anew from memory: less would be a loss.
            return
        data, identity = filesystem.read(self.path)
        try:
            document = decode(data)
        except StoreError as error:
            raise OSError(errno.ESTALE, f"was changed by another program ({error})", self.path) from error
        if document.save in {self._document.save, *self._attempts} - {""}:
            self._identity = identity
            return
        is_first_sight = self._identity is None and not self._attempts
        is_later = document.store == self._document.store and document.ledger.sequence >= self.ledger.sequence
        if not document.is_ours or not (is_first_sight or is_later) or self._file.outcome_unknown:
            raise OSError(errno.ESTALE, "was changed by another program", self.path)
        self._document, self._identity = document, identity

    def _take_lock(self) -> None:
        if not self._locked and not self._wait_for_lock():
            raise BlockingIOError(errno.EAGAIN, "another process holds the lock for long", lock_path(self.path))

    def _wait_for_lock(self) -> bool:
        deadline = time.monotonic() + _LOCK_PATIENCE_SECONDS
        while not self._try_lock():
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOCK_POLL_SECONDS)
        return True

    def _try_lock(self) -> bool:
        if not filesystem.is_at(self._lock, lock_path(self.path)):
            # Somebody removed the lock file, and a process that came later made another: agree with it.
            replaced, self._lock = self._lock, filesystem.open_lock(lock_path(self.path))
            filesystem.close(replaced)
        if not filesystem.try_lock(self._lock):
            return False
        self._locked = filesystem.is_at(self._lock, lock_path(self.path))
        if not self._locked:
            filesystem.unlock(self._lock)
        return self._locked

    def _release_lock(self) -> None:
        if self._locked:
            filesystem.unlock(self._lock)
            self._locked = False


def previous_path(path: str) -> str:
    """Where the save before the last one is kept."""
    return path + ".previous"


def lock_path(path: str) -> str:
    """The lock file of a store."""
    return path + ".lock"


def load(path: str, observer: Observer | None = None) -> tuple[Document, filesystem.Identity | None]:
    """Read the document at a path, an empty one where there is nothing yet.

    With an observer, a damaged document is mended where that loses nothing: it is kept aside, and the save before
    it, which holds the same totals, takes its place.

    Raises:
        OSError: it cannot be read.
        StoreError: it is damaged or newer; the message says what would be lost and how to mend it.
    """
    if filesystem.identity(path) is None:
        if filesystem.identity(previous_path(path)) is None:
            return Document(), None
        raise CorruptStoreError(_damage(path, "is missing", _decoded(previous_path(path))))
    data, identity = filesystem.read(path)
    try:
        return decode(data), identity
    except NewerSchemaError as error:
        raise NewerSchemaError(
            f"{path}: {error}; use the newer program, or another --store. If nothing newer ever wrote it, it is "
            f"damaged: move it away, then savings-exporter verify --repair --store {path}"
        ) from None
    except CorruptStoreError as error:
        previous = _decoded(previous_path(path))
        if observer is None or previous is None or not _says_the_same(data, previous):
            raise CorruptStoreError(_damage(path, f"is damaged: {error}", previous)) from None
        aside = _put_previous_in_place(path, observer)
        logger.error(
            "%s: was damaged (%s); kept as %s, nothing is lost: the save before it is in place", *(path, error, aside)
        )
        return load(path)


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """What ``inspect`` found: the totals that a tracker would open with, and what is wrong, in words."""

    ledger: Ledger | None
    saved_at: datetime | None
    problems: tuple[str, ...]


def inspect(path: str) -> Inspection:
    """Look at a store without changing anything.

    Raises:
        OSError: it cannot be read.
    """
    path = filesystem.resolved(path)
    problems: list[str] = []
    ledger, saved_at = None, None
    try:
        document, identity = load(path)
        if identity is None:
            problems.append(f"{path}: there is no store yet")
        else:
            ledger, saved_at = document.ledger, document.saved_at
            problems += [f"{path}: {problem}" for problem in document.problems]
    except StoreError as error:
        problems.append(str(error))
    if filesystem.identity(previous_path(path)) is not None and _decoded(previous_path(path)) is None:
        problems.append(f"{previous_path(path)}: is damaged; the next save replaces it")
    return Inspection(ledger=ledger, saved_at=saved_at, problems=tuple(problems))


def repair(path: str, observer: Observer) -> str:
    """Put the save before the last one in the place of a damaged or missing document, which is kept aside.

    Returns:
        What was done, in words.

    Raises:
        StoreError: there is nothing to mend, or nothing to mend it with.
        OSError: the disk would not.
    """
    path = filesystem.resolved(path)
    lock = _opened_lock(path)
    try:
        if not filesystem.try_lock(lock):
            raise StoreError(f"{path}: another process is saving it; stop it first")
        try:
            load(path)
        except CorruptStoreError:
            previous = _decoded(previous_path(path))
            if previous is None:
                raise
            aside = _put_previous_in_place(path, observer)
            kept = f"; the damaged document is kept as {aside}" if aside else ""
            return f"{path}: went back to {_described(previous)}; what was recorded after that is lost{kept}"
        raise StoreError(f"{path}: there is nothing to repair")
    finally:
        filesystem.close(lock)


def _put_previous_in_place(path: str, observer: Observer) -> str | None:
    data, _ = filesystem.read(previous_path(path))
    aside = None
    if filesystem.identity(path) is not None:
        aside = filesystem.unused_name(path, "corrupt")
        filesystem.rename(path, aside)
        observer.recovered("corrupt_document")
    with observed(observer, SAVE) as operation:
        operation.size = len(data)
        AtomicFile(path, previous_path(path)).save(data, observer, operation)
    observer.recovered("previous_document")
    return aside


def _says_the_same(damaged: bytes, previous: Document) -> bool:
    """Whether a damaged document can still be read and its sums are those of the document before it."""
    try:
        raw = json.loads(damaged)
        lifetime = raw["lifetime"]
        sums = msgspec.structs.asdict(previous.ledger.lifetime)
        return raw["savings_exporter"]["sequence"] == previous.ledger.sequence and all(
            lifetime[name] == value for name, value in sums.items()
        )
    except (ValueError, RecursionError, KeyError, TypeError):
        return False


def _decoded(path: str) -> Document | None:
    """The document at a path, or None when there is no whole one."""
    try:
        return decode(filesystem.read(path)[0])
    except (OSError, StoreError):
        return None


def _damage(path: str, what: str, previous: Document | None) -> str:
    if previous is None:
        return (
            f"{path}: {what}; there is no whole save before it, so its totals are lost. Restore it from a backup, or "
            f"move it (and its .previous, where there is one) away to start from zero"
        )
    return (
        f"{path}: {what}; the save before it is whole and holds {_described(previous)}; what was recorded after that "
        f"is lost. To go on from there: savings-exporter verify --repair --store {path}"
    )


def _described(document: Document) -> str:
    saved = f", saved {document.saved_at:%Y-%m-%d %H:%M:%S} UTC" if document.saved_at else ""
    return f"{document.ledger.lifetime.tokens_saved} tokens saved in {document.ledger.sequence} records{saved}"


def _opened_lock(path: str) -> int:
    try:
        if filesystem.is_directory(path):
            raise StoreError(f"{path}: is a directory; name a file in it, such as {path}/proxy_savings.json")
        return filesystem.open_lock(lock_path(path))
    except FileNotFoundError:
        directory = os.path.dirname(path)
        raise StoreError(f"{path}: the directory does not exist; make it first: mkdir -p {directory}") from None
    except OSError as error:
        raise _cannot("use", path, error) from None


def _cannot(do: str, path: str, error: OSError) -> StoreError:
    reason = error.strerror or str(error)
    return StoreError(f"{path}: cannot {do} the store: {reason} ({error_symbol(error)}) on {error.filename or path}")
