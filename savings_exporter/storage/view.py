"""What is durable in a store, as one immutable value, and its pure transitions.

::

    totals = document's totals + every frame of every journal that the counting rule counts

The counting rule: take a writer's frames in the order of segments and offsets; a frame counts if and only if its first
sequence number is the next one. A frame below that was counted already and is skipped; one above it means that
acknowledged records are missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import NamedTuple

import msgspec

from savings_exporter.formats.document import Document, WriterState
from savings_exporter.formats.frame import ReadGroup
from savings_exporter.model.keys import KeyEntry, KeyTable
from savings_exporter.model.totals import Ledger, Limits, Sums
from savings_exporter.storage.filesystem import Identity


class Position(NamedTuple):
    """How far a journal is counted: up to a sequence number, and the place where reading goes on."""

    sequence: int = 0
    segment: int = 0
    offset: int = 0


class Special(NamedTuple):
    """A group that has a key or sums, and the first sequence number of its frame."""

    first: int
    group: ReadGroup


class Reading(NamedTuple):
    """What reading one journal gave: what the frames hold that the counting rule counts, and where reading goes on.

    ``sums`` are of the records without a key: a journal has many. ``specials`` are the other groups. ``raw`` are
    the frames' bytes, kept where the whole journal is read, to be written again. ``lost`` are the sequence numbers,
    first and last, of acknowledged records that are missing; ``doubt`` says why that cannot be determined. ``tail`` is
    what follows the last good frame: a segment's path and the bytes of a torn write. ``foreign`` are segments of
    another store.
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
        """Whether there is something to count."""
        return bool(self.sums or self.specials)


class View(msgspec.Struct, frozen=True, kw_only=True):
    """The document, and what the journals hold beyond it.

    ``identity`` is that of the document's file, None when there is none. ``store`` names the store (8 bytes).
    ``is_whole`` says whether that file is this document; if not, it is damaged, and this is the previous document.
    ``ledger`` are the totals of both. The keys are those of the document, to which each transition adds: adding one
    twice changes nothing, so an interrupt between that and the publishing of the view does no harm.
    """

    document: Document
    identity: Identity | None
    store: bytes
    ledger: Ledger
    positions: Mapping[bytes, Position]
    is_whole: bool = True

    @property
    def keys(self) -> KeyTable:
        """The idempotency keys that were counted."""
        return self.document.keys

    def is_older_than(self, other: View) -> bool:
        """Whether it was read before another view: the other has a later document, or more of the journals counted.

        Totals alone do not tell: a key that two processes recorded at once counts as either of its records.
        """
        if self.identity != other.identity:
            return self.document.ledger.records < other.document.ledger.records
        ours, theirs = (sum(position.sequence for position in view.positions.values()) for view in (self, other))
        return ours < theirs

    def position_of(self, writer: bytes) -> Position:
        """How far a writer's journal is counted."""
        return self.positions.get(writer) or Position()

    def is_saved(self) -> bool:
        """Whether the document holds all that is counted."""
        writers = self.document.writers
        return all(
            position.sequence == (state.through if (state := writers.get(writer.hex())) else 0)
            for writer, position in self.positions.items()
        )


def view_of(document: Document, identity: Identity | None, store: bytes) -> View:
    """What a document alone says."""
    positions = {
        bytes.fromhex(writer): Position(state.through, state.segment, state.offset)
        for writer, state in document.writers.items()
    }
    return View(document=document, identity=identity, store=store, ledger=document.ledger, positions=positions)


def counted(view: View, readings: Iterable[Reading], limits: Limits, now: datetime) -> View:
    """The view with more of the journals counted."""
    sums, positions = Sums(), dict(view.positions)
    for reading in readings:
        if reading.adds:
            sums.add_rows(reading.sums.rows())
            for special in reading.specials:
                if not special.group.key or _is_first(special, reading.writer, view.keys):
                    sums.add_all(special.group.records)
                    sums.add_rows(special.group.sums)
            positions[reading.writer] = reading.position
    ledger = view.ledger.plus(sums, limits, now) if sums else view.ledger
    return msgspec.structs.replace(view, ledger=ledger, positions=positions)


def composed(
    view: View, gone: Iterable[bytes], ended: Iterable[bytes], closing: bytes | None = None
) -> dict[str, WriterState]:
    """The writers' entries of the next document: without those that are gone; the counters of ``ended`` are in it.

    Where reading goes on is noted only of writers that may record more. The segments of the others are removed, and one
    that a power loss brings back may have lost its content, because its blocks were given away.
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
    """Whether a key is counted here for the first time, or is this very group."""
    group = special.group
    digest, sequence = bytes.fromhex(group.key), special.first + group.at - 1
    known = keys.get(digest)
    if known is not None:
        return (known.writer, known.sequence) == (writer, sequence)
    keys.add(digest, KeyEntry(bytes.fromhex(group.print), writer, sequence))
    return True
