"""``verify --repair`` saves undamaged data, keeps copies of damaged files, and reports losses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from savings_exporter import CorruptStoreError, SavingsTracker, StoreError
from savings_exporter.storage.observers import Observers
from savings_exporter.storage.repair import Repaired, inspect
from savings_exporter.storage.repair import repair as repair_store
from tests.support.damaged import (
    COMMITTED,
    DOCUMENT,
    FOREIGN,
    FOREIGN_TOTAL,
    SAVED,
    TOTAL,
    Kept,
    contents,
    opened,
    total_or_refused,
)
from tests.support.service import run_cli


def repair(path: Path) -> Repaired:
    return repair_store(str(path), Observers())


def kept_aside(path: Path, suffix: str = "corrupt") -> set[bytes]:
    return {file.read_bytes() for file in path.parent.glob(f"*.{suffix}-*")}


def test_both_documents(kept: Kept) -> None:
    """The journal holds every record, because a store's first record goes there before there is a document."""
    path = kept.put(document=b"one", previous=b"two")
    done = repair(path)
    assert not done.leaves_out
    assert f"{path}: holds {TOTAL} tokens saved in 6 records" in done.text
    assert kept_aside(path) == {b"one", b"two"}
    assert f"{path}.corrupt-" in done.text
    assert opened(path)[0] == TOTAL
    assert inspect(str(path)).problems == ()


def test_journal(kept: Kept) -> None:
    """All but the damaged frame is kept, what comes after it included."""
    damaged = kept.journal.replace(b'"tokens_saved":10000,', b'"tokens_saved":90000,')
    assert damaged != kept.journal
    path = kept.put(segment=damaged)
    assert total_or_refused(path) is None
    done = repair(path)
    assert "acknowledged records are lost: number 5 of writer" in done.text
    assert f"holds {TOTAL - 10_000} tokens saved in 5 records" in done.text
    assert kept_aside(path) == {damaged}
    assert opened(path)[0] == TOTAL - 10_000
    with SavingsTracker(path) as tracker:
        assert tracker.record_request(model="m", tokens_saved=1).durable
    assert opened(path)[0] == TOTAL - 10_000 + 1


def test_missing_segments(kept: Kept) -> None:
    path = kept.put(segment=None)
    assert "acknowledged records are lost: number 4 to 6" in repair(path).text
    assert opened(path)[0] == sum(SAVED)
    assert inspect(str(path)).problems == ()


def test_document(kept: Kept) -> None:
    path = kept.put(document=b"junk")
    assert "nothing is lost" in repair(path).text
    assert kept_aside(path) == {b"junk"}
    assert opened(path)[0] == TOTAL


def test_every_damaged_file(kept: Kept) -> None:
    damaged = kept.journal[:-20]
    path = kept.put(document=b"one", previous=b"two", segment=damaged)
    assert "records are lost: number 6" in repair(path).text
    assert kept_aside(path) == {b"one", b"two", damaged}
    assert opened(path)[0] == TOTAL - COMMITTED[-1]


def test_names_of_their_own(kept: Kept) -> None:
    path = kept.put(document=b"first")
    repair(path)
    path.write_bytes(b"second")
    repair(path)
    assert kept_aside(path) == {b"first", b"second"}
    assert opened(path)[0] == TOTAL


def test_whole_store(kept: Kept) -> None:
    path = kept.put()
    before = contents(path)
    done = repair(path)
    assert done.text == f"{path}: there is nothing to repair: it holds {TOTAL} tokens saved in 6 records"
    assert contents(path) == before


@pytest.mark.parametrize("journal", [None, b"junk"])
def test_nothing_left(kept: Kept, journal: bytes | None) -> None:
    path = kept.put(document=b"junk", previous=b"junk", segment=journal, writer=None)
    before = contents(path)
    with pytest.raises(CorruptStoreError, match="its totals are lost"):
        repair(path)
    assert contents(path) == before


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is nothing to repair: there is no store yet"):
        repair(tmp_path / DOCUMENT)
    assert list(tmp_path.iterdir()) == []


def test_junk_for_journal(kept: Kept) -> None:
    path = kept.put(segment=b"junk" * 50, writer=b"junk" * 20, lock=b"junk" * 20)
    done = repair(path)
    assert "cannot be determined" in done.text
    assert kept_aside(path) == {b"junk" * 50}
    assert opened(path)[0] == sum(SAVED)


