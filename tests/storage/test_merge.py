"""``verify --repair --merge``: what another program recorded counts once, whatever happens in between.

Here another program is imitated, which rewrites our document as Headroom does. ``tests/interop/test_merge.py`` has a
real Headroom.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from savings_exporter import SavingsTracker, StoreError
from savings_exporter.sources.merging import difference
from savings_exporter.storage.filesystem import LOCAL, FileSystem
from savings_exporter.storage.observers import Observers
from savings_exporter.storage.repair import Repaired, inspect
from savings_exporter.storage.repair import repair as repair_store
from tests.support.damaged import COMMITTED, DOCUMENT, SAVED, TOTAL, Kept, opened
from tests.support.service import run_cli

THEIRS = 20_000

_FIGURES = ("requests", "tokens_saved", "compression_savings_usd", "total_input_tokens", "total_input_cost_usd")


def rewritten(data: bytes, *saved: int, at: str = "2030-01-01T00:00", model: str = "theirs") -> bytes:
    """A document as Headroom writes it that read ``data`` (nothing when empty), and recorded requests."""
    raw = json.loads(data or b"{}")
    lifetime = {name: raw.get("lifetime", {}).get(name, 0) for name in _FIGURES}
    by_model = {name: {key: entry[key] for key in _FIGURES} for name, entry in raw.get("by_model", {}).items()}
    names = {"provider": "unknown", "agent": "unknown", "model": "unknown"}
    history = [{**names, **point} for point in raw.get("history", [])]
    for number, tokens in enumerate(saved):
        for totals in (lifetime, by_model.setdefault(model, dict.fromkeys(_FIGURES, 0))):
            totals["requests"] += 1
            totals["tokens_saved"] += tokens
        figures = {"total_tokens_saved": lifetime["tokens_saved"]}
        history.append({"timestamp": f"{at}:{number:02}Z", **names, "provider": "openai", "model": model, **figures})
    members = {"lifetime": lifetime, "history": history, "projects": {}, "by_model": by_model}
    return json.dumps({"schema_version": 6, **members}).encode()


def merge(path: Path, fs: FileSystem = LOCAL) -> Repaired:
    return repair_store(str(path), Observers(), fs, difference=difference)


def refused(path: Path) -> str:
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    with pytest.raises(StoreError) as error:
        merge(path)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before
    return str(error.value)


def document_after(kept: Kept, frames: int) -> bytes:
    """The document that a save after so many frames of the journal wrote."""
    ends = [*kept.frames, len(kept.journal)][len(SAVED) :]
    path = kept.put(segment=kept.journal[: ends[frames]] + bytes(8192), writer=None)
    opened(path)
    return path.read_bytes()


@pytest.mark.parametrize("frames", [0, 1, 2, 3])
def test_document_that_was_read(kept: Kept, frames: int) -> None:
    """Whichever of our documents the other program read, its records and ours are all counted, and once."""
    document = rewritten(document_after(kept, frames), THEIRS, THEIRS)
    path = kept.put(document=document)
    in_document = sum((*SAVED, *COMMITTED[:frames]))
    assert (
        f"this store holds {TOTAL - in_document} tokens saved in {3 - frames} records that the document lacks"
        in (inspect(str(path)).problems[0])
    )
    done = merge(path)
    assert not done.leaves_out
    assert f"of these, {2 * THEIRS} tokens saved in 2 records are from the other program" in done.text
    assert opened(path)[0] == TOTAL + 2 * THEIRS
    with SavingsTracker(path) as tracker:
        by_model = {name: totals.tokens_saved for name, totals in tracker.snapshot().by_model.items()}
        assert by_model == {"m": TOTAL, "theirs": 2 * THEIRS}
        assert tracker.snapshot().by_provider_model["openai", "theirs"].requests == 2
    assert run_cli("verify", "--store", str(path)).returncode == 0


def test_document_of_none_of_ours(kept: Kept) -> None:
    path = kept.put(document=rewritten(b"", THEIRS))
    merge(path)
    assert opened(path)[0] == TOTAL + THEIRS


def test_same_savings_as_ours(kept: Kept) -> None:
    """A request of the other program that saved as much as ours is not taken for ours."""
    path = kept.put(document=rewritten(document_after(kept, 0), *COMMITTED))
    merge(path)
    assert opened(path)[0] == TOTAL + sum(COMMITTED)


def test_clock_behind_ours(kept: Kept) -> None:
    path = kept.put(document=rewritten(document_after(kept, 1), THEIRS, at="2020-01-01T00:00"))
    merge(path)
    assert opened(path)[0] == TOTAL + THEIRS


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(lambda raw: raw["history"].clear(), id="no points"),
        pytest.param(lambda raw: raw["history"][0].update(total_tokens_saved=77), id="point of ours that is not known"),
        pytest.param(lambda raw: raw["by_model"]["m"].update(requests=1), id="model with less"),
    ],
)
def test_not_determined(kept: Kept, changed: Callable[[dict[str, Any]], None]) -> None:
    """Nothing changes, and the message has the figures and the ways to continue."""
    raw = json.loads(rewritten(document_after(kept, 1), THEIRS))
    changed(raw)
    path = kept.put(document=json.dumps(raw).encode())
    says = refused(path)
    more = THEIRS + COMMITTED[0]
    assert "cannot be determined which document of this store the other program started from" in says
    assert f"the document at the path holds {more} tokens saved in 2 records more" in says
    assert f"and this store {sum(COMMITTED)} tokens saved in 3 records" in says
    assert "--merge" not in says
    assert f"savings-exporter verify --repair --store {path}" in says


def test_later_document_that_is_gone(kept: Kept) -> None:
    """The document has all points of our last remaining one, and one of a later document of ours, which is gone."""
    raw = json.loads(rewritten(document_after(kept, 0), THEIRS))
    raw["history"][-1].update(provider="unknown", model="unknown")
    path = kept.put(document=json.dumps(raw).encode())
    assert "cannot be determined which document of this store the other program started from" in refused(path)


def test_unreadable_document(kept: Kept) -> None:
    path = kept.put(document=rewritten(document_after(kept, 0), THEIRS)[:-10])
    assert "its totals are not known" in refused(path)


def test_points_that_were_removed(kept: Kept) -> None:
    """Headroom keeps 5,000 points. Without any of ours, it is not known what its document holds."""
    raw = json.loads(rewritten(document_after(kept, 1), THEIRS))
    points = [
        {**raw["history"][-1], "timestamp": f"2030-01-{1 + n // 1440:02}T{n // 60 % 24:02}:{n % 60:02}:00Z"}
        for n in range(5_000)
    ]
    path = kept.put(document=json.dumps({**raw, "history": points}).encode())
    assert "cannot be determined" in refused(path)


class Killed(BaseException):
    """The process ends here."""


class DyingFileSystem(FileSystem):
    """Ends the process at one of the calls that change something: nothing changes any more from this call on."""

    def __init__(self, last: int) -> None:
        self.left = last

    def __getattribute__(self, name: str) -> Any:
        if name in _CHANGES:
            if not self.left:
                raise Killed
            self.left -= 1
        return super().__getattribute__(name)


_CHANGES = {"create", "write_all", "write_at", "fsync_file", "fsync_path", "fsync_directory", "sync_data", "replace"}
_CHANGES |= {"link", "rename", "unlink", "discard", "keep_copy"}


@pytest.mark.parametrize("is_begun", [False, True], ids=["saved", "first save begun"])
def test_killed_at_every_call(kept: Kept, is_begun: bool) -> None:
    """The next merge counts the other program's records once, and a merge after that changes nothing."""
    document = rewritten(document_after(kept, 1), THEIRS)
    lock = bytearray(kept.files["lock"])
    if is_begun:
        lock[12] = 2
    calls = 0
    while True:
        path = kept.put(document=document, lock=bytes(lock))
        try:
            merge(path, DyingFileSystem(calls))
        except Killed:
            calls += 1
        else:
            break
        merge(path)
        assert "there is nothing to repair" in merge(path).text
        assert opened(path)[0] == TOTAL + THEIRS, f"killed at call {calls}"
    assert calls > 10


