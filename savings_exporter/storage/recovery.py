"""Examines a store when it is opened: the document, the previous document and the journals, and any damage to them.

This module never writes. The sequence numbers of a writer have no gaps, so missing records are detected: a frame begins
with too high a number, or the journal ends before a watermark of the same boot. A damaged frame without missing
acknowledged records was never acknowledged.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import NamedTuple

import msgspec

from savings_exporter.errors import CorruptStoreError, NewerSchemaError, OtherFileError, StoreError
from savings_exporter.formats.document import Document, is_of_another_program
from savings_exporter.model.figures import Totals
from savings_exporter.model.totals import Ledger
from savings_exporter.storage.filesystem import NO_SUCH_FILE, Identity
from savings_exporter.storage.lock import LockContent, new_store, read_lock
from savings_exporter.storage.other_program import continues, started_from
from savings_exporter.storage.reader import Reader, bounded, described_losses, previous_document, previous_path
from savings_exporter.storage.view import Reading, View, counted, view_of

_ATTEMPTS = 5

_EARLIER_SEGMENT = re.compile(r"\.journal\.(\d{8,18})")


class Conflict(NamedTuple):
    """Totals of another program's document that replaced ours, and of our store. Each may hold records that the other
    lacks.

    ``theirs`` is the other program's document; None when it cannot be read, and ``damage`` then says why. ``ours`` is
    our last remaining document with the journals' further records. ``common`` are the totals of the document that the
    other program started from; None when it cannot be determined. ``base`` are the totals of our last remaining
    document.
    """

    theirs: Totals | None
    base: Totals
    ours: Totals
    common: Ledger | None = None
    damage: str = ""


class BusyStoreError(StoreError):
    """Other processes saved the document during each attempt to read it."""


class Findings(NamedTuple):
    """The result of examining a store.

    ``damage`` says why the document at the path was not used; it is empty when the document was used. ``other`` are the
    totals of that document when it is whole and does not belong to this store. ``incomplete`` are the journals that
    lack, or may lack, acknowledged records. ``torn`` are the journals that end with a torn write.
    """

    view: View
    exists: bool
    damage: str = ""
    incomplete: Sequence[Reading] = ()
    torn: Sequence[Reading] = ()
    harmless: Sequence[str] = ()
    conflict: Conflict | None = None
    other: Totals | None = None

    def is_lossy(self) -> bool:
        """Whether acknowledged records are missing, or may be."""
        return bool(self.incomplete) or self.conflict is not None


def examine(reader: Reader, lock: LockContent) -> Findings:
    """Examine a store. If another process saves in the meantime, the store is read again.

    Raises:
        OSError: the store cannot be read.
        StoreError: the content of the store cannot be determined; NewerSchemaError: a newer program wrote it;
            BusyStoreError: other processes saved it during every attempt.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        identity = reader.fs.identity(reader.path)
        try:
            found = _examined(reader, lock)
        except (FileNotFoundError, CorruptStoreError) as error:
            # A file can also disappear while the document stays the same: a writer removed a segment it does not need.
            is_damage = isinstance(error, CorruptStoreError) and reader.fs.identity(reader.path) == identity
            if attempt == _ATTEMPTS or is_damage:
                raise
            continue
        if reader.fs.identity(reader.path) == identity:
            return found
    raise BusyStoreError(f"{reader.path}: is being saved too often to be read; try again", path=reader.path)


def _examined(reader: Reader, lock: LockContent) -> Findings:
    document, identity, damage = _document_at(reader)
    if document is None:
        previous = previous_document(reader.fs, reader.path)
        if previous is not None and identity is not None and _is_of_another_program(reader):
            return _with_unreadable_document(reader, lock, identity, damage, previous)
        return _without_document(reader, lock, identity, damage)
    if not document.is_ours:
        return _with_foreign_document(reader, lock, document, identity)
    _refuse_open_journal_of_earlier_version(reader, document, lock)
    _refuse_other_store(reader, document, lock)
    older = _older_than_previous(reader, document)
    if older:
        return _without_document(reader, lock, identity, older)
    return _followed(reader, view_of(document, identity, bytes.fromhex(document.store)), exists=True)


