"""Processes that share a store are killed at random, some in the middle of a write; the others continue."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from savings_exporter.storage.segment import SyncMethod
from tests.crash.lab import METHODS, Lab, reported, rounds

pytestmark = pytest.mark.needs("linux")

KINDS = ("alone", "alone", "threads", "batches", "batches", "visitors", "forks")


@pytest.mark.parametrize("method", METHODS)
def test_killed_writers(tmp_path: Path, method: SyncMethod) -> None:
    kinds = {f"{kind}{n}": kind for n, kind in enumerate(KINDS)}
    store = tmp_path / "store" / "proxy_savings.json"
    store.parent.mkdir()
    with Lab(store, tmp_path / "outside", reported(f"killed writers, {method}"), method) as lab:
        for name, kind in kinds.items():
            lab.start(name, kind)
        lab.start("reader", "reader")
        lab.start("watcher", "watcher")
        for number in range(rounds(8, 200)):
            victim = random.choice(list(kinds))
            lab.kill(victim)
            # Killed from outside at any instant, or by itself when part of its work is on the disk.
            if by_itself := (None, "torn write", "sudden death")[number % 3]:
                die(lab, victim, kinds[victim], by_itself)
            lab.goes_on()
            lab.start(victim, kinds[victim])
            lab.figures.crashes += 1
        lab.kill()
        lab.check()
        lab.verify()
    lab.figures.torn_frames = sum(account.notes["torn"] for account in lab.accounts.values())
    lab.figures.bytes_damaged = sum(account.torn_bytes for account in lab.accounts.values())
    assert lab.figures.bytes_damaged > 0


def die(lab: Lab, name: str, kind: str, how: str) -> None:
    """Run a writer that leaves incomplete work to the running processes."""
    lab.start(name, kind, how)
    lab.running[name].process.join()
    lab.kill(name)
