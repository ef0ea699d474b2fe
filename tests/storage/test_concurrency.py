"""Many threads and tasks on one tracker, and several trackers on one store."""

from __future__ import annotations

import asyncio
import enum
import errno
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from savings_exporter import KeyConflictError, Receipt, SavingsRecord, SavingsTracker
from savings_exporter.telemetry.metrics import SavingsCollector
from tests.support.faults import FaultyFileSystem
from tests.support.scrape import samples
from tests.support.wait import WAIT_SECONDS, eventually

ONE: dict[str, Any] = {"model": "m", "tokens_saved": 1}


def test_threads_and_tasks_are_exact(tracker: SavingsTracker, store_path: Path) -> None:
    sequences: list[int | None] = []

    def record(worker: int) -> None:
        for number in range(50):
            receipt = tracker.record_request(model=f"m{worker}", tokens_saved=number, project="threads")
            assert receipt.durable
            sequences.append(receipt.sequence)

    async def record_in_tasks() -> list[Receipt]:
        return await asyncio.gather(
            *(tracker.record_request_async(model="task", tokens_saved=i, project="tasks") for i in range(500))
        )

    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(record, worker) for worker in range(8)]
        receipts = asyncio.run(record_in_tasks())
        for each in running:
            each.result()
    assert all(receipts)
    sequences += [receipt.sequence for receipt in receipts]
    assert sorted(number or 0 for number in sequences) == list(range(1, 901))
    tracker.close()
    with SavingsTracker(store_path) as reopened:
        snapshot = reopened.snapshot()
        assert snapshot.lifetime.tokens_saved == 8 * sum(range(50)) + sum(range(500))
        assert snapshot.lifetime.requests == snapshot.sequence == 900
        assert snapshot.projects["threads"].tokens_saved == 8 * sum(range(50))
        assert snapshot.by_model["m7"].tokens_saved == sum(range(50))
        assert snapshot.by_model["task"].requests == 500


def test_waiting_records_share_a_commit(tracker: SavingsTracker, faults: FaultyFileSystem) -> None:
    tracker.record_request(**ONE)
    faults.hang("fsync_journal")
    with ThreadPoolExecutor(17) as pool:
        first = pool.submit(tracker.record_request, **ONE)
        assert faults.reached.wait(WAIT_SECONDS)
        waiting = [pool.submit(tracker.record_request, **ONE) for _ in range(16)]
        eventually(lambda: tracker.snapshot().pending_records == 17, "all to wait")
        faults.mend()
        assert all(each.result() for each in (first, *waiting))
    seen = samples(SavingsCollector(tracker))
    assert seen["savings_commits_total"] == seen["savings_commit_records_count"] == 3
    assert seen["savings_commit_records_sum"] == 18


@pytest.mark.slow
def test_waiting_threads_end_in_failure(tracker: SavingsTracker, faults: FaultyFileSystem) -> None:
    tracker.record_request(**ONE)
    faults.hang("fsync_journal")
    faults.fail("fsync_journal", errno.EIO)
    with ThreadPoolExecutor(17) as pool:
        first = pool.submit(tracker.record_request, **ONE)
        assert faults.reached.wait(WAIT_SECONDS)
        waiting = [pool.submit(tracker.record_request, **ONE) for _ in range(16)]
        eventually(lambda: tracker.health().pending_records == 17, "all to wait")
        faults.mend()
        faults.fail("fsync_journal", errno.EIO)
        receipts = [each.result() for each in (first, *waiting)]
        # A receipt may have become durable by a retry; none was waited for.
        faults.mend()
        assert all(receipt.wait(WAIT_SECONDS) for receipt in receipts)
    assert sorted(receipt.sequence or 0 for receipt in receipts) == list(range(2, 19))


def test_loop_runs_while_the_disk_hangs(tracker: SavingsTracker, faults: FaultyFileSystem) -> None:
    async def record() -> int:
        """The number of times that the loop ran other tasks while a commit hung."""
        await tracker.record_request_async(**ONE)
        faults.hang("fsync_journal")
        recording = [asyncio.ensure_future(tracker.record_request_async(**ONE)) for _ in range(100)]
        await asyncio.to_thread(faults.reached.wait, WAIT_SECONDS)
        rounds = 0
        for _ in range(1000):
            recording.append(asyncio.ensure_future(tracker.record_request_async(**ONE)))
            await asyncio.sleep(0)
            rounds += 1
        assert not any(each.done() for each in recording)
        faults.mend()
        assert all(await asyncio.gather(*recording))
        return rounds

    # The event loop repairs the disk, so if the loop waited for the disk, this would never end.
    assert asyncio.run(record()) == 1000


