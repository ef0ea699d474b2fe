"""Several processes on one store: forked, spawned, started by hand, stopped, killed, and behind one port."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from savings_exporter import SavingsCollector, SavingsTracker, StoreError
from tests.support.faults import FaultyFileSystem
from tests.support.paths import ROOT
from tests.support.scrape import parsed, samples
from tests.support.service import free_port
from tests.support.wait import WAIT_SECONDS, eventually

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
IS_LONG = os.environ.get("CRASH_LAB") == "long"

COMMIT_STEPS, SAVE_STEPS = ("fsync_journal", "watermark"), ("write", "fsync_file", "replace", "fsync_dir")


@pytest.fixture
def memory_path() -> Iterator[Path]:
    """The path of a store that is opened and closed very often."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        yield Path(directory, "proxy_savings.json")


def run(program: str, *arguments: str | Path | int, seconds: float = WAIT_SECONDS * 2, status: int = 0) -> str:
    """Run a Python program to its end and return its output; fail if the program fails."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        env=ENVIRONMENT,
    )
    assert done.returncode == status, done.stderr
    return done.stdout


class Process:
    """A Python program that answers each line with a line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def hear(self) -> str:
        """The next line of its output."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line or self.process.poll() is None, self.process.stderr and self.process.stderr.read()
        return line.strip()

    def tell(self, line: str) -> None:
        """Send a line to it."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def ask(self, line: str) -> str:
        """Send a line to it. Return its answer."""
        self.tell(line)
        return self.hear()

    def end(self) -> None:
        """Wait until it ends."""
        _, errors = self.process.communicate(timeout=WAIT_SECONDS * 2)
        assert self.process.returncode == 0, errors


@contextmanager
def started(program: str, *arguments: str | Path | int) -> Iterator[Process]:
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT) as process:
        try:
            yield Process(process)
        finally:
            process.kill()


def totals(store_path: Path) -> dict[str, int]:
    with SavingsTracker(store_path) as tracker:
        snapshot = tracker.snapshot()
        assert snapshot.lifetime.requests == snapshot.sequence == sum(t.requests for t in snapshot.by_model.values())
        return {model: part.requests for model, part in snapshot.by_model.items()}


def segments(store_path: Path) -> list[str]:
    return [path.name for path in store_path.parent.glob("*.journal.*")]


def test_new_process_reads_records(tracker: SavingsTracker, store_path: Path) -> None:
    assert tracker.record_request(
        model="claude-sonnet-4-5", input_tokens=12_000, tokens_saved=4096, provider="anthropic", project="billing-api"
    )
    printed = run(
        """
        import json, sys
        from savings_exporter import SavingsTracker
        snapshot = SavingsTracker(sys.argv[1]).snapshot()
        print(json.dumps([snapshot.lifetime.tokens_saved, snapshot.by_model["claude-sonnet-4-5"].requests,
                          snapshot.projects["billing-api"].total_input_tokens]))
        """,
        store_path,
    )
    assert json.loads(printed) == [4096, 1, 12_000]


def test_exit_without_close_saves(store_path: Path) -> None:
    run(
        """
        import sys
        from savings_exporter import SavingsTracker
        tracker = SavingsTracker(sys.argv[1])
        for _ in range(100):
            tracker.record_request(model="m", tokens_saved=1, wait=False)
        """,
        store_path,
    )
    assert totals(store_path) == {"m": 100}


@pytest.mark.slow
def test_processes_see_each_other(tracker: SavingsTracker, store_path: Path) -> None:
    program = """
        import sys
        from savings_exporter import SavingsTracker
        with SavingsTracker(sys.argv[1]) as tracker:
            for number in range(200):
                assert tracker.record_request(model=sys.argv[2], tokens_saved=1).wait(30)
    """
    shown = 0
    with ExitStack() as stack:
        writers = [stack.enter_context(started(program, store_path, f"m{number}")) for number in range(3)]
        for number in range(200):
            assert tracker.record_request(model="mine", tokens_saved=1).wait(WAIT_SECONDS)
            before, shown = shown, tracker.snapshot().lifetime.requests
            assert shown >= max(before, number + 1)
        for writer in writers:
            writer.end()
    # Not after the next save: at once.
    assert tracker.snapshot().lifetime.requests == 800
    tracker.close()
    assert totals(store_path) == dict.fromkeys(("m0", "m1", "m2", "mine"), 200)
    assert segments(store_path) == []


