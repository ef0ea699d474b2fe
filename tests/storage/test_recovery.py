"""Damaged files: the store opens with the whole total or is refused with an error, never with less or a traceback."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from savings_exporter import CorruptStoreError, SavingsTracker, StoreError
from savings_exporter.formats.frame import frame_of
from savings_exporter.model.history import DAYS_OF_HOURLY_POINTS, DAYS_OF_POINTS
from savings_exporter.storage.repair import inspect
from savings_exporter.storage.writers import facts_of
from savings_exporter.watched import WatchedFile
from tests.support.damaged import (
    COMMITTED,
    DOCUMENT,
    FOREIGN,
    FOREIGN_TOTAL,
    SAVED,
    STRIDE,
    TOTAL,
    Kept,
    cuts,
    flipped,
    flips,
    opened,
    total_or_refused,
)
from tests.support.faults import FaultyFileSystem
from tests.support.service import run_cli

TORN = b"SXJ2 and half of a frame"


def segments(path: Path) -> list[str]:
    return sorted(file.name for file in path.parent.glob("*.journal.*") if ".torn-" not in file.name)


def recoveries(seen: dict[str, float]) -> dict[str, float]:
    """The recoveries that the metrics show, by kind."""
    prefix = 'savings_recoveries_total{kind="'
    return {name[len(prefix) : -2]: value for name, value in seen.items() if name.startswith(prefix) and value}


def test_killed(kept: Kept) -> None:
    found = inspect(str(kept.put()))
    assert (found.problems, found.notes) == ((), ())
    total, seen = opened(kept.put())
    assert total == TOTAL
    assert recoveries(seen) == {}


@pytest.mark.slow
@pytest.mark.parametrize("damage", [cuts, flips])
@pytest.mark.parametrize("without", [(), ("lock",), ("writer",)])
def test_document(kept: Kept, damage: Callable[[bytes], Iterator[bytes]], without: tuple[str, ...]) -> None:
    document = kept.files["document"]
    for damaged in damage(document):
        path = kept.put(document=damaged, **dict.fromkeys(without))
        if damaged == document.rstrip():
            # Only damage to the final newline is harmless.
            continue
        total, seen = opened(path)
        assert total == TOTAL
        aside = [file.read_bytes() for file in path.parent.glob("*.corrupt-*")]
        assert aside == [damaged]
        assert recoveries(seen) == {"corrupt_document": 1, "previous_document": 1}
        assert Path(f"{path}.previous").read_bytes() != damaged


def test_missing_document(kept: Kept) -> None:
    path = kept.put(document=None)
    assert "is missing; nothing is lost" in "; ".join(inspect(str(path)).problems)
    total, seen = opened(path)
    assert total == TOTAL
    assert recoveries(seen) == {"previous_document": 1}
    assert inspect(str(path)).problems == ()


@pytest.mark.slow
@pytest.mark.parametrize("damage", [cuts, flips])
def test_previous(kept: Kept, damage: Callable[[bytes], Iterator[bytes]]) -> None:
    for damaged in damage(kept.files["previous"]):
        path = kept.put(previous=damaged)
        assert opened(path)[0] == TOTAL
        assert inspect(str(path)).problems == ()


@pytest.mark.slow
def test_journal(kept: Kept) -> None:
    """The watermark says how much was acknowledged, so that even the loss of the last frame is detected."""
    first_needed = kept.frames[len(SAVED)]
    for position in range(0, len(kept.journal), STRIDE):
        path = kept.put(segment=flipped(kept.journal, position) + bytes(8192))
        total = total_or_refused(path)
        # What the document holds is not read again; all after it is needed.
        assert total in ((None,) if position >= first_needed else (None, TOTAL)), position
    for damaged in cuts(kept.journal):
        assert total_or_refused(kept.put(segment=damaged)) is None


@pytest.mark.slow
def test_journal_without_watermark(kept: Kept) -> None:
    """After a power loss, later frames distinguish damage from a torn write. Only the last frame can be lost."""
    last = kept.frames[-1]
    for position in range(kept.frames[len(SAVED)], len(kept.journal), STRIDE):
        path = kept.put(segment=flipped(kept.journal, position) + bytes(8192), writer=None)
        if position < last:
            assert total_or_refused(path) is None, position
            continue
        (note,) = inspect(str(path)).notes
        assert "bytes of a write that was never acknowledged" in note
        total, seen = opened(path)
        # Nothing proves that the last frame was acknowledged, so it is treated as an unacknowledged commit.
        assert total == TOTAL - COMMITTED[-1], position
        assert recoveries(seen) == {"torn_tail": 1}
        (aside,) = path.parent.glob("*.torn-*")
        assert aside.read_bytes() == flipped(kept.journal, position)[last:].rstrip(b"\0")


@pytest.mark.slow
def test_journal_alone(kept: Kept) -> None:
    """Of a store that was lost with the machine before its first save."""
    lock = kept.files["lock"]
    unsaved = lock[:12] + b"\0" + lock[13:]
    alone: dict[str, bytes | None] = {"document": None, "previous": None, "writer": None, "lock": unsaved}
    assert opened(kept.put(**alone))[0] == TOTAL
    last = kept.frames[-1]
    for position in range(0, len(kept.journal), STRIDE):
        path = kept.put(**{**alone, "segment": flipped(kept.journal, position) + bytes(8192)})
        total = total_or_refused(path)
        assert total == (TOTAL - COMMITTED[-1] if position >= last else None), position


@pytest.mark.slow
def test_writer_file(kept: Kept) -> None:
    """Damage to a writer's file only hides how much was acknowledged; an undamaged journal is counted completely."""
    data = kept.files["writer"][:100]
    for damage in (cuts, flips):
        for damaged in damage(data):
            assert total_or_refused(kept.put(writer=damaged)) in (None, TOTAL)


