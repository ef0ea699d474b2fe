"""Processes that share a store are killed at random, some in the middle of a write; the others go on."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from crash.lab import Lab, reported, rounds
from support import WAIT_SECONDS

pytestmark = pytest.mark.needs("linux")

# One of them sends batches: every process counts what all the others record, and that is what takes the time here.
KINDS = ("alone", "alone", "alone", "alone", "alone", "threads", "threads", "batches")


def test_writers_go_on_when_others_are_killed_and_nothing_is_lost(tmp_path: Path) -> None:
    kinds = {f"{kind}{n}": kind for n, kind in enumerate(KINDS)}
    store = tmp_path / "store" / "proxy_savings.json"
    store.parent.mkdir()
    with Lab(store, tmp_path / "outside", reported("killed writers")) as lab:
        for name, kind in kinds.items():
            lab.start(name, kind)
        lab.start("reader", "reader")
        for number in range(rounds(30, 200)):
            victim = random.choice(list(kinds))
            lab.kill(victim)
            if number % 2:
                die_in_a_write(lab, victim, kinds[victim])
            lab.goes_on()
            lab.start(victim, kinds[victim])
            lab.figures.crashes += 1
        lab.kill()
        lab.check()
        lab.verify()
    lab.figures.torn_frames = sum(account.notes["torn"] for account in lab.accounts.values())
    lab.figures.bytes_damaged = sum(account.torn_bytes for account in lab.accounts.values())
    assert lab.figures.bytes_damaged > 0


def die_in_a_write(lab: Lab, name: str, kind: str) -> None:
    """Run a writer that leaves a part of something it wrote to those who still run."""
    lab.start(name, kind, "torn write")
    lab.running[name].join(WAIT_SECONDS)
    assert not lab.running[name].is_alive()
    lab.kill(name)