STOPS = """
    import os, signal, sys
    from savings_exporter import SavingsTracker
    from tests.support.faults import FaultyFileSystem
    path, step = sys.argv[1:]
    faults = FaultyFileSystem()
    with SavingsTracker(path, filesystem=faults, save_interval=3600) as tracker:
        for _ in range(2):
            assert tracker.record_request(model="stopped", tokens_saved=1)
        assert tracker.save()
        def stop(name):
            if name == step:
                faults.before = lambda name: None
                print("stopping", flush=True)
                os.kill(os.getpid(), signal.SIGSTOP)
        faults.before = stop
        assert tracker.record_request(model="stopped", tokens_saved=1)
        assert tracker.save()
        for _ in range(10):
            assert tracker.record_request(model="stopped", tokens_saved=1)
"""

OTHER = """
    import sys
    from savings_exporter import SavingsTracker
    with SavingsTracker(sys.argv[1], save_interval=0.05) as tracker:
        assert tracker.record_request(model=sys.argv[2], tokens_saved=1)
        print("ready", flush=True)
        for line in sys.stdin:
            for _ in range(100):
                assert tracker.record_request(model=sys.argv[2], tokens_saved=1), tracker.health()
            print(tracker.health().error, flush=True)
"""


@pytest.mark.slow
@pytest.mark.needs("linux")
@pytest.mark.parametrize("step", [*COMMIT_STEPS, *SAVE_STEPS])
def test_a_stopped_process_stops_no_other(store_path: Path, step: str) -> None:
    with ExitStack() as stack:
        others = [stack.enter_context(started(OTHER, store_path, f"m{number}")) for number in range(3)]
        assert [other.hear() for other in others] == ["ready"] * 3
        stopped = stack.enter_context(started(STOPS, store_path, step))
        assert stopped.hear() == "stopping"
        rounds, is_saving = 0, step in SAVE_STEPS
        while rounds < 1 or is_saving:
            # While it is stopped in a save, saves of the other processes finally fail, but their records stay durable.
            for other in others:
                other.tell("go on")
            errors = [other.hear() for other in others]
            assert set(errors) <= {"None", "EAGAIN"}
            rounds += 1
            is_saving = is_saving and errors != ["EAGAIN"] * 3
            assert rounds < 10_000
        stopped.process.send_signal(signal.SIGCONT)
        stopped.end()
        for other in others:
            other.end()
    assert totals(store_path) == {"stopped": 13, **dict.fromkeys(("m0", "m1", "m2"), 100 * rounds + 1)}