@pytest.mark.parametrize("boot", [b"\0" * 16, b"another boot id."])
def test_watermark_of_other_boot(kept: Kept, boot: bytes) -> None:
    """It may be any older one after a power loss: the frames after it count, and those up to it have to be there."""
    facts = facts_of(kept.files["writer"])
    assert facts is not None
    assert facts.watermark == len(SAVED) + len(COMMITTED)
    data = other_boot(kept.files["writer"], boot)
    assert opened(kept.put(writer=data))[0] == TOTAL
    cut = kept.journal[: kept.frames[-1]] + bytes(8192)
    assert total_or_refused(kept.put(writer=data, segment=cut)) is None
    older = facts.watermark - 1
    data = data[:64] + struct.pack("<QQ", older, older ^ (2**64 - 1)) + data[80:]
    assert opened(kept.put(writer=data, segment=cut))[0] == TOTAL - COMMITTED[-1]


def other_boot(writer: bytes, boot: bytes) -> bytes:
    """A writer's file as of another boot of the machine: the header's last field, and the checksum after it."""
    header = writer[:20] + boot
    return header + zlib.crc32(header).to_bytes(4, "little") + writer[40:]


def test_missing_segments(kept: Kept) -> None:
    """The writer's file says how much they held."""
    path = kept.put(segment=None)
    assert total_or_refused(path) is None
    with pytest.raises(CorruptStoreError, match="acknowledged records are lost: number 4 to 6 of writer"):
        WatchedFile(path)


def test_torn_tail(kept: Kept) -> None:
    path = kept.put(segment=kept.journal + TORN + bytes(8192))
    found = inspect(str(path))
    assert found.problems == ()
    assert "ends with 24 bytes of a write that was never acknowledged; they are kept aside when" in found.notes[0]
    total, seen = opened(path)
    assert total == TOTAL
    assert recoveries(seen) == {"torn_tail": 1}
    assert [file.read_bytes() for file in path.parent.glob("*.torn-*")] == [TORN]
    assert inspect(str(path)).notes == ()


def test_torn_tail_is_kept_once(kept: Kept) -> None:
    """Also when the processes that opened the store could not save it."""
    path = kept.put(segment=kept.journal + TORN + bytes(8192))
    for _ in range(3):
        open_and_die = "import os, sys; from savings_exporter import SavingsTracker as T; T(sys.argv[1]); os._exit(0)"
        subprocess.run([sys.executable, "-c", open_and_die, path], check=True)
    assert [file.read_bytes() for file in path.parent.glob("*.torn-*")] == [TORN]
    assert opened(path)[0] == TOTAL


def test_newest_ten_torn_tails(kept: Kept) -> None:
    path = kept.put(segment=kept.journal + TORN + bytes(8192))
    for number in range(12):
        old = path.with_name(f"{kept.names['segment']}.torn-{number:08x}")
        old.write_bytes(b"%d" % number)
        os.utime(old, (number, number))
    opened(path)
    tails = {file.read_bytes() for file in path.parent.glob("*.torn-*")}
    assert tails == {TORN, *(b"%d" % number for number in range(3, 12))}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.data())
