"""Repeated power losses while several processes record, on a real ext4 and a real XFS."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from savings_exporter import CorruptStoreError, SavingsTracker
from savings_exporter.storage.segment import SyncMethod
from tests.crash.lab import FILESYSTEMS, METHODS, Disk, Lab, LostError, mounted, reported, rounds

pytestmark = pytest.mark.needs("linux", "root", "mount", "xfsprogs", "e2fsprogs")

WRITERS = ("alone", "threads", "batches", "visitors", "forks", "reader", "watcher")

# From before the first process has opened the store until all have recorded for a while.
LONGEST_LIFE_SECONDS = 0.4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("filesystem", FILESYSTEMS)
def test_power_loss_at_any_instant(tmp_path: Path, filesystem: str, method: SyncMethod) -> None:
    with mounted(Disk(filesystem, tmp_path)) as disk:
        store = disk.mountpoint / "proxy_savings.json"
        figures = reported(f"power loss, {filesystem}, {method}")
        with Lab(store, tmp_path / "outside", figures, method) as lab:
            for number in range(rounds(20, 300)):
                # In every second round the disk is slow, so that the power loss comes between a write and its sync.
                lose_power_while_recording(disk, lab, "slow syncs" if number % 2 else None)
                lab.check()
            lab.verify()
    # In all rounds records were acknowledged, and some records were in progress at the power loss.
    assert 0 < lab.figures.acknowledged < lab.figures.attempted


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda _data: b"", lambda data: bytes(len(data))])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("filesystem", FILESYSTEMS)
def test_damage_after_power_loss(
    tmp_path: Path, filesystem: str, method: SyncMethod, damage: Callable[[bytes], bytes]
) -> None:
    """The previous document and the journals contain all acknowledged records. Without it, records are missing."""
    with mounted(Disk(filesystem, tmp_path)) as disk:
        store = disk.mountpoint / "proxy_savings.json"
        with SavingsTracker(store, save_interval=1000, sync_method=method) as tracker:
            for number in range(1, 8):
                assert tracker.record_request(model="m", tokens_saved=1)
                assert number % 2 or tracker.save()
            disk.lose_power()
        disk.unmount()
        disk.mount()
        store.write_bytes(damage(store.read_bytes()))
        with SavingsTracker(store) as tracker:
            assert tracker.snapshot().lifetime.requests == 7
        for document in (store, store.with_name(store.name + ".previous")):
            document.write_bytes(damage(document.read_bytes()))
        with pytest.raises(CorruptStoreError, match="its totals are lost"):
            SavingsTracker(store)


@pytest.mark.parametrize("sabotage", ["no directory fsync", "no data sync"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("filesystem", FILESYSTEMS)
def test_without_a_sync_it_loses(tmp_path: Path, filesystem: str, method: SyncMethod, sabotage: str) -> None:
    with mounted(Disk(filesystem, tmp_path)) as disk:
        store = disk.mountpoint / "proxy_savings.json"
        figures = reported(f"{sabotage}, {filesystem}, {method} (must lose)")
        with Lab(store, tmp_path / "outside", figures, method) as lab:
            for _ in range(rounds(60, 200)):
                try:
                    lose_power_while_recording(disk, lab, sabotage)
                    lab.check()
                except LostError:
                    return
            pytest.fail(f"with {sabotage}, nothing was lost in {lab.figures.crashes} power losses")


def lose_power_while_recording(disk: Disk, lab: Lab, sabotage: str | None = None) -> None:
    """One round: processes start to record, the power is lost, and the disk is mounted again."""
    for kind in WRITERS:
        lab.start(kind, kind, sabotage)
    time.sleep(random.uniform(0, LONGEST_LIFE_SECONDS))
    disk.lose_power()
    lab.figures.crashes += 1
    lab.kill()
    disk.unmount()
    disk.mount()