FAILING_AND_KILLED = """
    import errno, os, shutil, signal, sys, tempfile
    from savings_exporter import SavingsTracker
    from tests.support.faults import FaultyFileSystem

    def told(pipe, what):
        os.write(pipe, what)

    def attempt(pipe, tracker, model, **arguments):
        os.write(pipe, b"t")
        receipt = tracker.record_request(model=model, tokens_saved=1, **arguments)
        if receipt:
            os.write(pipe, b"a")
        return receipt

    def failing(path, pipe, before):
        faults = FaultyFileSystem()
        faults.before = before
        with SavingsTracker(path, filesystem=faults, save_interval=3600) as tracker:
            attempt(pipe, tracker, "failing")
            faults.fail("fsync_journal", errno.EIO, times=2)
            pending = attempt(pipe, tracker, "failing")
            assert not pending
            later = attempt(pipe, tracker, "failing")
            tracker.save()
            tracker.save()
            assert pending.wait(30) and later.wait(30)
            os.write(pipe, b"aa")

    def well(path, pipe, before):
        faults = FaultyFileSystem()
        faults.before = before
        with SavingsTracker(path, filesystem=faults, save_interval=3600) as tracker:
            for _ in range(5):
                assert attempt(pipe, tracker, "well")
            assert tracker.save()
            assert attempt(pipe, tracker, "well")

    def killed_at(call):
        calls = 0
        def before(step):
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
        return before

    def forked(work, path, call):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                work(path, write, killed_at(call))
                status = 0
            finally:
                os._exit(status)
        os.close(write)
        return child, read

    def ended(child, read):
        said = b""
        while part := os.read(read, 4096):
            said += part
        os.close(read)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.count(b"a"), said.count(b"t")

    victim, memory = sys.argv[1], sys.argv[2] or None
    call = 0
    while True:
        call += 1
        directory = tempfile.mkdtemp(dir=memory)
        path = os.path.join(directory, "proxy_savings.json")
        children = {
            work.__name__: forked(work, path, call if work.__name__ == victim else 0) for work in (failing, well)
        }
        results = {name: ended(*child) for name, child in children.items()}
        with SavingsTracker(path) as tracker:
            by_model = tracker.snapshot().by_model
            for name, (status, acknowledged, attempted) in results.items():
                assert status == 0 or (name == victim and status == -9), (call, results)
                counted = by_model[name].requests if name in by_model else 0
                assert acknowledged <= counted <= attempted, (call, results, counted)
                assert status or counted == attempted, (call, results, counted)
        with SavingsTracker(path) as tracker:
            assert tracker.snapshot().lifetime.requests == sum(part.requests for part in by_model.values())
        shutil.rmtree(directory)
        if results[victim][0] == 0:
            break
    assert call > 20
    print(call)
"""


@pytest.mark.slow
@pytest.mark.needs("linux")
@pytest.mark.parametrize("victim", ["failing", "well"])
def test_killed_beside_a_failing_process(memory_path: Path, victim: str) -> None:
    """One process's writes fail and are retried, and it or another is killed before any call."""
    run(FAILING_AND_KILLED, victim, memory_path.parent, seconds=WAIT_SECONDS * 10)


@pytest.mark.needs("linux")
def test_failing_process_stops_no_other(store_path: Path) -> None:
    failing = """
        import errno, sys
        from savings_exporter import SavingsTracker
        from tests.support.faults import FaultyFileSystem
        faults = FaultyFileSystem()
        with SavingsTracker(sys.argv[1], filesystem=faults) as tracker:
            assert tracker.record_request(model="failing", tokens_saved=1)
            for step in ("fsync_journal", "fsync_file", "fsync_dir"):
                faults.fail(step, errno.EIO)
            pending = [tracker.record_request(model="failing", tokens_saved=1) for _ in range(10)]
            assert not any(pending)
            print("failing", flush=True)
            input()
            faults.mend()
            assert all(receipt.wait(30) for receipt in pending)
    """
    with started(OTHER, store_path, "other") as other, started(failing, store_path) as process:
        assert (other.hear(), process.hear()) == ("ready", "failing")
        for _ in range(3):
            other.tell("go on")
            assert other.hear() == "None"
        process.tell("")
        process.end()
        other.end()
    assert totals(store_path) == {"other": 301, "failing": 11}


