"""Watching a file that another program owns."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from savings_exporter import SavingsRecord, SavingsTracker, StoreError
from savings_exporter.watched import WatchedFile
from tests.support.paths import DATA
from tests.support.scrape import parsed
from tests.support.service import run_cli, running

OLDER = DATA / "headroom" / "v5" / "proxy_savings.json"
NEWER = DATA / "headroom" / "v6-latest" / "proxy_savings.json"
OLDER_TOTAL, NEWER_TOTAL = 2_835_043, 2_672_322


@pytest.fixture
def watched(tmp_path: Path) -> Path:
    """A copy of a file of Headroom's, alone in its directory."""
    path = tmp_path / "headroom" / "proxy_savings.json"
    path.parent.mkdir()
    path.write_bytes(OLDER.read_bytes())
    return path


def replace(path: Path, data: bytes) -> None:
    """Replace a file as Headroom does."""
    temporary = path.with_name(".proxy_savings_new.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def total(text: str) -> float:
    """The sum over models."""
    return sum(value for name, value in parsed(text).items() if name.startswith("savings_tokens_saved_total{"))


def test_scrape_sees_changes(watched: Path) -> None:
    """And nothing is ever written."""
    with running("watch", str(watched)) as service:
        assert total(service.get("/metrics")[1]) == OLDER_TOTAL
        replace(watched, NEWER.read_bytes())
        assert total(service.get("/metrics")[1]) == NEWER_TOTAL
        assert json.loads(service.get("/v1/savings")[1])["lifetime"]["tokens_saved"] == NEWER_TOTAL
        assert service.get("/")[0] == 200
        assert service.get("/-/healthy")[0] == service.get("/-/ready")[0] == 200
        status, problem = service.post({"model": "m", "tokens_saved": 1})
        assert (status, problem["status"]) == (405, 405)
        assert "savings-exporter serve" in problem["detail"]
        assert service.stop()[0] == 0
    assert watched.read_bytes() == NEWER.read_bytes()
    assert [entry.name for entry in watched.parent.iterdir()] == ["proxy_savings.json"]


def test_unreadable_file(watched: Path) -> None:
    """The last totals stay, and the service is not healthy."""
    with running("watch", str(watched)) as service:
        for breaking in (watched.unlink, lambda: watched.write_bytes(b'{"schema_version": 6, "lifeti')):
            breaking()
            text = service.get("/metrics")[1]
            assert total(text) == OLDER_TOTAL
            assert parsed(text)["savings_watched_file_readable"] == 0
            status, body = service.get("/-/healthy")
            assert status == 503
            assert str(watched) in json.loads(body)["detail"]
        replace(watched, OLDER.read_bytes())
        assert parsed(service.get("/metrics")[1])["savings_watched_file_readable"] == 1
        assert service.get("/-/healthy")[0] == 200
        assert f"{watched}: can be read again" in service.stop()[2]


def test_damaged_store_of_a_tracker(store_path: Path) -> None:
    """A document of this program is reported like that of another one."""
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_request(model="m", tokens_saved=5).durable
    whole = store_path.read_bytes()
    with running("watch", str(store_path)) as service:
        for damaged in (b"{broken", b"", whole[:-5]):
            replace(store_path, damaged)
            assert total(service.get("/metrics")[1]) == 5
            assert parsed(service.get("/metrics")[1])["savings_watched_file_readable"] == 0
            assert service.get("/-/healthy")[0] == 503
            replace(store_path, whole)
            assert service.get("/-/healthy")[0] == 200


def test_whose_time_it_is(watched: Path) -> None:
    """A copy of a file is no news: shown is what the document says, and when it was read."""
    activity = "2026-06-09T02:22:33+00:00"
    os.utime(watched)
    started = datetime.now(timezone.utc)
    with running("watch", str(watched)) as service:
        shown = json.loads(service.get("/v1/savings")[1])
        assert (shown["last_record_at"], shown["saved_at"]) == (activity, None)
        assert started < datetime.fromisoformat(shown["read_at"]) <= datetime.now(timezone.utc)
        scraped = parsed(service.get("/metrics")[1])
        assert scraped["savings_last_record_timestamp_seconds"] == datetime.fromisoformat(activity).timestamp()
        assert scraped["savings_last_save_success_timestamp_seconds"] == 0
        page = service.get("/")[1]
        assert re.search(r"last: 2026-06-09 02:22:33 UTC \([0-9,]+ days ago\)", page)
        assert re.search(r"read 2[0-9-]+ [0-9:]+ UTC", page)
        assert "saved 2" not in page
        # While it is damaged, the time of the last good reading stays.
        watched.write_text("{")
        times = {json.loads(service.get("/v1/savings")[1])["read_at"] for _ in range(2)}
        assert len(times) == 1


@pytest.mark.parametrize(
    "content", ["{", '{"schema_version": 7}', '{"schema_version": 6, "lifetime": {"requests": "x"}}']
)
def test_advice_is_for_a_reader(watched: Path, content: str) -> None:
    """The file is another program's: nobody is told to move it away or to repair it."""
    with running("watch", str(watched)) as service:
        watched.write_text(content)
        detail = json.loads(service.get("/-/healthy")[1])["detail"]
        assert re.search(r"\. The totals read at 2[0-9-]+ [0-9:]+ UTC are still shown\. ", detail)
    started = run_cli("watch", str(watched)).stderr
    for said in (detail, started):
        assert str(watched) in said
        assert said.count("the program that writes it, or its operator, has to fix it") == 1
        assert not re.search("move|--repair|--store|backup|lost", said)
    assert started.count("\n") == 1


def test_document_that_is_away(watched: Path) -> None:
    """Also beside a tracker that took it over and has not saved: it is no empty store."""
    with SavingsTracker(watched):
        pass
    file = WatchedFile(watched)
    data = watched.read_bytes()
    watched.unlink()
    assert file.snapshot().lifetime.tokens_saved == OLDER_TOTAL
    assert "there is no such file" in (file.health().reason or "")
    found = run_cli("verify", "--store", str(watched))
    assert (found.returncode, "there is no store yet" in found.stderr) == (1, True)
    watched.write_bytes(data)
    assert file.snapshot().lifetime.tokens_saved == OLDER_TOTAL
    assert file.health().healthy


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def with_figure(figure: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        document = json.loads(NEWER.read_bytes())
        document["lifetime"]["tokens_saved"] = figure
        path.write_text(json.dumps(document))

    return write


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (Path.unlink, "there is no such file"),
        (directory, "Is a directory"),
        (lambda path: path.write_bytes(b""), "the file is empty"),
        (lambda path: path.write_bytes(NEWER.read_bytes()[:-9]), "is damaged: not JSON"),
        (lambda path: path.write_text('{"schema_version": 7}'), "schema_version is 7"),
        (with_figure(10**30), "lifetime.tokens_saved cannot be read"),
        (with_figure(float("nan")), "lifetime.tokens_saved cannot be read"),
        (with_figure("many"), "lifetime.tokens_saved cannot be read"),
    ],
)
def test_last_totals_stay(watched: Path, change: Callable[[Path], None], reason: str) -> None:
    file = WatchedFile(watched)
    assert file.snapshot().lifetime.tokens_saved == OLDER_TOTAL
    change(watched)
    for _ in range(2):
        assert file.snapshot().lifetime.tokens_saved == OLDER_TOTAL
        assert not file.health().healthy
        assert reason in (file.health().reason or "")
    if watched.is_dir():
        watched.rmdir()
    replace(watched, NEWER.read_bytes())
    assert file.snapshot().lifetime.tokens_saved == NEWER_TOTAL
    assert file.health().healthy


