"""JSON in ASCII. This uses the faster msgspec whenever its output is equivalent to that of the standard library."""

from __future__ import annotations

import json
from typing import Any

import msgspec

_ENCODER = msgspec.json.Encoder()


def ascii_json(value: Any) -> bytes:
    """Encode a value as JSON in ASCII, without loss, including NaN, infinities and halves of surrogate pairs.

    Raises:
        TypeError, ValueError: the value cannot be encoded as JSON.
    """
    try:
        data = _ENCODER.encode(value)
    except (UnicodeEncodeError, OverflowError):
        data = b"null"
    # msgspec encodes NaN and infinities as null.
    if data.isascii() and b"null" not in data:
        return data
    return json.dumps(msgspec.to_builtins(value)).encode("ascii")


def any_json(data: bytes) -> Any:
    """Decode any JSON that a Python program can write, including NaN, infinities and halves of surrogate pairs.

    Raises:
        ValueError: the bytes are not JSON.
        RecursionError: the JSON is nested too deeply.
    """
    try:
        return msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return json.loads(data)
