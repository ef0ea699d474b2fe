"""Several trackers on one store: one save per interval is enough for all of them."""

from __future__ import annotations

import fcntl
import json
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path

import msgspec
import pytest

from savings_exporter import SavingsTracker
from savings_exporter.formats.document import decode, encode
from savings_exporter.storage.filesystem import FileSystem, Identity
from tests.support.wait import eventually

pytestmark = [pytest.mark.needs("linux"), pytest.mark.slow]

TRACKERS = 8


class WatchedFileSystem(FileSystem):
    """Notes which files are read."""

    def __init__(self) -> None:
        self.documents = 0
        self.opened_names: list[str] = []

    def read(self, path: str) -> tuple[bytes, Identity]:
        self.documents += path.endswith(".json")
        return super().read(path)

    @contextmanager
    def opened(self, path: str) -> Iterator[int]:
        self.opened_names.append(Path(path).name)
        with super().opened(path) as descriptor:
            yield descriptor


def lifetime(store_path: Path) -> int:
    tokens: int = json.loads(store_path.read_bytes())["lifetime"]["tokens_saved"]
    return tokens


def saves(trackers: Iterable[SavingsTracker]) -> float:
    """How often these trackers have saved."""
    counts = [tracker.counters.counts().counts for tracker in trackers]
    return sum(
        count
        for of_one in counts
        for name, count in of_one.items()
        if name.startswith("save_seconds/") and name != "save_seconds/sum"
    )


def test_one_save_serves_all_trackers(store_path: Path) -> None:
    with ExitStack() as stack:
        trackers = [stack.enter_context(SavingsTracker(store_path, save_interval=0.5)) for _ in range(TRACKERS)]
        assert trackers[0].record_request(model="m", tokens_saved=1)
        assert trackers[0].save()
        before = saves(trackers)
        for tracker in trackers:
            assert tracker.record_request(model="m", tokens_saved=1)
        eventually(lambda: lifetime(store_path) == TRACKERS + 1, "the document to hold all records")
        # Two that look at the same instant may both save.
        assert 1 <= saves(trackers) - before < TRACKERS / 2


def test_another_trackers_save_needs_no_journal(store_path: Path) -> None:
    watched = WatchedFileSystem()
    with (
        SavingsTracker(store_path, save_interval=3600) as other,
        SavingsTracker(store_path, save_interval=2, filesystem=watched) as tracker,
    ):
        assert tracker.record_request(model="m", tokens_saved=1)
        assert other.save()
        assert other.record_request(model="m", tokens_saved=2)
        watched.opened_names.clear()
        documents = watched.documents
        eventually(lambda: watched.documents > documents, "the tracker to look at the document")
        assert not [name for name in watched.opened_names if ".journal." in name]
        assert tracker.snapshot().lifetime.tokens_saved == 3


def test_document_of_the_future_and_a_held_lock(store_path: Path) -> None:
    """The clock was set back, and a process was stopped in the middle of a save: the failure is reported."""
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_request(model="m", tokens_saved=1)
    document = decode(store_path.read_bytes())
    later = datetime.now(timezone.utc) + timedelta(hours=1)
    store_path.write_bytes(encode(msgspec.structs.replace(document, saved_at=later)))
    with SavingsTracker(store_path, save_interval=0.5) as tracker:
        with store_path.with_name(f"{store_path.name}.lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert tracker.record_request(model="m", tokens_saved=1)
            eventually(lambda: not tracker.health().healthy, "the failure to be reported")
            assert tracker.health().error == "EAGAIN"
        eventually(lambda: lifetime(store_path) == 2, "the document to be saved")


def test_close_waits_for_another_save(store_path: Path) -> None:
    tracker = SavingsTracker(store_path, save_interval=3600)
    assert tracker.record_request(model="m", tokens_saved=1)
    lock = store_path.with_name(f"{store_path.name}.lock").open("rb")
    fcntl.flock(lock, fcntl.LOCK_EX)
    timer = threading.Timer(3.0, lock.close)
    timer.start()
    assert tracker.close()
    timer.join()
    assert lifetime(store_path) == 1
