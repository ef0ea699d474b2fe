"""Saving the document, adopting the journals of dead writers, and retiring segments: functions over a view.

Called with the store's lock held. Nothing is acknowledged on the strength of a document: a save is a checkpoint. At
every instant {document, journals} and {previous document, journals} both hold every acknowledged record.
"""

from __future__ import annotations

import errno
import logging
import os
import zlib
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone

import msgspec

from savings_exporter.errors import StoreError
from savings_exporter.formats.document import Document, WriterState, encode
from savings_exporter.formats.frame import next_block
from savings_exporter.storage.atomic_file import AtomicFile
from savings_exporter.storage.filesystem import unused_name
from savings_exporter.storage.journal import segment_path
from savings_exporter.storage.lock import lock_path
from savings_exporter.storage.observers import Observer
from savings_exporter.storage.operation import FSYNC_DIR, ROTATE, Operation
from savings_exporter.storage.reader import Listing, Reader, described_losses
from savings_exporter.storage.segment import make_segment
from savings_exporter.storage.view import Position, View, composed, counted
from savings_exporter.storage.writers import read_counts, set_watermark, writer_path

logger = logging.getLogger(__name__)

MOST_TORN_TAILS = 10
"""How many torn tails are kept aside: the newest ones. One has at most the size of a segment."""


def save(
    reader: Reader,
    file: AtomicFile,
    view: View,
    observer: Observer,
    operation: Operation,
    *,
    closing: bool = False,
) -> View:
    """Save the document with all that is durable by now, and remove the segments that are not needed any more.

    The save's steps become those of ``operation``. With ``closing``, this process has ended its journal: the document
    gets both names, so that all segments of its writer and of dead ones can be removed.

    Raises:
        OSError: it failed, or the outcome is unknown; nothing was removed. ESTALE: another program replaced the
            document.
    """
    listing = reader.listing()
    # Before anything is counted: a writer that dies after that may have committed more.
    dead = dead_writers(reader, view, listing)
    view = adopt(reader, file, _refreshed(reader, view), dead, observer)
    gone = _gone(reader, view, listing)
    if gone:
        # Their segments were removed by an earlier save. Should one come back after a power loss, it would be
        # counted twice.
        with operation.step(FSYNC_DIR, "directory") as step:
            file.directory.sync(step, reader.path if view.identity is not None else lock_path(reader.path))
    own = reader.own.id if closing and reader.own is not None else None
    document = _next_document(reader, view, gone, dead, own)
    data = encode(document)
    operation.sequence, operation.size = document.ledger.records, len(data)
    both = closing or view.identity is None or not view.is_whole
    if view.identity is not None and not view.is_whole:
        _keep_damaged(reader, observer)
    identity = file.save(data, operation, both=both)
    # Without those that are gone: the next save would write their entries again.
    positions = {writer: position for writer, position in view.positions.items() if writer not in gone}
    saved = msgspec.structs.replace(view, document=document, identity=identity, positions=positions, is_whole=True)
    finished = dead | {own} if own is not None else dead
    _retire(reader, document, document if both else view.document, listing, finished)
    return saved


def adopt(reader: Reader, file: AtomicFile, view: View, dead: Iterable[bytes], observer: Observer) -> View:
    """Write the tails of dead writers again, and count them; keep torn writes aside.

    A frame above a dead writer's watermark was attempted, perhaps not acknowledged, and after a failed sync it can be
    readable without being on the disk. So it is written again, the same frame with the same number, before it counts.

    Raises:
        OSError: it failed. The next save tries again.
    """
    segments = reader.listing().segments
    for writer in dead:
        reading = reader.read_journal(view, writer, None, segments.get(writer, ()))
        if reading.lost:
            raise OSError(errno.EIO, described_losses(reading), reader.path)
        if reading.adds:
            with Operation(ROTATE, observer) as operation:
                number = max(segments[writer]) + 1
                data = b"".join(reading.raw)
                path = segment_path(reader.path, writer, number)
                make_segment(
                    reader.fs, path, next_block(len(data)), operation, file.directory, "fdatasync", data
                ).close()
            set_watermark(reader.fs, writer_path(reader.path, writer), reading.position.sequence)
            # Reading goes on after the copy: after a power loss the first one may be gone.
            copied = reading._replace(position=Position(reading.position.sequence, number, len(data)))
            view = counted(view, [copied], reader.limits, datetime.now(timezone.utc))
        if reading.tail is not None:
            _keep_torn_tail(reader, *reading.tail, observer)
    return view