RETRIED = """
    import os, signal, sys
    from savings_exporter import SavingsTracker
    from tests.support.faults import FaultyFileSystem

    path, rounds = sys.argv[1], int(sys.argv[2])
    faults = FaultyFileSystem()
    tracker = SavingsTracker(path, filesystem=faults, save_interval=3600)
    assert tracker.record_request(model="m", tokens_saved=1)

    def die_before(step):
        def before(name):
            if name == step:
                os.kill(os.getpid(), signal.SIGKILL)
        return before

    # Before the sync, between sync and watermark, and between that and the answer.
    steps = ("fsync_journal", "watermark", "answer")
    for number in range(1, rounds + 1):
        step, key = steps[number % 3], f"key {number}"
        child = os.fork()
        if child == 0:
            # The first "watermark" of a writer is a part of the making of its file.
            assert number % 2 or tracker.record_request(model="m", tokens_saved=0, wait=False).wait(30)
            faults.before = die_before(step)
            tracker.record_request(model="m", tokens_saved=1, idempotency_key=key)
            os.kill(os.getpid(), signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        if number % 4 == 0:
            # The dead writer's frame is counted before the repeat comes.
            assert tracker.save()
        receipt = tracker.record_request(model="m", tokens_saved=1, idempotency_key=key)
        assert receipt.durable
        if number % 20 == 0:
            assert tracker.save()
            assert tracker.snapshot().lifetime.tokens_saved == number + 1, (number, tracker.snapshot().lifetime)
    assert tracker.close()
    for _ in range(2):
        with SavingsTracker(path) as tracker:
            assert tracker.snapshot().lifetime.tokens_saved == rounds + 1
            repeat = tracker.record_request(model="m", tokens_saved=1, idempotency_key=f"key {rounds}")
            assert repeat.duplicate
            assert repeat.writer == receipt.writer and repeat.sequence == receipt.sequence
            assert tracker.snapshot().lifetime.tokens_saved == rounds + 1
"""


@pytest.mark.slow
@pytest.mark.needs("linux")
def test_retry_after_a_kill_counts_once(memory_path: Path) -> None:
    """A keyed record is sent to a process that is killed in its commit, and again to another one."""
    rounds = 10_000 if IS_LONG else 200
    run(RETRIED, memory_path, rounds, seconds=WAIT_SECONDS * 40)


@pytest.mark.needs("linux")
def test_repeat_of_a_failed_write(store_path: Path, faults: FaultyFileSystem) -> None:
    """A frame that a process wrote but could not sync may be readable. A repeat of it is not acknowledged."""
    run(
        """
        import errno, os, signal, sys
        from savings_exporter import SavingsTracker
        from tests.support.faults import FaultyFileSystem
        faults = FaultyFileSystem(has_direct_io=False)
        tracker = SavingsTracker(sys.argv[1], filesystem=faults)
        for _ in range(2):
            assert tracker.record_request(model="m", tokens_saved=1)
        faults.fail("fsync_journal", errno.EIO)
        assert not tracker.record_request(model="m", tokens_saved=1, idempotency_key="k")
        child = os.fork()
        if child == 0:
            os.kill(os.getppid(), signal.SIGKILL)
            os._exit(0)
        os.waitpid(child, 0)
        """,
        store_path,
        status=-signal.SIGKILL,
    )
    for step in ("append", "fsync_journal", "fsync_file"):
        faults.fail(step, errno.EIO)
    with SavingsTracker(store_path, filesystem=faults) as tracker:
        receipt = tracker.record_request(model="m", tokens_saved=1, idempotency_key="k")
        assert not receipt.durable
        assert tracker.snapshot().sequence == 2
        faults.mend()
        assert receipt.wait(WAIT_SECONDS)
        repeat = tracker.record_request(model="m", tokens_saved=1, idempotency_key="k")
        assert (repeat.duplicate, repeat.durable) == (True, True)
        assert tracker.save()
        assert tracker.snapshot().sequence == 3
    assert totals(store_path) == {"m": 3}


def test_a_pipe_in_place_of_a_segment(store_path: Path) -> None:
    """It is refused, and nothing waits for its other end."""
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_request(model="m", tokens_saved=1)
    os.mkfifo(f"{store_path}.journal.{'a' * 16}.00000001")
    with pytest.raises(StoreError, match=r"Not a regular file \(EINVAL\) on .*\.journal\.a{16}\.00000001"):
        SavingsTracker(store_path)


@pytest.mark.needs("root")
def test_lock_file_of_roots_making(store_path: Path) -> None:
    """It is for the user of the document."""
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_request(model="m", tokens_saved=1)
    lock = store_path.with_name(store_path.name + ".lock")
    lock.unlink()
    os.chown(store_path, 1234, 1234)
    assert totals(store_path) == {"m": 1}
    status = lock.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (1234, 1234, 0o600)


