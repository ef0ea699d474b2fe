"""``verify`` and ``verify --repair``: find out what is wrong with a store, and save its intact data."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any, NamedTuple

import msgspec

from savings_exporter.errors import CorruptStoreError, StoreError
from savings_exporter.formats.document import decode, encode
from savings_exporter.model.totals import Ledger, Limits, Row, Sums, Totals, total_of
from savings_exporter.storage.atomic_file import AtomicFile, Directory
from savings_exporter.storage.checkpoint import dead_writers
from savings_exporter.storage.closed_days import days_path, mended, problem_of_days
from savings_exporter.storage.filesystem import LOCAL, FileSystem, unused_name
from savings_exporter.storage.journal import segment_path
from savings_exporter.storage.lock import StoreLock, read_lock
from savings_exporter.storage.observers import Observer
from savings_exporter.storage.operation import SAVE, Operation
from savings_exporter.storage.other_program import copy_path, digest_of
from savings_exporter.storage.reader import Reader, described_losses, previous_path
from savings_exporter.storage.recovery import (
    Findings,
    described,
    described_conflict,
    described_difference,
    described_overlap,
    described_totals,
    examine,
    refuse_other_file,
    remedy_of_conflict,
    salvage,
)
from savings_exporter.storage.view import View, composed
from savings_exporter.storage.writers import read_counts, writer_path

_ATTEMPTS = 5


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """The content of a store, as far as it can be determined.

    ``problems`` require an action. ``notes`` require none.
    """

    ledger: Ledger | None
    saved_at: datetime | None
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()


class Repaired(NamedTuple):
    """A description of what a repair did, and whether it left out records that another file holds."""

    text: str
    leaves_out: bool


def is_begun(path: str, fs: FileSystem = LOCAL) -> bool:
    """Whether any file of a store exists."""
    path = fs.resolved(path)
    return fs.is_directory(os.path.dirname(path)) and bool(fs.names_beside(path))


def inspect(path: str, fs: FileSystem = LOCAL) -> Inspection:
    """Examine a store without changing anything.

    Raises:
        OSError: the store cannot be read.
    """
    path = fs.resolved(path)
    reader = Reader(fs, path, Limits())
    try:
        found = examine(reader, read_lock(fs, path))
        days = problem_of_days(fs, path, found.view)
        for _ in range(_ATTEMPTS):
            if not days or not found.view.is_whole or reader.is_current(found.view):
                break
            # Another process saved the document, and removed the file that belonged to the earlier one.
            found = examine(reader, read_lock(fs, path))
            days = problem_of_days(fs, path, found.view)
    except StoreError as error:
        return Inspection(ledger=None, saved_at=None, problems=(str(error),))
    if not found.exists:
        return Inspection(ledger=None, saved_at=None, problems=(f"{path}: there is no store yet",))
    return Inspection(
        ledger=found.view.ledger,
        saved_at=found.view.document.saved_at,
        problems=tuple(_problems(reader, found, days)),
        notes=tuple(_notes(reader, found)),
    )


class Merging(NamedTuple):
    """What another program recorded: sums of its records, and sums that count only in the totals by project."""

    rows: Sequence[Row]
    projects: Sequence[Row]


Difference = Callable[[str, bytes, Ledger, datetime], Merging]
"""Computes what another program recorded. The arguments are the path and the bytes of its document, the totals of the
document that it started from, and the current time.
"""


def repair(path: str, observer: Observer, fs: FileSystem = LOCAL, *, difference: Difference | None = None) -> Repaired:
    """Repair a store: save its intact data as a new document, and keep copies of its damaged files.

    Args:
        path: the document's path.
        observer: is notified of the save.
        fs: the file system.
        difference: adds what another program recorded that rewrote the document. Without it, that is left out.

    Raises:
        StoreError: no intact data is left, another process uses the store, or it cannot be determined what the other
            program recorded. Nothing was changed.
        OSError: the disk failed.
    """
    path = fs.resolved(path)
    if not is_begun(path, fs):
        raise StoreError(f"{path}: there is nothing to repair: there is no store yet", path=path)
    reader = Reader(fs, path, Limits())
    refuse_other_file(reader)
    lock = StoreLock(fs, path)
    try:
        if not lock.take_if_free():
            raise StoreError(f"{path}: another process is saving it; stop that process first", path=path)
        content = lock.content()
        try:
            found = examine(reader, content)
        except CorruptStoreError:
            found = salvage(reader, content)
        if any(reader.is_alive(writer) for writer in reader.listing().writers):
            raise StoreError(f"{path}: another process is writing to it; stop that process first", path=path)
        days = problem_of_days(fs, path, found.view)
        if not found.damage and not found.is_lossy() and not _problem_of_previous(reader) and not days:
            return Repaired(f"{path}: there is nothing to repair: it holds {described(found.view)}", leaves_out=False)
        merged = _merged(reader, found, difference) if difference is not None and found.conflict is not None else None
        aside = _put_aside(reader, found, merged)
        if days:
            found = found._replace(view=_with_mended_days(reader, found, aside))
        if merged is not None:
            found = found._replace(view=_with_merged(found.view, merged, reader.limits))
        # Written before the document, so that a running process of an earlier version detects that the document is no
        # longer its own.
        lock.write(found.view.store, is_saved=content.is_saved, is_begun=content.is_begun)
        _save(reader, found, observer)
        lock.write(found.view.store, is_saved=True)
    finally:
        lock.close()
    return _report(path, found, aside, merged)


def _problems(reader: Reader, found: Findings, days: str) -> list[str]:
    path = reader.path
    to_continue = f"To continue with what is left: savings-exporter verify --repair --store {path}"
    problems = [f"{path}: {problem}" for problem in found.view.document.problems]
    if found.conflict is not None:
        remedy = remedy_of_conflict(path, found.conflict)
        problems.append(f"{path}: {described_conflict(found.conflict)}. {remedy}")
    elif found.damage:
        whole = "" if found.is_lossy() else "; nothing is lost: it is written anew when the store is next opened"
        problems.append(f"{path}: {found.damage}{whole}")
    problems += [f"{path}: {described_losses(reading)}. {to_continue}" for reading in found.incomplete]
    if days:
        problems.append(
            f"{days}; the totals are complete, but what was saved on each closed day is not known. To continue with "
            f"the totals: savings-exporter verify --repair --store {path}"
        )
    return problems + _problem_of_previous(reader)


def _with_mended_days(reader: Reader, found: Findings, aside: list[str]) -> View:
    view = mended(reader.fs, reader.path, found.view)
    file = days_path(reader.path, found.view.document.days_file)
    if view.document.days_file != found.view.document.days_file and reader.fs.identity(file) is not None:
        with suppress(OSError):  # it may be the disk that cannot read it
            aside.append(_copied(reader, file, "corrupt"))
    return view


def _notes(reader: Reader, found: Findings) -> list[str]:
    notes = [f"{note}; it is not counted here" for note in found.harmless]
    for reading in found.torn:
        # The last write of a living writer may still be in progress.
        if reading.tail is not None and not reader.is_alive(reading.writer):
            segment, data = reading.tail
            notes.append(
                f"{segment}: ends with {len(data)} bytes of a write that was never acknowledged; they are kept aside "
                "when the store is next opened"
            )
    return notes


class _Merged(NamedTuple):
    """What is merged, and the document that it comes from."""

    merging: Merging
    digest: str
    kept: Mapping[str, Any]

    @property
    def totals(self) -> Totals:
        """What the other program recorded."""
        sums = Sums()
        sums.add_rows(self.merging.rows)
        return total_of(Totals().plus(*part) for _, part, _ in sums.parts())


def _merged(reader: Reader, found: Findings, difference: Difference) -> _Merged:
    """What another program recorded since it read a document of this store.

    Raises:
        StoreError: this cannot be determined.
    """
    path, conflict = reader.path, found.conflict
    assert conflict is not None
    if conflict.common is None:
        remedy = remedy_of_conflict(path, conflict)
        raise StoreError(f"{path}: cannot be merged: {described_conflict(conflict)}", remedy, path=path)
    data, identity = reader.fs.read(path)
    if identity != found.view.identity:
        raise StoreError(f"{path}: another program is writing it; stop that program first", path=path)
    theirs, common = decode(data), conflict.common.lifetime
    merging = difference(path, data, conflict.common, datetime.now(timezone.utc))
    merged = _Merged(merging, digest_of(data), theirs.kept)
    if described_difference(theirs.ledger.lifetime, common) != described_totals(merged.totals):
        raise StoreError(
            f"{path}: cannot be merged: what the other program recorded does not add up",
            remedy_of_conflict(path, conflict._replace(common=None)),
            path=path,
        )
    return merged


def _with_merged(view: View, merged: _Merged, limits: Limits) -> View:
    """The view with the other program's records. The document names their source, so that they do not count again."""
    sums = Sums()
    sums.add_rows(merged.merging.rows)
    sums.add_projects(merged.merging.projects)
    document = msgspec.structs.replace(
        view.document, included=merged.digest, kept={**view.document.kept, **merged.kept}
    )
    ledger = view.ledger.plus(sums, limits, datetime.now(timezone.utc))
    return msgspec.structs.replace(view, document=document, ledger=ledger)