def test_merged_document_comes_back(kept: Kept, tmp_path: Path) -> None:
    """The other program still runs, and writes again what was merged, with more."""
    first = rewritten(document_after(kept, 1), THEIRS)
    path = kept.put(document=first)
    merge(path)
    path.write_bytes(first)
    merge(path)
    assert opened(path)[0] == TOTAL + THEIRS
    path.write_bytes(rewritten(first, 7, at="2030-01-02T00:00"))
    merge(path)
    assert opened(path)[0] == TOTAL + THEIRS + 7
    # Without the copy it is not known what was merged.
    for copy in path.parent.glob("*.other-program-*"):
        shutil.move(copy, tmp_path)
    path.write_bytes(rewritten(first, 7, 8, at="2030-01-02T00:00"))
    assert "cannot be determined" in refused(path)


def test_taken_over_and_still_written(tmp_path: Path) -> None:
    """A copy of the document that was taken over is kept, and only of the newest one."""
    path = tmp_path / DOCUMENT
    first = rewritten(b"", THEIRS)
    path.write_bytes(first)
    for tokens in (1, 10, 100):
        with SavingsTracker(path) as tracker:
            assert tracker.record_request(model="m", tokens_saved=tokens).durable
    assert [copy.read_bytes() for copy in tmp_path.glob("*.other-program-*")] == [first]
    path.write_bytes(rewritten(first, 5, at="2030-01-02T00:00"))
    merge(path)
    assert opened(path)[0] == THEIRS + 111 + 5
    ended = rewritten(path.read_bytes(), 9, at="2030-01-03T00:00")
    path.write_bytes(ended)
    assert opened(path)[0] == THEIRS + 111 + 5 + 9
    with SavingsTracker(path) as tracker:
        assert tracker.record_request(model="m", tokens_saved=1).durable
    assert [copy.read_bytes() for copy in tmp_path.glob("*.other-program-*")] == [ended]


def test_nothing_to_merge(kept: Kept) -> None:
    path = kept.put()
    done = run_cli("verify", "--repair", "--merge", "--store", str(path))
    assert (done.returncode, done.stderr) == (0, "")
    assert "there is nothing to repair" in done.stdout


def test_merge_without_repair(kept: Kept) -> None:
    done = run_cli("verify", "--merge", "--store", str(kept.put()))
    assert done.returncode == 2
    assert "give it with --repair" in done.stderr