def test_a_moved_directory(store_path: Path) -> None:
    """The store is created again in the new directory."""
    directory = store_path.parent
    with SavingsTracker(store_path) as tracker:
        for _ in range(2):
            assert tracker.record_request(model="m", tokens_saved=1)
        directory.rename(directory.with_name(f"{directory.name}-moved"))
        assert not tracker.save()
        assert not tracker.health().healthy
        directory.mkdir()
        assert tracker.record_request(model="m", tokens_saved=1)
        assert tracker.save()
        assert tracker.health().healthy
        assert totals(store_path) == {"m": 3}
    assert totals(store_path) == {"m": 3}


AT_ONCE = """
    import os, sys
    from savings_exporter import SavingsTracker

    path, rounds = sys.argv[1], int(sys.argv[2])
    tracker = SavingsTracker(path)
    assert tracker.record_request(model="m", tokens_saved=1)
    for number in range(1, rounds + 1):
        start, go = os.pipe()
        children = []
        for _ in range(3):
            child = os.fork()
            if child == 0:
                os.close(go)
                assert os.read(start, 1) == b""
                receipt = tracker.record_request(model="m", tokens_saved=1, idempotency_key=f"key {number}")
                os._exit(0 if receipt.durable and tracker.close() else 1)
            children.append(child)
        os.close(start)
        os.close(go)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
        assert tracker.snapshot().lifetime.requests == number + 1
        assert tracker.record_request(model="m", tokens_saved=1, idempotency_key=f"key {number}").duplicate
        assert tracker.snapshot().lifetime.requests == number + 1
"""


@pytest.mark.slow
@pytest.mark.needs("linux")
def test_same_key_at_once_counts_once(memory_path: Path) -> None:
    rounds = 1000 if IS_LONG else 40
    run(AT_ONCE, memory_path, rounds, seconds=WAIT_SECONDS * 10)
    assert totals(memory_path) == {"m": rounds + 1}


ONCE_EACH = """
    import os, sys
    from savings_exporter import SavingsTracker
    path, count = sys.argv[1], int(sys.argv[2])
    start, go = os.pipe()
    children = []
    for number in range(count):
        child = os.fork()
        if child == 0:
            os.close(go)
            os.read(start, 1)
            with SavingsTracker(path) as tracker:
                durable = tracker.record_request(model=f"m{number}", tokens_saved=1).durable
            os._exit(0 if durable else 1)
        children.append(child)
    os.close(go)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * count
"""


@pytest.mark.slow
@pytest.mark.needs("linux")
def test_processes_that_record_once(memory_path: Path) -> None:
    run(ONCE_EACH, memory_path, 64)
    assert segments(memory_path) == []
    with SavingsTracker(memory_path) as tracker:
        snapshot = tracker.snapshot()
        assert snapshot.by_model.keys() == {f"m{number}" for number in range(64)}
        assert snapshot.lifetime.requests == 64
        counts = snapshot.operations.counts
        saves = sum(n for name, n in counts.items() if name.startswith("save_seconds/") and not name.endswith("/sum"))
        assert 1 <= saves <= 64
        assert not any(name.startswith("save_failures/") for name in counts)


SCRAPED = """
    import errno, json, sys
    from savings_exporter import SavingsTracker
    from savings_exporter.telemetry.metrics import SavingsCollector
    from tests.support.faults import FaultyFileSystem
    from tests.support.scrape import samples
    faults = FaultyFileSystem()
    with SavingsTracker(sys.argv[1], filesystem=faults, save_interval=0.2) as tracker:
        for line in sys.stdin:
            if line == "scrape\\n":
                print(json.dumps(samples(SavingsCollector(tracker))), flush=True)
            elif line == "record\\n":
                print(tracker.record_request(model="m", tokens_saved=1).durable, flush=True)
            elif line == "fail\\n":
                faults.fail("fsync_journal", errno.EIO)
                print(tracker.record_request(model="m", tokens_saved=1).durable, flush=True)
"""

