"""Hostile requests among valid ones: what the service holds is exactly what it acknowledged."""

from __future__ import annotations

import random
from pathlib import Path

from tests.fuzz import fuzz

REQUESTS = 5_000


def test_fuzz(store_path: Path) -> None:
    seed = random.randrange(2**32)
    found = fuzz(store_path, REQUESTS, seed)
    assert found.problems == [], f'repeat it with: make fuzz ARGS="--requests {REQUESTS} --seed {seed}"'
    assert found.recorded == found.acknowledged
    # Each kind of request was among them.
    assert {200, 400, 404, 405, 422} <= set(found.statuses)