def salvage(reader: Reader, lock: LockContent) -> Findings:
    """Recover what is left of a store that cannot be opened: the previous document, if it is intact, and the journals.

    Raises:
        OSError: the store cannot be read.
        CorruptStoreError: nothing is left.
    """
    previous = previous_document(reader.fs, reader.path)
    document = previous if previous is not None and previous.is_ours else Document()
    identity = reader.fs.identity(reader.path)
    view = view_of(document, identity, _store_of(reader, document, lock))
    found = _followed(reader, msgspec.structs.replace(view, is_whole=False), exists=True)
    if not document.is_ours and found.view.ledger.records == 0:
        raise _nothing_left(reader, "no intact part of it is left")
    at_path, _, _ = _document_at(reader)
    other = at_path.ledger.lifetime if at_path is not None and at_path.store != view.store.hex() else None
    return found._replace(damage="cannot be used", other=other)


def refuse_losses(path: str, found: Findings) -> None:
    """Raise when acknowledged records are missing.

    Raises:
        CorruptStoreError: the message says which records are missing, and what to do.
    """
    if found.conflict is not None:
        remedy = remedy_of_conflict(path, found.conflict)
        raise CorruptStoreError(f"{path}: {described_conflict(found.conflict)}", remedy, path=path)
    if found.incomplete:
        what = f"{found.damage}; " if found.damage else ""
        losses = "; ".join(map(described_losses, found.incomplete))
        raise CorruptStoreError(
            f"{path}: {what}{losses}. What is left holds {described(found.view)}",
            f"To continue from that: savings-exporter verify --repair --store {path}",
            path=path,
        )


def described(view: View) -> str:
    """A description of a view's totals."""
    return described_totals(view.ledger.lifetime)


def described_conflict(conflict: Conflict) -> str:
    """A description of what the conflicting document and this store hold."""
    ours = f"this store holds {described_totals(conflict.ours)}"
    if conflict.theirs is None:
        return f"another program wrote the document, and {conflict.damage}, so its totals are not known; {ours}"
    text = (
        "another program rewrote the document, and each may hold records that the other lacks. The document at the "
        f"path holds {described_totals(conflict.theirs)}; {ours}. {described_overlap(conflict)}"
    )
    if conflict.common is None:
        return text
    more = described_difference(conflict.ours, conflict.common.lifetime)
    return f"{text}, and this store holds {more} that the document lacks"


def remedy_of_conflict(path: str, conflict: Conflict) -> str:
    """Instructions for each way to continue after another program rewrote the document."""
    repair = f"savings-exporter verify --repair --store {shlex.quote(path)}"
    merge = f"To continue with the savings of both: {repair} --merge. " if conflict.common is not None else ""
    theirs = (
        f". To continue with the other program's document alone: move {path}.previous, {path}.lock and all files "
        f"{path}.journal.*, {path}.writer.* and {path}.days.* away"
    )
    return (
        f"Stop the other program and every process that uses the store first. {merge}To continue with this store's "
        f"totals alone: {repair} (the other document is kept beside it){theirs if conflict.theirs is not None else ''}"
    )


def refuse_other_file(reader: Reader) -> None:
    """Raise when an unusable file is at the path of a new store. This runs before anything is written.

    Raises:
        OSError: the file cannot be read.
        StoreError: the file is not a savings document (OtherFileError), is damaged, or was written by a newer program.
    """
    if reader.fs.identity(reader.path) is not None and not _is_store(reader):
        _, _, damage = _document_at(reader)
        if damage:
            raise _nothing_left(reader, damage)