def test_tasks_end_while_commits_fail(tracker: SavingsTracker, faults: FaultyFileSystem) -> None:
    async def record() -> list[Receipt]:
        return await asyncio.gather(
            *(tracker.record_request_async(**ONE, idempotency_key=f"k{number}") for number in range(10)),
            *(tracker.record_request_async(**ONE) for _ in range(10)),
        )

    tracker.record_request(**ONE)
    faults.fail("fsync_journal", errno.EIO)
    receipts = asyncio.run(record())
    assert not any(receipts)
    faults.mend()
    assert all(receipt.wait(WAIT_SECONDS) for receipt in receipts)
    assert tracker.snapshot().lifetime.requests == 21


def test_unwaited_records_become_durable(tracker: SavingsTracker) -> None:
    receipts = [tracker.record_request(**ONE, wait=False) for _ in range(1000)]
    assert tracker.flush(WAIT_SECONDS)
    assert [receipt.sequence for receipt in receipts] == list(range(1, 1001))
    assert tracker.snapshot().lifetime.requests == 1000


def test_async_face_without_waiting(tracker: SavingsTracker) -> None:
    async def record() -> Receipt:
        return await tracker.record_request_async(**ONE, wait=False)

    receipt = asyncio.run(record())
    assert receipt.wait(WAIT_SECONDS)


def test_cancelled_task_leaves_its_record(tracker: SavingsTracker, faults: FaultyFileSystem) -> None:
    async def cancel() -> None:
        faults.hang("fsync_journal")
        task = asyncio.ensure_future(tracker.record_request_async(**ONE))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    faults.mend()
    assert tracker.flush(WAIT_SECONDS)
    assert tracker.snapshot().lifetime.requests == 1


def test_many_are_all_recorded_or_none(tracker: SavingsTracker) -> None:
    receipt = tracker.record_many([SavingsRecord(model="m", tokens_saved=number) for number in range(10)])
    assert (receipt.durable, receipt.sequence) == (True, 10)
    with pytest.raises(TypeError, match=r"records\[1\] must be a SavingsRecord"):
        tracker.record_many([SavingsRecord(**ONE), {"model": "m"}])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="records must not be empty"):
        tracker.record_many([])
    with pytest.raises(ValueError, match="tokens_saved must not be negative"):
        tracker.record_request(model="m", tokens_saved=-1)
    assert tracker.snapshot().lifetime.requests == 10


def test_records_with_own_fields_refused(tracker: SavingsTracker) -> None:
    class Mine(SavingsRecord, frozen=True, kw_only=True):
        team: str = "t"

    with pytest.raises(TypeError, match=r"records\[1\] must be a SavingsRecord, not Mine"):
        tracker.record_many([SavingsRecord(**ONE), Mine(**ONE)])
    assert tracker.record_request(**ONE).sequence == 1


class Text(str):
    __slots__ = ()


class Model(str, enum.Enum):
    OPUS = "opus"


class Count(enum.IntEnum):
    TEN = 10


class Dollars(float):
    __slots__ = ()


def test_arguments_of_subclasses(tracker: SavingsTracker) -> None:
    for key in (Text("k"), Text("k"), Model.OPUS, None):
        for model in (Text("sonnet"), Model.OPUS):
            receipt = tracker.record_request(
                model=model,
                project=Text("p"),
                provider=Text("anthropic"),
                tokens_saved=Count.TEN,
                savings_usd=Dollars(0.5),
                timestamp=Text("2026-01-01T00:00:00Z"),
                idempotency_key=key and Text(f"{key} {model}"),
            )
            assert receipt.durable
    assert {model: totals.tokens_saved for model, totals in tracker.snapshot().by_model.items()} == {
        "sonnet": 30,
        "opus": 30,
    }


def test_many_pending_are_folded(tracker: SavingsTracker, faults: FaultyFileSystem) -> None:
    tracker.record_request(**ONE)
    faults.fail("fsync_journal", errno.EIO)
    records = 12_345
    for number in range(records):
        tracker.record_request(model=f"m{number % 7}", tokens_saved=number, wait=False)
    pending = tracker.snapshot()
    assert (pending.pending_records, pending.pending_tokens) == (records, sum(range(records)))
    faults.mend()
    assert tracker.save()
    snapshot = tracker.snapshot()
    assert snapshot.lifetime.tokens_saved == sum(range(records)) + 1
    assert snapshot.by_model["m3"].requests == len(range(3, records, 7))


