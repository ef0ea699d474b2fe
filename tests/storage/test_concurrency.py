"""Many threads, tasks and processes on one store."""

from __future__ import annotations

import asyncio
import errno
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from savings_exporter import Receipt, SavingsRecord, SavingsTracker
from savings_exporter.telemetry.metrics import SavingsCollector
from tests.support.faults import Faults
from tests.support.scrape import samples
from tests.support.wait import eventually


def test_a_new_process_reads_what_was_recorded(tracker: SavingsTracker, store_path: Path) -> None:
    assert tracker.record_request(
        model="claude-sonnet-4-5", input_tokens=12_000, tokens_saved=4096, provider="anthropic", project="billing-api"
    )
    program = f"""
import json
from savings_exporter import SavingsTracker
snapshot = SavingsTracker({str(store_path)!r}).snapshot()
print(json.dumps([snapshot.lifetime.tokens_saved, snapshot.by_model["claude-sonnet-4-5"].requests,
                  snapshot.projects["billing-api"].total_input_tokens]))
"""
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout
    assert json.loads(output) == [4096, 1, 12_000]


def test_threads_and_tasks_at_once_give_exact_totals(tracker: SavingsTracker, store_path: Path) -> None:
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


def test_records_that_wait_at_the_same_moment_share_one_commit(tracker: SavingsTracker, faults: Faults) -> None:
    tracker.record_request(model="m", tokens_saved=1)
    faults.hang("fsync_journal")
    with ThreadPoolExecutor(17) as pool:
        first = pool.submit(tracker.record_request, model="m", tokens_saved=1)
        assert faults.reached.wait(30)
        waiting = [pool.submit(tracker.record_request, model="m", tokens_saved=1) for _ in range(16)]
        eventually(lambda: tracker.snapshot().pending_records == 17, "all to wait")
        faults.mend()
        assert all(each.result() for each in (first, *waiting))
    seen = samples(SavingsCollector(tracker))
    assert (seen["savings_commits_total"], seen["savings_commit_records_sum"]) == (2, 17)


def test_the_event_loop_goes_on_while_a_save_hangs(tracker: SavingsTracker, faults: Faults) -> None:
    tick_seconds, hang_seconds = 0.005, 1.0

    async def longest_stall() -> int:
        """The most ticks in a row that the loop missed while a save hung."""
        await tracker.record_request_async(model="m", tokens_saved=1)
        faults.hang("fsync_journal")
        recording = [asyncio.ensure_future(tracker.record_request_async(model="m", tokens_saved=1)) for _ in range(100)]
        most, begun = 0, time.monotonic()
        last = begun
        while (now := time.monotonic()) - begun < hang_seconds:
            most, last = max(most, int((now - last) / tick_seconds) - 1), now
            recording.append(asyncio.ensure_future(tracker.record_request_async(model="m", tokens_saved=1)))
            await asyncio.sleep(tick_seconds)
        assert faults.reached.is_set()
        assert not any(each.done() for each in recording)
        faults.mend()
        assert all(await asyncio.gather(*recording))
        return most

    missed = asyncio.run(longest_stall())
    assert missed < hang_seconds / 4 / tick_seconds


def test_a_record_nobody_waits_for_becomes_durable(tracker: SavingsTracker) -> None:
    receipts = [tracker.record_request(model="m", tokens_saved=1, wait=False) for _ in range(1000)]
    assert tracker.flush(30)
    assert [receipt.sequence for receipt in receipts] == list(range(1, 1001))
    assert tracker.snapshot().lifetime.requests == 1000


def test_the_async_face_without_waiting(tracker: SavingsTracker) -> None:
    async def record() -> Receipt:
        return await tracker.record_request_async(model="m", tokens_saved=1, wait=False)

    receipt = asyncio.run(record())
    assert receipt.wait(30)


def test_a_cancelled_task_leaves_its_record_behind(tracker: SavingsTracker, faults: Faults) -> None:
    async def cancel() -> None:
        faults.hang("fsync_file")
        task = asyncio.ensure_future(tracker.record_request_async(model="m", tokens_saved=1))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    faults.mend()
    assert tracker.flush(30)
    assert tracker.snapshot().lifetime.requests == 1


