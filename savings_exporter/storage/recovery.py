"""Reading a store: what its document, the one before it and its journal hold together, and what is wrong with them.

Nothing here writes. What was acknowledged is numbered without a hole, so a record that is missing is always noticed:
a frame begins too late, or the journal ends before the mark's sequence. A bad frame after which nothing is missing was
never acknowledged.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from datetime import datetime, timezone

import msgspec

from savings_exporter.documents import Document, decode
from savings_exporter.errors import CorruptStoreError, NewerSchemaError, StoreError
from savings_exporter.idempotency import Keys
from savings_exporter.storage import filesystem, journal
from savings_exporter.storage.lock import NOBODY, Mark, nobody_writing, read_mark
from savings_exporter.totals import Delta, Ledger, Limits

_READING_ATTEMPTS = 5


class Tail(msgspec.Struct, frozen=True):
    """What a torn commit left at the end of a segment."""

    segment: str
    data: bytes


class Found(msgspec.Struct, kw_only=True):
    """What a store holds.

    ``document`` is what the journal was counted onto, ``since`` what was counted from there. ``epoch`` and ``offset``
    are where the journal ends, ``unsure`` why it cannot be told whether it did. ``damage`` says why the document at the
    path is not the one that was taken; ``lost`` are the sequences, first and last, of acknowledged records that are
    nowhere.
    """

    document: Document
    identity: filesystem.Identity | None
    damage: str | None = None
    store: bytes = b""
    since: Delta = msgspec.field(default_factory=Delta)
    keys: Keys = msgspec.field(default_factory=Keys)
    sequence: int = 0
    epoch: int = 0
    offset: int = 0
    newest_epoch: int = 0
    lost: list[tuple[int, int]] = []
    tail: Tail | None = None
    harmless: list[str] = []
    unsure: str | None = None
    journal_bytes: int = 0

    @property
    def exists(self) -> bool:
        """Whether there is anything of a store yet."""
        return self.identity is not None or self.damage is not None

    def totals(self, limits: Limits) -> Ledger:
        """The totals of all that was found."""
        ledger = self.document.ledger
        if self.since.records:
            ledger = ledger.plus(self.since, limits, datetime.now(timezone.utc))
        return msgspec.structs.replace(ledger, sequence=self.sequence)

    def is_as_marked(self, mark: Mark | None) -> bool:
        """Whether this is exactly what the mark says is durable: then there is nothing to recover."""
        return (
            mark is not None
            and self.damage is None
            and self.tail is None
            and mark.writer != NOBODY
            and mark.is_of(self.identity)
            and mark[:4] == (self.store, self.epoch, self.offset, self.sequence)
        )


def previous_path(path: str) -> str:
    """Where the save before the last one is kept."""
    return path + ".previous"


def read(path: str, limits: Limits) -> Found:
    """What a store holds, also while others write to it: all that is durable. For those who only read.

    Raises:
        OSError: it cannot be read.
        StoreError: it is damaged or newer.
    """
    with nobody_writing(path) as quiet:
        for attempt in itertools.count(1):
            mark = read_mark(path)
            try:
                found = find(path, limits, mark, only_marked=not quiet)
                if quiet or mark is None or found.sequence >= mark.sequence:
                    refuse_losses(path, found)
                    return found
            except (FileNotFoundError, StoreError):
                # A document was replaced, and its segments removed, between our reading the one and the others.
                if quiet or attempt == _READING_ATTEMPTS:
                    raise
            if attempt == _READING_ATTEMPTS:
                raise StoreError(f"{path}: is being written too fast to be read; try again")
    raise AssertionError


def find(path: str, limits: Limits, mark: Mark | None, *, only_marked: bool = False) -> Found:
    """What a store holds now; with ``only_marked``, no frame that the mark does not call durable.

    Raises:
        OSError: it cannot be read.
        StoreError: it cannot be told what it holds. Losses that can be told are in the answer.
    """
    segments = journal.segments(path)
    found = _base(path, limits, mark, segments)
    if only_marked and mark is not None and mark.writer == NOBODY and mark.sequence < found.document.ledger.sequence:
        # Who saves it has the lock, and a document is seen before it is durable.
        earlier = _before(found, path, segments, limits, mark)
        if earlier is not None:
            return earlier
    return _with_journal(found, segments, limits, mark, only_marked=only_marked)


def salvage(path: str, limits: Limits, mark: Mark | None) -> Found:
    """What is left of our own of a store that cannot be opened: the save before the last, and the journal.

    Raises:
        OSError: it cannot be read.
        CorruptStoreError: nothing is left.
    """
    segments = journal.segments(path)
    previous = decoded(previous_path(path))
    if previous is None and not segments:
        raise CorruptStoreError(
            f"{path}: there is no whole save before the last one and no journal, so its totals are lost. Restore it "
            f"from a backup, or move all files {path}* away to start from zero"
        )
    store = bytes.fromhex(previous.store) if previous is not None else b""
    found = Found(
        document=previous or Document(),
        identity=filesystem.identity(path),
        damage="cannot be used",
        store=store or (mark.store if mark else _store_of(segments)),
    )
    found = _with_journal(found, segments, limits, mark, only_marked=False)
    if previous is None:
        found.unsure = "there is no whole document"
        if not found.since.records:
            raise CorruptStoreError(
                f"{path}: nothing of it is whole, so its totals are lost. Restore it from a backup, or move all files "
                f"{path}* away to start from zero"
            )
    return found


def decoded(path: str) -> Document | None:
    """The document at a path, or None when there is no whole one."""
    try:
        return decode(filesystem.read(path)[0])
    except (OSError, StoreError):
        return None


def refuse_losses(path: str, found: Found) -> None:
    """Raise when records are lost.

    Raises:
        CorruptStoreError: the message says which, and what to do.
    """
    if found.unsure:
        raise CorruptStoreError(
            f"{path}: {found.unsure}, and whether acknowledged records are lost with it cannot be told; what is left "
            f"holds {described(found)}. To go on from there: savings-exporter verify --repair --store {path}"
        )
    if found.lost:
        what = f"{found.damage}; " if found.damage else ""
        raise CorruptStoreError(
            f"{path}: {what}{described_losses(found.lost)}; what is left holds {described(found)}. To go on from "
            f"there: savings-exporter verify --repair --store {path}"
        )


def described(found: Found) -> str:
    """What was found, in words."""
    tokens = found.document.ledger.lifetime.tokens_saved + found.since.lifetime.tokens_saved
    return f"{tokens} tokens saved in {found.document.ledger.lifetime.requests + found.since.records} records"


def described_losses(lost: Iterable[tuple[int, int]]) -> str:
    """Lost records, in words."""
    ranges = [f"{first} to {last}" if last > first else str(first) for first, last in lost]
    return f"acknowledged records are lost: number {', '.join(ranges)}"


def _base(path: str, limits: Limits, mark: Mark | None, segments: dict[int, str]) -> Found:
    """The newest whole document, and what has become of the one at the path."""
    identity, damage = filesystem.identity(path), "is missing"
    if identity is not None:
        data, identity = filesystem.read(path)
        try:
            document = decode(data)
        except NewerSchemaError as error:
            raise NewerSchemaError(
                f"{path}: {error}; use the newer program, or another --store. If nothing newer ever wrote it, it is "
                f"damaged: move it away, then savings-exporter verify --repair --store {path}"
            ) from None
        except CorruptStoreError as error:
            damage = f"is damaged: {error}"
        else:
            if document.is_ours and mark is not None and mark.store != bytes.fromhex(document.store) and mark.sequence:
                raise CorruptStoreError(
                    f"{path}: is of another store than the files beside it, which hold {mark.sequence} records. To go "
                    f"on with it, move the other files {path}.* away; to go back: savings-exporter verify --repair "
                    f"--store {path}"
                )
            if not document.is_ours:
                _refuse_to_lose_ours(path, limits, mark, segments)
            store = bytes.fromhex(document.store)
            return Found(document=document, identity=identity, store=store)
    previous = decoded(previous_path(path))
    if previous is None:
        acknowledged = mark.sequence if mark else 0
        is_new = identity is None and filesystem.identity(previous_path(path)) is None
        if is_new and not segments and not acknowledged:
            return Found(document=Document(), identity=None)
        if segments:
            raise CorruptStoreError(
                f"{path}: {damage}; there is no whole save before it, so only what the journal holds is left. Restore "
                f"it from a backup, or save what is left: savings-exporter verify --repair --store {path}"
            )
        raise CorruptStoreError(
            f"{path}: {damage}; there is no whole save before it, so its totals are lost. Restore it from a backup, or "
            f"move all files {path}* away to start from zero"
        )
    store = bytes.fromhex(previous.store) or (mark.store if mark else _store_of(segments))
    return Found(document=previous, identity=identity, damage=damage, store=store)


def _refuse_to_lose_ours(path: str, limits: Limits, mark: Mark | None, segments: dict[int, str]) -> None:
    """Raise when another program wrote the document without what only our journal holds."""
    previous = decoded(previous_path(path))
    if not segments:
        return
    ours = Found(
        document=previous if previous is not None and previous.is_ours else Document(),
        identity=None,
        store=mark.store if mark else _store_of(segments),
    )
    _with_journal(ours, segments, limits, mark, only_marked=False)
    saved = mark.saved_sequence if mark else ours.document.ledger.sequence
    if ours.sequence > saved:
        raise CorruptStoreError(
            f"{path}: was written by another program, and does not have our records {saved + 1} to {ours.sequence}. To "
            f"go back to our own totals: savings-exporter verify --repair --store {path}"
        )


def _before(found: Found, path: str, segments: dict[int, str], limits: Limits, mark: Mark) -> Found | None:
    """What the mark says, by the save before the last one and the journal; None when they do not hold just that."""
    previous = decoded(previous_path(path))
    if previous is None or previous.store != found.document.store or mark.store != found.store:
        return None
    before = Found(document=previous, identity=found.identity, store=found.store)
    _with_journal(before, segments, limits, mark, only_marked=True)
    return before if before.sequence == mark.sequence and not before.lost else None


def _with_journal(
    found: Found, segments: dict[int, str], limits: Limits, mark: Mark | None, *, only_marked: bool
) -> Found:
    try:
        found.keys = Keys.unpacked(found.document.keys)
    except ValueError as error:
        raise CorruptStoreError(f"the document's checksum matches, but its keys cannot be read: {error}") from None
    found.sequence = found.document.ledger.sequence
    found.epoch, found.offset = found.document.epoch, found.document.offset
    found.newest_epoch = max([found.epoch, *segments])
    for epoch, name in segments.items():
        if epoch < found.document.epoch or (only_marked and mark is not None and epoch > mark.epoch):
            continue
        data = filesystem.read(name)[0]
        if journal.store_of(data) not in (b"", found.store):
            found.harmless.append(f"{name}: is of another store")
            continue
        if only_marked and mark is not None and epoch == mark.epoch:
            data = data[: mark.offset]
        _replay(found, name, data, epoch, limits)
    if mark is not None and mark.store == found.store and mark.sequence > found.sequence:
        found.lost.append((found.sequence + 1, mark.sequence))
        # What looks like a torn commit was acknowledged.
        found.tail = None
    if mark is not None and mark.store == found.store:
        # It says how much there was.
        found.unsure = None
    return found


def _replay(found: Found, name: str, data: bytes, epoch: int, limits: Limits) -> None:
    """Count one segment's frames in."""
    start = found.document.offset if epoch == found.document.epoch else 0
    payloads: list[memoryview] = []
    numbers: list[range] = []
    found.epoch, found.offset, found.tail = epoch, 0, None
    # What the document has already is looked at, too: the document before it may need it.
    for item in journal.scan(data, found.store, epoch):
        if isinstance(item, journal.Damage):
            found.tail = Tail(name, data[item.start : item.end])
            continue
        if found.tail is not None:
            found.harmless.append(f"{name}: {len(found.tail.data)} bytes are damaged")
            found.tail = None
        found.offset = item.end
        if item.last <= found.sequence:
            continue
        if item.first != found.sequence + 1:
            found.lost.append((found.sequence + 1, item.first - 1))
        found.sequence = item.last
        payloads.append(item.payload)
        numbers.append(range(item.first, item.last + 1))
    try:
        records = journal.decoded(b"".join(payloads))
    except CorruptStoreError as error:
        raise CorruptStoreError(f"{name}: {error}; restore it from a backup") from None
    if len(records) != sum(map(len, numbers)):
        raise CorruptStoreError(f"{name}: a frame holds other than its number of records; restore it from a backup")
    found.since.add_all(records, found.document.ledger, limits)
    for number, record in zip(itertools.chain.from_iterable(numbers), records, strict=True):
        if record.idempotency_key is not None:
            found.keys.remember(record.idempotency_key, number)
    if found.offset < start:
        found.unsure = f"{name} is damaged"
    found.journal_bytes += found.offset


def _store_of(segments: dict[int, str]) -> bytes:
    return journal.store_of(filesystem.read(next(iter(segments.values())))[0]) if segments else b""
