"""Damaged files: opened with the whole total or refused in words, never with less and never with a traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from savings_exporter import CorruptStoreError, SavingsRecord, SavingsTracker, StoreError
from savings_exporter.storage import journal
from savings_exporter.storage.recovery import previous_path
from savings_exporter.storage.repair import inspect, repair
from savings_exporter.storage.steps import Observers
from savings_exporter.telemetry.metrics import SavingsCollector
from tests.support.paths import DATA
from tests.support.scrape import samples

DOCUMENT = "proxy_savings.json"
PREVIOUS = "proxy_savings.json.previous"
SEGMENT = "proxy_savings.json.journal.00000001"
LOCK = "proxy_savings.json.lock"

SAVED = (1, 10, 100)
"""What is saved in the document, and in the one before it."""

COMMITTED = (1_000, 10_000, 100_000)
"""What is in the journal only."""

TOTAL = sum(SAVED) + sum(COMMITTED)

KILLED = f"""
import os, sys
from savings_exporter import SavingsTracker
tracker = SavingsTracker(sys.argv[1], save_interval=3600)
for tokens in {SAVED}:
    assert tracker.record_request(model="m", tokens_saved=tokens, provider="p").durable
assert tracker.save() and tracker.save()
for tokens in {COMMITTED}:
    assert tracker.record_request(model="m", tokens_saved=tokens, provider="p").durable
os._exit(0)
"""


class Kept:
    """A store whose process was killed, as its files' bytes, put into a directory of its own each time it is needed."""

    def __init__(self, directory: Path) -> None:
        subprocess.run([sys.executable, "-c", KILLED, directory / DOCUMENT], check=True)
        self.files = {path.name: path.read_bytes() for path in directory.iterdir()}
        assert self.files.keys() == {DOCUMENT, PREVIOUS, SEGMENT, LOCK}
        self.journal = self.files[SEGMENT].rstrip(b"\0")
        # Padding costs time when a segment is written a thousand times, and says nothing.
        self.files[SEGMENT] = self.journal + bytes(8192)
        self._directory = directory / "damaged"

    def put(self, **changed: bytes | None) -> Path:
        """The store with other bytes in the place of its files; None leaves a file away."""
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir()
        names = {"document": DOCUMENT, "previous": PREVIOUS, "segment": SEGMENT, "lock": LOCK}
        for name, data in {**self.files, **{names[key]: data for key, data in changed.items()}}.items():
            if data is not None:
                (self._directory / name).write_bytes(data)
        return self._directory / DOCUMENT


@pytest.fixture(scope="module")
def kept() -> Iterator[Kept]:
    # In memory where that can be: what a reader makes of thousands of damaged files does not depend on the disk.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        yield Kept(Path(directory))


def opened(path: Path) -> tuple[int, dict[str, float]]:
    """The total that a store opens with, and its metrics."""
    with SavingsTracker(path) as tracker:
        snapshot = tracker.snapshot()
        assert (
            sum(totals.tokens_saved for totals in snapshot.by_provider_model.values()) == snapshot.lifetime.tokens_saved
        )
        return snapshot.lifetime.tokens_saved, samples(SavingsCollector(tracker))


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.parent.iterdir() if file.name != LOCK}


def assert_whole_or_refused(path: Path) -> int | None:
    """The total it opens with; None when it is refused, in one line, with the remedy, and with nothing changed."""
    before = contents(path)
    try:
        return opened(path)[0]
    except StoreError as error:
        assert contents(path) == before
        refusal = str(error)
    assert refusal.startswith(f"{path}: ")
    assert "\n" not in refusal
    assert f"savings-exporter verify --repair --store {path}" in refusal
    return None


# Each damaged byte is a store opened. In the long form of the crash lab it is every byte; otherwise every fifth.
STRIDE = 1 if os.environ.get("CRASH_LAB") == "long" else 5


def cuts(data: bytes) -> Iterator[bytes]:
    yield from (data[:length] for length in range(0, len(data), STRIDE))


def flips(data: bytes) -> Iterator[bytes]:
    yield from (flipped(data, position) for position in range(0, len(data), STRIDE))


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ (1 << position % 8)]) + data[position + 1 :]


def test_a_killed_process_leaves_a_store_that_opens_whole(kept: Kept) -> None:
    assert inspect(str(kept.put())).problems == ()
    total, seen = opened(kept.put())
    assert total == TOTAL
    assert all(value == 0 for name, value in seen.items() if name.startswith("savings_recoveries_total"))