FAILURES = "savings_commit_failures_total{{error={error},step={step}}}".format(error='"EIO"', step='"fsync_journal"')


class Scraped:
    """The counters of one store never decrease, no matter which process answers."""

    def __init__(self) -> None:
        self._seen: dict[str, float] = {}

    def by(self, process: Process) -> dict[str, float]:
        shown: dict[str, float] = json.loads(process.ask("scrape"))
        self.note(shown)
        return shown

    def note(self, shown: dict[str, float]) -> None:
        counters = {
            name: value
            for name, value in shown.items()
            if name.split("{")[0].endswith(("_total", "_count", "_sum", "_bucket"))
        }
        lower = {name for name, value in self._seen.items() if counters.get(name, 0) < value}
        assert not lower, {name: (self._seen[name], counters.get(name)) for name in lower}
        self._seen = counters


@pytest.mark.slow
@pytest.mark.needs("linux")
def test_counters_are_those_of_the_store(store_path: Path) -> None:
    scraped = Scraped()
    with ExitStack() as stack:
        processes = [stack.enter_context(started(SCRAPED, store_path)) for _ in range(3)]
        for number in range(1, 61):
            assert processes[number % 3].ask("record") == "True"
            shown = [scraped.by(process) for process in processes]
            # Each process's own commits are known to the others once it was scraped itself.
            assert shown[2]["savings_commits_total"] <= number
        assert scraped.by(processes[0])["savings_commits_total"] == 60
        assert scraped.by(processes[1])["savings_commit_records_sum"] == 60
        assert processes[1].ask("fail") == "False"
        processes[1].process.kill()
        processes[1].process.wait()
        # Its failure is counted, by the others and by those who come later.
        for process in (processes[0], processes[2]):
            assert scraped.by(process)[FAILURES] == 1
        assert processes[0].ask("record") == "True"
        for process in (processes[0], processes[2]):
            process.end()
    for _ in range(3):
        with started(SCRAPED, store_path) as process:
            shown_later = scraped.by(process)
            assert shown_later[FAILURES] == 1
            assert process.ask("record") == "True"
            assert scraped.by(process)["savings_commit_records_sum"] > shown_later["savings_commit_records_sum"]
            process.end()


class Meanwhile(FaultyFileSystem):
    """Calls a function when the store's directory is listed."""

    def __init__(self) -> None:
        super().__init__()
        self.meanwhile: Callable[[], object] = bool

    def names_beside(self, path: str) -> list[str]:
        self.meanwhile()
        return super().names_beside(path)


def test_counters_that_rise_during_a_scrape(store_path: Path) -> None:
    filesystem, scraped = Meanwhile(), Scraped()
    with (
        SavingsTracker(store_path, filesystem=filesystem, save_interval=3600) as tracker,
        started(SCRAPED, store_path) as other,
        ThreadPoolExecutor(1) as pool,
    ):
        assert tracker.record_request(model="m", tokens_saved=1).durable
        scraped.by(other)
        filesystem.meanwhile = lambda: pool.submit(tracker.record_request, model="m", tokens_saved=1).result()
        first = samples(SavingsCollector(tracker))
        filesystem.meanwhile = bool
        scraped.note(first)
        assert first["savings_commits_total"] > 1
        # The other worker shows what this one showed, or more.
        scraped.by(other)