def test_names_beyond_the_limit_are_other(tracker: SavingsTracker, faults: FaultyFileSystem) -> None:
    faults.fail("fsync_journal", errno.ENOSPC)
    receipts = [
        tracker.record_request(model=f"model-{number}", tokens_saved=1, project=f"p{number}") for number in range(2000)
    ]
    assert tracker.snapshot().pending_records == 2000
    faults.mend()
    assert tracker.flush(WAIT_SECONDS)
    snapshot = tracker.snapshot()
    assert snapshot.lifetime.tokens_saved == 2000
    assert len(snapshot.by_model) == len(snapshot.projects) == 201
    assert snapshot.by_model["other"].requests == 1800
    assert [receipt.sequence for receipt in receipts] == list(range(1, 2001))


def test_same_key_at_once_in_threads(tracker: SavingsTracker, store_path: Path) -> None:
    start = threading.Barrier(8)

    def record(number: int) -> Receipt:
        start.wait(WAIT_SECONDS)
        return tracker.record_request(**ONE, idempotency_key=f"k{number // 8}")

    with ThreadPoolExecutor(8) as pool:
        receipts = list(pool.map(record, range(8 * 20)))
    assert all(receipts)
    assert tracker.snapshot().lifetime.requests == 20
    assert len({(receipt.writer, receipt.sequence) for receipt in receipts}) == 20
    assert sum(not receipt.duplicate for receipt in receipts) == 20
    tracker.close()
    with SavingsTracker(store_path) as reopened:
        assert reopened.snapshot().lifetime.requests == 20
        assert reopened.record_request(**ONE, idempotency_key="k19").duplicate


def test_same_key_with_other_content(tracker: SavingsTracker, faults: FaultyFileSystem, store_path: Path) -> None:
    tracker.record_request(**ONE, idempotency_key="durable")
    faults.fail("fsync_journal", errno.EIO)
    pending = tracker.record_request(**ONE, idempotency_key="pending")
    assert not pending.durable
    for key in ("durable", "pending"):
        with pytest.raises(KeyConflictError, match="other content"):
            tracker.record_request(model="m", tokens_saved=2, idempotency_key=key)
    repeat = tracker.record_request(**ONE, idempotency_key="pending")
    assert (repeat.duplicate, repeat.durable) == (True, False)
    faults.mend()
    assert repeat.wait(WAIT_SECONDS)
    assert (repeat.writer, repeat.sequence) == (pending.writer, pending.sequence)
    with SavingsTracker(store_path) as other:
        with pytest.raises(KeyConflictError, match="other content"):
            other.record_request(model="m", tokens_saved=2, idempotency_key="pending")
        assert other.record_request(**ONE, idempotency_key="pending").writer == pending.writer
    assert tracker.snapshot().lifetime.tokens_saved == 2


def test_a_closed_tracker_says_so(tracker: SavingsTracker) -> None:
    assert tracker.close()
    assert tracker.close()
    with pytest.raises(RuntimeError, match="is closed"):
        tracker.record_request(**ONE)
    with pytest.raises(RuntimeError, match="is closed"):
        tracker.save()


def test_closing_twice_closes_its_files(tracker: SavingsTracker, tmp_path: Path) -> None:
    tracker.record_request(**ONE)
    tracker.close()
    files = [(tmp_path / str(number)).open("w") for number in range(20)]
    tracker.close()
    for file in files:
        file.write("precious")
        file.close()


def test_close_commits_what_is_pending(store_path: Path) -> None:
    tracker = SavingsTracker(store_path)
    receipts = [tracker.record_request(**ONE, wait=False) for _ in range(100)]
    assert tracker.close()
    assert all(receipts)
    with SavingsTracker(store_path) as reopened:
        assert reopened.snapshot().lifetime.requests == 100


def test_closing_from_two_threads(tracker: SavingsTracker, faults: FaultyFileSystem) -> None:
    faults.hang("fsync_journal")
    receipt = tracker.record_request(**ONE, wait=False)
    assert faults.reached.wait(WAIT_SECONDS)
    with ThreadPoolExecutor(2) as pool:
        closing = [pool.submit(tracker.close) for _ in range(2)]
        faults.mend()
        assert all(each.result() for each in closing)
    assert receipt.durable