def test_no_file_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no such file"):
        WatchedFile(tmp_path / "none.json")
    assert list(tmp_path.iterdir()) == []


def test_names_are_bounded(tmp_path: Path) -> None:
    models = {f"m{number}": {"requests": 1, "tokens_saved": number} for number in range(1000)}
    document = {"schema_version": 6, "lifetime": {"requests": 1000, "tokens_saved": sum(range(1000))}}
    (tmp_path / "p.json").write_text(json.dumps({**document, "by_model": models}))
    snapshot = WatchedFile(tmp_path / "p.json").snapshot()
    assert len(snapshot.by_model) == len(snapshot.by_provider_model) == 201
    assert snapshot.by_model["other"].tokens_saved == sum(range(800))


def test_link_to_another_file(watched: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(watched)
    file = WatchedFile(link)
    assert file.snapshot().lifetime.tokens_saved == OLDER_TOTAL
    other = tmp_path / "other.json"
    other.write_bytes(NEWER.read_bytes())
    link.unlink()
    link.symlink_to(other)
    assert file.snapshot().lifetime.tokens_saved == NEWER_TOTAL


def test_store_of_a_tracker(store_path: Path) -> None:
    """What its journal holds is shown too, while it records and saves, and nothing is written."""
    with SavingsTracker(store_path, save_interval=3600) as tracker:
        assert tracker.record_request(model="m", tokens_saved=1)
        file = WatchedFile(store_path)
        for number in range(2, 30):
            # Some of them fill a segment, and some are saved and their segments removed.
            assert tracker.record_many([SavingsRecord(model="m", tokens_saved=1)] * (number % 5 * 500 + 1))
            for _ in range(number % 4):
                assert tracker.save()
            assert file.snapshot().lifetime == tracker.snapshot().lifetime
            assert file.health().healthy
    before = {entry.name: entry.stat().st_mtime_ns for entry in store_path.parent.iterdir()}
    assert file.snapshot().lifetime == WatchedFile(store_path).snapshot().lifetime
    assert {entry.name: entry.stat().st_mtime_ns for entry in store_path.parent.iterdir()} == before


def test_tracker_then_headroom(store_path: Path) -> None:
    """Another program's document in the place of a store that was closed."""
    with SavingsTracker(store_path) as tracker:
        tracker.record_request(model="m", tokens_saved=1)
    file = WatchedFile(store_path)
    document = json.loads(store_path.read_bytes())
    del document["savings_exporter"]
    document["lifetime"]["tokens_saved"] += 5
    replace(store_path, json.dumps(document).encode())
    assert file.snapshot().lifetime.tokens_saved == 6
    assert file.health().healthy
    # This one was not made from ours, and lacks our record.
    replace(store_path, NEWER.read_bytes())
    assert file.snapshot().lifetime.tokens_saved == 6
    assert "this store holds 1 tokens saved in 1 records that the document lacks" in (file.health().reason or "")


def test_conflict(store_path: Path) -> None:
    """While its journal holds more, the last totals stay, and the reason says what each holds."""
    with SavingsTracker(store_path, save_interval=3600) as tracker:
        assert tracker.record_request(model="m", tokens_saved=1)
        assert tracker.save()
        assert tracker.record_request(model="m", tokens_saved=2)
        file = WatchedFile(store_path)
        replace(store_path, NEWER.read_bytes())
        assert file.snapshot().lifetime.tokens_saved == 3
        reason = file.health().reason or ""
        assert "another program rewrote the document" in reason
        assert "this store holds 3 tokens saved in 2 records" in reason
