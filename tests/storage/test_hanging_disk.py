"""A disk that hangs: what is known is still shown."""

from __future__ import annotations

import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from savings_exporter import SavingsTracker, Snapshot
from tests.crash.lab import Disk, mounted
from tests.support.faults import FaultyFileSystem
from tests.support.service import running
from tests.support.wait import WAIT_SECONDS, eventually
from tests.unit.telemetry.operations import run


def shown(tracker: SavingsTracker) -> Snapshot:
    """A snapshot that does not wait for the disk: what hangs in these tests hangs for ``WAIT_SECONDS``."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(tracker.snapshot).result(WAIT_SECONDS / 2)


def test_counters_that_cannot_be_written(store_path: Path, faults: FaultyFileSystem) -> None:
    """The totals, the pending records and the last published counters are shown meanwhile."""
    with SavingsTracker(store_path, filesystem=faults) as tracker:
        assert tracker.record_request(model="m", tokens_saved=1).durable
        before = tracker.snapshot().operations
        assert before.counts
        faults.hang("counters")
        faults.hang("fsync_journal")
        receipt = tracker.record_request(model="m", tokens_saved=2, wait=False)
        run(tracker.counters)
        for _ in range(3):
            snapshot = shown(tracker)
            assert (snapshot.lifetime.tokens_saved, snapshot.pending_tokens) == (1, 2)
            assert snapshot.operations == before
        faults.mend()
        assert receipt.wait(WAIT_SECONDS)
        eventually(lambda: tracker.snapshot().operations != before, "the counters to be published")
        assert tracker.snapshot().lifetime.tokens_saved == 3


def test_writer_that_cannot_be_created(store_path: Path, faults: FaultyFileSystem) -> None:
    """The first commit of a process hangs. What other processes have recorded is shown, and the process can end."""
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_request(model="m", tokens_saved=1).durable
    tracker = SavingsTracker(store_path, filesystem=faults)
    faults.hang("watermark")
    receipt = tracker.record_request(model="m", tokens_saved=2, wait=False)
    assert faults.reached.wait(WAIT_SECONDS)
    for _ in range(2):
        snapshot = shown(tracker)
        assert (snapshot.lifetime.tokens_saved, snapshot.pending_tokens) == (1, 2)
    faults.mend()
    assert receipt.wait(WAIT_SECONDS)
    assert tracker.close()


@pytest.mark.needs("linux", "root", "mount", "e2fsprogs")
def test_file_system_that_is_frozen(tmp_path: Path) -> None:
    """Every write to it hangs. A scrape still shows what is pending, and the totals."""
    with mounted(Disk("ext4", tmp_path)) as disk:
        store = disk.mountpoint / "proxy_savings.json"
        total = 'savings_tokens_saved_total{model="m",provider="unknown"}'
        with running("serve", "--store", str(store)) as service:
            assert service.post({"model": "m", "tokens_saved": 5})[0] == 200
            posting = threading.Thread(target=service.post, args=[{"model": "m", "tokens_saved": 7}])
            subprocess.run(["fsfreeze", "--freeze", disk.mountpoint], check=True)
            try:
                posting.start()
                eventually(lambda: service.metrics()["savings_tokens_pending"] == 7, "the saving to be pending")
                assert service.metrics()[total] == 5
                assert service.get("/v1/savings")[0] == service.get("/-/ready")[0] == 200
            finally:
                subprocess.run(["fsfreeze", "--unfreeze", disk.mountpoint], check=True)
            posting.join()
            assert service.metrics()[total] == 12
            assert service.stop()[0] == 0