def test_garbled(kept: Kept, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["document", "previous", "segment", "writer"]))
    original = kept.journal if name == "segment" else kept.files[name][:10_000]
    start = data.draw(st.integers(0, len(original)))
    end = data.draw(st.integers(start, min(len(original), start + 64)))
    garbled = original[:start] + data.draw(st.binary(max_size=64)) + original[end:]
    assert total_or_refused(kept.put(**{name: garbled})) in (None, TOTAL)


@pytest.mark.parametrize("junk", [b"", b"\x00" * 512, b"{}", b"null"])
def test_both_documents(kept: Kept, junk: bytes) -> None:
    path = kept.put(document=junk, previous=junk)
    assert total_or_refused(path) is None
    assert any("only what the journals hold is left" in problem for problem in inspect(str(path)).problems)


def test_all_but_lock_gone(kept: Kept) -> None:
    """The lock file says that a document was saved: no new store."""
    path = kept.put(document=None, previous=None, segment=None)
    with pytest.raises(CorruptStoreError, match=r"is missing. There .* its totals are lost"):
        SavingsTracker(path)
    path = kept.put(document=None, previous=None, segment=None, lock=None, writer=None)
    assert opened(path)[0] == 0


def test_older_backup(kept: Kept, tmp_path: Path) -> None:
    """A restored older document, when the segments after it have been removed."""
    store = tmp_path / DOCUMENT
    with SavingsTracker(store) as tracker:
        tracker.record_request(model="m", tokens_saved=1)
    backup = store.read_bytes()
    with SavingsTracker(store) as tracker:
        tracker.record_request(model="m", tokens_saved=2)
    store.write_bytes(backup)
    assert "is older than the previous document beside it" in "; ".join(inspect(str(store)).problems)
    assert opened(store)[0] == 3
    assert [file.read_bytes() for file in tmp_path.glob("*.corrupt-*")] == [backup]


def test_backup_alone(kept: Kept) -> None:
    path = kept.put(previous=None, segment=None, writer=None, lock=None)
    with SavingsTracker(path) as tracker:
        assert tracker.record_request(model="m", tokens_saved=1).durable
        assert tracker.record_request(model="m", tokens_saved=1).durable
    assert opened(path)[0] == sum(SAVED) + 2


def test_journal_of_another_store(kept: Kept, tmp_path: Path) -> None:
    """Segments left beside a restored document are not counted, and are harmless."""
    with SavingsTracker(tmp_path / DOCUMENT) as other:
        other.record_request(model="m", tokens_saved=7)
    path = kept.put(document=(tmp_path / DOCUMENT).read_bytes(), previous=None, lock=None)
    found = inspect(str(path))
    assert found.problems == ()
    assert found.notes == (
        f"{path.with_name(kept.names['segment'])}: belongs to another store; it is not counted here",
    )
    done = run_cli("verify", "--store", str(path))
    assert (done.returncode, done.stderr) == (0, "")
    assert "belongs to another store" in done.stdout
    assert opened(path)[0] == 7
    # What is not this store's stays.
    assert path.with_name(kept.names["segment"]).read_bytes() == kept.files["segment"]


def test_document_of_another_store(kept: Kept, tmp_path: Path) -> None:
    with SavingsTracker(tmp_path / DOCUMENT) as other:
        other.record_request(model="m", tokens_saved=7)
    path = kept.put(document=(tmp_path / DOCUMENT).read_bytes())
    with pytest.raises(CorruptStoreError, match=r"to another store than the files beside it \(.* holds 111 tokens"):
        SavingsTracker(path)
    assert total_or_refused(path) is None
    for name in ("previous", "segment", "writer", "lock"):
        path.with_name(kept.names[name]).unlink()
    assert opened(path)[0] == 7


@pytest.mark.parametrize(
    "payload", [b"{}", b"[1]", b"\xff]", b"", b'[{"records":[{"model":"m","tokens_saved":1}]}]' * 2]
)
@pytest.mark.parametrize("without", [(), ("writer",)])
def test_nonsense_in_a_frame(kept: Kept, payload: bytes, without: tuple[str, ...]) -> None:
    """With a checksum that is right."""
    store = bytes.fromhex(json.loads(kept.files["document"])["savings_exporter"]["store"])
    writer = bytes.fromhex(kept.names["writer"].split(".")[-1])
    frame = frame_of(store, writer, 7, 1, payload)
    path = kept.put(segment=kept.journal + frame + bytes(8192), **dict.fromkeys(without))
    with pytest.raises(CorruptStoreError, match=rf"{kept.names['segment']}: a frame"):
        SavingsTracker(path)


