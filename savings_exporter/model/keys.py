"""Idempotency keys: which keys were counted, for which content, and under which sequence numbers."""

from __future__ import annotations

import base64
import hashlib
import struct
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from savings_exporter.model.record import SavingsRecord

MAX_KEYS = 100_000
"""How many keys a store remembers. It keeps the newest ones."""

MAX_KEY_LENGTH = 255
"""The maximum length of a key, in characters."""

DIGEST_BYTES = 16
FINGERPRINT_BYTES = 8
WRITER_BYTES = 8

NO_FINGERPRINT = bytes(FINGERPRINT_BYTES)
"""The fingerprint of unknown content. It matches any fingerprint."""

_ENTRY = struct.Struct(f"<{DIGEST_BYTES}s{FINGERPRINT_BYTES}s{WRITER_BYTES}sQ")
_WHOLE_ENTRY = struct.Struct(f"{_ENTRY.size}s")
_OLD_ENTRY = struct.Struct(f"<{DIGEST_BYTES}sQ")

_DEFAULTS = {field.name: field.default for field in msgspec.structs.fields(SavingsRecord) if field.name != "timestamp"}


class KeyEntry(NamedTuple):
    """The records that were counted for a key.

    Attributes:
        fingerprint: the fingerprint of the records' content, 8 bytes; zeros when it is unknown.
        writer: the id of the writer that recorded them, 8 bytes; zeros when it is unknown.
        sequence: that writer's sequence number for the last of the records.
    """

    fingerprint: bytes
    writer: bytes
    sequence: int

    def matches(self, fingerprint: bytes) -> bool:
        """Whether records with this fingerprint can be the records that were counted."""
        return NO_FINGERPRINT in (self.fingerprint, fingerprint) or self.fingerprint == fingerprint


class KeyTable:
    """The newest keys, at most ``max_keys``, by their digests. When the table is full, adding a key removes the oldest.

    Two different keys are treated as the same key only if their 128-bit hashes collide. Several threads may use
    a table at the same time.
    """

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        self._max_keys = max_keys
        # Without the deque, finding the oldest entry of the dict is slow after many deletions.
        self._oldest_first: deque[bytes] = deque()
        self._entries: dict[bytes, bytes] = {}
        # Data from `unpack` that is not loaded yet. Readers that look up no key never pay for building the table.
        self._packed = b""

    def get(self, digest: bytes) -> KeyEntry | None:
        """The entry of the key with this digest; None when the key is new or was removed."""
        self._load()
        entry = self._entries.get(digest)
        return None if entry is None else KeyEntry(*_ENTRY.unpack(entry)[1:])

    def claim(self, digest: bytes, entry: KeyEntry) -> KeyEntry:
        """Add a key, unless it is known. Returns the table's entry: threads that claim one key at the same time, with
        different entries, all get the same one.
        """
        self._load()
        packed = _ENTRY.pack(digest, *entry)
        found = self._entries.setdefault(digest, packed)
        if found is packed:
            self._oldest_first.append(digest)
            while len(self._entries) > self._max_keys:
                self._entries.pop(self._oldest_first.popleft(), None)
        return KeyEntry(*_ENTRY.unpack(found)[1:])

    def pack(self) -> str:
        """All keys as ASCII text, from the oldest to the newest: base64 of 40 bytes per key."""
        return base64.b64encode(self._packed or b"".join(self._entries.values())).decode("ascii")

    @classmethod
    def unpack(cls, text: str, max_keys: int = MAX_KEYS) -> KeyTable:
        """Decode the output of ``pack``. If it holds more than ``max_keys`` keys, only the newest are kept.

        Raises:
            ValueError: the text is invalid.
        """
        packed = _bytes_of(text, _ENTRY.size)
        table = cls(max_keys)
        table._packed = packed[max(len(packed) - max_keys * _ENTRY.size, 0) :]
        return table

    @classmethod
    def unpack_format_1(cls, text: str, max_keys: int = MAX_KEYS) -> KeyTable:
        """Decode the keys of a format 1 document. They have no fingerprint and no writer.

        Raises:
            ValueError: the text is invalid.
        """
        table = cls(max_keys)
        for digest, sequence in _OLD_ENTRY.iter_unpack(_bytes_of(text, _OLD_ENTRY.size)):
            table.claim(digest, KeyEntry(NO_FINGERPRINT, bytes(WRITER_BYTES), sequence))
        return table

    def __len__(self) -> int:
        return len(self._packed) // _ENTRY.size or len(self._entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeyTable) and self.pack() == other.pack()

    __hash__ = None  # type: ignore[assignment]  # it changes

    def _load(self) -> None:
        if not self._packed:
            return
        entries = {entry[:DIGEST_BYTES]: entry for (entry,) in _WHOLE_ENTRY.iter_unpack(self._packed)}
        loaded = (deque(entries), entries, b"")
        # Several threads may load at the same time, and one of them may have added keys since then. The assignment is
        # one step without a call, so no other thread and no signal handler runs in between.
        self._oldest_first, self._entries, self._packed = (
            loaded if self._packed else (self._oldest_first, self._entries, b"")
        )


def digest_of(key: str) -> bytes:
    """The 16-byte digest that identifies a key."""
    return hashlib.blake2b(key.encode(), digest_size=DIGEST_BYTES).digest()


def fingerprint_of(records: Sequence[SavingsRecord]) -> bytes:
    """An 8-byte fingerprint of the records' content. It excludes timestamps, because a retry without a timestamp gets a
    later one.

    Fields with their default value are left out, so a field that a later version adds does not change existing
    fingerprints.
    """
    content = [
        {name: value for name, default in _DEFAULTS.items() if (value := getattr(record, name)) != default}
        for record in records
    ]
    return hashlib.blake2b(msgspec.json.encode(content), digest_size=FINGERPRINT_BYTES).digest()


def checked_key(key: Any) -> str | None:
    """Validate a caller's idempotency key. Returns None when there is no key.

    Raises:
        TypeError: the key is not a string.
        ValueError: the key is empty, too long, or cannot be encoded as UTF-8.
    """
    if key is None:
        return None
    if not isinstance(key, str):
        raise TypeError(f"idempotency_key must be a string, not {type(key).__name__}")
    text: str = str.__str__(key)
    if not 1 <= len(text) <= MAX_KEY_LENGTH:
        raise ValueError(f"idempotency_key must have 1 to {MAX_KEY_LENGTH} characters, and has {len(text)}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("idempotency_key must be text that can be written as UTF-8") from None
    return text


def _bytes_of(text: str, size: int) -> bytes:
    packed = base64.b64decode(text, validate=True)
    if len(packed) % size:
        raise ValueError(f"keys: {len(packed)} bytes are not a whole number of entries of {size} bytes")
    return packed
