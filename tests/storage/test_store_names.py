"""A store's name, documents of other programs, and what is counted only once between them."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from savings_exporter import CorruptStoreError, SavingsRecord, SavingsTracker
from savings_exporter.storage.observers import Observers
from savings_exporter.storage.repair import inspect, repair
from savings_exporter.telemetry.metrics import SavingsCollector
from tests.support.faults import FaultyFileSystem
from tests.support.scrape import samples
from tests.support.segments import frames, segments
from tests.support.wait import WAIT_SECONDS, eventually

ONE: dict[str, Any] = {"model": "m", "tokens_saved": 1}
NEVER = 3600.0


class NoName(FaultyFileSystem):
    """A disk that is so full that the lock file cannot be written, until there is room."""

    has_room = False

    def write_at(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        if not self.has_room and bytes(data[:3]) == b"SXL":
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write_at(descriptor, data, offset)


def rewritten(path: Path, requests: int) -> None:
    """Let another program rewrite the document, with so many requests of one token."""
    lifetime = {"requests": requests, "tokens_saved": requests}
    path.write_text(json.dumps({"schema_version": 6, "lifetime": lifetime}))


def test_two_agree_on_a_name(store_path: Path) -> None:
    """Also when neither could write it at first: nothing is recorded under a name that the other does not know."""
    full = NoName()
    with (
        SavingsTracker(store_path, filesystem=full) as one,
        SavingsTracker(store_path, filesystem=full) as other,
    ):
        pending = one.record_request(**ONE)
        assert not pending.durable
        full.has_room = True
        assert pending.wait(WAIT_SECONDS)
        assert other.record_request(**ONE).wait(WAIT_SECONDS)
        assert one.snapshot().sequence == other.snapshot().sequence == 2
    with SavingsTracker(store_path) as tracker:
        assert tracker.snapshot().sequence == 2


def test_takeover_without_a_name(store_path: Path) -> None:
    rewritten(store_path, 11)
    full = NoName()
    tracker = SavingsTracker(store_path, filesystem=full, save_interval=NEVER)
    pending = tracker.record_request(**ONE)
    assert not pending.durable
    full.has_room = True
    assert pending.wait(WAIT_SECONDS)
    # Before its first save, as if it had been killed.
    with SavingsTracker(store_path) as other:
        assert other.snapshot().sequence == 12
    assert tracker.close()


def test_document_with_less(store_path: Path) -> None:
    """Another program wrote what it had read before our last save."""
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_many([SavingsRecord(**ONE)] * 20)
    rewritten(store_path, 10)
    with pytest.raises(CorruptStoreError, match="verify --repair"):
        SavingsTracker(store_path)
    assert inspect(str(store_path)).problems
    assert repair(str(store_path), Observers()).leaves_out
    with SavingsTracker(store_path) as tracker:
        assert tracker.snapshot().sequence == 20


def test_first_save_in_doubt(store_path: Path, faults: FaultyFileSystem) -> None:
    """A document that was seen before it was known to be saved holds the records that the journal holds, too."""
    tracker = SavingsTracker(store_path, filesystem=faults, save_interval=NEVER)
    assert tracker.record_many([SavingsRecord(**ONE)] * 10)
    faults.fail("fsync_dir", errno.EIO)
    assert not tracker.save()
    rewritten(store_path, json.loads(store_path.read_bytes())["lifetime"]["requests"] + 1)
    assert tracker.close()
    with SavingsTracker(store_path) as reopened:
        assert reopened.snapshot().sequence == 11


def test_key_survives_a_takeover(store_path: Path) -> None:
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_request(**ONE, idempotency_key="k")
    rewritten(store_path, 1)
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_request(**ONE, idempotency_key="k").duplicate
        assert tracker.snapshot().lifetime.requests == 1


def test_repair_keeps_counters(store_path: Path) -> None:
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_request(**ONE)
    before = operations(store_path)
    previous = store_path.with_name(store_path.name + ".previous")
    previous.write_bytes(b"rot")
    repair(str(store_path), Observers())
    assert operations(store_path) >= before > 0


def operations(path: Path) -> float:
    with SavingsTracker(path) as tracker:
        return samples(SavingsCollector(tracker))["savings_commits_total"]


def test_reader_saves_for_others(store_path: Path) -> None:
    """A process that only shows the totals saves what those recorded that have ended without a save."""
    dead = SavingsTracker(store_path, save_interval=NEVER)
    assert dead.record_request(**ONE)
    with SavingsTracker(store_path, save_interval=0.01) as reader:
        assert reader.snapshot().sequence == 1
        eventually(store_path.exists, "the document to be saved")
    assert dead.close()


def test_dropping_is_synced(store_path: Path, faults: FaultyFileSystem) -> None:
    """The directory fsync before a dead writer's entry is dropped is a step like any other."""
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_request(**ONE)
    for _ in range(2):
        with SavingsTracker(store_path) as tracker:
            assert tracker.record_request(**ONE)
            assert tracker.save()
            assert tracker.save()
    with SavingsTracker(store_path, filesystem=faults, save_interval=NEVER) as tracker:
        failures = 'savings_fsync_failures_total{target="directory"}'
        before = samples(SavingsCollector(tracker))[failures]
        assert tracker.record_request(**ONE)
        faults.fail("fsync_dir", errno.EIO, times=1)
        assert not tracker.save()
        assert samples(SavingsCollector(tracker))[failures] == before + 1
        assert samples(SavingsCollector(tracker))["savings_last_dir_fsync_success"] == 0
        faults.mend()


@pytest.mark.slow
def test_watermark_fails(store_path: Path, faults: FaultyFileSystem) -> None:
    """The frame is durable by then: it is not written again, and no segments pile up."""
    with SavingsTracker(store_path, filesystem=faults, save_interval=NEVER) as tracker:
        assert tracker.record_request(**ONE)
        faults.fail("watermark", errno.EIO, times=3)
        receipt = tracker.record_request(**ONE)
        assert not receipt.durable
        assert receipt.wait(WAIT_SECONDS)
        assert tracker.snapshot().sequence == 2
        (segment,) = segments(store_path)
        assert len(frames(segment)) == 2