def test_junk_for_journal_and_watermark(kept: Kept) -> None:
    path = kept.put(segment=b"junk" * 50, writer=b"junk" * 20, lock=b"junk" * 20)
    assert total_or_refused(path) is None
    assert any("cannot be determined" in problem for problem in inspect(str(path)).problems)


def test_names_like_a_segment(kept: Kept) -> None:
    path = kept.put()
    strangers = [
        path.with_name(f"{DOCUMENT}.journal.{name}")
        for name in (f"{10**20}", "x", f"{'0' * 16}.1", f"{'0' * 16}.00000001x")
    ]
    for stranger in strangers:
        stranger.write_bytes(b"not ours")
    assert opened(path)[0] == TOTAL
    assert {stranger.read_bytes() for stranger in strangers} == {b"not ours"}


def test_document_of_store_beside(kept: Kept) -> None:
    """Another store in the same directory, whose name begins like this one's."""
    path = kept.put()
    beside = path.with_name(f"{DOCUMENT}.journal")
    with SavingsTracker(beside) as tracker:
        tracker.record_request(model="m", tokens_saved=7)
    found = inspect(str(path))
    assert (found.problems, found.notes) == ((), ())
    assert opened(path)[0] == TOTAL
    assert opened(beside)[0] == 7


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_headroom_document_cut(tmp_path: Path, share: float) -> None:
    path = tmp_path / DOCUMENT
    path.write_bytes(FOREIGN[: int(len(FOREIGN) * share)])
    with pytest.raises(CorruptStoreError, match="is damaged: not JSON"):
        SavingsTracker(path)
    assert not Path(f"{path}.previous").exists()


def test_file_that_never_was_a_store(tmp_path: Path) -> None:
    """Nobody is told to move it away."""
    path = tmp_path / "passwd"
    path.write_text("root:x:0:0:root:/root:/bin/bash\n")
    for _ in range(2):
        with pytest.raises(CorruptStoreError) as refused:
            SavingsTracker(path)
        assert "If it is no store, correct the path" in str(refused.value)
        assert "away" not in str(refused.value)
    assert path.read_text().startswith("root:")


def test_history_of_others_is_bounded(tmp_path: Path) -> None:
    """Of another program's points no more are taken over than a history keeps: the last of each day."""
    path = tmp_path / DOCUMENT
    document = json.loads(FOREIGN)
    first = datetime(2020, 1, 1, tzinfo=timezone.utc)
    moments = (first + timedelta(hours=hour) for hour in range(24 * 1_000))
    document["history"] = [{"timestamp": f"{at:%Y-%m-%dT%H:%M:%SZ}", "total_tokens_saved": 1} for at in moments]
    path.write_text(json.dumps(document))
    with SavingsTracker(path) as tracker:
        assert tracker.save()
        assert tracker.snapshot().lifetime.tokens_saved == FOREIGN_TOTAL
    kept = [point["timestamp"] for point in json.loads(path.read_bytes())["history"]]
    assert len(kept) == DAYS_OF_POINTS - DAYS_OF_HOURLY_POINTS + 24 * DAYS_OF_HOURLY_POINTS
    assert kept[0] == "2020-09-26T23:00:00Z"


@pytest.mark.slow
@pytest.mark.parametrize("figure", [10**30, float("nan"), "12 monkeys", "", None, -1, [], True + 2**70])
@pytest.mark.parametrize("field", ["tokens_saved", "requests"])
def test_lifetime_figure(tmp_path: Path, figure: object, field: str) -> None:
    """One that cannot be read is damage, and never 0."""
    path = tmp_path / DOCUMENT
    document = json.loads(FOREIGN)
    document["lifetime"][field] = figure
    path.write_text(json.dumps(document))
    for attempt in (lambda: SavingsTracker(path), lambda: WatchedFile(path)):
        with pytest.raises(CorruptStoreError, match=rf"is damaged: lifetime\.{field} cannot be read"):
            attempt()
    done = run_cli("verify", "--store", str(path))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"lifetime.{field} cannot be read" in done.stderr
    assert path.read_text() == json.dumps(document)


# A writer that dies between the sync of its frame and its watermark.

DIES = """
import os, sys
from savings_exporter import SavingsTracker
from tests.support.faults import FaultyFileSystem

def die(step):
    if step == sys.argv[2]:
        os._exit(0)

faults = FaultyFileSystem()
tracker = SavingsTracker(sys.argv[1], save_interval=3600, filesystem=faults, sync_method=sys.argv[3])
assert tracker.record_request(model="m", tokens_saved=1).durable
faults.before = die
tracker.record_request(model="m", tokens_saved=10, idempotency_key="k")
os._exit(1)
"""


