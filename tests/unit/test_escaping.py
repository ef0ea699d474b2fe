"""Text of others, made plain."""

from __future__ import annotations

import json
import sys

import pytest

from savings_exporter.escaping import cell, plain


def test_each_character_keeps_its_meaning_in_json() -> None:
    for code in (*range(0x2100), 0xD800, 0xFEFF, 0xFFFF, 0x10000, 0xE0041, sys.maxunicode):
        character = chr(code)
        shown = plain(character)
        assert shown.isprintable()
        if not character.isprintable():
            assert json.loads(f'"{shown}"') == character
        else:
            assert shown == character


def test_line_ends_can_be_kept() -> None:
    assert plain("a\nb\r\x1b", keep="\n") == "a\nb\\u000d\\u001b"


@pytest.mark.parametrize(
    ("text", "shown"),
    [("=1", "'=1"), ("+1", "'+1"), ("-1", "'-1"), ("@a", "'@a"), ("a=1", "a=1"), ("", ""), ("\t=1", "\\u0009=1")],
)
def test_cell_is_no_formula(text: str, shown: str) -> None:
    assert cell(text) == shown
