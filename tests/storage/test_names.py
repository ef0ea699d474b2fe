"""Names take places by what they saved. An operator can let one in and fold one, in all processes, exactly."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from savings_exporter import SavingsRecord, SavingsTracker, StoreError
from savings_exporter.model.days import MOST_ROWS
from savings_exporter.model.names import OTHER
from savings_exporter.storage.filesystem import FileSystem
from savings_exporter.storage.repair import inspect
from savings_exporter.watched import WatchedFile
from tests.support.faults import FaultyFileSystem
from tests.support.service import run_cli, running


@pytest.fixture
def tracker(store_path: Path) -> Iterator[SavingsTracker]:
    with SavingsTracker(store_path, max_projects=10, max_models=10) as tracker:
        yield tracker


def record(tracker: SavingsTracker, name: str, tokens: int) -> None:
    assert tracker.record_request(model=f"model {name}", project=name, agent=name, source=name, tokens_saved=tokens)


def test_names_without_savings_leave_places(tracker: SavingsTracker, store_path: Path) -> None:
    made_up = [SavingsRecord(model=f"m{n}", project=f"p{n}", agent=f"a{n}", tokens_saved=0) for n in range(200)]
    assert tracker.record_many(made_up)
    record(tracker, "billing", 100)
    tracker.close()
    with SavingsTracker(store_path, max_projects=10, max_models=10) as again:
        record(again, "engine", 50)
        with SavingsTracker(store_path, max_projects=10, max_models=10) as another:
            record(another, "engine", 7)
            assert another.snapshot().projects["engine"].tokens_saved == 57
        snapshot = again.snapshot()
    real = {name: totals.tokens_saved for name, totals in snapshot.projects.items() if totals.tokens_saved}
    assert real == {"billing": 100, "engine": 57}
    assert snapshot.projects[OTHER].requests == 195
    assert len(snapshot.projects.keys() - {OTHER}) == 5 + 2
    assert {"model billing", "model engine"} <= snapshot.by_model.keys()
    assert {("unknown", "model billing"), ("unknown", "model engine")} <= snapshot.by_provider_model.keys()
    assert len(snapshot.by_provider_model.keys() - {(OTHER, OTHER)}) == 5 + 2
    # There are 50 places for agents.
    assert len(snapshot.agents.keys() - {OTHER}) == 25 + 2


def test_no_counter_goes_back_when_another_process_saves(store_path: Path) -> None:
    """A name saves nothing at first. One process counts its records one by one, and another all at once."""
    with SavingsTracker(store_path, save_interval=3600) as tracker:
        for tokens in (0, 10, 0):
            record(tracker, "billing", tokens)
            before = tracker.snapshot()
        with SavingsTracker(store_path, save_interval=3600) as another:
            assert another.save()
        after = tracker.snapshot()
    assert before.projects == after.projects
    assert before.projects["billing"].requests == 3
    assert before.by_provider_model == after.by_provider_model
    assert before.by_model == after.by_model
    assert before.agents == after.agents


def test_large_name_in_other_is_known(tracker: SavingsTracker) -> None:
    for number in range(10):
        record(tracker, f"p{number}", 10 + number)
    record(tracker, "small", 5)
    for _ in range(3):
        record(tracker, "large", 100)
    (outsider,) = tracker.snapshot().ledger.outsiders("project")
    assert (outsider.name, outsider.candidate.least, outsider.candidate.most) == ("large", 300, 300)
    tracker.let_in("project", "large")
    record(tracker, "large", 7)
    snapshot = tracker.snapshot()
    assert snapshot.projects["large"].tokens_saved == 7
    assert snapshot.projects[OTHER].tokens_saved == 305
    assert snapshot.ledger.outsiders("project") == []
    # Its place is beyond the limit, so no other name loses one.
    assert len(snapshot.projects) == 12


@pytest.mark.slow
def test_fold_is_exact_in_all_processes(store_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    context = multiprocessing.get_context("spawn")
    begin, done = context.Barrier(2), context.Barrier(2)
    process = context.Process(target=record_in_turn, args=(str(store_path), begin, done))
    process.start()
    with SavingsTracker(store_path, save_interval=3600) as tracker:
        begin.wait(30)
        done.wait(30)
        # Neither these records nor those of the other process are in a document.
        for _ in range(5):
            record(tracker, "gone", 10)
        moved = tracker.fold("project", "gone")
        assert (moved.tokens_saved, moved.requests) == (50 + 70, 12)
        tracker.fold("model", "model gone")
        begin.wait(30)
        done.wait(30)
        record(tracker, "gone", 1)
        snapshot = tracker.snapshot()
        assert "gone" not in snapshot.projects
        assert snapshot.projects[OTHER].tokens_saved == 50 + 70 + 70 + 1
        assert "model gone" not in snapshot.by_model
        assert snapshot.agents["gone"].tokens_saved == 191
        assert not any(model == "model gone" for _, model in snapshot.by_provider_model)
        begin.wait(30)
    process.join()
    assert process.exitcode == 0
    assert inspect(str(store_path)).problems == ()
    with SavingsTracker(store_path) as tracker:
        record(tracker, "gone", 2)
        assert tracker.snapshot().projects[OTHER].tokens_saved == 193
        tracker.let_in("project", "gone")
        record(tracker, "gone", 4)
        assert tracker.snapshot().projects["gone"].tokens_saved == 4
    assert "the project 'gone' was folded into other" in caplog.text


def record_in_turn(
    path: str, begin: multiprocessing.synchronize.Barrier, done: multiprocessing.synchronize.Barrier
) -> None:
    logging.disable()
    with SavingsTracker(path, save_interval=3600) as tracker:
        for _ in range(2):
            begin.wait(30)
            for _ in range(7):
                record(tracker, "gone", 10)
            done.wait(30)
        begin.wait(30)
        assert tracker.snapshot().projects.keys() == {OTHER}


def test_fold_that_fails_changes_nothing(store_path: Path, faults: FaultyFileSystem) -> None:
    with SavingsTracker(store_path, filesystem=faults) as tracker:
        record(tracker, "gone", 10)
        tracker.save()
        faults.fail("fsync_file", errno.EIO)
        with pytest.raises(StoreError, match="cannot be saved"):
            tracker.fold("project", "gone")
        faults.mend()
        assert tracker.snapshot().projects["gone"].tokens_saved == 10
        tracker.fold("project", "gone")
        assert tracker.snapshot().projects.keys() == {OTHER}


@pytest.mark.parametrize("names", [1, 2], ids=["document", "document and journals"])
def test_fold_survives_a_damaged_document(store_path: Path, names: int) -> None:
    """No journal holds the change, so both documents have to."""
    with SavingsTracker(store_path, save_interval=3600) as tracker:
        record(tracker, "gone", 10)
        assert tracker.save()
        tracker.let_in("agent", "later")
        tracker.fold("project", "gone")
        for _ in range(names - 1):
            record(tracker, "gone", 5)
        store_path.write_bytes(b"damaged")
        with SavingsTracker(store_path) as another:
            snapshot = another.snapshot()
            assert snapshot.projects.keys() == {OTHER}
            assert snapshot.projects[OTHER].tokens_saved == 5 + 5 * names
            assert snapshot.ledger.crowds["agent"].admitted == {"later"}


class KillingFileSystem(FileSystem):
    """Kills the process at one of the calls that change something, once ``left`` is set."""

    left = -1

    def __getattribute__(self, name: str) -> Any:
        if name in _CHANGES and self.left >= 0:
            if not self.left:
                os.kill(os.getpid(), signal.SIGKILL)
            self.left -= 1
        return super().__getattribute__(name)


_CHANGES = {"create", "write_all", "write_at", "write_new", "fsync_file", "fsync_path", "fsync_directory", "sync_data"}
_CHANGES |= {"replace", "link", "rename", "unlink", "discard", "keep_copy"}


def fold_until_killed(path: Path, calls: int) -> bool:
    """Fold a name in a process of its own, which is killed at a call. Returns whether it was killed."""
    child = os.fork()
    if not child:
        status = 1
        try:
            filesystem = KillingFileSystem()
            command = SavingsTracker(path, save_interval=3600, filesystem=filesystem)
            filesystem.left = calls
            command.fold("project", "gone")
            status = 0
        finally:
            os._exit(status)
    exitcode = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert exitcode in (0, -signal.SIGKILL)
    return exitcode != 0


@pytest.mark.slow
@pytest.mark.needs("linux")
def test_killed_at_each_call_of_a_fold(store_path: Path) -> None:
    """The name is folded or not, no token is lost or counted twice, and the fold can be made again."""
    folded: list[bool] = []
    while True:
        path = store_path.with_name(f"{len(folded)}.json")
        with SavingsTracker(path, save_interval=3600) as tracker:
            record(tracker, "gone", 10)
            assert tracker.save()
            record(tracker, "gone", 7)
            if not fold_until_killed(path, len(folded)):
                break
            record(tracker, "gone", 3)
            projects = tracker.snapshot().projects
            folded.append("gone" not in projects)
            assert projects[OTHER if folded[-1] else "gone"].tokens_saved == 20
            assert len(projects) == 1
            if not folded[-1]:
                tracker.fold("project", "gone")
        with SavingsTracker(path) as again:
            record(again, "gone", 4)
            projects = again.snapshot().projects
            assert projects.keys() == {OTHER}
            assert projects[OTHER].tokens_saved == 24
        assert inspect(str(path)).problems == ()
    # Before the document is replaced, and after it.
    assert folded == sorted(folded)
    assert set(folded) == {False, True}


@pytest.mark.parametrize(("kind", "name"), [("project", "nothing"), ("project", OTHER), ("model", "p")])
def test_name_that_cannot_be_folded(tracker: SavingsTracker, kind: str, name: str) -> None:
    record(tracker, "p", 1)
    record(tracker, OTHER, 1)
    with pytest.raises(ValueError, match="no place"):
        tracker.fold(kind, name)
    with pytest.raises(ValueError, match="has a place"):
        tracker.let_in("project", "p")
    assert tracker.snapshot().operations.counts == tracker.snapshot().operations.counts
    assert tracker.health().healthy


def test_name_that_was_let_in_by_mistake(tracker: SavingsTracker) -> None:
    record(tracker, "p", 1)
    tracker.let_in("project", "typo")
    with pytest.raises(ValueError, match="has a place"):
        tracker.let_in("project", "typo")
    assert tracker.fold("project", "typo").requests == 0
    snapshot = tracker.snapshot()
    assert snapshot.ledger.crowds["project"].admitted == frozenset()
    assert snapshot.projects.keys() == {"p"}


def test_names_are_cleaned_as_in_records(tracker: SavingsTracker) -> None:
    name = "\x1b%41" + "x" * 5000
    tracker.let_in("project", name)
    record(tracker, name, 1)
    (admitted,) = tracker.snapshot().ledger.crowds["project"].admitted
    assert admitted.startswith("Axxx")
    assert len(admitted) <= 128
    assert admitted in tracker.snapshot().projects
    assert tracker.fold("project", name).tokens_saved == 1
    for kind, wrong, says in (("project", "\x1b", "printed"), ("agent", OTHER, "has a place"), ("agents", "a", "kind")):
        with pytest.raises(ValueError, match=says):
            tracker.let_in(kind, wrong)


@pytest.mark.slow
def test_commands_beside_a_running_service(store_path: Path) -> None:
    store = ("--store", str(store_path))
    with running("serve", *store) as service:
        for name in ("billing", "\x1b[31mred"):
            assert service.post({"model": "m", "project": name, "tokens_saved": 10})[0] == 200
        listed = run_cli("names", *store)
        assert listed.returncode == 0
        assert "billing" in listed.stdout
        assert "unknown/m" in listed.stdout
        assert "\x1b" not in listed.stdout
        folded = run_cli("names", "fold", "project", "billing", *store)
        assert folded.returncode == 0, folded.stderr
        assert "10 tokens and 1 request are in other" in folded.stdout
        assert "savings_project_tokens_saved_total" in folded.stdout
        metrics = service.metrics()
        assert metrics['savings_project_tokens_saved_total{project="other"}'] == 10
        assert 'savings_project_tokens_saved_total{project="billing"}' not in metrics
        assert service.post({"model": "m", "project": "billing", "tokens_saved": 5})[0] == 200
        assert service.metrics()['savings_project_tokens_saved_total{project="other"}'] == 15
        assert run_cli("names", *store, "let-in", "project", "billing").returncode == 0
        assert service.post({"model": "m", "project": "billing", "tokens_saved": 3})[0] == 200
        assert service.metrics()['savings_project_tokens_saved_total{project="billing"}'] == 3
        again = run_cli("names", *store, "fold", "project", "nothing")
        assert (again.returncode, again.stdout) == (1, "")
        assert "has no place" in again.stderr
        content = json.loads(run_cli("names", *store, "--json").stdout)
        assert content["project"]["let_in"] == ["billing"]
        assert content["provider/model"]["named"]["unknown/m"]["tokens_saved"] == 28
    assert WatchedFile(store_path).snapshot().lifetime.tokens_saved == 28


@pytest.mark.slow
def test_page_and_show_tell_what_is_in_other(store_path: Path) -> None:
    with SavingsTracker(store_path, max_projects=1) as tracker:
        record(tracker, "small", 1)
        record(tracker, "<large>", 100)
    shown = run_cli("show", "--store", str(store_path)).stdout
    assert "in other: <large>, which has saved 100 tokens" in shown
    with running("serve", "--store", str(store_path)) as service:
        assert "in other: &lt;large&gt;, which has saved 100 tokens" in service.get("/")[1]
        content = json.loads(service.get("/v1/savings")[1])
        assert content["in_other"]["project"] == [{"name": "<large>", "least": 100, "most": 100}]


def test_names_without_savings_do_not_fill_a_day(tracker: SavingsTracker) -> None:
    made_up = [SavingsRecord(model=f"m{n}", tokens_saved=0) for n in range(300)]
    assert tracker.record_many(made_up)
    for number in range(50):
        record(tracker, f"p{number}", 10)
    rows = tracker.days().rows
    assert {row.names.project for row in rows} >= {f"p{number}" for number in range(50)}
    assert sum(row.numbers[0] for row in rows) == 350
    assert len(rows) <= MOST_ROWS