def _put_aside(reader: Reader, found: Findings, merged: _Merged | None) -> list[str]:
    """Keep copies of unusable files under other names, because the repair replaces or removes the originals."""
    aside = []
    if merged is not None:
        aside.append(copy_path(reader.path, merged.digest))
        reader.fs.keep_copy(reader.path, aside[0])
    elif (found.damage or found.conflict is not None) and found.view.identity is not None:
        aside.append(_copied(reader, reader.path, _suffix(found)))
    if _problem_of_previous(reader):
        aside.append(_copied(reader, previous_path(reader.path), "corrupt"))
    if found.incomplete:
        segments = reader.listing().segments
        for reading in found.incomplete:
            for number in segments.get(reading.writer, ()):
                aside.append(_copied(reader, segment_path(reader.path, reading.writer, number), "corrupt"))
    return aside


def _suffix(found: Findings) -> str:
    """What a copy of the document at the path is called."""
    if found.conflict is not None:
        return "other-program"
    return "other-store" if found.other is not None else "corrupt"


def _copied(reader: Reader, name: str, suffix: str) -> str:
    aside = unused_name(name, suffix)
    reader.fs.keep_copy(name, aside)
    return aside


def _save(reader: Reader, found: Findings, observer: Observer) -> None:
    """Save the findings under both names, and remove the journals: the new document holds all their intact records."""
    view, listing, now = found.view, reader.listing(), datetime.now(timezone.utc)
    dead = dead_writers(reader, view, listing)
    operations = view.document.operations
    for writer in dead:
        state = view.document.writers.get(writer.hex())
        if state is None or not state.ended:
            operations = operations.plus(read_counts(reader.fs, writer_path(reader.path, writer)))
    document = msgspec.structs.replace(
        view.document,
        operations=operations,
        ledger=view.ledger,
        cursors=view.cursors,
        store=view.store.hex(),
        writers=composed(view, (), dead),
        saved_at=now,
        created_at=view.document.created_at or now,
        problems=(),
        legacy=None,
    )
    data = encode(document)
    file = AtomicFile(reader.fs, reader.path, Directory(reader.fs, reader.path))
    with Operation(SAVE, observer) as operation:
        operation.size = len(data)
        file.save(data, operation, both=True)
    for writer in dead:
        for number in listing.segments.get(writer, ()):
            reader.fs.discard(segment_path(reader.path, writer, number))
        reader.fs.discard(writer_path(reader.path, writer))


