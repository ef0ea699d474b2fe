"""Saying what is wrong with a store, and mending what can be mended."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from datetime import datetime, timezone

import msgspec

from savings_exporter.documents import decode, encode
from savings_exporter.errors import CorruptStoreError, StoreError
from savings_exporter.storage import filesystem, journal
from savings_exporter.storage.atomic_file import AtomicFile
from savings_exporter.storage.lock import NOBODY, StoreLock, nobody_writing, read_mark
from savings_exporter.storage.recovery import (
    Found,
    described,
    described_losses,
    find,
    previous_path,
    salvage,
)
from savings_exporter.storage.steps import SAVE, Observer, Operation
from savings_exporter.totals import Ledger, Limits


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """What a store holds, as far as it can be told, and what is wrong with it, in words."""

    ledger: Ledger | None
    saved_at: datetime | None
    problems: tuple[str, ...]


def is_begun(path: str) -> bool:
    """Whether there is any file of a store yet."""
    directory = os.path.dirname(filesystem.resolved(path))
    return filesystem.is_directory(directory) and bool(filesystem.with_suffix(filesystem.resolved(path), ""))


def inspect(path: str) -> Inspection:
    """Look at a store without changing anything.

    Raises:
        OSError: it cannot be read.
    """
    path = filesystem.resolved(path)
    with nobody_writing(path) as quiet:
        mark = read_mark(path)
        try:
            found = find(path, Limits(), mark, only_marked=not quiet)
        except StoreError as error:
            return Inspection(ledger=None, saved_at=None, problems=(str(error),))
        if not found.exists:
            return Inspection(ledger=None, saved_at=None, problems=(f"{path}: there is no store yet",))
        problems = [f"{path}: {problem}" for problem in found.document.problems]
        whole = "" if found.lost or found.unsure else "; nothing is lost by it"
        problems += [f"{problem}{whole}" for problem in found.harmless]
        if found.damage is not None:
            whole = "" if found.lost else "; nothing is lost: it is written anew when the store is next opened"
            problems.append(f"{path}: {found.damage}{whole}")
        if found.unsure:
            problems.append(
                f"{path}: {found.unsure}, and whether acknowledged records are lost with it cannot be told. To go on "
                f"with what is left: savings-exporter verify --repair --store {path}"
            )
        if found.lost:
            problems.append(
                f"{path}: {described_losses(found.lost)}. To go on with what is left: savings-exporter verify --repair "
                f"--store {path}"
            )
        if found.tail is not None:
            problems.append(
                f"{found.tail.segment}: ends with {len(found.tail.data)} bytes of a commit that was never "
                "acknowledged; they are put aside when the store is next opened"
            )
        problems += _problem_of_previous(path)
        return Inspection(ledger=found.totals(Limits()), saved_at=found.document.saved_at, problems=tuple(problems))


def repair(path: str, observer: Observer) -> str:
    """Mend a store: what is whole is saved as a new document, and what is damaged is kept aside.

    Returns:
        What was done and what is lost, in words.

    Raises:
        StoreError: there is nothing to mend it with, or another process has the store.
        OSError: the disk would not.
    """
    path = filesystem.resolved(path)
    if not is_begun(path):
        raise StoreError(f"{path}: there is nothing to repair: there is no store yet")
    lock = StoreLock(path)
    try:
        if not lock.take_if_free():
            raise StoreError(f"{path}: another process is writing to it; stop it first")
        mark = read_mark(path)
        try:
            found = find(path, Limits(), mark)
        except CorruptStoreError:
            found = salvage(path, Limits(), mark)
        is_damaged = found.damage or found.lost or found.tail or found.harmless or found.unsure
        if not is_damaged and not _problem_of_previous(path):
            return f"{path}: there is nothing to repair: it holds {described(found)}"
        aside = _put_aside(path, found)
        if mark is not None:
            # Who is idle beside us has to read anew what it finds here.
            lock.write(mark._replace(writer=NOBODY).packed())
        _save(path, found, observer)
    finally:
        lock.close()
    parts = [f"{path}: holds {described(found)}"]
    if found.lost:
        parts.append(described_losses(found.lost))
    elif found.unsure:
        parts.append(f"{found.unsure}, so whether anything is lost cannot be told")
    else:
        parts.append("nothing is lost")
    if aside:
        parts.append(f"kept aside: {', '.join(aside)}")
    return "; ".join(parts)


def _put_aside(path: str, found: Found) -> list[str]:
    """Give what is damaged, or was of no use, second names, because the first ones get new contents or go."""
    kept = []
    if found.damage is not None and found.identity is not None:
        kept.append(path)
    kept += [previous_path(path)] if _problem_of_previous(path) else []
    is_journal_damaged = found.lost or found.tail or found.harmless or found.unsure
    kept += journal.segments(path).values() if is_journal_damaged else []
    return [_copied_aside(name) for name in kept]


def _copied_aside(name: str) -> str:
    aside = filesystem.unused_name(name, "corrupt")
    filesystem.keep_copy(name, aside)
    return aside


def _save(path: str, found: Found, observer: Observer) -> None:
    """Save what was found twice, so that the document and the one before it both hold it, and remove the segments."""
    # Numbers that were given out, also of what is lost, are not given out again.
    sequence = max([found.sequence, *(last for _, last in found.lost)])
    document = msgspec.structs.replace(
        found.document,
        ledger=msgspec.structs.replace(found.totals(Limits()), sequence=sequence),
        store=found.document.store or found.store.hex() or secrets.token_hex(8),
        epoch=found.newest_epoch + 1,
        offset=0,
        keys=found.keys.pack(),
        saved_at=datetime.now(timezone.utc),
    )
    data = encode(document)
    for file in (AtomicFile(path), AtomicFile(path, previous_path(path))):
        with Operation(SAVE, observer) as operation:
            operation.size = len(data)
            file.save(data, operation)
    _discard(journal.segments(path).values())


def _discard(segments: Iterable[str]) -> None:
    for segment in segments:
        filesystem.discard(segment)


def _problem_of_previous(path: str) -> list[str]:
    previous = previous_path(path)
    try:
        if filesystem.identity(previous) is None or decode(filesystem.read(previous)[0]) is not None:
            return []
    except OSError as error:
        return [f"{previous}: cannot be read: {error.strerror}"]
    except StoreError:
        pass
    return [f"{previous}: is damaged; the next save replaces it"]
