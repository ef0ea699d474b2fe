"""Which idempotency keys were counted already, and as what. Pure."""

from __future__ import annotations

import base64
import hashlib
import struct
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

MAX_KEYS = 100_000
"""How many keys are known; of more, the newest."""

MAX_KEY_LENGTH = 255
"""Longest key, in characters."""

_DIGEST_BYTES = 16
_ENTRY = struct.Struct(f"<{_DIGEST_BYTES}sQ")


class Keys:
    """The newest keys with the sequence each was counted under; only their digests are kept, so any key costs the same.

    Of two keys that differ, the chance to be taken for one is that of a 128-bit hash.
    """

    def __init__(self) -> None:
        self._sequences: OrderedDict[bytes, int] = OrderedDict()

    def sequence_of(self, key: str) -> int | None:
        """What the key's records were counted under, None when the key is new or forgotten."""
        return self._sequences.get(_digest(key))

    def remember(self, key: str, sequence: int) -> None:
        """Take note of a key, and forget the oldest beyond the limit."""
        self._put(_digest(key), sequence)

    def pack(self, more: Iterable[tuple[str, int]] = ()) -> str:
        """All keys as ASCII text, from the oldest to the newest, and behind them more that are not known yet."""
        entries = [*self._sequences.items(), *((_digest(key), sequence) for key, sequence in more)]
        return base64.b64encode(b"".join(_ENTRY.pack(*entry) for entry in entries[-MAX_KEYS:])).decode()

    @classmethod
    def unpacked(cls, text: str) -> Keys:
        """The keys that ``pack`` wrote.

        Raises:
            ValueError: the text is something else.
        """
        keys = cls()
        try:
            for digest, sequence in _entries(text):
                keys._put(digest, sequence)
        except struct.error as error:
            raise ValueError(f"keys: {error}") from None
        return keys

    def _put(self, digest: bytes, sequence: int) -> None:
        self._sequences[digest] = sequence
        if len(self._sequences) > MAX_KEYS:
            self._sequences.popitem(last=False)


def checked_key(key: Any) -> str | None:
    """An idempotency key as given by a caller, None when there is none.

    Raises:
        TypeError, ValueError: it is no text, or empty, or too long, or cannot be written.
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


def _entries(text: str) -> Iterator[tuple[bytes, int]]:
    return _ENTRY.iter_unpack(base64.b64decode(text, validate=True))


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=_DIGEST_BYTES).digest()