def _report(path: str, found: Findings, aside: Sequence[str], merged: _Merged | None) -> Repaired:
    parts = [f"{path}: holds {described(found.view)}"]
    parts += map(described_losses, found.incomplete)
    left_out = ""
    if merged is not None:
        parts.append(f"of these, {described_totals(merged.totals)} are from the other program's document")
    elif found.conflict is not None:
        theirs = found.conflict.theirs
        held = f"with {described_totals(theirs)}" if theirs is not None else "which cannot be read"
        left_out = f"the other program's document, {held}, is left out. {described_overlap(found.conflict)}"
    elif found.other is not None:
        held = described_totals(found.other)
        left_out = f"the document at the path, with {held}, does not belong to this store and is left out"
    if left_out:
        parts.append(left_out)
    elif not found.incomplete:
        parts.append("nothing is lost")
    if aside:
        parts.append(f"kept aside: {', '.join(aside)}")
    return Repaired("; ".join(parts), leaves_out=bool(left_out))


def _problem_of_previous(reader: Reader) -> list[str]:
    previous = previous_path(reader.path)
    try:
        if reader.fs.identity(previous) is None:
            return []
        decode(reader.fs.read(previous)[0])
    except OSError as error:
        return [f"{previous}: cannot be read: {error.strerror}"]
    except StoreError:
        return [f"{previous}: is damaged; the next save replaces it"]
    return []