@pytest.mark.slow
@pytest.mark.parametrize("damage", [cuts, flips])
@pytest.mark.parametrize("lock", ["lock", "no lock file"])
def test_a_damaged_document_is_rebuilt_from_the_one_before_it_and_the_journal(
    kept: Kept, damage: object, lock: str
) -> None:
    assert callable(damage)
    changed: dict[str, bytes | None] = {} if lock == "lock" else {"lock": None}
    document = kept.files[DOCUMENT]
    for damaged in damage(document):
        path = kept.put(document=damaged, **changed)
        total, seen = opened(path)
        assert total == TOTAL
        if damaged == document.rstrip():
            # Only the newline at the end says nothing.
            continue
        aside = [file.read_bytes() for file in path.parent.glob("*.corrupt-*")]
        assert aside == [damaged]
        assert seen['savings_recoveries_total{kind="corrupt_document"}'] == 1
        assert seen['savings_recoveries_total{kind="previous_document"}'] == 1
        assert path.with_name(PREVIOUS).read_bytes() != damaged


def test_a_missing_document_is_rebuilt_too(kept: Kept) -> None:
    path = kept.put(document=None)
    assert "is missing; nothing is lost" in "; ".join(inspect(str(path)).problems)
    total, seen = opened(path)
    assert total == TOTAL
    assert seen['savings_recoveries_total{kind="previous_document"}'] == 1
    assert inspect(str(path)).problems == ()


@pytest.mark.slow
@pytest.mark.parametrize("damage", [cuts, flips])
def test_damage_to_the_save_before_is_harmless(kept: Kept, damage: object) -> None:
    assert callable(damage)
    for damaged in damage(kept.files[PREVIOUS]):
        path = kept.put(previous=damaged)
        assert opened(path)[0] == TOTAL
        assert inspect(str(path)).problems == ()


def test_damage_to_what_was_acknowledged_is_never_a_smaller_total(kept: Kept) -> None:
    """The mark in the lock file says how much was acknowledged, so that even the last frame cannot go in silence."""
    saved = kept.journal.index(b'"tokens_saved":1000')
    for position in range(0, len(kept.journal), STRIDE):
        path = kept.put(segment=flipped(kept.journal, position) + bytes(8192))
        total = assert_whole_or_refused(path)
        # What the document has by itself is not read again; all after it is needed.
        assert total in ((None,) if position > saved else (None, TOTAL)), position
    for damaged in cuts(kept.journal):
        total = assert_whole_or_refused(kept.put(segment=damaged))
        assert total is None


def test_without_the_mark_damage_is_told_from_a_torn_tail_by_what_follows(kept: Kept) -> None:
    last_frame = kept.journal.rindex(b"SXJ1")
    first_needed = kept.journal.rindex(b"SXJ1", 0, kept.journal.index(b'"tokens_saved":1000'))
    for position in range(first_needed, len(kept.journal), STRIDE):
        path = kept.put(segment=flipped(kept.journal, position) + bytes(8192), lock=None)
        total = assert_whole_or_refused(path)
        # Nothing proves the last frame, so it is what a commit leaves that was never acknowledged.
        assert total == (TOTAL - COMMITTED[-1] if position >= last_frame else None), position


def test_a_torn_tail_is_kept_aside_counted_and_dropped(kept: Kept) -> None:
    torn = b"SXJ1 and half of a frame"
    path = kept.put(segment=kept.journal + torn + bytes(8192))
    assert "never acknowledged" in "; ".join(inspect(str(path)).problems)
    total, seen = opened(path)
    assert total == TOTAL
    assert seen['savings_recoveries_total{kind="torn_tail"}'] == 1
    assert [file.read_bytes() for file in path.parent.glob("*.torn-*")] == [torn]
    assert inspect(str(path)).problems == ()


def test_of_torn_tails_the_newest_ten_are_kept(kept: Kept) -> None:
    torn = b"SXJ1 and half of a frame"
    path = kept.put(segment=kept.journal + torn + bytes(8192))
    for number in range(12):
        old = path.with_name(f"{path.name}.journal.00000001.torn-{number:012x}")
        old.write_bytes(b"%d" % number)
        os.utime(old, (number, number))
    opened(path)
    tails = {file.read_bytes() for file in path.parent.glob("*.torn-*")}
    assert tails == {torn, *(b"%d" % number for number in range(3, 12))}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.data())
def test_any_garbling_of_any_file_is_whole_or_refused(kept: Kept, data: st.DataObject) -> None:
    name, original = data.draw(
        st.sampled_from(
            [("document", kept.files[DOCUMENT]), ("previous", kept.files[PREVIOUS]), ("segment", kept.journal)]
        )
    )
    start = data.draw(st.integers(0, len(original)))
    end = data.draw(st.integers(start, min(len(original), start + 64)))
    garbled = original[:start] + data.draw(st.binary(max_size=64)) + original[end:]
    assert assert_whole_or_refused(kept.put(**{name: garbled})) in (None, TOTAL)


