"""Large files of other programs, and files with many wrong entries."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from savings_exporter.formats.headroom import MOST_BYTES
from savings_exporter.storage.filesystem import FileSystem, Identity
from savings_exporter.watched import WatchedFile
from tests.support.paths import DATA
from tests.support.service import run_cli, running

HEADROOM = (DATA / "headroom" / "v6-latest" / "proxy_savings.json").read_text()
TOTAL = 2_672_322


class CountingFileSystem(FileSystem):
    """Counts how often whole files are read."""

    def __init__(self) -> None:
        self.reads: list[str] = []

    def read(self, path: str) -> tuple[bytes, Identity]:
        self.reads.append(path)
        return super().read(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A document of Headroom."""
    path = tmp_path / "proxy_savings.json"
    path.write_text(HEADROOM)
    return path


def too_large(path: Path) -> None:
    """Put a document that is too large in the place of another one. It takes no space on the disk."""
    path.with_suffix(".new").write_text(HEADROOM)
    os.truncate(path.with_suffix(".new"), MOST_BYTES + 1)
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("command", ["show", "watch", "export", "import"])
def test_file_that_is_too_large(path: Path, command: str) -> None:
    too_large(path)
    arguments = {
        "watch": ["watch", str(path)],
        "import": ["import", str(path), "--store", f"{path}.ours"],
    }
    done = run_cli(*arguments.get(command, [command, "--store", str(path)]))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert f"{MOST_BYTES + 1:,} bytes, and at most {MOST_BYTES:,} are read" in done.stderr
    assert str(path) in done.stderr


def test_watched_file_that_becomes_too_large(path: Path) -> None:
    with running("watch", str(path)) as service:
        too_large(path)
        status, text = service.get("/-/healthy")
        assert (status, "are read" in text) == (503, True)
        assert json.loads(service.get("/v1/savings")[1])["lifetime"]["tokens_saved"] == TOTAL
        path.with_suffix(".new").write_text(HEADROOM)
        path.with_suffix(".new").replace(path)
        assert service.get("/-/healthy")[0] == 200


def test_unchanged_file_is_read_once(path: Path) -> None:
    fs = CountingFileSystem()
    watched = WatchedFile(path, fs)
    reads = fs.reads.count(str(path))
    for _ in range(3):
        assert watched.snapshot().lifetime.tokens_saved == TOTAL
    assert fs.reads.count(str(path)) == reads


@pytest.mark.parametrize("content", ["{", HEADROOM.replace('"tokens_saved": 2672322', '"tokens_saved": "many"')])
def test_refused_file_is_read_once(path: Path, content: str) -> None:
    """And read again when it has changed."""
    fs = CountingFileSystem()
    watched = WatchedFile(path, fs)
    path.write_text(content)
    watched.snapshot()
    reason, reads = watched.health().reason, fs.reads.count(str(path))
    assert reason
    for _ in range(3):
        assert watched.snapshot().lifetime.tokens_saved == TOTAL
        assert watched.health().reason == reason
    assert fs.reads.count(str(path)) == reads
    path.write_text(HEADROOM)
    watched.snapshot()
    assert watched.health().healthy


def wrong(number: int) -> str:
    """A document in which many entries of the history and of the projects are wrong."""
    document = json.loads(HEADROOM)
    document["history"] += [{"timestamp": f"wrong {n}"} for n in range(number)]
    document["projects"] |= {f"wrong {n}": n for n in range(number)}
    return json.dumps(document)


def test_wrong_entries_are_summed_up(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once, and not again for each change of the file."""
    path.write_text(wrong(100_000))
    with caplog.at_level(logging.WARNING):
        watched = WatchedFile(path)
        assert watched.snapshot().lifetime.tokens_saved == TOTAL
        assert len(caplog.messages) < 30
        assert caplog.messages[-1].endswith("there are 199,980 more problems like these")
        number = len(caplog.messages)
        path.with_suffix(".new").write_text(wrong(100_000) + " ")
        path.with_suffix(".new").replace(path)
        assert watched.snapshot().lifetime.tokens_saved == TOTAL
    assert len(caplog.messages) == number


def test_log_of_a_file_that_always_changes(path: Path) -> None:
    with running("watch", str(path)) as service:
        for number in range(30):
            path.with_suffix(".new").write_text(wrong(number + 1))
            path.with_suffix(".new").replace(path)
            assert service.metrics()["savings_watched_file_readable"] == 1
        _, _, logged = service.stop()
    assert "wrong 0" in logged
    assert logged.count("\n") < 30


@pytest.mark.parametrize("value", ["9" * 5000, '{"a": ' * 50 + "1" + "}" * 50, json.dumps("x" * 1_000_000)])
def test_message_about_a_large_value_is_short(path: Path, value: str) -> None:
    for content in (
        HEADROOM.replace('"history": [', f'"history": [{value}, ', 1),
        HEADROOM.replace('"lifetime": {', f'"lifetime": {{"requests": {value}, ', 1),
        f'{{"lifetime": {value}, "schema_version": 6}}',
        f'{{"lifetime": {{}}, "schema_version": {value}}}',
    ):
        path.write_text(content)
        done = run_cli("verify", "--store", str(path))
        assert "Traceback" not in done.stderr
        assert len(done.stdout + done.stderr) < 2000
