"""JSON in ASCII, at msgspec's speed wherever msgspec writes the same as the standard library."""

from __future__ import annotations

import json
from typing import Any

import msgspec

_ENCODER = msgspec.json.Encoder()


def ascii_json(value: Any) -> bytes:
    """Write a value as JSON in ASCII, with nothing lost: also NaN, infinities and halves of surrogate pairs.

    Raises:
        TypeError, ValueError: the value cannot be written as JSON.
    """
    try:
        data = _ENCODER.encode(value)
    except (UnicodeEncodeError, OverflowError):
        data = b"null"
    # msgspec writes NaN and infinities as null.
    if data.isascii() and b"null" not in data:
        return data
    return json.dumps(msgspec.to_builtins(value)).encode("ascii")


def any_json(data: bytes) -> Any:
    """Read any JSON that a Python program can have written: also NaN, infinities and halves of surrogate pairs.

    Raises:
        ValueError: the bytes are no JSON.
        RecursionError: it is nested too deep.
    """
    try:
        return msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return json.loads(data)
