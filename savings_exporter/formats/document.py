"""Encodes and decodes ``proxy_savings.json``.

The layout is Headroom's schema 6, so existing readers of ``proxy_savings.json`` continue to work. Our own block,
``savings_exporter``, adds the totals by provider and model, by agent and by source, the prices that were used, how far
each writer's journal is counted, the idempotency keys, the operation counters, and a checksum over every byte of the
document.

This module reads schemas 2 to 6, and formats 1 and 2 of our own block. It keeps unknown keys.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

import msgspec

from savings_exporter.errors import CorruptStoreError, NewerSchemaError, OtherFileError
from savings_exporter.formats import headroom
from savings_exporter.formats.days import decode_numbers, decode_open, encode_numbers, encode_open
from savings_exporter.formats.headroom import (
    BLOCK,
    KNOWN_MEMBERS,
    OLDEST_SCHEMA_VERSION,
    SCHEMA_VERSION,
    TOTALS_FIELDS,
    kept_of,
    shown,
    unknown_keys,
)
from savings_exporter.model.crowds import Crowd
from savings_exporter.model.cursors import Cursor, Cursors
from savings_exporter.model.figures import numbers_of
from savings_exporter.model.history import History
from savings_exporter.model.jsontext import any_json, ascii_json
from savings_exporter.model.keys import MAX_KEYS, KeyTable
from savings_exporter.model.names import UNKNOWN
from savings_exporter.model.operations import OperationCounts
from savings_exporter.model.pricing import PriceBasis
from savings_exporter.model.record import parse_timestamp
from savings_exporter.model.totals import Ledger, Pair, Totals

FORMAT = 2
"""The format of our block that this program writes."""

_NO_CHECKSUM = b"sha256:" + b"0" * 64
_ID = re.compile("[0-9a-f]{16}")
# The checksum precedes every name, so the first match is the checksum itself.
_CHECKSUM = re.compile(rb'"checksum": ?"(sha256:[0-9a-f]{64})"')

# A JSON object without any of these members and without a known schema_version is not a savings document.
_SAVINGS_MEMBERS = {BLOCK, "lifetime", "history"}

_MEMBERS = msgspec.json.Decoder(dict[str, msgspec.Raw])
# Totals hold no names and only finite numbers, so this encoding is ASCII and lossless.
_encoded = msgspec.json.Encoder().encode
_ITEMS = msgspec.json.Decoder(list[msgspec.Raw])
_DECODE_TOTALS = msgspec.json.Decoder(Totals).decode


class WriterState(msgspec.Struct, frozen=True):
    """A writer's entry in the document.

    Attributes:
        through: the sequence number up to which the writer's records are in the totals.
        segment, offset: the position in the journal after that record; zero when the writer records no more.
        ended: whether the writer has ended and its operation counters are in the document's ``operations``.
    """

    through: int
    segment: int = 0
    offset: int = 0
    ended: bool = False


class LegacyJournal(msgspec.Struct, frozen=True):
    """The position in the journal of a format 1 store after which its records are not in the document."""

    epoch: int
    offset: int


class Document(msgspec.Struct, frozen=True, kw_only=True):
    """The content of a document.

    Attributes:
        ledger: all totals.
        store: the permanent name of the store, 16 hexadecimal digits; empty in a document that another program wrote.
        writers: the writers' entries, by writer id (16 hexadecimal digits).
        keys: the idempotency keys that were counted.
        operations: the operation counters of writers that have ended.
        cursors: how far each source has been imported.
        included: the digest of the last document of another program that is in the totals, 16 hexadecimal digits; empty
            without one. A copy of that document is kept beside this one.
        days_file: the number of the file of closed days that belongs to this document; 0 without one.
        saved_at: when the document was saved.
        created_at: when the store began to count. In a document that does not contain the time, it is the time of the
            oldest point of the history; None without points.
        kept: unknown members, and unknown keys of entries.
        problems: descriptions of what was left out when the document was read.
        legacy: the journal position of a format 1 document; None for every other document.
    """

    ledger: Ledger = Ledger()
    store: str = ""
    writers: Mapping[str, WriterState] = {}
    keys: KeyTable = msgspec.field(default_factory=KeyTable)
    operations: OperationCounts = OperationCounts()
    cursors: Cursors = {}
    included: str = ""
    days_file: int = 0
    saved_at: datetime | None = None
    created_at: datetime | None = None
    kept: Mapping[str, Any] = {}
    problems: tuple[str, ...] = ()
    legacy: LegacyJournal | None = None

    @property
    def is_ours(self) -> bool:
        """Whether this program wrote the document. Only such a document has a checksum, which ``decode`` verifies."""
        return bool(self.store)


def decode(data: bytes, max_keys: int = MAX_KEYS) -> Document:
    """Read a document of any known schema.

    Args:
        data: all bytes of the file.
        max_keys: how many idempotency keys the document's table keeps.

    Raises:
        CorruptStoreError: the document is damaged; OtherFileError: the file is not a savings document.
        NewerSchemaError: a newer program wrote the document.
    """
    members = _document_members(data)
    schema = _value(members.get("schema_version", b"null"))
    is_number = isinstance(schema, int) and not isinstance(schema, bool)
    if is_number and schema > SCHEMA_VERSION:
        raise NewerSchemaError(f"schema_version is {schema}, and this program knows up to {SCHEMA_VERSION}")
    is_known = is_number and schema >= OLDEST_SCHEMA_VERSION
    if not is_known and members.keys().isdisjoint(_SAVINGS_MEMBERS):
        raise _no_savings()
    if not is_known:
        raise CorruptStoreError(f"not a savings document: schema_version is {shown(schema)}", field="schema_version")
    if BLOCK in members:
        return _decode_ours(data, members, max_keys)
    raw = {key: _value(value) for key, value in members.items()}
    if any(isinstance(value, dict) and {"format", "checksum", "store"} <= value.keys() for value in raw.values()):
        raise CorruptStoreError(f"the name of its {BLOCK} block is damaged", field=BLOCK)
    ledger, kept, problems = headroom.read(raw)
    if ledger == Ledger() and not isinstance(raw.get("lifetime"), dict):
        raise _no_savings()
    ledger = _without_days(ledger)
    return Document(ledger=ledger, created_at=ledger.history.began_at, kept=kept, problems=problems)


def is_of_another_program(data: bytes) -> bool:
    """Whether a file that cannot be read as a document looks like a document of another program.

    This program writes its block before the totals, so what is left of a document of its own has a part of the block if
    it has totals.
    """
    return b'"lifetime"' in data and not any(part in data for part in (BLOCK.encode("ascii"), b'"sha256:'))


def encode(document: Document) -> bytes:
    """Encode a document as schema 6 with our block in format 2: ASCII, one entry per line.

    ``legacy`` and ``problems`` are not written.
    """
    ledger, kept = document.ledger, document.kept
    lifetime = _entry(ledger.lifetime, {"savings_basis": UNKNOWN, **_dict(kept.get("lifetime"))})
    before, after = _block(document).split(_NO_CHECKSUM, 1)
    head = b'{\n"schema_version": %d,\n"%s": %s' % (SCHEMA_VERSION, BLOCK.encode("ascii"), before)
    tail = [
        after,
        b',\n"lifetime": ' + lifetime,
        b',\n"projects": ' + _entries(ledger.projects, _dict(kept.get("projects"))),
        b',\n"by_model": ' + _entries(ledger.by_model, _dict(kept.get("by_model"))),
        b',\n"history": ',
        *ledger.history.pieces(),
        *(b",\n" + ascii_json(key) + b": " + ascii_json(kept[key]) for key in kept if key not in KNOWN_MEMBERS),
        b"\n}\n",
    ]
    return b"".join((head, _digest(head, _NO_CHECKSUM, *tail), *tail))


def _no_savings() -> OtherFileError:
    return OtherFileError("is not a savings document: it holds no savings")


def _document_members(data: bytes) -> Mapping[str, bytes]:
    try:
        members = _members(data)
    except (ValueError, RecursionError) as error:
        raise CorruptStoreError(f"not JSON: {error}" if data.strip() else "the file is empty") from None
    except TypeError:
        raise OtherFileError("is not a savings document: it is JSON, but not an object") from None
    return members


def _decode_ours(data: bytes, members: Mapping[str, bytes], max_keys: int) -> Document:
    try:
        block = _members(members[BLOCK])
    except (TypeError, ValueError):
        block = {}
    written_format = _value(block.get("format", b"null"))
    if isinstance(written_format, int) and written_format > FORMAT:
        raise NewerSchemaError(f"its format is {written_format}, and this program knows up to {FORMAT}")
    _check(data)
    try:
        return _decode_checked(members, block, written_format, max_keys)
    except (KeyError, TypeError, ValueError, msgspec.MsgspecError) as error:
        raise CorruptStoreError(f"its checksum matches, but a field is missing or wrong: {error}") from None


def _check(data: bytes) -> None:
    checksum = _CHECKSUM.search(data)
    if checksum is None:
        raise CorruptStoreError("its checksum is missing: it was damaged, or rewritten by another program")
    whole = memoryview(data)
    if _digest(whole[: checksum.start(1)], _NO_CHECKSUM, whole[checksum.end(1) :]) != checksum[1]:
        raise CorruptStoreError("its checksum does not match: it was damaged, or edited by another program")


def _decode_checked(
    members: Mapping[str, bytes], block: Mapping[str, bytes], written_format: int, max_keys: int
) -> Document:
    is_old = written_format == 1
    by_model, kept_by_model = _read_entries(members["by_model"])
    projects, kept_projects = _read_entries(members["projects"])
    saved_at, created_at = _value(block["saved_at"]), _value(block.get("created_at", b"null"))
    ledger = Ledger(
        records=_typed(block["sequence" if is_old else "records"], int),
        lifetime=_totals(members["lifetime"]),
        by_model=by_model,
        projects=projects,
        agents={} if is_old else _typed(block["agents"], dict[str, Totals]),
        sources=_typed(block.get("sources", b"{}"), dict[str, Totals]),
        by_provider_model=dict(map(_read_pair, _items(block["totals"]))),
        history=History.of_lines(_items(members["history"])),
        bases=_typed(block.get("prices", b"[]"), tuple[PriceBasis, ...]),
        crowds=_typed(block.get("crowds", b"{}"), dict[str, Crowd]),
    )
    if b'"compared_tokens_saved"' not in members["lifetime"]:
        ledger = ledger.with_assumed_records()
    days_file = 0
    if "days" in block:
        days = _members(block["days"])
        days_file = _typed(days["file"], int)
        ledger = msgspec.structs.replace(
            ledger, days=decode_open(days["open"]), undated=decode_numbers(days["undated"])
        )
    else:
        ledger = _without_days(ledger)
    store, writers = _typed(block["store"], str), {} if is_old else _typed(block["writers"], dict[str, WriterState])
    if not all(map(_ID.fullmatch, (store, *writers))):
        raise ValueError("a store or a writer is not named by 16 hexadecimal digits")
    unknown = {key: _value(value) for key, value in members.items() if key not in KNOWN_MEMBERS}
    unpacked = KeyTable.unpack_format_1 if is_old else KeyTable.unpack
    return Document(
        ledger=ledger,
        store=store,
        writers=writers,
        keys=unpacked(_typed(block["idempotency_keys"], str), max_keys),
        operations=OperationCounts() if is_old else _typed(block["operations"], OperationCounts),
        cursors=_typed(block.get("cursors", b"{}"), dict[str, Cursor]),
        included=_typed(block.get("included", b'""'), str),
        days_file=days_file,
        saved_at=datetime.fromisoformat(saved_at) if saved_at else None,
        created_at=parse_timestamp(str(created_at)) or ledger.history.began_at,
        kept=kept_of(unknown, unknown_keys(_value(members["lifetime"])), kept_projects, kept_by_model),
        legacy=_typed(block["journal"], LegacyJournal) if is_old else None,
    )


def _without_days(ledger: Ledger) -> Ledger:
    """A ledger from a document without days: everything belongs to no day."""
    return msgspec.structs.replace(ledger, undated=numbers_of(ledger.lifetime))


def _block(document: Document) -> bytes:
    """Our block. The checksum precedes all members that can contain a name."""
    members = {
        "format": ascii_json(FORMAT),
        "checksum": b'"' + _NO_CHECKSUM + b'"',
        "store": ascii_json(document.store),
        "records": ascii_json(document.ledger.records),
        "saved_at": ascii_json(document.saved_at.isoformat() if document.saved_at else None),
        "created_at": ascii_json(document.created_at.isoformat() if document.created_at else None),
        "writers": ascii_json(document.writers),
        "operations": ascii_json(document.operations),
        "agents": _entries(document.ledger.agents, {}),
        "sources": _entries(document.ledger.sources, {}),
        "totals": _list(_pair(*entry) for entry in document.ledger.by_provider_model.items()),
        "days": b'{"file": %d, "undated": %s,\n  "open": %s}'
        % (document.days_file, encode_numbers(document.ledger.undated), encode_open(document.ledger.days)),
        "cursors": ascii_json(document.cursors),
        "prices": ascii_json(document.ledger.bases),
        "crowds": ascii_json(document.ledger.crowds),
        "included": ascii_json(document.included),
        "idempotency_keys": ascii_json(document.keys.pack()),
    }
    return b"{" + b",\n ".join(_joined(members)) + b"}"


def _joined(members: Mapping[str, bytes]) -> Iterable[bytes]:
    return (ascii_json(key) + b": " + value for key, value in members.items())


def _entries(totals: Mapping[str, Totals], kept: Mapping[str, Any]) -> bytes:
    lines = (
        b"\n  " + ascii_json(name) + b": " + _entry(value, _dict(kept.get(name)) if kept else {})
        for name, value in totals.items()
    )
    return b"{" + b",".join(lines) + b"}"


def _entry(totals: Totals, kept: Mapping[str, Any]) -> bytes:
    return ascii_json({**kept, **msgspec.structs.asdict(totals)}) if kept else _encoded(totals)


def _list(items: Iterable[bytes]) -> bytes:
    lines = b",\n  ".join(items)
    return b"[\n  " + lines + b"]" if lines else b"[]"


def _pair(pair: Pair, totals: Totals) -> bytes:
    provider, model = map(ascii_json, pair)
    return b"".join((b'{"provider":', provider, b',"model":', model, b",", _encoded(totals)[1:]))


class _Names(msgspec.Struct):
    provider: str
    model: str


def _read_pair(entry: bytes) -> tuple[Pair, Totals]:
    names = _typed(entry, _Names)
    return (names.provider, names.model), _typed(entry, Totals)


def _read_entries(data: bytes) -> tuple[dict[str, Totals], dict[str, dict[str, Any]]]:
    """The totals by name, and the unknown keys of each entry."""
    named: dict[str, Totals] = {}
    kept: dict[str, dict[str, Any]] = {}
    for name, entry in _members(data).items():
        named[name] = totals = _totals(entry)
        # Most entries have no unknown keys. Encoding the totals again is the fastest way to check that.
        if _encoded(totals) != entry and (unknown := unknown_keys(_value(entry))):
            kept[name] = unknown
    return named, kept


def _members(data: bytes) -> Mapping[str, bytes]:
    """The members of a JSON object, each as separate JSON bytes.

    Raises:
        ValueError: the data is not JSON.
        TypeError: the JSON value is not an object.
    """
    try:
        return {key: bytes(value) for key, value in _MEMBERS.decode(data).items()}
    except (msgspec.MsgspecError, UnicodeDecodeError):
        value = json.loads(data)
    if not isinstance(value, dict):
        raise TypeError(f"not an object: {shown(value)}")
    return {key: ascii_json(member) for key, member in value.items()}


def _items(data: bytes) -> Iterable[bytes]:
    """The items of a JSON array, each as separate JSON bytes.

    Raises:
        ValueError: the data is not JSON.
        TypeError: the JSON value is not an array.
    """
    try:
        return list(map(bytes, _ITEMS.decode(data)))
    except (msgspec.MsgspecError, UnicodeDecodeError):
        value = json.loads(data)
    if not isinstance(value, list):
        raise TypeError(f"not a list: {shown(value)}")
    return list(map(ascii_json, value))


def _value(data: bytes) -> Any:
    try:
        return any_json(data)
    except (ValueError, RecursionError) as error:
        raise CorruptStoreError(f"not JSON: {error}") from None


def _totals(entry: bytes) -> Totals:
    try:
        return _DECODE_TOTALS(entry)
    except (msgspec.DecodeError, UnicodeDecodeError):
        # Another key of the entry, from another program, can hold a value that msgspec never accepts, such as half of a
        # surrogate pair.
        value = json.loads(entry)
    if not isinstance(value, dict):
        raise TypeError(f"not an object: {shown(value)}")
    return msgspec.convert({key: value[key] for key in value if key in TOTALS_FIELDS}, Totals)


def _typed(data: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return msgspec.convert(json.loads(data), kind)


def _digest(*pieces: bytes | memoryview) -> bytes:
    """The checksum of the concatenated pieces."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return b"sha256:" + digest.hexdigest().encode("ascii")


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