@pytest.mark.needs("linux")
def test_fork_leaves_the_parents_pending(store_path: Path) -> None:
    run(
        """
        import errno, os, sys
        from savings_exporter import SavingsTracker
        from tests.support.faults import FaultyFileSystem
        faults = FaultyFileSystem()
        tracker = SavingsTracker(sys.argv[1], filesystem=faults)
        assert tracker.record_request(model="parent", tokens_saved=1).durable
        parent = tracker.record_request(model="parent", tokens_saved=1)
        faults.fail("fsync_journal", errno.EIO)
        pending = tracker.record_request(model="parent", tokens_saved=1)
        assert not pending.durable
        child = os.fork()
        if child == 0:
            faults.mend()
            # What is on its way is the parent's: here nothing makes it durable, so there is nothing to wait for.
            assert not pending.wait()
            assert tracker.snapshot().pending_records == 0
            assert tracker.health().healthy
            receipt = tracker.record_request(model="child", tokens_saved=1)
            assert receipt.durable
            assert receipt.writer != parent.writer
            assert receipt.sequence == 1
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert not pending.durable
        faults.mend()
        assert pending.wait(30)
        assert (pending.writer, pending.sequence) == (parent.writer, 3)
        assert tracker.snapshot().lifetime.requests == 4
        """,
        store_path,
    )
    assert totals(store_path) == {"parent": 3, "child": 1}


@pytest.mark.needs("linux")
@pytest.mark.parametrize("step", [*COMMIT_STEPS, *SAVE_STEPS])
def test_fork_while_a_thread_is_at_work(store_path: Path, step: str) -> None:
    """A thread commits or saves at the moment of the fork: the child neither waits for it nor does it again."""
    run(
        """
        import os, sys, threading
        from savings_exporter import SavingsTracker
        from tests.support.faults import FaultyFileSystem
        faults = FaultyFileSystem()
        path, step = sys.argv[1:]
        tracker = SavingsTracker(path, filesystem=faults, save_interval=3600)
        for _ in range(2):
            assert tracker.record_request(model="parent", tokens_saved=1).durable
            assert tracker.save()
        faults.reached.clear()
        faults.hang(step)
        def work():
            tracker.record_request(model="parent", tokens_saved=1)
            assert tracker.save()
        thread = threading.Thread(target=work)
        thread.start()
        assert faults.reached.wait(30)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            faults.mend()
            assert tracker.snapshot().lifetime.requests in (2, 3)
            receipt = tracker.record_request(model="child", tokens_saved=1)
            assert receipt.durable
            os.write(write, b".")
            assert tracker.close()
            os._exit(0)
        os.close(write)
        assert os.read(read, 1) == b"."
        faults.mend()
        thread.join()
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert tracker.snapshot().lifetime.requests == 4
        """,
        store_path,
        step,
    )
    assert totals(store_path) == {"parent": 3, "child": 1}
    assert segments(store_path) == []


@pytest.mark.needs("linux")
def test_a_fork_that_cannot_make_files(store_path: Path) -> None:
    """Its records are pending until it can."""
    run(
        """
        import os, sys
        from pathlib import Path
        from savings_exporter import SavingsTracker
        directory = Path(sys.argv[1]).parent
        moved = directory.with_name(f"{directory.name}-moved")
        with SavingsTracker(sys.argv[1]) as tracker:
            assert tracker.record_request(model="parent", tokens_saved=1)
            directory.rename(moved)
            child = os.fork()
            if child == 0:
                receipt = tracker.record_request(model="child", tokens_saved=1)
                refused = not receipt.durable and not tracker.health().healthy
                moved.rename(directory)
                os._exit(0 if refused and receipt.wait(30) and tracker.close() else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert tracker.snapshot().sequence == 2
        """,
        store_path,
    )
    assert totals(store_path) == {"parent": 1, "child": 1}


