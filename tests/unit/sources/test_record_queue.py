"""The queue through which programs hand records to a worker thread."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from savings_exporter import SavingsRecord, StoreError
from savings_exporter.model.totals import Totals
from savings_exporter.sources.record_queue import RecordQueue
from savings_exporter.watched import WatchedFile
from tests.support.paths import ROOT
from tests.support.wait import WAIT_SECONDS, eventually

Opened = Callable[..., RecordQueue]


@pytest.fixture
def opened(store_path: Path) -> Iterator[Opened]:
    """Creates queues for the test's store, and closes them at the end."""
    queues: list[RecordQueue] = []

    def opened(path: Path | None = store_path, **options: int) -> RecordQueue:
        queues.append(RecordQueue(path, **options))
        return queues[-1]

    yield opened
    for queue in queues:
        queue.close()


def saved(tokens: int) -> SavingsRecord:
    return SavingsRecord(model="gpt-4o", tokens_saved=tokens)


def lifetime(path: Path) -> Totals:
    return WatchedFile(path).snapshot().lifetime


def has_saved(path: Path, tokens: int) -> bool:
    """Whether the store is there, and these tokens are durable."""
    try:
        return lifetime(path).tokens_saved == tokens
    except StoreError:
        return False


def run(program: str, store: Path, **env: str) -> str:
    """Run a program that has ``RecordQueue``, ``SavingsRecord`` and ``store``: what it printed on standard error."""
    header = "import sys; from savings_exporter import SavingsRecord, StoreError\n"
    header += "from savings_exporter.sources.record_queue import RecordQueue\nstore = sys.argv[1]\n"
    ran = subprocess.run(
        [sys.executable, "-c", header + program, str(store)],
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS * 2,
        env={**os.environ, **env},
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stderr


def test_records_become_durable(opened: Opened, store_path: Path) -> None:
    queue = opened()
    for tokens in range(100):
        queue.put(saved(tokens))
    eventually(lambda: has_saved(store_path, sum(range(100))), "100 records")
    assert lifetime(store_path).requests == 100
    assert queue.close()
    assert queue.lost == 0


def test_key_counts_once(opened: Opened, store_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, other = opened(), opened()
    for queue in (one, one, other):
        queue.put(saved(10), "key")
    assert one.close()
    assert other.close()
    assert lifetime(store_path).tokens_saved == 10
    assert not caplog.records


def test_key_of_other_content(opened: Opened, store_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    queue = opened()
    queue.put(saved(10), "key")
    queue.put(saved(20), "key")
    queue.put(saved(3), "other key")
    assert queue.close()
    assert lifetime(store_path).tokens_saved == 13
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "a record is not counted" in caplog.text


def test_wrong_key_loses_one(opened: Opened, store_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    queue = opened()
    queue.put(saved(10), "k" * 300)
    queue.put(saved(3))
    assert not queue.close()
    assert lifetime(store_path).tokens_saved == 3
    assert "lost 1 records (10 tokens saved)" in caplog.text


def test_store_of_the_environment(opened: Opened, store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAVINGS_EXPORTER_STORE", str(store_path))
    queue = opened(None)
    queue.put(saved(7))
    assert queue.close()
    assert lifetime(store_path).tokens_saved == 7


def test_store_opens_later(opened: Opened, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "later" / "proxy_savings.json"
    queue = opened(path)
    queue.put(saved(7))
    eventually(lambda: "savings are not recorded" in caplog.text, "the problem")
    queue.put(saved(8))
    path.parent.mkdir()
    eventually(lambda: has_saved(path, 15), "both records")
    assert queue.close()
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
    assert str(path.parent) in caplog.messages[0]


def test_full_queue_loses_records(opened: Opened, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "later" / "proxy_savings.json"
    queue = opened(path, capacity=3)
    queue.put(saved(1))
    eventually(lambda: "savings are not recorded" in caplog.text, "the problem")
    for tokens in (2, 3, 4, 100, 200):
        queue.put(saved(tokens))
    assert queue.lost == 2
    assert caplog.text.count("3 records wait already") == 1
    path.parent.mkdir()
    eventually(lambda: has_saved(path, 10), "four records")
    assert not queue.close()
    assert "lost 2 records (300 tokens saved)" in caplog.text


def test_close_without_a_store(opened: Opened, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    queue = opened(tmp_path / "missing" / "proxy_savings.json")
    queue.put(saved(40))
    queue.put(saved(2))
    assert not queue.close()
    assert queue.lost == 2
    assert "lost 2 records (42 tokens saved)" in caplog.text


def test_closed_queue_loses_records(opened: Opened, caplog: pytest.LogCaptureFixture) -> None:
    queue = opened()
    assert queue.close()
    queue.put(saved(1))
    assert queue.lost == 1
    assert "the queue is closed" in caplog.text


def test_put_does_not_import_the_tracker(store_path: Path) -> None:
    program = "assert 'savings_exporter.tracker' not in sys.modules\nassert 'asyncio' not in sys.modules"
    assert run(program, store_path) == ""


@pytest.mark.skipif(
    (3, 12) <= sys.version_info < (3, 12, 2), reason="this Python starts no threads once the main thread has ended"
)
def test_process_that_ends_at_once(store_path: Path) -> None:
    program = "RecordQueue(store).put(SavingsRecord(model='m', tokens_saved=5), 'key')"
    assert run(program, store_path) == ""
    assert lifetime(store_path).tokens_saved == 5


def test_process_ends_without_a_store(tmp_path: Path) -> None:
    program = "RecordQueue(store).put(SavingsRecord(model='m', tokens_saved=5), 'key')"
    errors = run(program, tmp_path / "missing" / "proxy_savings.json")
    assert "lost 1 records (5 tokens saved)" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_process_of_multiprocessing(tmp_path: Path, store_path: Path, method: str) -> None:
    if method == "fork" and not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import multiprocessing, sys
from pathlib import Path
from tests.unit.sources.test_record_queue import RecordQueue, eventually, has_saved, saved

def child(path):
    queue = RecordQueue(path)
    queue.put(saved(1))
    eventually(lambda: has_saved(Path(path), 1), "the tracker is open")
    for number in range(500):
        queue.put(saved(1), str(number))

if __name__ == "__main__":
    process = multiprocessing.get_context("{method}").Process(target=child, args=sys.argv[1:])
    process.start()
    process.join()
"""
    )
    ran = subprocess.run(
        [sys.executable, script, str(store_path)],
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS * 2,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert lifetime(store_path).requests == 501


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_forked_child_begins_empty(store_path: Path) -> None:
    program = """
import os
queue = RecordQueue(store)
queue.put(SavingsRecord(model="m", tokens_saved=1))
child = os.fork()
queue.put(SavingsRecord(model="m", tokens_saved=10 if child else 100))
if child:
    assert os.waitpid(child, 0)[1] == 0
assert queue.close()
"""
    assert run(program, store_path, PYTHONWARNINGS="ignore::DeprecationWarning") == ""  # threads and a fork
    assert lifetime(store_path).tokens_saved == 111


@pytest.mark.needs("linux")
def test_failing_disk_bounds_memory(store_path: Path) -> None:
    """While commits fail, the worker takes no more records. Then they become durable, except for lost ones."""
    program = """
import logging, resource
from tests.support.paths import ROOT
from tests.support.wait import eventually
from savings_exporter.watched import WatchedFile
messages = []
class Kept(logging.Handler):
    def emit(self, record):
        messages.append(record.getMessage())
logging.getLogger("savings_exporter.tracking").addHandler(Kept())
queue = RecordQueue(store, capacity=3)
def put(tokens):
    queue.put(SavingsRecord(model="m", tokens_saved=tokens))
def is_saved(tokens):
    try:
        return WatchedFile(store).snapshot().lifetime.tokens_saved == tokens
    except StoreError:
        return False
put(1)
eventually(lambda: is_saved(1), "the first record")
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
put(10)
eventually(lambda: any("could not be committed" in message for message in messages), "the commit that fails")
for tokens in (100, 200, 300, 1000):
    put(tokens)
assert queue.lost == 1, queue.lost
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
eventually(lambda: is_saved(611), "the other records")
"""
    errors = run(program, store_path)
    assert "3 records wait already" in errors
    assert "lost 1 records (1000 tokens saved)" in errors
    assert lifetime(store_path).tokens_saved == 611


def test_many_threads(opened: Opened, store_path: Path) -> None:
    queue = opened()

    def put() -> None:
        for _ in range(200):
            queue.put(saved(1))

    threads = [threading.Thread(target=put) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert queue.close()
    assert lifetime(store_path).requests == 1600


@pytest.fixture(autouse=True)
def _only_warnings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="savings_exporter.sources")
