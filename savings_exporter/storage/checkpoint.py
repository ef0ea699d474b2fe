"""Saves the document, adopts the journals of dead writers, and removes segments that are no longer needed.

These functions work on a view and require the store's lock. A save is a checkpoint: no record is acknowledged because a
document holds it. At all times, {document, journals} and {previous document, journals} each hold every acknowledged
record.
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
from savings_exporter.storage.closed_days import discard_unused, with_closed_days
from savings_exporter.storage.filesystem import unused_name
from savings_exporter.storage.journal import segment_path
from savings_exporter.storage.lock import lock_path
from savings_exporter.storage.observers import Observer
from savings_exporter.storage.operation import FSYNC_DIR, ROTATE, Operation
from savings_exporter.storage.other_program import copy_path, digest_of, discard_copies
from savings_exporter.storage.reader import Listing, Reader, described_losses
from savings_exporter.storage.segment import make_segment
from savings_exporter.storage.view import Position, View, composed, counted
from savings_exporter.storage.writers import read_counts, set_watermark, writer_path

logger = logging.getLogger(__name__)

MOST_TORN_TAILS = 10
"""How many files with torn tails are kept: the newest ones. Each is at most as large as a segment."""


def save(
    reader: Reader,
    file: AtomicFile,
    view: View,
    observer: Observer,
    operation: Operation,
    *,
    closing: bool = False,
    both: bool = False,
) -> View:
    """Save the document with everything that is durable now, and remove the segments that are no longer needed.

    The steps of the save are recorded in ``operation``. With ``closing``, this process has ended its journal. The
    document is then written under both names, so that all segments of this writer and of dead writers can be removed.
    With ``both``, it is too: what is only in the document and in no journal then survives damage to one of the files.

    Raises:
        OSError: the save failed, or its outcome is unknown; no segment was removed. ESTALE: another program replaced
            the document.
    """
    listing = reader.listing()
    # Determined before the journals are counted: a writer that dies later may have committed more records.
    dead = dead_writers(reader, view, listing)
    view = _with_copy(reader, adopt(reader, file, _refreshed(reader, view), dead, observer))
    before = view.document.days_file
    now = datetime.now(timezone.utc)
    view = with_closed_days(reader.fs, reader.path, view, file.directory, operation, observer, now)
    gone = _gone(reader, view, listing)
    if gone:
        # An earlier save removed their segments. Without this sync, a power loss could restore a segment, and its
        # records would be counted twice.
        with operation.step(FSYNC_DIR, "directory") as step:
            file.directory.sync(step, reader.path if view.identity is not None else lock_path(reader.path))
    own = reader.own.id if closing and reader.own is not None else None
    document = _next_document(reader, view, gone, dead, own)
    data = encode(document)
    operation.sequence, operation.size = document.ledger.records, len(data)
    both = closing or view.identity is None or not view.is_whole or both
    if view.identity is not None and not view.is_whole:
        _keep_damaged(reader, observer)
    identity = file.save(data, operation, both=both)
    # Positions of removed writers are dropped: otherwise the next save would write their entries again.
    positions = {writer: position for writer, position in view.positions.items() if writer not in gone}
    saved = msgspec.structs.replace(view, document=document, identity=identity, positions=positions, is_whole=True)
    finished = dead | {own} if own is not None else dead
    _retire(reader, document, document if both else view.document, listing, finished)
    discard_unused(reader.fs, reader.path, view.store, document.days_file, document.days_file if both else before)
    if not view.document.is_ours:
        discard_copies(reader.fs, reader.path, document.included)
    return saved


def adopt(reader: Reader, file: AtomicFile, view: View, dead: Iterable[bytes], observer: Observer) -> View:
    """Rewrite the uncounted frames of dead writers and count them. Keep torn writes in separate files.

    A frame above a dead writer's watermark was written but perhaps not acknowledged. After a failed sync such a frame
    can be readable without being on the disk. It is therefore written again, with the same content and the same
    sequence numbers, before it is counted.

    Raises:
        OSError: the adoption failed. The next save tries again.
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
            # The next read starts after the copy: a power loss may remove the original.
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


