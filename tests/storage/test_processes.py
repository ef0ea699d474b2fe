"""Several processes on one store: forked, spawned, started by hand, and behind one port."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from savings_exporter import SavingsTracker
from tests.support.scrape import parsed
from tests.support.service import free_port
from tests.support.wait import WAIT_SECONDS, eventually


def run(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a Python program to its end, and fail when it fails."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS * 2,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def totals(store_path: Path) -> dict[str, int]:
    with SavingsTracker(store_path) as tracker:
        snapshot = tracker.snapshot()
        assert snapshot.lifetime.requests == snapshot.sequence == sum(t.requests for t in snapshot.by_model.values())
        return {model: part.requests for model, part in snapshot.by_model.items()}


def test_processes_started_by_hand_add_up_and_see_each_other(tracker: SavingsTracker, store_path: Path) -> None:
    program = """
        import sys
        from savings_exporter import SavingsTracker
        with SavingsTracker(sys.argv[1]) as tracker:
            for number in range(200):
                assert tracker.record_request(model=sys.argv[2], tokens_saved=1).wait(30)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(store_path)]
    writers = [subprocess.Popen([*command, f"m{number}"]) for number in range(3)]
    for _ in range(200):
        receipt = tracker.record_request(model="mine", tokens_saved=1)
        assert receipt.wait(WAIT_SECONDS)
        assert tracker.snapshot().sequence >= (receipt.sequence or 0)
    assert [writer.wait(WAIT_SECONDS) for writer in writers] == [0, 0, 0]
    # Not after the next save: at once.
    assert tracker.snapshot().lifetime.requests == 800
    # They share one segment, and none makes its own.
    assert [path.name[-8:] for path in store_path.parent.glob("*.journal.*")] == ["00000001"]
    assert totals(store_path) == dict.fromkeys(("m0", "m1", "m2", "mine"), 200)


@pytest.mark.needs("linux")
def test_a_forked_copy_records_for_itself_and_leaves_the_parents_pending_records_alone(store_path: Path) -> None:
    run(
        """
        import errno, os, sys
        from savings_exporter import SavingsTracker
        from savings_exporter.telemetry.metrics import SavingsCollector
        tracker = SavingsTracker(sys.argv[1])
        assert tracker.record_request(model="parent", tokens_saved=1).durable
        assert tracker.record_request(model="parent", tokens_saved=1).durable
        real = os.fdatasync
        def fail(fd):
            raise OSError(errno.EIO, "Input/output error")
        os.fdatasync = fail
        pending = tracker.record_request(model="parent", tokens_saved=1)
        assert not pending.durable
        os.fdatasync = real
        child = os.fork()
        if child == 0:
            # What is on its way is the parent's, and so is the lock it keeps until that is settled.
            assert tracker.snapshot().pending_records == 0
            receipt = tracker.record_request(model="child", tokens_saved=1)
            assert receipt.wait(30)
            assert tracker.health().healthy
            os._exit(0)
        assert pending.wait(30)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert tracker.snapshot().lifetime.requests == 4
        """,
        store_path,
    )
    assert totals(store_path) == {"parent": 3, "child": 1}


@pytest.mark.needs("linux")
def test_a_fork_in_the_middle_of_a_commit_of_another_thread_is_no_deadlock(store_path: Path) -> None:
    run(
        """
        import os, sys, threading
        from savings_exporter import SavingsTracker
        tracker = SavingsTracker(sys.argv[1])
        for _ in range(2):
            assert tracker.record_request(model="parent", tokens_saved=1).durable
        real, reached, go_on = os.fdatasync, threading.Event(), threading.Event()
        def hang(fd):
            reached.set()
            go_on.wait(30)
            real(fd)
        os.fdatasync = hang
        thread = threading.Thread(target=lambda: tracker.record_request(model="parent", tokens_saved=1))
        thread.start()
        reached.wait(30)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.fdatasync = real
            assert tracker.snapshot().lifetime.requests == 2
            os.write(write, b".")
            receipt = tracker.record_request(model="child", tokens_saved=1)
            assert receipt.wait(30)
            assert tracker.close()
            os._exit(0)
        os.read(read, 1)
        go_on.set()
        thread.join()
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        """,
        store_path,
    )
    assert totals(store_path) == {"parent": 3, "child": 1}


@pytest.mark.needs("linux")
def test_a_forked_copy_that_records_nothing_writes_nothing(store_path: Path) -> None:
    run(
        """
        import os, sys
        from savings_exporter import SavingsTracker
        tracker = SavingsTracker(sys.argv[1], save_interval=3600)
        for _ in range(5):
            assert tracker.record_request(model="m", tokens_saved=1).durable
        before = os.stat(sys.argv[1])
        child = os.fork()
        if child == 0:
            assert tracker.close()
            os._exit(0)
        os.waitpid(child, 0)
        assert os.stat(sys.argv[1]) == before
        assert tracker.record_request(model="m", tokens_saved=1).durable
        """,
        store_path,
    )
    assert totals(store_path) == {"m": 6}


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing_children_add_up_also_what_nobody_waited_for(
    store_path: Path, tmp_path: Path, method: str
) -> None:
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
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route
from savings_exporter import SavingsTracker
from savings_exporter.telemetry.metrics import SavingsCollector

tracker = SavingsTracker(os.environ["STORE"])
registry = CollectorRegistry()
MultiProcessCollector(registry)
registry.register(SavingsCollector(tracker))

async def save(request):
    receipt = await tracker.record_request_async(model="m", tokens_saved=10)
    return JSONResponse({"worker": os.getpid(), "sequence": receipt.sequence, "durable": receipt.durable})

def metrics(request):
    return PlainTextResponse(generate_latest(registry), headers={"worker": str(os.getpid())})

app = Starlette(routes=[Route("/save", save), Route("/metrics", metrics)])
"""


@pytest.mark.needs("linux")
def test_any_of_four_uvicorn_workers_answers_a_scrape_for_all(store_path: Path, tmp_path: Path) -> None:
    (tmp_path / "proxy.py").write_text(APP)
    (tmp_path / "multiprocess").mkdir()
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "proxy:app", "--workers", "4", "--port", str(port)]
    environment = {**os.environ, "STORE": str(store_path), "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "multiprocess")}
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

        try:
            # No scrape before: prometheus_client cannot read the file of a worker that makes it at this moment.
            eventually(all_recorded, "each of the workers to record")
            assert all(answer["durable"] for answer in answers)
            assert sorted(answer["sequence"] for answer in answers) == list(range(1, len(answers) + 1))
            scrapes: dict[str, dict[str, float]] = {}
            while len(scrapes) < 4:
                worker, text = get("/metrics") or (None, "")
                if worker is not None:
                    scrapes.setdefault(worker, parsed(text))
            name = 'savings_tokens_saved_total{model="m",provider="unknown"}'
            assert {seen[name] for seen in scrapes.values()} == {10 * len(answers)}
            # Commits carry what was recorded, but for what went by the document, and every worker shows those of all.
            carried = {seen["savings_commit_records_sum"] for seen in scrapes.values()}
            assert len(carried) == 1
            assert len(answers) - 8 <= carried.pop() <= len(answers)
            for seen in scrapes.values():
                assert seen['savings_commit_failures_total{error="EIO",step="append"}'] == 0
                assert seen["savings_dir_fsync_supported"] == 1
        finally:
            server.send_signal(signal.SIGTERM)
            _, errors = server.communicate(timeout=WAIT_SECONDS)
    assert "Traceback" not in errors
    assert totals(store_path) == {"m": len(answers)}
