"""What Headroom's tracker and this program do at each failure. ``docs/headroom.md`` has the table of these rows."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from savings_exporter import CorruptStoreError, NewerSchemaError, SavingsRecord, SavingsTracker
from savings_exporter.telemetry.metrics import SavingsCollector
from tests.support.faults import FaultyFileSystem
from tests.support.headroom_tracker import running_headroom
from tests.support.paths import ROOT
from tests.support.scrape import samples
from tests.support.service import run_cli
from tests.support.wait import eventually

pytestmark = pytest.mark.needs("headroom", "strace")

BEGUN = datetime(2026, 3, 1, tzinfo=timezone.utc)


def request(tokens: int, at: datetime = BEGUN) -> dict[str, Any]:
    """The same request for both programs."""
    return {"model": "m", "provider": "p", "input_tokens": 10, "tokens_saved": tokens, "timestamp": at.isoformat()}


def saved(path: Path) -> int:
    """The lifetime tokens of a document that Headroom wrote."""
    tokens: int = json.loads(path.read_bytes())["lifetime"]["tokens_saved"]
    return tokens


def tracked(path: Path) -> int:
    """The lifetime tokens of our store after it is opened again."""
    with SavingsTracker(path) as tracker:
        return tracker.snapshot().lifetime.tokens_saved


def fsync_fails_in_headroom(path: Path) -> None:
    """Nothing shows it."""
    strace = ["strace", "-f", "-o", os.devnull, "-e", "trace=fsync", "-P", str(path.parent)]
    with running_headroom(path, wrapped_by=[*strace, "-e", "inject=fsync:error=EIO"]) as headroom:
        headroom.record(request(5))
        assert headroom.health() | {"last_saved_at": None} == {
            "enabled": True,
            "healthy": True,
            "error": None,
            "pending_records": 0,
            "last_saved_at": None,
        }
        assert headroom.health()["last_saved_at"]


def fsync_fails_here(path: Path) -> None:
    """The record is durable in the journal, and the failed save is reported, counted and repeated."""
    faults = FaultyFileSystem()
    with SavingsTracker(path, filesystem=faults, save_interval=3600) as tracker:
        receipt = tracker.record_request(**request(5))
        assert receipt.durable
        faults.fail("fsync_dir", errno.EIO)
        assert not tracker.save()
        assert "fsync_dir" in (tracker.health().reason or "")
        found = samples(SavingsCollector(tracker))
        assert found['savings_fsync_failures_total{target="directory"}'] >= 1
        assert found["savings_store_healthy"] == 0
        faults.mend()
        eventually(lambda: tracker.health().healthy, "the save to be repeated")
    assert tracked(path) == 5


def two_processes_of_headroom(path: Path) -> None:
    """The document of the one that saved last remains."""
    with running_headroom(path) as first, running_headroom(path) as second:
        first.record(request(5), request(5))
        second.record(request(300))
        assert saved(path) == 300
        first.record(request(5))
        assert saved(path) == 15


_PROCESS = """
import sys
from savings_exporter import SavingsTracker
tracker = SavingsTracker(sys.argv[1], save_interval=3600)
for tokens in map(int, sys.argv[2:]):
    assert tracker.record_request(model="m", tokens_saved=tokens).durable