def dead(path: Path, method: str = "auto") -> Path:
    """A writer that acknowledged 1 token, and died with 10 more above its watermark; its file."""
    subprocess.run([sys.executable, "-c", DIES, path, "watermark", method], check=True)
    (writer,) = path.parent.glob("*.writer.*")
    facts = facts_of(writer.read_bytes())
    assert facts is not None
    assert facts.watermark == 1
    return writer


@pytest.mark.parametrize("method", ["direct", "fdatasync"])
def test_tail_is_written_again(store_path: Path, method: str) -> None:
    """Before it counts: after a failed sync it can be readable without being on the disk."""
    writer = dead(store_path, method)
    (first,) = segments(store_path)
    faults, counted = FaultyFileSystem(), []
    faults.before = lambda step: counted.append((step, WatchedFile(store_path).snapshot().lifetime.tokens_saved))
    with SavingsTracker(store_path, save_interval=3600, filesystem=faults) as tracker:
        faults.before = lambda _step: None
        assert set(counted) == {("append", 1), ("fsync_journal", 1), ("fsync_dir", 1), ("watermark", 1)}
        assert counted[-1] == ("watermark", 1)
        facts = facts_of(writer.read_bytes())
        assert facts is not None
        assert facts.watermark == 2
        assert tracker.snapshot().lifetime.tokens_saved == 11
        before, again = segments(store_path)
        assert before == first
        frame = store_path.with_name(again).read_bytes().rstrip(b"\0")
        assert frame.startswith(b"SXJ2")
        assert store_path.with_name(first).read_bytes().rstrip(b"\0").endswith(frame)
    assert opened(store_path)[0] == 11


@pytest.mark.parametrize("step", ["append", "fsync_journal", "fsync_dir", "watermark"])
def test_tail_cannot_be_written(store_path: Path, faults: FaultyFileSystem, step: str) -> None:
    """The store opens with what is acknowledged, and a later save takes the tail in."""
    dead(store_path)
    faults.fail(step, errno.EIO)
    with SavingsTracker(store_path, save_interval=3600, filesystem=faults) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == 1
        assert not tracker.save()
        assert tracker.snapshot().lifetime.tokens_saved == 1
        faults.mend()
        assert tracker.save()
        assert tracker.snapshot().lifetime.tokens_saved == 11
    assert opened(store_path)[0] == 11


def test_tail_with_a_key_used_since(store_path: Path, faults: FaultyFileSystem) -> None:
    dead(store_path)
    faults.fail("append", errno.EIO)
    with SavingsTracker(store_path, save_interval=3600, filesystem=faults) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == 1
        faults.mend()
        receipt = tracker.record_request(model="m", tokens_saved=10, idempotency_key="k")
        assert (receipt.durable, receipt.duplicate) == (True, False)
        assert tracker.save()
        assert tracker.snapshot().lifetime.tokens_saved == 11
    assert opened(store_path)[0] == 11


def test_key_in_the_tail(store_path: Path) -> None:
    """A retry after the death is a repeat of what was adopted."""
    dead(store_path)
    with SavingsTracker(store_path) as tracker:
        receipt = tracker.record_request(model="m", tokens_saved=10, idempotency_key="k")
        assert (receipt.durable, receipt.duplicate, receipt.sequence) == (True, True, 2)
        assert tracker.snapshot().lifetime.tokens_saved == 11


@pytest.mark.slow
def test_opened_while_saved(store_path: Path) -> None:
    """A store whose lock is held for long is opened with what is durable, and adopts later."""
    dead(store_path)
    faults = FaultyFileSystem()
    descriptor = faults.open_lock(f"{store_path}.lock", like=str(store_path))
    assert faults.try_lock(descriptor)
    try:
        tracker = SavingsTracker(store_path, save_interval=3600)
        assert tracker.snapshot().lifetime.tokens_saved == 1
    finally:
        faults.close(descriptor)
    assert tracker.save()
    assert tracker.snapshot().lifetime.tokens_saved == 11
    assert tracker.close()


def test_refused_closes_its_files(kept: Kept) -> None:
    """The same process can therefore repair a store that was refused."""
    path = kept.put(document=b"junk", previous=b"junk")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(StoreError):
            SavingsTracker(path)
    assert len(os.listdir("/proc/self/fd")) == before
