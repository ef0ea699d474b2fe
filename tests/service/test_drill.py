"""The fire drill: a running service reports simulated failures but still stores every saving."""

from __future__ import annotations

import errno
import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from savings_exporter import SavingsTracker
from savings_exporter.service.drill import KINDS, DrillError, Drills, taking_drills
from savings_exporter.telemetry.metrics import DRILLS, SavingsCollector
from tests.support.faults import FaultyFileSystem
from tests.support.scrape import samples
from tests.support.service import run_cli, running
from tests.support.wait import WAIT_SECONDS, eventually

SAVING: dict[str, Any] = {"model": "m", "tokens_saved": 7}


def test_every_drill_has_its_series_from_the_start() -> None:
    assert tuple(KINDS) == DRILLS


@pytest.mark.parametrize(
    ("name", "series"),
    [
        ("dir-fsync", 'savings_fsync_failures_total{target="directory"}'),
        ("file-fsync", 'savings_fsync_failures_total{target="file"}'),
        ("journal-fsync", 'savings_fsync_failures_total{target="journal"}'),
    ],
)
def test_a_drill_is_counted_like_the_failure_and_touches_no_saving(name: str, series: str, store_path: Path) -> None:
    with running("serve", "--store", str(store_path), "--enable-drill") as service:
        assert service.post(SAVING)[1]["sequence"] == 1
        asked = run_cli("drill", name, "--seconds", "600", "--store", str(store_path))
        assert (asked.returncode, asked.stderr) == (0, "")
        assert KINDS[name].alert in asked.stdout
        eventually(lambda: service.metrics()[series] > 0, "the drill to be counted")
        again = run_cli("drill", name, "--store", str(store_path))
        assert again.returncode == 1
        assert "another drill is running" in again.stderr
        assert service.metrics()[f'savings_drill_active{{drill="{name}"}}'] == 1
        status, answer = service.post(SAVING)
        assert (status, answer["durable"], answer["sequence"]) == (200, True, 2)
        assert service.get("/-/healthy")[0] == 200
        status, _, log = service.stop()
    assert status == 0
    lines = [line for line in log.splitlines() if "fire drill" in line]
    assert any(f"{KINDS[name].step} failed: Input/output error (EIO)" in line for line in lines)
    assert all("drill=true" in line for line in lines)
    with SavingsTracker(store_path) as tracker:
        assert tracker.snapshot().sequence == 2


def test_a_drill_ends_by_itself_and_leaves_the_directory_well(tracker: SavingsTracker) -> None:
    metrics = SavingsCollector(tracker)
    Drills(tracker).begin("dir-fsync", 0.001)
    eventually(lambda: samples(metrics)['savings_fsync_failures_total{target="directory"}'] == 1, "the failure")
    eventually(lambda: samples(metrics)['savings_drill_active{drill="dir-fsync"}'] == 0, "the end")
    assert samples(metrics)["savings_last_dir_fsync_success"] == 1


def test_a_directory_fsync_that_really_fails_during_a_drill_is_still_known_at_its_end(
    tracker: SavingsTracker, faults: FaultyFileSystem
) -> None:
    metrics, drills = SavingsCollector(tracker), Drills(tracker)
    drills.begin("dir-fsync", 60)
    eventually(lambda: samples(metrics)['savings_fsync_failures_total{target="directory"}'], "a failure")
    faults.fail("fsync_dir", errno.EIO)
    tracker.record_request(**SAVING)
    assert not tracker.save()
    drills.stop()
    assert samples(metrics)["savings_last_dir_fsync_success"] == 0


def test_slow_saves_are_seen_as_slow(store_path: Path) -> None:
    with running("serve", "--store", str(store_path), "--enable-drill") as service:
        assert run_cli("drill", "save-latency", "--seconds", "3", "--store", str(store_path)).returncode == 0
        slow = 'savings_save_step_duration_seconds_sum{step="fsync_file"}'
        eventually(lambda: service.metrics()[slow] >= 2, "a save that took two seconds")


def test_spans_say_that_it_is_a_drill(store_path: Path) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with SavingsTracker(store_path, tracer_provider=provider) as tracker:
        tracker.record_request(**SAVING)
        drills = Drills(tracker)
        drills.begin("dir-fsync", 60)
        metrics = SavingsCollector(tracker)
        eventually(lambda: samples(metrics)['savings_fsync_failures_total{target="directory"}'], "a failure")
        drills.stop()
        assert samples(metrics)['savings_drill_active{drill="dir-fsync"}'] == 0
    marked = {
        span.name for span in exporter.get_finished_spans() if (span.attributes or {}).get("savings.drill") == "true"
    }
    assert marked == {"savings.save", "savings.save.fsync_dir"}
    real = [span for span in exporter.get_finished_spans() if (span.attributes or {}).get("savings.records")]
    assert real
    assert not any("savings.drill" in (span.attributes or {}) for span in real)