@pytest.mark.parametrize("junk", [b"", b"\x00" * 512, b"{}", b"null"])
def test_two_damaged_documents_are_refused(kept: Kept, junk: bytes) -> None:
    path = kept.put(document=junk, previous=junk)
    assert assert_whole_or_refused(path) is None
    assert any("only what the journal holds is left" in problem for problem in inspect(str(path)).problems)


def test_repair_of_two_damaged_documents_saves_what_the_journal_has_and_names_what_is_lost(kept: Kept) -> None:
    path = kept.put(document=b"junk", previous=b"junk")
    done = repair(str(path), Observers([]))
    # The first record of a store is saved with its first document, so the journal begins with the second.
    assert f"{TOTAL - SAVED[0]} tokens saved in 5 records" in done
    assert "acknowledged records are lost: number 1" in done
    assert opened(path)[0] == TOTAL - SAVED[0]
    aside = [file.read_bytes() for file in path.parent.glob("*.corrupt-*")]
    assert sorted(aside)[1:] == [b"junk", b"junk"]
    assert f"{path}.corrupt-" in done


def test_repair_of_a_damaged_journal_keeps_all_that_is_whole(kept: Kept) -> None:
    damaged = kept.journal.replace(b'"tokens_saved":10000,', b'"tokens_saved":90000,')
    path = kept.put(segment=damaged)
    assert assert_whole_or_refused(path) is None
    done = repair(str(path), Observers([]))
    assert "acknowledged records are lost: number 5;" in done
    assert [file.read_bytes() for file in path.parent.glob("*journal*.corrupt-*")] == [damaged]
    assert opened(path)[0] == TOTAL - 10_000
    with SavingsTracker(path) as tracker:
        # A number that was given out is not given out again.
        assert tracker.record_request(model="m", tokens_saved=1).sequence == 7


def test_repair_of_a_damaged_document_loses_nothing(kept: Kept) -> None:
    path = kept.put(document=b"junk")
    assert "nothing is lost" in repair(str(path), Observers([]))
    assert opened(path)[0] == TOTAL


def test_damaged_files_are_kept_under_names_of_their_own(kept: Kept) -> None:
    path = kept.put(document=b"first")
    assert opened(path)[0] == TOTAL
    path.write_bytes(b"second")
    assert opened(path)[0] == TOTAL
    aside = {file.read_bytes() for file in path.parent.iterdir() if "corrupt" in file.name}
    assert aside == {b"first", b"second"}


def test_repair_of_a_whole_store_changes_nothing(kept: Kept) -> None:
    path = kept.put()
    before = contents(path)
    assert "there is nothing to repair" in repair(str(path), Observers([]))
    assert contents(path) == before


def test_repair_with_nothing_left_changes_nothing(kept: Kept) -> None:
    path = kept.put(document=b"junk", previous=b"junk", segment=None)
    with pytest.raises(CorruptStoreError, match="its totals are lost"):
        repair(str(path), Observers([]))
    assert path.read_bytes() == b"junk"


def test_a_store_whose_files_are_gone_is_no_new_store(kept: Kept) -> None:
    """The mark says that something was acknowledged."""
    path = kept.put(document=None, previous=None, segment=None)
    with pytest.raises(CorruptStoreError, match=r"is missing; .* its totals are lost"):
        SavingsTracker(path)
    path.with_name(LOCK).unlink()
    assert opened(path)[0] == 0


def test_an_older_backup_is_refused_until_repair_is_asked_for(kept: Kept) -> None:
    path = kept.put(document=kept.files[PREVIOUS], segment=None)
    assert assert_whole_or_refused(path) is None
    assert "acknowledged records are lost: number 4 to 6" in repair(str(path), Observers([]))
    assert opened(path)[0] == sum(SAVED)


def test_the_document_of_another_program_does_not_replace_what_only_our_journal_has(kept: Kept) -> None:
    foreign = (DATA / "headroom" / "v6-latest" / "proxy_savings.json").read_bytes()
    path = kept.put(document=foreign)
    assert assert_whole_or_refused(path) is None
    assert "does not have our records 4 to 6" in inspect(str(path)).problems[0]
    assert "nothing is lost" in repair(str(path), Observers([]))
    assert opened(path)[0] == TOTAL
    assert [file.read_bytes() for file in path.parent.glob("*.corrupt-*")] == [foreign]


def test_the_journal_of_another_store_is_not_counted(kept: Kept, tmp_path: Path) -> None:
    with SavingsTracker(tmp_path / DOCUMENT) as other:
        other.record_request(model="m", tokens_saved=7)
    path = kept.put(document=(tmp_path / DOCUMENT).read_bytes(), previous=None, lock=None)
    assert opened(path)[0] == 7


