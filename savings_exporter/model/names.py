"""Names of models, providers, agents and projects, as documents and labels may hold them."""

from __future__ import annotations

import re
from typing import Any

UNKNOWN = "unknown"
"""The name of a model, provider or agent that has none."""

OTHER = "other"
"""The name under which everything beyond a limit is counted."""

MAX_NAME_LENGTH = 128
"""Longest name of a model, provider, agent or project, in characters (Headroom's limit too)."""

# A longer name is cut before it is cleaned, so that the cost of cleaning has a bound.
_MAX_RAW_NAME_LENGTH = 2 * MAX_NAME_LENGTH

# Real names are percent-encoded once or twice. Without a limit, decoding a hostile name of 128 characters takes sixty
# rounds.
_MAX_DECODINGS = 3

_ENCODED = re.compile(r"(?:%[0-9A-Fa-f]{2})+")


def are_clean(*values: object) -> bool:
    """Whether cleaning leaves each name as it is, and something is in it. A project may still be encoded."""
    for value in values:
        if not (
            type(value) is str and 0 < len(value) <= MAX_NAME_LENGTH and value.isprintable() and value == value.strip()
        ):
            return False
    return True


def clean_name(field: str, value: Any) -> str:
    """Clean a name: drop what cannot be printed, strip spaces, keep 128 characters. "" when nothing is left.

    Cleaning a clean name changes nothing, so a name that is read back from a document is the same name.

    Raises:
        TypeError: the value is neither a string nor None; the message names ``field``.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(f"{field} must be a string, not {type(value).__name__}")
    # msgspec encodes no subclass of str.
    name: str = value if type(value) is str else str.__str__(value)
    if len(name) <= MAX_NAME_LENGTH and name.isprintable() and name == name.strip():
        return name
    printable = name[:_MAX_RAW_NAME_LENGTH]
    if not printable.isprintable():
        printable = "".join(filter(str.isprintable, printable))
    return printable.strip()[:MAX_NAME_LENGTH].strip()


def clean_project(value: Any) -> str | None:
    """Clean a project's name and decode its percent-encoding, as Headroom does. None when nothing is left.

    Headroom decodes a name each time it reads one. Here decoding goes on until nothing changes: otherwise
    ``a%2520b`` would become another project each time the two programs rewrite the document. A name that is still
    encoded after three rounds loses its percent signs, so that it cannot be decoded any further.

    Raises:
        TypeError: the value is neither a string nor None.
    """
    if value is None:
        return None
    name = clean_name("project", value)
    for _ in range(_MAX_DECODINGS):
        if not _ENCODED.search(name):
            return name or None
        name = clean_name("project", _ENCODED.sub(_decoded, name))
    if _ENCODED.search(name):
        name = clean_name("project", name.replace("%", ""))
    return name or None


def _decoded(run: re.Match[str]) -> str:
    # The result of urllib.parse.unquote, which takes ten times as long where there are many percent signs.
    return bytes.fromhex(run[0].replace("%", "")).decode("utf-8", "replace")