@pytest.mark.parametrize("seconds", [0.0, -1.0, 3601.0, float("nan")])
def test_a_drill_without_an_end_does_not_begin(tracker: SavingsTracker, seconds: float) -> None:
    with pytest.raises(DrillError, match="3600 seconds at most"):
        Drills(tracker).begin("dir-fsync", seconds)


def test_a_service_that_was_not_asked_to_takes_none(store_path: Path) -> None:
    with running("serve", "--store", str(store_path)):
        asked = run_cli("drill", "dir-fsync", "--store", str(store_path))
    assert asked.returncode == 1
    assert "serve --enable-drill" in asked.stderr
    assert len(asked.stderr.splitlines()) == 1


def test_only_the_services_own_user_reaches_it_and_nothing_of_it_stays(tmp_path: Path) -> None:
    directory = tmp_path / ("long" * 30)
    directory.mkdir()
    store = directory / "proxy_savings.json"
    with running("serve", "--store", str(store), "--enable-drill") as service:
        (socket,) = (entry for entry in directory.iterdir() if stat.S_ISSOCK(entry.stat().st_mode))
        assert stat.S_IMODE(socket.stat().st_mode) == 0o600
        other = run_cli("serve", "--store", str(store), "--enable-drill", "--web.listen-address", "127.0.0.1:0")
        assert other.returncode == 1
        assert "another service accepts drills" in other.stderr
        assert run_cli("drill", "dir-fsync", "--seconds", "60", "--store", str(store)).returncode == 0
        assert service.stop()[0] == 0
    assert not [entry for entry in os.listdir(directory) if "drill" in entry]


def asked(directory: Path, question: bytes) -> bytes:
    """The answer of the service to a client that violates the protocol, in a directory with a short name."""
    with socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(WAIT_SECONDS)
        asking.connect(str(directory / ".proxy_savings.json.drill"))
        asking.sendall(question)
        return asking.recv(4096)


@pytest.fixture
def short_directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


@pytest.mark.parametrize(
    "question",
    [
        b"{}",
        b"\xff",
        b"[" * 4000,
        b'{"drill": "dir-fsync", "seconds": ' + b"9" * 400 + b"}",
        b'{"drill": "dir-fsync", "seconds": null}',
        b'{"drill": "dir-fsync", "seconds": 60',
    ],
    ids=lambda question: question[:20],
)
def test_what_is_no_question_is_refused_and_the_next_is_answered(question: bytes, short_directory: Path) -> None:
    with SavingsTracker(short_directory / "proxy_savings.json") as tracker, taking_drills(tracker):
        assert asked(short_directory, question) == b'{"refused":"the request is not a drill"}'
        assert asked(short_directory, b'{"drill": "dir-fsync", "seconds": 1}') == b'{"refused":""}'


def test_who_asks_and_says_nothing_does_not_keep_the_service_from_stopping(short_directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent, socket.socket(socket.AF_UNIX) as also_silent:
        with SavingsTracker(short_directory / "proxy_savings.json") as tracker, taking_drills(tracker):
            for asking in (silent, also_silent):
                asking.connect(str(short_directory / ".proxy_savings.json.drill"))
        assert not list(short_directory.glob(".*"))


def test_a_file_that_is_no_socket_stays(store_path: Path) -> None:
    other = store_path.parent / f".{store_path.name}.drill"
    other.write_text("somebody's")
    service = run_cli("serve", "--store", str(store_path), "--enable-drill", "--web.listen-address", "127.0.0.1:0")
    assert service.returncode == 1
    assert f"{other}: cannot accept drills: Address already in use" in service.stderr
    assert other.read_text() == "somebody's"


def test_what_a_killed_service_left_is_in_nobodys_way(store_path: Path) -> None:
    with running("serve", "--store", str(store_path), "--enable-drill") as service:
        service.process.kill()
        service.process.wait()
    assert run_cli("drill", "dir-fsync", "--store", str(store_path)).returncode == 1
    with running("serve", "--store", str(store_path), "--enable-drill"):
        assert run_cli("drill", "dir-fsync", "--seconds", "1", "--store", str(store_path)).returncode == 0