@pytest.mark.slow
def test_records_beside_a_close_are_kept(store_path: Path) -> None:
    """A record that is acknowledged while another thread closes is there afterwards; others are refused."""
    for round_number in range(20):
        tracker, acknowledged = SavingsTracker(store_path), [0] * 4
        start = threading.Barrier(5)

        def record(worker: int, tracker: SavingsTracker, acknowledged: list[int], start: threading.Barrier) -> None:
            start.wait(WAIT_SECONDS)
            try:
                while tracker.record_request(model=str(worker), tokens_saved=1).durable:
                    acknowledged[worker] += 1
            except RuntimeError:
                pass

        before = tracker.snapshot().lifetime.requests
        with ThreadPoolExecutor(4) as pool:
            running = [pool.submit(record, worker, tracker, acknowledged, start) for worker in range(4)]
            start.wait(WAIT_SECONDS)
            eventually(lambda acknowledged=acknowledged: sum(acknowledged) >= 4, "some records")  # type: ignore[misc]
            assert tracker.close()
            for each in running:
                each.result()
        with SavingsTracker(store_path) as reopened:
            assert reopened.snapshot().lifetime.requests == before + sum(acknowledged), round_number


def test_two_trackers_share_one_store(store_path: Path) -> None:
    with SavingsTracker(store_path) as one, SavingsTracker(store_path) as two:
        first, second = one.record_request(**ONE), two.record_request(**ONE)
        assert first.sequence == second.sequence == 1
        assert first.writer != second.writer
        assert one.snapshot().lifetime.tokens_saved == two.snapshot().lifetime.tokens_saved == 2
        assert one.snapshot().writers == 2


def test_removed_lock_file_is_made_again(store_path: Path) -> None:
    lock = store_path.with_name("proxy_savings.json.lock")
    with SavingsTracker(store_path) as one:
        one.record_request(**ONE)
        lock.unlink()
        with SavingsTracker(store_path) as two:
            with ThreadPoolExecutor(2) as pool:
                for _ in range(20):
                    pool.submit(one.record_request, **ONE)
                    pool.submit(two.record_request, **ONE)
            assert one.flush(WAIT_SECONDS)
            assert two.flush(WAIT_SECONDS)
            assert one.save()
            assert two.save()
            assert one.snapshot().lifetime.requests == two.snapshot().lifetime.requests == 41
    with SavingsTracker(store_path) as reopened:
        assert reopened.snapshot().lifetime.requests == 41


def test_unknown_save_stops_no_records(store_path: Path, faults: FaultyFileSystem) -> None:
    with SavingsTracker(store_path, filesystem=faults) as one, SavingsTracker(store_path) as two:
        assert one.record_request(**ONE)
        assert two.record_request(**ONE)
        faults.fail("fsync_dir", errno.EIO)
        assert not one.save()
        assert one.health().error == "EIO"
        # The new document is visible. It counts as saved for the first save that succeeds, of any process.
        assert one.record_request(**ONE)
        assert two.record_request(**ONE)
        assert two.save()
        assert one.snapshot().lifetime.requests == two.snapshot().lifetime.requests == 4
        faults.mend()
        eventually(lambda: one.health().healthy, "a save that works")
    with SavingsTracker(store_path) as reopened:
        assert reopened.snapshot().lifetime.requests == 4


def test_document_of_others_is_kept(tracker: SavingsTracker, store_path: Path) -> None:
    tracker.record_request(**ONE)
    assert tracker.save()
    ours = store_path.read_bytes()
    foreign = b'{"schema_version": 6, "lifetime": {"requests": 7, "tokens_saved": 77}}'
    store_path.write_bytes(foreign)
    assert not tracker.save()
    assert tracker.health().error == "ESTALE"
    assert "replaced the document" in (tracker.health().reason or "")
    # No other process writes this journal, so records still become durable.
    assert tracker.record_request(model="m", tokens_saved=2).durable
    assert not tracker.save()
    assert store_path.read_bytes() == foreign
    store_path.write_bytes(ours)
    eventually(lambda: tracker.health().healthy, "the document to be saved again")
    assert tracker.snapshot().lifetime.tokens_saved == 3


def test_older_document_is_not_trusted(tracker: SavingsTracker, store_path: Path) -> None:
    tracker.record_request(**ONE)
    assert tracker.save()
    older = store_path.read_bytes()
    tracker.record_request(model="m", tokens_saved=10)
    assert tracker.save()
    store_path.unlink()
    store_path.write_bytes(older)
    assert tracker.snapshot().lifetime.tokens_saved == 11
    assert tracker.record_request(model="m", tokens_saved=100).durable
    # The older document and the journal still give the whole total.
    assert tracker.save()
    assert tracker.snapshot().lifetime.tokens_saved == 111