def dead_writers(reader: Reader, view: View, listing: Listing) -> set[bytes]:
    """The store's writers whose processes have ended.

    Raises:
        OSError: a file cannot be read.
    """
    return {
        writer
        for writer in listing.segments.keys() | listing.writers
        if not reader.is_alive(writer, listing) and not reader.is_of_another_store(view, writer, listing)
    }


def _keep_damaged(reader: Reader, observer: Observer) -> None:
    """Keep the file in the document's place, which could not be used, under a name of its own before it is replaced."""
    aside = unused_name(reader.path, "corrupt")
    reader.fs.keep_copy(reader.path, aside)
    observer.recovered("corrupt_document")
    logger.error("%s: is damaged; it is kept as %s", reader.path, aside)


def _refreshed(reader: Reader, view: View) -> View:
    """All that is durable now, under the document that is to be replaced."""
    try:
        view = reader.refresh(view)
    except StoreError as error:
        raise OSError(errno.ESTALE, f"cannot be saved: {error}", reader.path) from error
    if reader.has_refused_document():
        raise OSError(errno.ESTALE, reader.refusal(), reader.path)
    return view


def _gone(reader: Reader, view: View, listing: Listing) -> list[bytes]:
    """Dead writers of which nothing is left but their entry in the document.

    Only those that a save found dead by their files: all files of a living writer may have been removed by hand.
    """
    known = (bytes.fromhex(writer) for writer, state in view.document.writers.items() if state.ended)
    return [
        writer
        for writer in known
        if writer not in listing.segments and writer not in listing.writers and not reader.is_alive(writer)
    ]


def _next_document(
    reader: Reader, view: View, gone: Iterable[bytes], ended: Iterable[bytes], closing: bytes | None
) -> Document:
    """The document of what is counted; it takes in the operation counters of ended writers."""
    operations, writers = view.document.operations, view.document.writers
    ended = [writer for writer in ended if not (state := writers.get(writer.hex())) or not state.ended]
    for writer in ended:
        operations = operations.plus(read_counts(reader.fs, writer_path(reader.path, writer)))
    return msgspec.structs.replace(
        view.document,
        ledger=view.ledger,
        store=view.store.hex(),
        writers=composed(view, gone, ended, closing),
        operations=operations,
        saved_at=datetime.now(timezone.utc),
        problems=(),
        legacy=None,
    )


def _retire(reader: Reader, new: Document, old: Document, listing: Listing, finished: set[bytes]) -> None:
    """Remove the segments that both documents cover, and the files of ended writers of which no segment is left."""
    for writer in listing.segments.keys() | listing.writers:
        numbers = listing.segments.get(writer, ())
        after, before = new.writers.get(writer.hex()), old.writers.get(writer.hex())
        if after is None:
            continue
        needless = _needless(numbers, after, before, is_finished=writer in finished)
        for number in needless:
            reader.fs.discard(segment_path(reader.path, writer, number))
        # Not before both documents hold its operation counters.
        if after.ended and before is not None and before.ended and len(needless) == len(numbers):
            reader.fs.discard(writer_path(reader.path, writer))


def _needless(
    numbers: Sequence[int], after: WriterState, before: WriterState | None, *, is_finished: bool
) -> Sequence[int]:
    if before is None:
        before = WriterState(through=0)
    if is_finished and before.through >= after.through:
        return numbers
    # The last one that holds a counted frame may be the one that a living writer writes.
    return [number for number in numbers if number < min(after.segment, before.segment)]


def _keep_torn_tail(reader: Reader, segment: str, data: bytes, observer: Observer) -> None:
    """Keep the rest of a torn write under a name of its own, once."""
    aside = f"{segment}.torn-{zlib.crc32(data):08x}"
    if reader.fs.identity(aside) is not None:
        return
    reader.fs.write_new(aside, data, like=segment)
    observer.recovered("torn_tail")
    logger.warning(
        "%s: ends with %d bytes of a write that was never acknowledged; kept as %s", segment, len(data), aside
    )
    directory = os.path.dirname(reader.path)
    start = os.path.basename(reader.path) + ".journal."
    names = (name for name in reader.fs.names_beside(reader.path) if name.startswith(start) and ".torn-" in name)
    tails = [os.path.join(directory, name) for name in names]
    for name in sorted(tails, key=reader.fs.modified_ns)[:-MOST_TORN_TAILS]:
        reader.fs.discard(name)