def test_document_of_another_store(kept: Kept, tmp_path: Path) -> None:
    with SavingsTracker(tmp_path / DOCUMENT) as other:
        other.record_request(model="m", tokens_saved=7)
    data = (tmp_path / DOCUMENT).read_bytes()
    path = kept.put(document=data)
    done = repair(path)
    assert "the document at the path, with 7 tokens saved in 1 records, does not belong to this store" in done.text
    assert "nothing is lost" not in done.text
    assert done.leaves_out
    assert kept_aside(path, "other-store") == {data}
    assert kept_aside(path) == set()
    assert opened(path)[0] == TOTAL


def test_living_writer(kept: Kept) -> None:
    path = kept.put()
    with SavingsTracker(path, save_interval=3600) as tracker:
        assert tracker.record_request(model="m", tokens_saved=1).durable
        path.write_bytes(b"junk")
        with pytest.raises(StoreError, match="another process is writing to it; stop that process first"):
            repair(path)
        assert tracker.save()
    assert opened(path)[0] == TOTAL + 1


# verify: what is harmless is a note.


def test_previous_is_no_file(kept: Kept) -> None:
    path = kept.put(previous=None)
    previous = Path(f"{path}.previous")
    previous.mkdir()
    (problem,) = inspect(str(path)).problems
    assert problem == f"{previous}: cannot be read: Is a directory"


def test_verify_torn_tail(kept: Kept) -> None:
    path = kept.put(segment=kept.journal + b"SXJ2 torn" + bytes(8192))
    before = contents(path)
    done = run_cli("verify", "--store", str(path))
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{path}: {TOTAL} tokens saved in 6 records" in done.stdout
    assert "of a write that was never acknowledged" in done.stdout
    assert contents(path) == before


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"document": b"junk"}, "nothing is lost: it is written anew when the store is next opened"),
        ({"document": None}, "is missing; nothing is lost"),
        ({"previous": b"junk"}, "is damaged; the next save replaces it"),
        ({"segment": b"junk"}, "acknowledged records are lost"),
        ({"document": b"junk", "previous": b"junk"}, "only what the journals hold is left"),
    ],
)
def test_verify_problem(kept: Kept, changed: dict[str, bytes | None], says: str) -> None:
    path = kept.put(**changed)
    before = contents(path)
    done = run_cli("verify", "--store", str(path))
    assert done.returncode == 1
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert contents(path) == before


# Another program rewrote the document while our journal held more.


def test_other_program(kept: Kept) -> None:
    """Both totals, what each has that the other lacks, and all ways to continue."""
    path = kept.put(document=FOREIGN)
    requests = json.loads(FOREIGN)["lifetime"]["requests"]
    with pytest.raises(CorruptStoreError) as refused:
        SavingsTracker(path)
    says = str(refused.value)
    assert inspect(str(path)).problems[0] == says
    for text in (
        "another program rewrote the document",
        f"The document at the path holds {FOREIGN_TOTAL} tokens saved in {requests} records",
        f"this store holds {TOTAL} tokens saved in 6 records",
        f"The other program recorded {FOREIGN_TOTAL} tokens saved in {requests} records that this store lacks",
        f"this store holds {TOTAL} tokens saved in 6 records that the document lacks",
        f"To continue with the savings of both: savings-exporter verify --repair --store {path} --merge",
        f"alone: savings-exporter verify --repair --store {path} (the other document is kept beside it)",
        f"move {path}.previous, {path}.lock and all files {path}.journal.*, {path}.writer.* and {path}.days.* away",
    ):
        assert text in says
    done = run_cli("verify", "--store", str(path))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert says in done.stderr


def test_keep_ours(kept: Kept) -> None:
    path = kept.put(document=FOREIGN)
    done = run_cli("verify", "--repair", "--store", str(path))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{path}: holds {TOTAL} tokens saved in 6 records" in done.stderr
    assert f"the other program's document, with {FOREIGN_TOTAL} tokens saved" in done.stderr
    assert "is left out" in done.stderr
    assert "nothing is lost" not in done.stderr
    assert kept_aside(path, "other-program") == {FOREIGN}
    assert kept_aside(path) == set()
    assert opened(path)[0] == TOTAL
    assert run_cli("verify", "--store", str(path)).returncode == 0