@pytest.mark.needs("linux")
def test_a_fork_that_records_nothing(store_path: Path) -> None:
    """It writes nothing."""
    run(
        """
        import os, sys
        from savings_exporter import SavingsTracker
        tracker = SavingsTracker(sys.argv[1], save_interval=3600)
        for _ in range(5):
            assert tracker.record_request(model="m", tokens_saved=1).durable
        assert tracker.save()
        before, names = os.stat(sys.argv[1]), sorted(os.listdir(os.path.dirname(sys.argv[1])))
        child = os.fork()
        if child == 0:
            assert tracker.close()
            os._exit(0)
        os.waitpid(child, 0)
        assert os.stat(sys.argv[1]) == before
        assert sorted(os.listdir(os.path.dirname(sys.argv[1]))) == names
        assert tracker.record_request(model="m", tokens_saved=1).durable
        """,
        store_path,
    )
    assert totals(store_path) == {"m": 6}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing_adds_up(store_path: Path, tmp_path: Path, method: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            """
            import multiprocessing, sys
            from savings_exporter import SavingsTracker

            tracker = SavingsTracker(sys.argv[1]) if sys.argv[2] == "fork" else None

            def work(path, name):
                mine = tracker or SavingsTracker(path)
                for _ in range(50):
                    assert mine.record_request(model=name, tokens_saved=1).wait(30)
                for _ in range(50):
                    mine.record_request(model=name, tokens_saved=1, wait=False)

            if __name__ == "__main__":
                context = multiprocessing.get_context(sys.argv[2])
                children = [context.Process(target=work, args=(sys.argv[1], f"m{n}")) for n in range(4)]
                for child in children:
                    child.start()
                for child in children:
                    child.join()
                    assert child.exitcode == 0
            """
        )
    )
    done = subprocess.run(
        [sys.executable, program, store_path, method],
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS * 2,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert totals(store_path) == dict.fromkeys(("m0", "m1", "m2", "m3"), 100)


APP = """
import os
from prometheus_client import CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route
from savings_exporter import SavingsCollector, SavingsTracker

tracker = SavingsTracker(os.environ["STORE"])
registry = CollectorRegistry()
registry.register(SavingsCollector(tracker))

async def save(request):
    receipt = await tracker.record_request_async(model="m", tokens_saved=10)
    place = [receipt.writer, receipt.sequence]
    return JSONResponse({"worker": os.getpid(), "place": place, "durable": receipt.durable})

def metrics(request):
    return PlainTextResponse(generate_latest(registry), headers={"worker": str(os.getpid())})

app = Starlette(routes=[Route("/save", save), Route("/metrics", metrics)])
"""


@pytest.mark.slow
@pytest.mark.needs("linux")
def test_any_uvicorn_worker_answers_for_all(store_path: Path, tmp_path: Path) -> None:
    (tmp_path / "proxy.py").write_text(APP)
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "proxy:app", "--workers", "4", "--port", str(port)]
    environment = {**os.environ, "STORE": str(store_path)}
    with subprocess.Popen(
        [*command, "--log-level", "warning"], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    ) as server:

        def get(path: str) -> tuple[str | None, str] | None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=WAIT_SECONDS) as answer:
                    return answer.headers["worker"], answer.read().decode()
            except OSError:
                return None

        answers: list[dict[str, Any]] = []

        def all_recorded() -> bool:
            if answer := get("/save"):
                answers.append(json.loads(answer[1]))
            return len({answer["worker"] for answer in answers}) == 4

        def scrape_of_each() -> dict[str, dict[str, float]]:
            scrapes: dict[str, dict[str, float]] = {}
            while len(scrapes) < 4:
                worker, text = get("/metrics") or (None, "")
                if worker is not None:
                    scrapes.setdefault(worker, parsed(text))
            return scrapes

        try:
            eventually(all_recorded, "each of the workers to record")
            assert all(answer["durable"] for answer in answers)
            assert len({tuple(answer["place"]) for answer in answers}) == len(answers)
            name = 'savings_tokens_saved_total{model="m",provider="unknown"}'
            assert {seen[name] for seen in scrape_of_each().values()} == {10 * len(answers)}
            # Each worker was scraped, and has shown its own commits to the others with that.
            for seen in scrape_of_each().values():
                assert seen["savings_commit_records_sum"] == len(answers)
                assert seen['savings_commit_failures_total{error="EIO",step="append"}'] == 0
                assert seen["savings_dir_fsync_supported"] == 1
        finally:
            server.send_signal(signal.SIGTERM)
            _, errors = server.communicate(timeout=WAIT_SECONDS)
    assert "Traceback" not in errors
    assert totals(store_path) == {"m": len(answers)}
