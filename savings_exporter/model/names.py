"""Names of models, providers, agents and projects, in the form that documents and labels allow."""

from __future__ import annotations

import re
from typing import Any

UNKNOWN = "unknown"
"""The name of a model, provider or agent without a name."""

OTHER = "other"
"""The name under which everything beyond a limit is counted."""

MAX_NAME_BYTES = 128
"""The maximum length of a name in UTF-8, in bytes, like Prometheus's ``label_value_length_limit``: a longer label value
makes a whole scrape fail. Headroom's limit is as many characters.
"""

# A longer name is truncated before it is cleaned, so that the cost of cleaning is bounded.
_MAX_RAW_NAME_LENGTH = 2 * MAX_NAME_BYTES

# Real names are percent-encoded at most twice. Without this limit, decoding a malicious name of 128 characters takes
# sixty rounds.
_MAX_DECODINGS = 3

_ENCODED = re.compile(r"(?:%[0-9A-Fa-f]{2})+")


def is_clean(name: object) -> bool:
    """Whether a name is not empty and cleaning would not change it. A project may still be percent-encoded."""
    return type(name) is str and bool(name) and _fits(name) and name.isprintable() and name == name.strip()


def clean_name(field: str, value: Any) -> str:
    """Clean a name: remove characters that cannot be printed, strip spaces, and keep at most 128 bytes. Returns ""
    when nothing is left.

    Cleaning a clean name does not change it, so a name that is read from a document stays the same.

    Raises:
        TypeError: the value is neither a string nor None; the message names ``field``.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(f"{field} must be a string, not {type(value).__name__}")
    # msgspec does not encode subclasses of str.
    name: str = value if type(value) is str else str.__str__(value)
    if _fits(name) and name.isprintable() and name == name.strip():
        return name
    printable = name[:_MAX_RAW_NAME_LENGTH]
    if not printable.isprintable():
        printable = "".join(filter(str.isprintable, printable))
    # What is printable has no halves of surrogate pairs.
    return printable.strip().encode()[:MAX_NAME_BYTES].decode(errors="ignore").strip()


def clean_project(value: Any) -> str | None:
    """Clean a project's name and decode its percent-encoding, as Headroom does. Returns None when nothing is left.

    Headroom decodes a name once each time it reads the name. This function decodes until nothing changes. Otherwise
    ``a%2520b`` would become another project each time one of the two programs rewrites the document. If a name is still
    encoded after three rounds, its percent signs are removed, so that it cannot be decoded any further.

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


def _fits(name: str) -> bool:
    if len(name) > MAX_NAME_BYTES:
        return False
    return name.isascii() or len(name.encode(errors="surrogatepass")) <= MAX_NAME_BYTES


def _decoded(run: re.Match[str]) -> str:
    # The same result as urllib.parse.unquote, which takes ten times as long if there are many percent signs.
    return bytes.fromhex(run[0].replace("%", "")).decode("utf-8", "replace")
