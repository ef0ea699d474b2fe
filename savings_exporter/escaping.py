"""Text of others, such as names and paths, for a terminal, a log and a spreadsheet."""

from __future__ import annotations

_FORMULA = ("=", "+", "-", "@")


def plain(text: str, keep: str = "") -> str:
    """Text that cannot control a terminal or deceive its reader: each character that cannot be printed becomes its
    escape sequence in JSON. These are control characters, characters that change the direction of text, separators of
    lines, and characters without a width. Those in ``keep`` stay.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in keep else _escaped(character) for character in text
    )


def cell(text: str) -> str:
    """Text for a cell of CSV. A spreadsheet takes text that begins with = + - or @ for a formula, and calculates it;
    an apostrophe at the beginning prevents that.
    """
    return plain(f"'{text}" if text.startswith(_FORMULA) else text)


def _escaped(character: str) -> str:
    code = ord(character)
    if code <= 0xFFFF:
        return f"\\u{code:04x}"
    # JSON has two surrogates for it (RFC 8259, section 7).
    return f"\\u{0xD800 + (code - 0x10000 >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"