def _is_store(reader: Reader) -> bool:
    """Whether other files of one of our stores exist. If so, the file at the path may once have been our document."""
    listing, lock = reader.listing(), read_lock(reader.fs, reader.path)
    is_known = lock.is_saved or lock.is_begun or bool(listing.segments) or bool(listing.writers)
    return is_known or _previous_if_readable(reader) is not None


def _previous_if_readable(reader: Reader) -> Document | None:
    """The previous document, or None when it cannot be read. For callers that do not depend on it."""
    try:
        return previous_document(reader.fs, reader.path)
    except OSError:
        return None


def _document_at(reader: Reader) -> tuple[Document | None, Identity | None, str]:
    """The document at the path and its identity, or the reason why it cannot be used."""
    identity = reader.fs.identity(reader.path)
    if identity is None:
        return None, None, "is missing"
    try:
        document, identity = reader.read_document()
    except NewerSchemaError as error:
        raise NewerSchemaError(
            f"{reader.path}: {error}",
            "Use the newer program, or another --store. If no newer program wrote it, it is damaged: move it away, "
            f"then savings-exporter verify --repair --store {reader.path}",
            path=reader.path,
        ) from None
    except OtherFileError as error:
        if not _is_store(reader):
            remedy = "It is left as it is; choose another path for the store"
            raise OtherFileError(f"{reader.path}: {error}", remedy, path=reader.path) from None
        return None, identity, str(error)
    except CorruptStoreError as error:
        return None, identity, f"is damaged: {error}"
    return document, identity, ""


def _is_of_another_program(reader: Reader) -> bool:
    """Whether the unusable file at the path was written by another program."""
    try:
        return is_of_another_program(reader.fs.read(reader.path)[0])
    except NO_SUCH_FILE:
        return False


def _older_than_previous(reader: Reader, document: Document) -> str:
    """Why a document is not the last saved one; empty when it may be the last one."""
    previous = _previous_if_readable(reader)
    if previous is None or previous.store != document.store or previous.ledger.records <= document.ledger.records:
        return ""
    return "is older than the previous document beside it, such as a backup that was put in place"


def _refuse_other_store(reader: Reader, document: Document, lock: LockContent) -> None:
    """Raise when the document belongs to another store than the files beside it."""
    if not lock.store or lock.store.hex() == document.store:
        return
    previous = _previous_if_readable(reader)
    if lock.is_saved or lock.store in reader.stores_of_segments():
        held = described_totals(previous.ledger.lifetime) if previous is not None else ""
        beside = f" (their previous document holds {held})" if held else ""
        raise CorruptStoreError(
            f"{reader.path}: belongs to another store than the files beside it{beside}",
            f"To continue with it, move {reader.path}.previous, {reader.path}.lock and all files "
            f"{reader.path}.journal.*, {reader.path}.writer.* and {reader.path}.days.* away. To continue with those "
            "files: "
            f"savings-exporter verify --repair --store {reader.path}",
            path=reader.path,
        )


def _without_document(reader: Reader, lock: LockContent, identity: Identity | None, damage: str) -> Findings:
    """Examine the store without the document at the path: the previous document and the journals."""
    previous = previous_document(reader.fs, reader.path)
    segments = reader.listing().segments
    if previous is None and identity is None and not lock.is_saved and not _has_previous(reader):
        # Either a new store, or a store whose process died before the first save. If the path held another program's
        # document before, that document was removed.
        exists = bool(segments) or (bool(lock.store) and not lock.is_foreign)
        new = Document(created_at=lock.created_at or datetime.now(timezone.utc))
        return _followed(reader, view_of(new, None, _store_of(reader, new, lock)), exists=exists)
    if previous is None:
        if segments:
            raise CorruptStoreError(
                f"{reader.path}: {damage}, and there is no whole previous document, so only what the journals hold is "
                "left",
                f"Restore it from a backup, or continue with what is left: savings-exporter verify --repair "
                f"--store {reader.path}",
                path=reader.path,
            )
        raise _nothing_left(reader, damage)
    _refuse_open_journal_of_earlier_version(reader, previous, lock)
    if not previous.is_ours:
        previous = bounded(previous, reader.limits)
    view = view_of(previous, identity, _store_of(reader, previous, lock))
    return _followed(reader, msgspec.structs.replace(view, is_whole=False), exists=True)._replace(damage=damage)


