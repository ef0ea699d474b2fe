"""While a disk is full, memory stays bounded, also for records with keys, and nothing that was accepted is lost."""

from __future__ import annotations

import errno
import gc
from pathlib import Path

import pytest

from savings_exporter import SavingsRecord, SavingsTracker
from tests.support.faults import FaultyFileSystem
from tests.support.service import running
from tests.support.wait import eventually

MIB = 1024 * 1024
HOUR = 3600 * 1000
BATCH = [
    SavingsRecord(model=f"model-{number % 7}", project=f"p{number % 5}", tokens_saved=1) for number in range(10_000)
]


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
@pytest.mark.parametrize("with_keys", [False, True], ids=["without keys", "with keys"])
def test_hour_of_full_disk(store_path: Path, faults: FaultyFileSystem, with_keys: bool) -> None:
    with SavingsTracker(store_path, filesystem=faults) as tracker:
        assert tracker.record_many(BATCH).durable
        faults.fail("fsync_journal", errno.ENOSPC)
        faults.fail("fsync_file", errno.ENOSPC)
        before = 0
        receipts = []
        for number in range(HOUR // len(BATCH)):
            key = f"key {number}" if with_keys else None
            receipts.append(tracker.record_many(BATCH, idempotency_key=key, wait=False))
            if number == 2:
                before = resident_bytes()
        assert resident_bytes() - before < 20 * MIB
        # Rows of records with keys cannot be added up: of each batch 35 are kept.
        pending = [receipt for receipt in receipts if receipt.pending]
        assert len(pending) >= (10_000 // 35 if with_keys else len(receipts))
        faults.mend()
        assert tracker.flush(60)
        assert [receipt for receipt in receipts if receipt.durable] == pending
        if with_keys:
            repeat = tracker.record_many(BATCH, idempotency_key="key 17")
            assert (repeat.duplicate, repeat.sequence) == (True, receipts[17].sequence)
    with SavingsTracker(store_path) as tracker:
        snapshot = tracker.snapshot()
        assert snapshot.lifetime.tokens_saved == len(BATCH) * (1 + len(pending))
        assert snapshot.projects["p0"].requests == len(BATCH) * (1 + len(pending)) // 5
        assert sorted(snapshot.by_model) == [f"model-{number}" for number in range(7)]


def test_more_keys_than_can_wait(store_path: Path, faults: FaultyFileSystem) -> None:
    """Those that are refused are recorded later, with the same key."""
    with SavingsTracker(store_path, filesystem=faults) as tracker:
        tracker.record_request(model="m", tokens_saved=1)
        faults.fail("fsync_journal", errno.ENOSPC)
        faults.fail("fsync_file", errno.ENOSPC)
        before = resident_bytes()
        receipts = [
            tracker.record_request(model="m", tokens_saved=1, idempotency_key=str(number), wait=False)
            for number in range(30_000)
        ]
        assert resident_bytes() - before < 20 * MIB
        accepted = [receipt for receipt in receipts if receipt.pending]
        refused = [number for number, receipt in enumerate(receipts) if not receipt.pending]
        assert 10_000 <= len(accepted) < 20_000
        assert not any(receipts)
        assert not receipts[refused[0]].wait(60)
        faults.mend()
        assert tracker.flush(60)
        for number in refused[:100]:
            assert tracker.record_request(model="m", tokens_saved=1, idempotency_key=str(number)).durable
        assert tracker.snapshot().lifetime.requests == 1 + len(accepted) + 100


@pytest.mark.parametrize("last", ["with a key", "without a key"])
def test_records_with_and_without_keys_wait_together(store_path: Path, faults: FaultyFileSystem, last: str) -> None:
    """Whatever is added up, and in whatever order they came: each is counted, and the store can be opened."""
    with SavingsTracker(store_path, filesystem=faults) as tracker:
        tracker.record_request(model="m", tokens_saved=1)
        faults.fail("fsync_journal", errno.ENOSPC)
        faults.fail("fsync_file", errno.ENOSPC)
        receipts = [
            tracker.record_request(model="m", tokens_saved=1, idempotency_key=str(number), wait=False)
            for number in range(10_100)
        ]
        receipts.append(tracker.record_many([*BATCH, BATCH[0]], wait=False))
        receipts.append(tracker.record_request(model="m", tokens_saved=1, wait=False))
        if last == "with a key":
            receipts.append(tracker.record_request(model="m", tokens_saved=1, idempotency_key="last", wait=False))
            assert not receipts[-1].pending
        counts = [1] * 10_100 + [len(BATCH) + 1, 1, 1]
        accepted = sum(count for receipt, count in zip(receipts, counts, strict=False) if receipt.pending)
        faults.mend()
        assert tracker.flush(60)
        repeat = tracker.record_request(model="m", tokens_saved=1, idempotency_key="50")
        assert (repeat.duplicate, repeat.sequence) == (True, receipts[50].sequence)
        assert tracker.record_request(model="m", tokens_saved=1).durable
        assert tracker.snapshot().lifetime.requests == accepted + 2
    with SavingsTracker(store_path) as tracker:
        assert tracker.snapshot().lifetime.requests == accepted + 2


def test_repeat_of_a_pending_batch(store_path: Path, faults: FaultyFileSystem) -> None:
    with SavingsTracker(store_path, filesystem=faults) as tracker:
        faults.fail("fsync_journal", errno.ENOSPC)
        faults.fail("fsync_file", errno.ENOSPC)
        for number in range(5):
            tracker.record_many(BATCH, idempotency_key=str(number), wait=False)
        assert tracker.record_many(BATCH, idempotency_key="3", wait=False).duplicate
        faults.mend()
        assert tracker.flush(60)
        assert tracker.snapshot().lifetime.requests == 5 * len(BATCH)


def test_service_refuses_what_it_cannot_keep(store_path: Path) -> None:
    with running("serve", "--store", str(store_path), faulty=True) as service:
        record = {"model": "m", "tokens_saved": 1}
        assert service.post(record)[0] == 200
        service.tell("fail fsync_journal")
        service.tell("fail fsync_file")
        assert service.post(record)[0] == 202
        # Each record of a batch has names of its own, so that none can be added up.
        batches = [[{**record, "project": f"{batch} {number}"} for number in range(500)] for batch in range(40)]
        codes = [
            service.post({"records": records}, headers={"Idempotency-Key": str(number)})[0]
            for number, records in enumerate(batches)
        ]
        accepted = codes.count(202)
        assert codes == [202] * accepted + [503] * (40 - accepted)
        assert 0 < accepted < 40
        service.tell("mend")
        eventually(lambda: service.get("/-/healthy")[0] == 200, "the commit of what was pending")
        codes = [
            service.post({"records": records}, headers={"Idempotency-Key": str(number)})[0]
            for number, records in enumerate(batches)
        ]
        assert set(codes) == {200}
        assert service.stop()[0] == 0
    with SavingsTracker(store_path) as tracker:
        assert tracker.snapshot().lifetime.requests == 2 + 40 * 500