def test_many_are_all_recorded_or_none(tracker: SavingsTracker) -> None:
    receipt = tracker.record_many([SavingsRecord(model="m", tokens_saved=number) for number in range(10)])
    assert (receipt.durable, receipt.sequence) == (True, 10)
    with pytest.raises(TypeError, match=r"records\[1\] must be a SavingsRecord"):
        tracker.record_many([SavingsRecord(model="m", tokens_saved=1), {"model": "m"}])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="records must not be empty"):
        tracker.record_many([])
    with pytest.raises(ValueError, match="tokens_saved must not be negative"):
        tracker.record_request(model="m", tokens_saved=-1)
    assert tracker.snapshot().lifetime.requests == 10


def test_pending_records_are_merged_not_dropped(tracker: SavingsTracker, faults: Faults) -> None:
    faults.fail("fsync_file", errno.ENOSPC)
    receipts = [
        tracker.record_request(model=f"model-{number}", tokens_saved=1, project=f"p{number}") for number in range(2000)
    ]
    assert tracker.snapshot().pending_records == 2000
    faults.mend()
    assert tracker.flush(30)
    snapshot = tracker.snapshot()
    assert snapshot.lifetime.tokens_saved == 2000
    assert len(snapshot.by_model) == len(snapshot.projects) == 201
    assert snapshot.by_model["other"].requests == 1800
    assert [receipt.sequence for receipt in receipts] == list(range(1, 2001))


def test_a_closed_tracker_says_so(tracker: SavingsTracker) -> None:
    assert tracker.close()
    assert tracker.close()
    with pytest.raises(RuntimeError, match="is closed"):
        tracker.record_request(model="m", tokens_saved=1)
    with pytest.raises(RuntimeError, match="is closed"):
        tracker.save()


def test_closing_twice_closes_nobody_elses_file(tracker: SavingsTracker, tmp_path: Path) -> None:
    tracker.close()
    files = [(tmp_path / str(number)).open("w") for number in range(20)]
    tracker.close()
    for file in files:
        file.write("precious")
        file.close()


def test_close_saves_what_is_pending(store_path: Path) -> None:
    tracker = SavingsTracker(store_path)
    receipts = [tracker.record_request(model="m", tokens_saved=1, wait=False) for _ in range(100)]
    assert tracker.close()
    assert all(receipts)
    with SavingsTracker(store_path) as reopened:
        assert reopened.snapshot().lifetime.requests == 100


def test_a_process_that_ends_without_close_saves_what_is_pending(store_path: Path) -> None:
    program = f"""
from savings_exporter import SavingsTracker
tracker = SavingsTracker({str(store_path)!r})
for _ in range(100):
    tracker.record_request(model="m", tokens_saved=1, wait=False)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    with SavingsTracker(store_path) as tracker:
        assert tracker.snapshot().lifetime.requests == 100


WRITER = """
import sys
from savings_exporter import SavingsTracker
with SavingsTracker(sys.argv[1]) as tracker:
    for number in range(40):
        tracker.record_request(model=sys.argv[2], tokens_saved=1).wait()