def _with_foreign_document(
    reader: Reader, lock: LockContent, document: Document, identity: Identity | None
) -> Findings:
    """Examine another program's document. It is taken over unless this store holds records that it may lack."""
    _refuse_earlier_journal(reader, lock)
    previous = previous_document(reader.fs, reader.path)
    whole, document = document, bounded(document, reader.limits)
    if previous is not None:
        # The keys of the previous document are kept, so that their records are not counted again.
        document = msgspec.structs.replace(document, keys=previous.keys)
    is_taken_over = bool(lock.store) and not lock.is_saved and not lock.is_begun
    view = view_of(document, identity, lock.store if is_taken_over else new_store())
    if is_taken_over:
        # This store took over the document but has not saved for the first time yet.
        return _followed(reader, view, exists=True)
    base = previous or Document()
    ours = _followed(reader, view_of(base, None, _store_of(reader, base, lock)), exists=True)
    adds_nothing = ours.view.ledger.records == base.ledger.records and not ours.incomplete
    if adds_nothing and (previous is None or _is_later(whole, previous)):
        return Findings(view, exists=True)
    common = started_from(reader, whole, base, ours.view.store)
    conflict = Conflict(whole.ledger.lifetime, base.ledger.lifetime, ours.view.ledger.lifetime, common)
    return _in_conflict(ours, identity, conflict)


def _with_unreadable_document(
    reader: Reader, lock: LockContent, identity: Identity, damage: str, base: Document
) -> Findings:
    """Examine a store whose document another program replaced with one that cannot be read."""
    ours = _followed(reader, view_of(base, None, _store_of(reader, base, lock)), exists=True)
    conflict = Conflict(None, base.ledger.lifetime, ours.view.ledger.lifetime, damage=f"it {damage}")
    return _in_conflict(ours, identity, conflict)


def _in_conflict(ours: Findings, identity: Identity | None, conflict: Conflict) -> Findings:
    return ours._replace(view=msgspec.structs.replace(ours.view, identity=identity, is_whole=False), conflict=conflict)


def _is_later(document: Document, previous: Document) -> bool:
    """Whether another program's document was made from our previous document. If its points do not show that, it is
    assumed when its totals are not lower.
    """
    known = continues(document, previous)
    return not _has_less(document, previous) if known is None else known


def _has_less(document: Document, previous: Document) -> bool:
    """Whether another program's document has lower totals than our previous document. The other program then started
    from an older document.
    """
    theirs, ours = document.ledger.lifetime, previous.ledger.lifetime
    return theirs.requests < ours.requests or theirs.tokens_saved < ours.tokens_saved


def _refuse_earlier_journal(reader: Reader, lock: LockContent) -> None:
    """Raise when the journal of an earlier version holds records that another program's document may lack."""
    is_open = (lock.earlier_records or 0) > lock.earlier_saved
    for epoch, path in earlier_segments(reader).items():
        if epoch >= lock.earlier_end[0]:
            start = lock.earlier_end[1] if epoch == lock.earlier_end[0] else 0
            is_open = is_open or any(reader.fs.read(path)[0][start:].rstrip(b"\0"))
    if is_open:
        raise _not_closed(reader.path)


def _followed(reader: Reader, view: View, *, exists: bool) -> Findings:
    """A document with all further records in the journals."""
    readings = list(reader.read_journals(view))
    return Findings(
        counted(view, readings, reader.limits, datetime.now(timezone.utc)),
        exists,
        incomplete=[reading for reading in readings if reading.lost or reading.doubt],
        torn=[reading for reading in readings if reading.tail is not None],
        harmless=[f"{path}: belongs to another store" for reading in readings for path in reading.foreign],
    )