def _with_copy(reader: Reader, view: View) -> View:
    """The view, whose document names the document of another program that it takes over. A copy of that one is kept:
    when the other program still runs, the copy shows what of its next document is already counted.
    """
    if view.document.is_ours or view.identity is None:
        return view
    data, identity = reader.fs.read(reader.path)
    if identity != view.identity:
        raise OSError(errno.ESTALE, "another program is writing the document", reader.path)
    digest = digest_of(data)
    reader.fs.keep_copy(reader.path, copy_path(reader.path, digest))
    return msgspec.structs.replace(view, document=msgspec.structs.replace(view.document, included=digest))


def _keep_damaged(reader: Reader, observer: Observer) -> None:
    """Keep a copy of the unusable file at the document's path under another name, before the save replaces it."""
    aside = unused_name(reader.path, "corrupt")
    reader.fs.keep_copy(reader.path, aside)
    observer.recovered("corrupt_document")
    logger.error("%s: is damaged; it is kept as %s", reader.path, aside)


def _refreshed(reader: Reader, view: View) -> View:
    """The view of everything that is durable now, based on the document that the save will replace."""
    try:
        view = reader.refresh(view)
    except StoreError as error:
        raise OSError(errno.ESTALE, f"cannot be saved: {error}", reader.path) from error
    if reader.has_refused_document():
        raise OSError(errno.ESTALE, reader.refusal(), reader.path)
    return view


def _gone(reader: Reader, view: View, listing: Listing) -> list[bytes]:
    """Dead writers that have no files left, only an entry in the document.

    Only writers that an earlier save marked as ended are included: an operator may have removed all files of a living
    writer.
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
    """The next document: everything that is counted, with the operation counters of ended writers added."""
    operations, writers = view.document.operations, view.document.writers
    ended = [writer for writer in ended if not (state := writers.get(writer.hex())) or not state.ended]
    for writer in ended:
        operations = operations.plus(read_counts(reader.fs, writer_path(reader.path, writer)))
    now = datetime.now(timezone.utc)
    return msgspec.structs.replace(
        view.document,
        ledger=view.ledger,
        cursors=view.cursors,
        store=view.store.hex(),
        writers=composed(view, gone, ended, closing),
        operations=operations,
        saved_at=now,
        created_at=view.document.created_at or now,
        problems=(),
        legacy=None,
    )


def _retire(reader: Reader, new: Document, old: Document, listing: Listing, finished: set[bytes]) -> None:
    """Remove the segments that both documents cover, and the files of ended writers that have no segment left."""
    for writer in listing.segments.keys() | listing.writers:
        numbers = listing.segments.get(writer, ())
        after, before = new.writers.get(writer.hex()), old.writers.get(writer.hex())
        if after is None:
            continue
        needless = _needless(numbers, after, before, is_finished=writer in finished)
        for number in needless:
            reader.fs.discard(segment_path(reader.path, writer, number))
        # Removed only when both documents hold the writer's operation counters.
        if after.ended and before is not None and before.ended and len(needless) == len(numbers):
            reader.fs.discard(writer_path(reader.path, writer))


def _needless(
    numbers: Sequence[int], after: WriterState, before: WriterState | None, *, is_finished: bool
) -> Sequence[int]:
    if before is None:
        before = WriterState(through=0)
    if is_finished and before.through >= after.through:
        return numbers
    # The segment with the last counted frame is kept: a living writer may still be writing to it.
    return [number for number in numbers if number < min(after.segment, before.segment)]


def _keep_torn_tail(reader: Reader, segment: str, data: bytes, observer: Observer) -> None:
    """Save the bytes of a torn write to a separate file, unless that file exists."""
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