print("done", flush=True)
sys.stdin.read()
tracker.close()
"""


def process(path: Path, *tokens: int) -> subprocess.Popen[str]:
    """A process that has recorded durably, and still has its tracker open."""
    command = [sys.executable, "-c", _PROCESS, str(path), *map(str, tokens)]
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    assert started.stdout.readline() == "done\n"
    return started


def two_processes_here(path: Path) -> None:
    """Each record counts, whoever saves last."""
    with process(path, 5, 5) as first, process(path, 300) as second:
        for each in (second, first):
            each.communicate()
    assert tracked(path) == 310


def headroom_is_killed(path: Path) -> None:
    """Up to 24 requests that it has recorded are gone: its proxy saves after every 25th."""
    with running_headroom(path, flush_every=25) as headroom:
        headroom.record(*(request(1) for _ in range(25 + 24)))
        assert headroom.lifetime()["requests"] == 49
        headroom.process.send_signal(signal.SIGKILL)
        headroom.process.wait()
    assert saved(path) == 25


def this_is_killed(path: Path) -> None:
    """Each record that was acknowledged is there."""
    with process(path, *(1 for _ in range(49))) as killed:
        killed.kill()
    assert tracked(path) == 49


def headroom_does_not_start(path: Path) -> None:
    """It does not handle the error: its tracker cannot be created, and the file stays as it is."""
    with running_headroom(path) as headroom:
        headroom.record(request(5))
    damaged = path.read_bytes().replace(b'"model": "m"', b'"model": "\xff"')
    path.write_bytes(damaged)
    with pytest.raises(AssertionError, match="UnicodeDecodeError"), running_headroom(path):
        pass
    assert path.read_bytes() == damaged


def invalid_text_here(path: Path) -> None:
    """Our document is rebuilt; that of another program is refused with one line."""
    for tokens in (5, 6):
        with SavingsTracker(path) as tracker:
            assert tracker.record_request(**request(tokens)).durable
    damaged = path.read_bytes().replace(b'"model":"m"', b'"model":"\xff"')
    assert damaged != path.read_bytes()
    path.write_bytes(damaged)
    assert tracked(path) == 11
    assert damaged in {copy.read_bytes() for copy in path.parent.glob("*.corrupt-*")}
    other = path.with_name("other.json")
    other.write_bytes(b'{"schema_version": 6, "lifetime": {"tokens_saved": 5}, "x": "\xff"}')
    with pytest.raises(CorruptStoreError, match="not JSON") as refused:
        SavingsTracker(other)
    assert "\n" not in str(refused.value)


def newer(path: Path) -> bytes:
    data = json.dumps({"schema_version": 7, "lifetime": {"requests": 1, "tokens_saved": 5}, "quality": {"a": 1}})
    path.write_text(data)
    return data.encode()


def headroom_reads_newer(path: Path) -> None:
    """It writes what it knows over it, as schema 6."""
    newer(path)
    with running_headroom(path) as headroom:
        headroom.record(request(6))
    document = json.loads(path.read_bytes())
    assert (document["schema_version"], document["lifetime"]["tokens_saved"]) == (6, 11)
    assert "quality" not in document


def newer_is_refused_here(path: Path) -> None:
    data = newer(path)
    with pytest.raises(NewerSchemaError, match="schema_version is 7, and this program knows up to 6"):
        SavingsTracker(path)
    assert path.read_bytes() == data


# Requests on five days. Headroom keeps the last 5,000 of them: all 400 of the first day go, and 100 of the second.
DAYS = {0: 400, 1: 1_000, 2: 1_400, 3: 1_400, 4: 1_300}


def on_days() -> list[dict[str, Any]]:
    return [request(1, BEGUN + timedelta(days=day, seconds=n)) for day, count in DAYS.items() for n in range(count)]


def headroom_trims_points(path: Path) -> None:
    """All that was saved before counts on the oldest day that is left."""
    requests = on_days()
    points = [{**each, "total_tokens_saved": n + 1} for n, each in enumerate(requests[:-200])]
    total = {"requests": len(points), "tokens_saved": len(points)}
    path.write_text(json.dumps({"schema_version": 6, "lifetime": total, "history": points[-5_000:]}))
    with running_headroom(path) as headroom:
        headroom.record(*requests[-200:])
        daily = [row["tokens_saved"] for row in headroom.series("daily")]
    assert daily == [DAYS[0] + DAYS[1], DAYS[2], DAYS[3], DAYS[4]]


def days_of(path: Path, requests: list[dict[str, Any]]) -> list[int]:
    """What our export shows for each day."""
    with SavingsTracker(path) as tracker:
        for at in range(0, len(requests), 1_000):
            records = [
                SavingsRecord(**{**each, "timestamp": datetime.fromisoformat(each["timestamp"])})
                for each in requests[at : at + 1_000]
            ]
            assert tracker.record_many(records).durable
    rows = json.loads(run_cli("export", "--json", "--by", "day", "--store", str(path)).stdout)["rows"]
    return [row["tokens_saved"] for row in rows]


def many_points_here(path: Path) -> None:
    """Each of the last 731 days has what was saved on it."""
    assert days_of(path, on_days()) == list(DAYS.values())


def over_a_year() -> list[dict[str, Any]]:
    """400 tokens on a day, and three on the days around a year later."""
    return [request(tokens, BEGUN + timedelta(days=day)) for day, tokens in ((0, 400), (1, 1), (365, 1), (366, 1))]


def headroom_trims_a_year(path: Path) -> None:
    with running_headroom(path) as headroom:
        headroom.record(*over_a_year())
        assert [row["tokens_saved"] for row in headroom.series("daily")] == [401, 1, 1]


def over_a_year_here(path: Path) -> None:
    begun = datetime.now(timezone.utc) - timedelta(days=400)
    requests = [
        {**each, "timestamp": (datetime.fromisoformat(each["timestamp"]) - BEGUN + begun).isoformat()}
        for each in over_a_year()
    ]
    assert days_of(path, requests) == [400, 1, 1, 1]


def disk_is_full_for_headroom(path: Path) -> None:
    """Its proxy goes on, its health says so, and what it could not write ends with its process."""
    with running_headroom(path, wrapped_by=_full_disk()) as headroom:
        headroom.record(*(request(1) for _ in range(7)))
        assert headroom.health()["healthy"] is False
        assert "No space left on device" in headroom.health()["error"]
        assert headroom.lifetime()["tokens_saved"] == 7
    assert not path.exists()


def _full_disk() -> list[str]:
    """strace that makes each fsync fail, as a file system does that allocates blocks late."""
    return ["strace", "-f", "-o", os.devnull, "-e", "trace=fsync", "-e", "inject=fsync:error=ENOSPC"]


def disk_is_full_here(path: Path) -> None:
    """Each receipt says so, metrics and health say so, and the records are written when there is space."""
    faults = FaultyFileSystem()
    with SavingsTracker(path, filesystem=faults) as tracker:
        for step in ("append", "fsync_journal", "write"):
            faults.fail(step, errno.ENOSPC)
        receipts = [tracker.record_request(**request(1)) for _ in range(7)]
        assert not any(receipt.durable for receipt in receipts)
        assert tracker.health().error == "ENOSPC"
        assert samples(SavingsCollector(tracker))["savings_tokens_pending"] == 7
        assert tracker.snapshot().lifetime.tokens_saved == 0
        faults.mend()
        assert all(receipt.wait(30) for receipt in receipts)
    assert tracked(path) == 7


def wrong_figure(path: Path, figure: str) -> bytes:
    data = f'{{"schema_version": 6, "lifetime": {{"requests": {figure}, "tokens_saved": 5}}}}'.encode()
    path.write_bytes(data)
    return data


def headroom_reads_zero(path: Path, figure: str) -> None:
    """The figure is zero from then on."""
    wrong_figure(path, figure)
    with running_headroom(path) as headroom:
        assert headroom.lifetime()["requests"] == 0
        headroom.record(request(6))
    assert json.loads(path.read_bytes())["lifetime"]["requests"] == 1


def figure_is_refused_here(path: Path, figure: str) -> None:
    data = wrong_figure(path, figure)
    with pytest.raises(CorruptStoreError, match=r"lifetime\.requests cannot be read: .* Another program wrote it"):
        SavingsTracker(path)
    assert path.read_bytes() == data


class Row(NamedTuple):
    """A row of the table: what Headroom does, and what this program does, each with a document of its own."""

    headroom: Callable[[Path], None]
    here: Callable[[Path], None]


ROWS = {
    "A directory fsync fails": Row(fsync_fails_in_headroom, fsync_fails_here),
    "Two processes use one file": Row(two_processes_of_headroom, two_processes_here),
    "The process is killed": Row(headroom_is_killed, this_is_killed),
    "The disk is full": Row(disk_is_full_for_headroom, disk_is_full_here),
    "The file is not valid UTF-8": Row(headroom_does_not_start, invalid_text_here),
    "A newer version wrote the file": Row(headroom_reads_newer, newer_is_refused_here),
    "A figure is NaN": Row(
        lambda path: headroom_reads_zero(path, "NaN"), lambda path: figure_is_refused_here(path, "NaN")
    ),
    "A figure is text": Row(
        lambda path: headroom_reads_zero(path, '"many"'), lambda path: figure_is_refused_here(path, '"many"')
    ),
    "More than 5,000 requests": Row(headroom_trims_points, many_points_here),
    "More than 365 days": Row(headroom_trims_a_year, over_a_year_here),
}


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str, tmp_path: Path) -> None:
    for program, reproduce in ROWS[name]._asdict().items():
        directory = tmp_path / program
        directory.mkdir()
        reproduce(directory / "proxy_savings.json")


def test_documented_rows() -> None:
    """The table in the documents has these rows, in this order."""
    document = (ROOT / "docs" / "headroom.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| failure \|.*\n\| --- .*\n((?:\|.*\n)+)", document, re.MULTILINE)
    assert [line.split("|")[1].strip() for line in table.splitlines()] == list(ROWS)
