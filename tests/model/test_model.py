"""Search all states of the protocol within small bounds. The removal of each rule must be detected."""

from __future__ import annotations

import pytest

from tests.model.engine_model import MUTANTS, SHORT, Config, mutated, search

MOST_STATES = 200_000


@pytest.mark.parametrize("config", SHORT, ids=lambda config: config.name)
def test_no_violation(config: Config) -> None:
    result = search(config, MOST_STATES)
    assert result.violation is None, "\n".join(result.trace)
    assert result.is_complete


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_found(name: str) -> None:
    assert search(mutated(name), MOST_STATES).violation is not None