def test_last_save_survives_a_restart(store_path: Path) -> None:
    name = "savings_last_save_success_timestamp_seconds"
    with SavingsTracker(store_path) as tracker:
        assert samples(SavingsCollector(tracker))[name] == 0
        tracker.record_request(**ONE)
        assert tracker.save()
        saved_at = samples(SavingsCollector(tracker))[name]
        assert abs(saved_at - time.time()) < 3600
    with SavingsTracker(store_path) as tracker:
        assert samples(SavingsCollector(tracker))[name] >= saved_at


@pytest.mark.parametrize("step", ["fsync_file", "replace", "fsync_dir"])
def test_scrape_in_a_save_counts_once(tracker: SavingsTracker, faults: FaultyFileSystem, step: str) -> None:
    for _ in range(3):
        tracker.record_request(**ONE)
        assert tracker.save()
    faults.reached.clear()
    faults.hang(step)
    with ThreadPoolExecutor(1) as pool:
        tracker.record_request(model="m", tokens_saved=10)
        saving = pool.submit(tracker.save)
        assert faults.reached.wait(WAIT_SECONDS)
        assert tracker.snapshot().lifetime.tokens_saved == 13
        # A save blocks no other call.
        assert tracker.record_request(model="m", tokens_saved=100).durable
        assert tracker.snapshot().lifetime.tokens_saved == 113
        faults.mend()
        assert saving.result()
    assert tracker.snapshot().lifetime.tokens_saved == 113


@pytest.mark.parametrize("step", ["fsync_journal", "watermark"])
def test_scrape_in_a_commit_counts_once(tracker: SavingsTracker, faults: FaultyFileSystem, step: str) -> None:
    for _ in range(2):
        tracker.record_request(**ONE)
    faults.reached.clear()
    faults.hang(step)
    receipt = tracker.record_request(model="m", tokens_saved=10, wait=False)
    assert faults.reached.wait(WAIT_SECONDS)
    snapshot = tracker.snapshot()
    assert (snapshot.lifetime.tokens_saved, snapshot.pending_tokens) == (2, 10)
    assert not receipt.durable
    faults.mend()
    assert receipt.wait(WAIT_SECONDS)
    snapshot = tracker.snapshot()
    assert (snapshot.lifetime.tokens_saved, snapshot.pending_tokens) == (12, 0)


def test_snapshot_while_it_cannot_be_read(tracker: SavingsTracker, store_path: Path) -> None:
    class Unreadable(FaultyFileSystem):
        is_unreadable = False

        def names_beside(self, path: str) -> list[str]:
            if self.is_unreadable:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
            return super().names_beside(path)

    unreadable = Unreadable()
    tracker.record_request(**ONE)
    with SavingsTracker(store_path, filesystem=unreadable) as other:
        assert other.snapshot().lifetime.requests == 1
        tracker.record_request(**ONE)
        unreadable.is_unreadable = True
        assert other.snapshot().lifetime.requests == 1
        unreadable.is_unreadable = False
        assert other.snapshot().lifetime.requests == 2


def test_thread_that_could_not_start(tracker: SavingsTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError):
            tracker.record_request(**ONE)
    assert tracker.record_request(**ONE, wait=False).wait(WAIT_SECONDS)
    assert tracker.snapshot().sequence == 1


def test_tasks_commit_during_a_save(tracker: SavingsTracker, faults: FaultyFileSystem) -> None:
    """A save that waits for the disk delays neither tasks nor records with ``wait=False``."""
    assert tracker.record_request(model="m", tokens_saved=1).durable
    faults.hang("fsync_file")
    with ThreadPoolExecutor(1) as pool:
        saving = pool.submit(tracker.save)
        assert faults.reached.wait(WAIT_SECONDS)

        async def record() -> bool:
            receipt = await asyncio.wait_for(tracker.record_request_async(model="m", tokens_saved=1), WAIT_SECONDS)
            return receipt.durable

        assert asyncio.run(record())
        assert tracker.record_request(model="m", tokens_saved=1, wait=False).wait(WAIT_SECONDS)
        assert not saving.done()
        faults.mend()
        assert saving.result()


def test_background_save_hangs(store_path: Path, faults: FaultyFileSystem) -> None:
    """A background save of the tracker does not delay them either."""
    with SavingsTracker(store_path, filesystem=faults, save_interval=0.01) as tracker:
        faults.hang("fsync_file")
        assert tracker.record_request(model="m", tokens_saved=1).durable
        assert faults.reached.wait(WAIT_SECONDS)
        assert tracker.record_request(model="m", tokens_saved=1, wait=False).wait(WAIT_SECONDS)
        faults.mend()