"""


def test_processes_on_one_store_add_up(tracker: SavingsTracker, store_path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(store_path), f"m{n}"]) for n in range(3)]
    for _ in range(40):
        assert tracker.record_request(model="mine", tokens_saved=1).wait(30)
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    snapshot = tracker.snapshot()
    assert snapshot.lifetime.tokens_saved == 160
    assert {model: totals.requests for model, totals in snapshot.by_model.items()} == {
        **dict.fromkeys(("m0", "m1", "m2", "mine"), 40)
    }


def test_a_lock_file_that_somebody_removed_is_agreed_on_anew(store_path: Path) -> None:
    lock = store_path.with_name("proxy_savings.json.lock")
    with SavingsTracker(store_path) as one:
        one.record_request(model="m", tokens_saved=1)
        lock.unlink()
        with SavingsTracker(store_path) as two:
            with ThreadPoolExecutor(2) as pool:
                for _ in range(20):
                    pool.submit(one.record_request, model="m", tokens_saved=1)
                    pool.submit(two.record_request, model="m", tokens_saved=1)
            assert one.flush(30)
            assert two.flush(30)
            assert one.snapshot().lifetime.requests == two.snapshot().lifetime.requests == 41


def test_closing_from_two_threads_at_once(tracker: SavingsTracker, faults: Faults) -> None:
    faults.hang("fsync_file")
    receipt = tracker.record_request(model="m", tokens_saved=1, wait=False)
    assert faults.reached.wait(30)
    with ThreadPoolExecutor(2) as pool:
        closing = [pool.submit(tracker.close) for _ in range(2)]
        faults.mend()
        assert all(each.result() for each in closing)
    assert receipt.durable


def test_two_new_trackers_agree_on_one_store(store_path: Path) -> None:
    with SavingsTracker(store_path) as one, SavingsTracker(store_path) as two:
        assert one.record_request(model="m", tokens_saved=1).sequence == 1
        assert two.record_request(model="m", tokens_saved=1).sequence == 2
        assert one.snapshot().lifetime.tokens_saved == two.snapshot().lifetime.tokens_saved == 2


@pytest.mark.slow
def test_nobody_builds_on_a_save_of_unknown_outcome(store_path: Path, faults: Faults) -> None:
    with SavingsTracker(store_path) as one, SavingsTracker(store_path) as two:
        assert one.record_request(model="m", tokens_saved=1).durable
        faults.fail("fsync_dir", errno.EIO)
        uncertain = one.record_request(model="m", tokens_saved=10)
        assert not uncertain
        waiting = two.record_request(model="m", tokens_saved=100)
        assert not waiting
        assert two.health().error == "EAGAIN"
        faults.mend()
        assert uncertain.wait(30)
        assert waiting.wait(30)
        assert one.snapshot().lifetime.tokens_saved == 111


def test_a_document_that_another_program_rewrote_is_never_overwritten(
    tracker: SavingsTracker, store_path: Path
) -> None:
    tracker.record_request(model="m", tokens_saved=1)
    ours = store_path.read_bytes()
    foreign = b'{"schema_version": 6, "lifetime": {"requests": 7, "tokens_saved": 77}}'
    store_path.write_bytes(foreign)
    assert not tracker.save()
    assert tracker.health().error == "ESTALE"
    assert "changed by another program" in (tracker.health().reason or "")
    # The journal is ours alone, so records go on being durable.
    assert tracker.record_request(model="m", tokens_saved=2).durable
    assert not tracker.save()
    assert store_path.read_bytes() == foreign
    store_path.write_bytes(ours)
    eventually(lambda: tracker.health().healthy, "the document to be saved again")
    assert tracker.snapshot().lifetime.tokens_saved == 3


def test_an_older_copy_put_in_place_is_not_taken_for_the_store(tracker: SavingsTracker, store_path: Path) -> None:
    tracker.record_request(model="m", tokens_saved=1)
    older = store_path.read_bytes()
    tracker.record_request(model="m", tokens_saved=10)
    for _ in range(3):
        assert tracker.save()
    store_path.unlink()
    store_path.write_bytes(older)
    assert tracker.snapshot().lifetime.tokens_saved == 11
    assert tracker.record_request(model="m", tokens_saved=100).durable
    # The older document and the journal make the whole total all the same.
    assert tracker.save()
    assert tracker.snapshot().lifetime.tokens_saved == 111


def test_a_gauge_survives_a_restart(store_path: Path) -> None:
    name = "savings_last_save_success_timestamp_seconds"
    with SavingsTracker(store_path) as tracker:
        assert samples(SavingsCollector(tracker))[name] == 0
        tracker.record_request(model="m", tokens_saved=1)
        saved_at = samples(SavingsCollector(tracker))[name]
        assert abs(saved_at - time.time()) < 3600
    with SavingsTracker(store_path) as tracker:
        assert samples(SavingsCollector(tracker))[name] >= saved_at


def test_a_scrape_in_the_middle_of_a_save_counts_each_record_once(tracker: SavingsTracker, faults: Faults) -> None:
    tracker.record_request(model="m", tokens_saved=1)
    faults.hang("fsync_dir")
    receipt = tracker.record_request(model="m", tokens_saved=10, wait=False)
    assert faults.reached.wait(30)
    # The new document is visible to readers of the file by now, and not durable.
    snapshot = tracker.snapshot()
    assert (snapshot.lifetime.tokens_saved, snapshot.pending_tokens) == (1, 10)
    assert not receipt.durable
    faults.mend()
    assert receipt.wait(30)
    snapshot = tracker.snapshot()
    assert (snapshot.lifetime.tokens_saved, snapshot.pending_tokens) == (11, 0)
