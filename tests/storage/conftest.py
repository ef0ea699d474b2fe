"""What the tests of damaged stores share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.damaged import Kept


@pytest.fixture(scope="module")
def kept() -> Iterator[Kept]:
    """A killed store, in memory where that can be: what a reader makes of its damage does not depend on the disk."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        yield Kept(Path(directory))
