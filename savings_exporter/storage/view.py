"""The durable content of a store as one immutable value, with pure transitions.

::

    totals = document's totals + every frame of every journal that the counting rule counts

The counting rule: a writer's frames are processed in the order of segments and offsets. A frame counts if and only if
its first sequence number is the next expected one. A frame with a lower number was counted already and is skipped. A
frame with a higher number means that acknowledged records are missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import NamedTuple

import msgspec

from savings_exporter.formats.document import Document, WriterState
from savings_exporter.formats.frame import ReadGroup
from savings_exporter.model.cursors import Cursors, with_cursors
from savings_exporter.model.keys import KeyEntry, KeyTable
from savings_exporter.model.totals import Ledger, Limits, Sums
from savings_exporter.storage.filesystem import Identity


class Position(NamedTuple):
    """How far a journal is counted: the last counted sequence number, and the place where reading continues."""

    sequence: int = 0
    segment: int = 0
    offset: int = 0


class Special(NamedTuple):
    """A group that has a key, sums or a cursor, and the first sequence number of its frame."""

    first: int
    group: ReadGroup


class Reading(NamedTuple):
    """The result of reading one journal: the content of the frames that count, and where reading continues.

    ``sums`` are sums of the records without a key, because a journal has many of them. ``specials`` are the other
    groups. ``raw`` are the bytes of the frames. They are kept only when the journal is read without a limit, so that
    the frames can be written again. ``lost`` are ranges of sequence numbers, first and last, of missing acknowledged
    records. ``doubt`` says why it cannot be determined whether records are missing. ``tail`` is the torn write after
    the last good frame: a segment's path and the bytes. ``foreign`` are segments of another store.
    """

    writer: bytes
    sums: Sums
    specials: list[Special]
    raw: list[bytes]
    position: Position
    lost: list[tuple[int, int]]
    doubt: str
    tail: tuple[str, bytes] | None
    foreign: list[str]

    @property
    def adds(self) -> bool:
        """Whether the journal has records to count."""
        return bool(self.sums or self.specials)


class View(msgspec.Struct, frozen=True, kw_only=True):
    """The document, and the further records of the journals.

    ``identity`` identifies the file at the document's path; None when there is no file. ``store`` is the store's name
    (8 bytes). ``is_whole`` says whether that file is this document. If not, the file is unusable, and ``document`` is
    another one, such as the previous document. ``ledger`` holds the totals of the document and the journals, and
    ``cursors`` how far each source has been imported with them.

    The keys are those of the document. Each transition claims keys in the same table. Claiming a key twice changes
    nothing, so an interrupt after the claim and before the view is published does no harm.
    """

    document: Document
    identity: Identity | None
    store: bytes
    ledger: Ledger
    positions: Mapping[bytes, Position]
    cursors: Cursors
    is_whole: bool = True

    @property
    def keys(self) -> KeyTable:
        """The idempotency keys that were counted."""
        return self.document.keys

    def is_older_than(self, other: View) -> bool:
        """Whether another view is newer: it has a newer document, or counts more of the journals.

        Comparing totals is not enough: if two processes record a key at the same time, either of the records may count.
        """
        if self.identity != other.identity:
            return self.document.ledger.records < other.document.ledger.records
        ours, theirs = (sum(position.sequence for position in view.positions.values()) for view in (self, other))
        return ours < theirs

    def position_of(self, writer: bytes) -> Position:
        """How far a writer's journal is counted."""
        return self.positions.get(writer) or Position()

    def is_saved(self) -> bool:
        """Whether the document holds everything that is counted."""
        writers = self.document.writers
        return all(
            position.sequence == (state.through if (state := writers.get(writer.hex())) else 0)
            for writer, position in self.positions.items()
        )


def view_of(document: Document, identity: Identity | None, store: bytes) -> View:
    """The view of a document without the journals."""
    positions = {
        bytes.fromhex(writer): Position(state.through, state.segment, state.offset)
        for writer, state in document.writers.items()
    }
    return View(
        document=document,
        identity=identity,
        store=store,
        ledger=document.ledger,
        positions=positions,
        cursors=document.cursors,
    )


def counted(view: View, readings: Iterable[Reading], limits: Limits, now: datetime) -> View:
    """The view with the readings of journals counted."""
    sums, positions, cursors = Sums(), dict(view.positions), []
    for reading in readings:
        if reading.adds:
            sums.add_rows(reading.sums.rows())
            sums.add_bases(reading.sums.bases)
            for special in reading.specials:
                if not special.group.key or _is_first(special, reading.writer, view.keys):
                    sums.add_all(special.group.records)
                    sums.add_rows(special.group.sums)
                    sums.add_projects(special.group.projects)
                    if special.group.cursor is not None:
                        cursors.append(special.group.cursor)
            positions[reading.writer] = reading.position
    ledger = view.ledger.plus(sums, limits, now) if sums else view.ledger
    return msgspec.structs.replace(
        view, ledger=ledger, positions=positions, cursors=with_cursors(view.cursors, cursors)
    )


def composed(
    view: View, gone: Iterable[bytes], ended: Iterable[bytes], closing: bytes | None = None
) -> dict[str, WriterState]:
    """The writers' entries for the next document. Writers in ``gone`` have no entry. Writers in ``ended`` are marked as
    ended: the document holds their operation counters.

    The position where reading continues is kept only for writers that may record more. The segments of the other
    writers are removed. If a power loss restores such a segment, its content may be gone, because the file system may
    have reused its blocks.
    """
    states = {}
    finished = {writer.hex() for writer in ended}
    known = {*view.document.writers, *finished, *(writer.hex() for writer in view.positions)}
    for writer in known - {writer.hex() for writer in gone}:
        before = view.document.writers.get(writer)
        position = view.position_of(bytes.fromhex(writer))
        is_ended = writer in finished or (before is not None and before.ended)
        if is_ended or (closing is not None and writer == closing.hex()):
            position = Position(position.sequence)
        states[writer] = WriterState(
            through=position.sequence, segment=position.segment, offset=position.offset, ended=is_ended
        )
    return states


def _is_first(special: Special, writer: bytes, keys: KeyTable) -> bool:
    """Whether a group has the first use of its key, or is the group that was already counted for the key."""
    group = special.group
    digest, sequence = bytes.fromhex(group.key), special.first + group.at - 1
    # In one step: a thread that saves and one that refreshes count with the same table.
    known = keys.claim(digest, KeyEntry(bytes.fromhex(group.print), writer, sequence))
    return (known.writer, known.sequence) == (writer, sequence)
