"""The disk below the file system runs full: a sync fails once, the next one succeeds, and the data is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from savings_exporter.storage.segment import SyncMethod
from tests.crash.lab import (
    FILESYSTEMS,
    METHODS,
    Disk,
    Lab,
    LostError,
    Pool,
    ThinDisk,
    drop_caches,
    mounted,
    pooled,
    reported,
    rounds,
)
from tests.support.wait import eventually

pytestmark = pytest.mark.needs("linux", "root", "mount", "xfsprogs", "e2fsprogs")

WRITERS = ("alone", "threads", "batches", "visitors", "forks", "reader", "watcher")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("filesystem", FILESYSTEMS)
def test_full_disk_loses_nothing(tmp_path: Path, filesystem: str, method: SyncMethod) -> None:
    with pooled(tmp_path) as pool, mounted(ThinDisk(filesystem, pool.path)) as disk:
        store = disk.mountpoint / "proxy_savings.json"
        with Lab(store, tmp_path / "outside", reported(f"full disk, {filesystem}, {method}"), method) as lab:
            for _ in range(rounds(3, 30)):
                run_full_while_recording(pool, disk, lab)
                come_back(pool, disk, lab)
            lab.verify()


@pytest.mark.parametrize("method", METHODS)
def test_room_again_on_xfs(tmp_path: Path, method: SyncMethod) -> None:
    with pooled(tmp_path) as pool, mounted(ThinDisk("xfs", pool.path)) as disk:
        store = disk.mountpoint / "proxy_savings.json"
        with Lab(store, tmp_path / "outside", reported(f"room again, xfs, {method}"), method) as lab:
            for _ in range(rounds(3, 30)):
                run_full_while_recording(pool, disk, lab)
                pool.enlarge()
                lab.goes_on()
                come_back(pool, disk, lab)
            lab.verify()


@pytest.mark.parametrize("method", METHODS)
def test_sync_again_loses_on_xfs(tmp_path: Path, method: SyncMethod) -> None:
    with pooled(tmp_path) as pool, mounted(ThinDisk("xfs", pool.path)) as disk:
        store = disk.mountpoint / "proxy_savings.json"
        with Lab(store, tmp_path / "outside", reported(f"sync again, xfs, {method} (must lose)"), method) as lab:
            for _ in range(rounds(20, 60)):
                try:
                    run_full_while_recording(pool, disk, lab, "sync again")
                    come_back(pool, disk, lab)
                except LostError:
                    return
            pytest.fail(f"nothing was lost in {lab.figures.faults_injected} rounds")


def run_full_while_recording(pool: Pool, disk: ThinDisk, lab: Lab, sabotage: str | None = None) -> None:
    """Processes record until the device has no space for their writes."""
    for kind in WRITERS:
        lab.start(kind, kind, sabotage)
    lab.goes_on()
    before = lab.failures()

    # Once, and while there is room: when ext4's log has just failed, a trim seems to take the blocks of files whose
    # removal never became durable, too. After the next mount such files were zeros.
    disk.trim()

    def fails() -> bool:
        pool.leave_no_room()
        return lab.failures() > before

    eventually(fails, "the disk to fail")
    lab.figures.faults_injected += 1


def come_back(pool: Pool, disk: Disk, lab: Lab) -> None:
    """Drop the page cache and kill the processes; then check the contents of the disk."""
    drop_caches()
    lab.kill()
    disk.unmount()
    pool.enlarge()
    disk.mount()
    lab.check()
