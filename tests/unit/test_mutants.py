"""The patches of ``tests/mutants.py``: each applies to the code as it is, and its tests exist."""

from __future__ import annotations

import re

import pytest

from tests.mutants import MUTANTS, Mutant, applied
from tests.support.paths import ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.rule)
def test_patch_applies(mutant: Mutant) -> None:
    texts = {edit.file: (ROOT / "savings_exporter" / edit.file).read_text() for edit in mutant.edits}
    for edit in mutant.edits:
        texts[edit.file] = applied(edit, texts[edit.file])
    for file, text in texts.items():
        compile(text, file, "exec")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.rule)
def test_tests_exist(mutant: Mutant) -> None:
    for test in mutant.tests:
        file, name = test.split("::")
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE)