def test_keep_theirs(kept: Kept, tmp_path: Path) -> None:
    """As the message says."""
    path = kept.put(document=FOREIGN)
    for file in path.parent.iterdir():
        if file != path:
            shutil.move(file, tmp_path / file.name)
    assert opened(path)[0] == FOREIGN_TOTAL


def test_other_program_began_anew(kept: Kept) -> None:
    """Its document holds less than ours did, so no difference is stated."""
    document = {"schema_version": 6, "lifetime": {"requests": 1, "tokens_saved": 5}}
    path = kept.put(document=json.dumps(document).encode())
    (says, *_) = inspect(str(path)).problems
    assert "The document at the path holds less than our last remaining document" in says
    assert "so this store may lack all of it" in says
    assert "--merge" not in says
    done = repair(path)
    assert done.leaves_out
    assert "so this store may lack all of it" in done.text


def test_other_program_under_a_tracker(kept: Kept) -> None:
    """What is recorded stays durable; saves fail and say what to do; nothing of either is lost."""
    path = kept.put()
    with SavingsTracker(path, save_interval=3600) as tracker:
        assert tracker.record_request(model="m", tokens_saved=1).durable
        assert tracker.save()
        path.unlink()
        path.write_bytes(FOREIGN)
        assert tracker.record_request(model="m", tokens_saved=2).durable
        assert not tracker.save()
        reason = tracker.health().reason or ""
        assert "another program replaced the document" in reason
        assert f"savings-exporter verify --store {path}" in reason
        assert tracker.snapshot().lifetime.tokens_saved == TOTAL + 3
    assert path.read_bytes() == FOREIGN
    assert total_or_refused(path) is None
    assert repair(path).leaves_out
    assert opened(path)[0] == TOTAL + 3


def test_other_program_after_close(kept: Kept) -> None:
    """Its document is taken over when it was made from ours. Ours held everything when it was replaced."""
    path = kept.put()
    opened(path)
    document = json.loads(path.read_bytes())
    del document["savings_exporter"]
    document["lifetime"]["requests"] += 1
    document["lifetime"]["tokens_saved"] += 5
    document["by_model"]["m"]["requests"] += 1
    document["by_model"]["m"]["tokens_saved"] += 5
    path.write_text(json.dumps(document))
    assert inspect(str(path)).problems == ()
    assert opened(path)[0] == TOTAL + 5


def test_unrelated_document_after_close(kept: Kept) -> None:
    """It is not taken over, although it holds more: it lacks all records of this store."""
    path = kept.put()
    opened(path)
    path.write_bytes(FOREIGN)
    assert total_or_refused(path) is None
    assert (
        f"this store holds {TOTAL} tokens saved in 6 records that the document lacks" in inspect(str(path)).problems[0]
    )


@pytest.mark.parametrize(
    ("document", "why"),
    [
        (FOREIGN[:-100], "it is damaged: not JSON"),
        (
            FOREIGN.replace(b'"tokens_saved": 2672322', b'"tokens_saved": NaN', 1),
            "it is damaged: lifetime.tokens_saved",
        ),
        (FOREIGN.replace(b"openai", b"\xff\xfe"), "it is damaged: not JSON"),
    ],
    ids=["cut", "figure", "encoding"],
)
def test_unreadable_document_of_other_program(kept: Kept, document: bytes, why: str) -> None:
    """It may hold records that this store lacks: it is neither replaced nor called a damaged document of ours."""
    path = kept.put(document=document)
    (says,) = inspect(str(path)).problems
    assert "another program wrote the document" in says
    assert why in says
    assert "nothing is lost" not in says
    assert total_or_refused(path) is None
    done = repair(path)
    assert done.leaves_out
    assert "the other program's document, which cannot be read, is left out" in done.text
    assert kept_aside(path, "other-program") == {document}
    assert opened(path)[0] == TOTAL


def test_unreadable_document_under_a_tracker(kept: Kept) -> None:
    path = kept.put()
    with SavingsTracker(path, save_interval=3600) as tracker:
        assert tracker.record_request(model="m", tokens_saved=1).durable
        assert tracker.save()
        path.unlink()
        path.write_bytes(FOREIGN[:-100])
        assert tracker.record_request(model="m", tokens_saved=2).durable
        assert not tracker.save()
    assert path.read_bytes() == FOREIGN[:-100]
    assert repair(path).leaves_out
    assert opened(path)[0] == TOTAL + 3
