"""Power goes while several processes record, on a real ext4 and a real XFS, again and again."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from savings_exporter import SavingsRecord, SavingsTracker
from savings_exporter.errors import CorruptStoreError
from tests.crash.lab import FILESYSTEMS, Disk, Lab, LostError, mounted, reported, rounds

pytestmark = pytest.mark.needs("linux", "root", "mount", "xfsprogs", "e2fsprogs")

WRITERS = ("alone", "threads", "batches", "reader")

ONE = SavingsRecord(model="m", tokens_saved=1)

# From before the first process has opened the store until all have recorded for a while.
LONGEST_LIFE_SECONDS = 0.3


@pytest.mark.parametrize("filesystem", FILESYSTEMS)
def test_what_was_acknowledged_survives_a_power_loss_at_any_instant(tmp_path: Path, filesystem: str) -> None:
    with mounted(Disk(filesystem, tmp_path)) as disk:
        store = disk.mountpoint / "proxy_savings.json"
        with Lab(store, tmp_path / "outside", reported(f"power loss, {filesystem}")) as lab:
            for number in range(rounds(40, 300)):
                # Every second time the disk is slow, so that the power goes between a write and its sync.
                lose_power_while_recording(disk, lab, "slow syncs" if number % 2 else None)
                lab.check()
            lab.verify()
    # Whatever the instants were, records were acknowledged, and some were on their way when the power went.
    assert 0 < lab.figures.acknowledged < lab.figures.attempted


@pytest.mark.parametrize("filesystem", FILESYSTEMS)
def test_what_only_a_document_had_is_missed_when_it_is_damaged_after_a_power_loss(
    tmp_path: Path, filesystem: str
) -> None:
    with mounted(Disk(filesystem, tmp_path)) as disk:
        store = disk.mountpoint / "proxy_savings.json"
        with SavingsTracker(store, save_interval=1000) as tracker:
            assert tracker.record_many([ONE])
            # So many go by the document.
            assert tracker.record_many([ONE] * 10_001)
            disk.lose_power()
        disk.unmount()
        disk.mount()
        store.write_bytes(store.read_bytes()[:-100])
        with pytest.raises(CorruptStoreError, match="acknowledged records are lost: number 2 to 10002"):
            SavingsTracker(store)


@pytest.mark.parametrize("sabotage", ["no directory fsync", "no data sync"])
@pytest.mark.parametrize("filesystem", FILESYSTEMS)
def test_the_lab_sees_what_is_lost_without_a_sync(tmp_path: Path, filesystem: str, sabotage: str) -> None:
    with mounted(Disk(filesystem, tmp_path)) as disk:
        store = disk.mountpoint / "proxy_savings.json"
        with Lab(store, tmp_path / "outside", reported(f"{sabotage}, {filesystem} (must lose)")) as lab:
            for _ in range(rounds(60, 200)):
                lose_power_while_recording(disk, lab, sabotage)
                try:
                    lab.check()
                except LostError:
                    return
            pytest.fail(f"with {sabotage}, nothing was lost in {lab.figures.crashes} power losses")


def lose_power_while_recording(disk: Disk, lab: Lab, sabotage: str | None = None) -> None:
    """One round: processes begin to record, the power goes, the disk comes back."""
    for kind in WRITERS:
        lab.start(kind, kind, sabotage)
    time.sleep(random.uniform(0, LONGEST_LIFE_SECONDS))
    disk.lose_power()
    lab.figures.crashes += 1
    lab.kill()
    disk.unmount()
    disk.mount()
