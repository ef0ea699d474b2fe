"""``savings-exporter doctor``: its report, its exit status, and that it leaves no files behind."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from savings_exporter import cli, doctor, tracker
from savings_exporter.storage import mounts
from savings_exporter.storage.mounts import FilesystemType
from tests.support.faults import FaultyFileSystem
from tests.support.mounts import mounted
from tests.support.service import run_cli
from tests.support.wait import WAIT_SECONDS, eventually

COMMIT_STEPS = ["append", "fsync_journal", "direct_write"]
STEPS = ["write", "fsync_file", "replace", "fsync_dir", *COMMIT_STEPS, "append_and_fsync_growing_file"]


@pytest.fixture
def disk(faults: FaultyFileSystem, monkeypatch: pytest.MonkeyPatch) -> FaultyFileSystem:
    """The file system that the command and its tracker use here, where faults can be made."""
    for module in (doctor, tracker):
        monkeypatch.setattr(module, "LOCAL", faults)
    return faults


@pytest.fixture
def _signals_as_before() -> Iterator[None]:
    """The command takes SIGTERM for itself, and here it runs in the process of the tests."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def run_here(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """Run the command line in this process, where faults can be made: its exit status."""
    monkeypatch.setattr(sys, "argv", ["savings-exporter", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_json_has_every_figure(tmp_path: Path) -> None:
    done = run_cli("doctor", "--json", env={"XDG_STATE_HOME": str(tmp_path / "not" / "yet")})
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["directory"] == str(tmp_path)
    found, mount = mounts.filesystem_type(str(tmp_path)), mounts.mount_of(str(tmp_path))
    assert report["filesystem"] == {
        "type": found.name,
        "is_network": found.is_network,
        "mount_point": mount.point if mount else None,
        "device": mount.device if mount else None,
    }
    assert report["directory_fsync_supported"] is True
    assert list(report["steps"]) == STEPS
    for step in report["steps"].values():
        assert step["runs"] >= 1
        assert 0 < step["median_seconds"] <= step["worst_seconds"]
    assert list(report["commits_per_second"]) == ["1", "8", "64"]
    assert all(rate > 0 for rate in report["commits_per_second"].values())
    cost = doctor.readable(1 / report["commits_per_second"]["1"])
    assert f"costs its caller {cost} here" in report["verdict"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.needs("mount")
def test_table_of_a_disk_in_memory(tmp_path: Path) -> None:
    disk = tmp_path / os.fsdecode(b"disk \xff")
    with mounted(disk, "tmpfs"):
        done = run_cli("doctor", "--store", str(disk / "savings.json"), env={"PYTHONIOENCODING": "utf-8:strict"})
        assert (done.returncode, done.stderr) == (0, "")
        assert list(disk.iterdir()) == []
    lines = done.stdout.splitlines()
    name = f"{tmp_path}/disk \N{REPLACEMENT CHARACTER}"
    assert lines[0] == f"{name}: tmpfs, mounted on {name} from savings-test"
    steps = [line.split()[0] for line in lines if re.search(r" (µs|ms|s) +[\d,]+$", line)]
    assert steps == STEPS
    threads = [line.split()[0] for line in lines if re.fullmatch(r"\d+ +[\d,]+", line)]
    assert threads == ["1", "8", "64"]
    said = " ".join(lines)
    assert "A saving costs its caller" in said
    assert said.count("Warning: ") == 1
    assert "this filesystem is in memory" in said


@pytest.mark.usefixtures("_signals_as_before")
def test_table_of_a_network_disk(
    tmp_path: Path, disk: FaultyFileSystem, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk.has_directory_fsync = disk.has_direct_io = False
    for module in (doctor, mounts):
        monkeypatch.setattr(module, "filesystem_type", lambda _path: FilesystemType("nfs", is_network=True))
    assert run_here(monkeypatch, "doctor", "--store", str(tmp_path)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"{tmp_path}: nfs, a network filesystem" in out.splitlines()[0]
    assert re.search(r"^fsync_dir +not supported *$", out, re.MULTILINE)
    said = " ".join(out.split())
    assert re.search(r"^direct_write +not supported *$", out, re.MULTILINE)
    assert "Warning: This file system has no direct, synchronous writes" in said
    assert "Warning: This filesystem has no directory fsync" in said
    assert "Warning: nfs is a network filesystem" in said
    assert "let one process only use a store" in said


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--nope"], 2, "--nope"),
        (["."], 2, "unexpected extra argument"),
        (["--store", "missing/savings.json"], 1, "mkdir -p"),
    ],
)
def test_mistake_gets_one_line(tmp_path: Path, arguments: list[str], status: int, said: str) -> None:
    done = run_cli("doctor", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (status, "", 1), done.stderr
    assert said in done.stderr


@pytest.mark.needs("mount")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("ro", "Read-only file system (EROFS)"),
        ("size=256k", "No space left on device (ENOSPC)"),
        ("nr_inodes=7", "cannot use the store: No space left on device (ENOSPC)"),
    ],
    ids=["read-only", "full", "full when the store is tried"],
)
def test_unusable_disk_gets_one_line(tmp_path: Path, options: str, said: str) -> None:
    with mounted(tmp_path, "tmpfs", options=options):
        done = run_cli("doctor", "--store", str(tmp_path))
        assert list(tmp_path.iterdir()) == []
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert str(tmp_path) in done.stderr
    assert said in done.stderr


@pytest.mark.usefixtures("_signals_as_before")
@pytest.mark.parametrize("step", ["write", "fsync_file", "replace", "fsync_dir", "append", "fsync_journal"])
def test_failing_step_gets_one_line(
    tmp_path: Path,
    disk: FaultyFileSystem,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    step: str,
) -> None:
    disk.fail(step, errno.EIO)
    assert run_here(monkeypatch, "doctor", "--store", str(tmp_path)) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("savings-exporter: ")
    assert err.count("\n") == 1
    # This one fails in the store that is tried out.
    if step == "append":
        assert "append failed: Input/output error (EIO)" in err
    else:
        remedy = "fix that or name another directory"
        assert f"{tmp_path}: a store cannot be kept here: Input/output error (EIO); {remedy}\n" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "status", "reached", "printed"),
    # After the ^C of a terminal, Click begins a new line.
    [(signal.SIGINT, 130, "*/proxy_savings.json.journal.*", "\n"), (signal.SIGTERM, 143, "*/document", "")],
    ids=["SIGINT while threads record", "SIGTERM while saves are measured"],
)
def test_interrupt_leaves_nothing(tmp_path: Path, number: int, status: int, reached: str, printed: str) -> None:
    command = [sys.executable, "-m", "savings_exporter", "doctor"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "SAVINGS_EXPORTER_STORE": str(tmp_path / "savings.json")},
    ) as process:
        try:
            eventually(lambda: list(tmp_path.glob(reached)), "the doctor to be at work")
            process.send_signal(number)
            out, err = process.communicate(timeout=WAIT_SECONDS)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (status, "", printed)
    assert list(tmp_path.iterdir()) == []


def test_symlink_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "savings.json"
    link.symlink_to(Path("real", "savings.json"))
    assert doctor.directory_of(str(link)) == str(tmp_path / "real")


@pytest.mark.parametrize(
    ("seconds", "said"), [(4.56789e-7, "0.457 µs"), (9.996e-4, "1 ms"), (0.0123456, "12.3 ms"), (2.5, "2.5 s")]
)
def test_durations_are_readable(seconds: float, said: str) -> None:
    assert doctor.readable(seconds) == said
