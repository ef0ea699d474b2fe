"""Each line of docs/security.md names tests that exist, or says why there is none."""

from __future__ import annotations

import re
from functools import cache

import pytest

from tests.support.paths import ROOT

_NO_TEST = "none: "


def rows() -> list[str]:
    """The lines of the tables, without their heads."""
    lines = (ROOT / "docs/security.md").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith("|") and not line.endswith(("| test |", "--- |"))]


@cache
def names_of_tests() -> set[str]:
    files = (ROOT / "tests").rglob("test_*.py")
    return {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.M)}


def test_there_are_lines() -> None:
    assert len(rows()) > 30


@pytest.mark.parametrize("row", rows())
def test_each_line_has_its_test(row: str) -> None:
    last = row.strip("|").rpartition("|")[2].strip()
    named = re.findall(r"`([^`]+)`", last)
    assert named or last.startswith(_NO_TEST), "no test"
    missing = [name for name in named if name not in names_of_tests() and not ("/" in name and (ROOT / name).is_file())]
    assert not missing