def _store_of(reader: Reader, document: Document, lock: LockContent) -> bytes:
    """The store's name from its document, its lock file or a frame, or else a new name."""
    if document.store or lock.store:
        return bytes.fromhex(document.store) or lock.store
    return next(reader.stores_of_segments(), None) or new_store()


def _refuse_open_journal_of_earlier_version(reader: Reader, document: Document, lock: LockContent) -> None:
    """Raise when a store of an earlier version was not closed, because this version does not read its journal."""
    legacy = document.legacy
    if legacy is None:
        return
    is_open = (lock.earlier_records or 0) > document.ledger.records
    for epoch, path in earlier_segments(reader).items():
        if epoch >= legacy.epoch:
            start = legacy.offset if epoch == legacy.epoch else 0
            is_open = is_open or any(reader.fs.read(path)[0][start:].rstrip(b"\0"))
    if is_open:
        raise _not_closed(reader.path)


def _not_closed(path: str) -> StoreError:
    return StoreError(
        f"{path}: was written by an earlier version of savings-exporter that did not close it: its journal holds "
        "records that the document does not",
        "If that version still runs, stop it; otherwise start and stop it once, "
        f"with its own command (serve --store {path}). Then use this version",
        path=path,
    )


def earlier_segments(reader: Reader) -> dict[int, str]:
    """The segments of an earlier version's journal, by number. That version had one journal for all processes."""
    found = {}
    name = os.path.basename(reader.path)
    for entry in reader.fs.names_beside(reader.path):
        if match := _EARLIER_SEGMENT.fullmatch(entry, len(name)):
            found[int(match[1])] = reader.path + match[0]
    return found


def _has_previous(reader: Reader) -> bool:
    return reader.fs.identity(previous_path(reader.path)) is not None


def _nothing_left(reader: Reader, damage: str) -> CorruptStoreError:
    path = reader.path
    if _is_of_another_program(reader):
        return CorruptStoreError(
            f"{path}: {damage}. Another program wrote it",
            "It is left as it is. Correct it or restore it from a backup, or choose another path for the store",
            path=path,
        )
    if not _is_store(reader):
        return CorruptStoreError(
            f"{path}: {damage}. No other file of a store is beside it",
            "It is left as it is. If it is no store, correct the path; if it was one, restore it from a backup",
            path=path,
        )
    return CorruptStoreError(
        f"{path}: {damage}",
        "There is no whole previous document, so its totals are lost. If this is not the store, correct the path. "
        f"Otherwise restore it from a backup, or move all files {path}* away to start from zero",
        path=path,
    )


def described_totals(totals: Totals) -> str:
    """A description of totals."""
    return f"{totals.tokens_saved} tokens saved in {totals.requests} records"


def described_overlap(conflict: Conflict) -> str:
    """A description of what another program's document holds beyond this store."""
    theirs, base = conflict.theirs, conflict.base
    if theirs is None:
        return "It is not known what it holds"
    if conflict.common is not None:
        more = described_difference(theirs, conflict.common.lifetime)
        return f"The other program recorded {more} that this store lacks"
    unknown = "It cannot be determined which document of this store the other program started from"
    if theirs.tokens_saved < base.tokens_saved or theirs.requests < base.requests:
        return (
            f"{unknown}. The document at the path holds less than our last remaining document "
            f"({described_totals(base)}), so this store may lack all of it"
        )
    return (
        f"{unknown}. Compared with our last remaining document ({described_totals(base)}), the document at the path "
        f"holds {described_difference(theirs, base)} more, and this store {described_difference(conflict.ours, base)}"
    )


def described_difference(totals: Totals, base: Totals) -> str:
    """A description of the difference between two totals."""
    return f"{totals.tokens_saved - base.tokens_saved} tokens saved in {totals.requests - base.requests} records"
