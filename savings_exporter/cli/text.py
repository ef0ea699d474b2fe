"""Text of other programs, for a terminal."""

from __future__ import annotations


def plain(text: str) -> str:
    """Text of another program for a terminal: characters that cannot be printed become their escape sequences."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