@pytest.mark.parametrize("payload", [b"{}\n", b"[1]\n", b"\xff\n", b"", b'{"model":"m","tokens_saved":1}\n' * 2])
def test_a_frame_that_is_right_and_says_nonsense_is_refused(kept: Kept, payload: bytes) -> None:
    store = bytes.fromhex(json.loads(kept.files[DOCUMENT])["savings_exporter"]["store"])
    frame = journal.frame_of(store, 1, 7, 1, payload)
    path = kept.put(segment=kept.journal + frame + bytes(8192))
    with pytest.raises(CorruptStoreError, match=r"journal\.00000001: a frame"):
        SavingsTracker(path)


def test_a_document_alone_is_a_backup_that_can_be_gone_on_with(kept: Kept) -> None:
    path = kept.put(previous=None, segment=None, lock=None)
    with SavingsTracker(path) as tracker:
        assert tracker.record_request(model="m", tokens_saved=1).durable
        assert tracker.record_request(model="m", tokens_saved=1).durable
    assert opened(path)[0] == sum(SAVED) + 2


def test_junk_in_the_place_of_the_journal_and_the_mark_is_no_smaller_total(kept: Kept) -> None:
    path = kept.put(segment=b"junk" * 50, lock=b"junk" * 20)
    assert assert_whole_or_refused(path) is None
    assert any("cannot be told" in problem for problem in inspect(str(path)).problems)
    done = repair(str(path), Observers([]))
    assert "cannot be told" in done
    assert [file.read_bytes() for file in path.parent.glob("*journal*.corrupt-*")] == [b"junk" * 50]
    assert opened(path)[0] == sum(SAVED)


def test_repair_of_nothing_but_junk_changes_nothing(kept: Kept) -> None:
    path = kept.put(document=b"junk", previous=b"junk", segment=b"junk", lock=b"junk")
    before = contents(path)
    with pytest.raises(CorruptStoreError, match="its totals are lost"):
        repair(str(path), Observers([]))
    assert contents(path) == before


def test_repair_keeps_every_damaged_file_aside(kept: Kept) -> None:
    damaged = kept.journal[:-200]
    path = kept.put(document=b"one", previous=b"two", segment=damaged)
    assert "records are lost" in repair(str(path), Observers([]))
    assert {file.read_bytes() for file in path.parent.glob("*.corrupt-*")} == {b"one", b"two", damaged}


def test_the_document_of_another_store_does_not_replace_ours_in_silence(kept: Kept, tmp_path: Path) -> None:
    with SavingsTracker(tmp_path / DOCUMENT) as other:
        other.record_request(model="m", tokens_saved=7)
    path = kept.put(document=(tmp_path / DOCUMENT).read_bytes())
    with pytest.raises(CorruptStoreError, match="is of another store than the files beside it, which hold 6 records"):
        SavingsTracker(path)
    assert "nothing is lost" in repair(str(path), Observers([]))
    assert opened(path)[0] == TOTAL


def test_what_only_looks_like_a_segment_is_left_alone(kept: Kept) -> None:
    path = kept.put()
    stranger = path.with_name(f"{DOCUMENT}.journal.{10**20}")
    stranger.write_bytes(b"not ours")
    assert opened(path)[0] == TOTAL
    assert stranger.read_bytes() == b"not ours"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_headroom_document_cut_short_is_refused(tmp_path: Path, share: float) -> None:
    data = (DATA / "headroom" / "v6-latest" / "proxy_savings.json").read_bytes()
    path = tmp_path / DOCUMENT
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CorruptStoreError, match="is damaged: not JSON"):
        SavingsTracker(path)
    assert Path(previous_path(str(path))).exists() is False


@pytest.mark.parametrize("elsewhere", [None, "moved-away"])
def test_a_segment_that_somebody_removes_while_it_is_written_loses_nothing(
    store_path: Path, elsewhere: str | None
) -> None:
    with SavingsTracker(store_path) as tracker:
        for records in (1, 2):
            assert tracker.record_many([SavingsRecord(model="m", tokens_saved=1)] * records)
        (segment,) = store_path.parent.glob("*.journal.*")
        segment.rename(store_path.with_name(elsewhere)) if elsewhere else segment.unlink()
        assert tracker.record_request(model="m", tokens_saved=1)
        # What a new process would find at this moment, before anything is saved at the end.
        assert inspect(str(store_path)).problems == ()
        assert opened_copy(store_path) == 4
        assert tracker.record_request(model="m", tokens_saved=1)
    assert opened(store_path)[0] == 5


def opened_copy(path: Path) -> int:
    """What a store holds that is left as it is at this moment."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "copy"
        shutil.copytree(path.parent, copy)
        return opened(copy / path.name)[0]


def test_a_save_before_the_last_that_cannot_be_read_is_not_called_damaged(kept: Kept) -> None:
    path = kept.put(previous=None)
    previous = Path(previous_path(str(path)))
    previous.mkdir()
    (problem,) = inspect(str(path)).problems
    assert problem == f"{previous}: cannot be read: Is a directory"
