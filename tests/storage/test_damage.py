"""Damaged files: refused in words or opened with the whole total, never with less and never with a traceback."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from savings_exporter import CorruptStoreError, SavingsTracker, StoreError
from savings_exporter.storage.steps import Observers
from savings_exporter.storage.recovery import previous_path
from savings_exporter.storage.repair import inspect, repair
from savings_exporter.telemetry.metrics import SavingsCollector
from support import DATA, samples

TOTAL = 4096 + 77
BEFORE_THE_LAST = 4096


class Kept:
    """A store of two saves as its files' bytes, put into a directory of its own each time it is needed."""

    def __init__(self, directory: Path) -> None:
        with SavingsTracker(directory / "proxy_savings.json") as tracker:
            tracker.record_request(model="m", tokens_saved=BEFORE_THE_LAST, provider="p")
            tracker.record_request(model="m", tokens_saved=TOTAL - BEFORE_THE_LAST, provider="p")
        self.document = (directory / "proxy_savings.json").read_bytes()
        self.previous = (directory / "proxy_savings.json.previous").read_bytes()
        self._directory = directory / "damaged"

    def put(self, document: bytes | None, previous: bytes | None = None) -> Path:
        """The store with other bytes in the place of its files; None leaves a file away."""
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir()
        path = self._directory / "proxy_savings.json"
        if document is not None:
            path.write_bytes(document)
        if previous is not None:
            Path(previous_path(str(path))).write_bytes(previous)
        return path


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    return Kept(tmp_path_factory.mktemp("store"))


def total_of(path: Path) -> int:
    with SavingsTracker(path) as tracker:
        return tracker.snapshot().lifetime.tokens_saved


def refusal_of(path: Path) -> str | None:
    """Why the store is refused, with nothing of it changed; None when it opens with the whole total."""
    damaged = path.read_bytes()
    try:
        assert total_of(path) == TOTAL
    except StoreError as error:
        assert path.read_bytes() == damaged
        return str(error)
    return None


def assert_says_what_to_do(refusal: str, path: Path) -> None:
    assert refusal.startswith(f"{path}: ")
    assert "\n" not in refusal
    is_newer = "newer program" in refusal
    assert is_newer or f"savings-exporter verify --repair --store {path}" in refusal
    assert is_newer or f"{BEFORE_THE_LAST} tokens saved in 1 records" in refusal


def cuts(data: bytes) -> Iterator[bytes]:
    yield from (data[:length] for length in range(len(data)))


def flips(data: bytes) -> Iterator[bytes]:
    for position, byte in enumerate(data):
        yield data[:position] + bytes([byte ^ (1 << position % 8)]) + data[position + 1 :]


def test_a_document_cut_at_any_byte_is_refused(kept: Kept) -> None:
    for damaged in cuts(kept.document):
        path = kept.put(damaged, kept.previous)
        refusal = refusal_of(path)
        if refusal is None:
            # Only the newline at the end says nothing.
            assert damaged == kept.document.rstrip()
        else:
            assert_says_what_to_do(refusal, path)


def test_a_document_with_a_bit_flipped_anywhere_is_refused(kept: Kept) -> None:
    for damaged in flips(kept.document):
        path = kept.put(damaged, kept.previous)
        refusal = refusal_of(path)
        assert refusal is not None, f"opened with {damaged!r}"
        assert_says_what_to_do(refusal, path)


def test_damage_to_the_only_save_is_refused_with_what_is_lost(kept: Kept) -> None:
    for damaged in (b"", kept.document[:-40], kept.document.replace(b"4173", b"9173")):
        path = kept.put(damaged)
        refusal = refusal_of(path)
        assert refusal is not None
        assert refusal.startswith(f"{path}: ")
        assert "its totals are lost. Restore it from a backup" in refusal


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_any_garbling_is_refused_or_harmless(kept: Kept, data: st.DataObject) -> None:
    length = len(kept.document)
    start = data.draw(st.integers(0, length))
    end = data.draw(st.integers(start, min(length, start + 64)))
    garbled = kept.document[:start] + data.draw(st.binary(max_size=64)) + kept.document[end:]
    refusal_of(kept.put(garbled, kept.previous))


@pytest.mark.parametrize("junk", [b"", b"\x00" * 512, b"{}", b"null"])
def test_a_document_of_nothing_is_refused(kept: Kept, junk: bytes) -> None:
    path = kept.put(junk, kept.previous)
    refusal = refusal_of(path)
    assert refusal is not None
    assert_says_what_to_do(refusal, path)


def test_a_missing_document_is_no_new_store_while_there_is_a_previous_one(kept: Kept) -> None:
    path = kept.put(None, kept.previous)
    with pytest.raises(CorruptStoreError, match="is missing") as caught:
        SavingsTracker(path)
    assert_says_what_to_do(str(caught.value), path)
    assert not path.exists()


def test_a_missing_document_and_a_damaged_previous_one_are_no_new_store(kept: Kept) -> None:
    path = kept.put(None, kept.previous[:-9])
    with pytest.raises(CorruptStoreError, match="its totals are lost"):
        SavingsTracker(path)


@pytest.mark.parametrize("damaged", [b"", b"junk", None], ids=["empty", "junk", "missing"])
def test_repair_goes_back_to_the_previous_save_and_keeps_the_damaged_one(kept: Kept, damaged: bytes | None) -> None:
    path = kept.put(damaged, kept.previous)
    done = repair(str(path), Observers([]))
    assert f"went back to {BEFORE_THE_LAST} tokens saved in 1 records" in done
    aside = [file for file in path.parent.iterdir() if "corrupt" in file.name]
    assert [file.read_bytes() for file in aside] == ([damaged] if damaged is not None else [])
    assert all(str(file) in done for file in aside)
    assert total_of(path) == BEFORE_THE_LAST


def test_damaged_files_are_kept_under_names_of_their_own(kept: Kept) -> None:
    path = kept.put(b"first", kept.previous)
    repair(str(path), Observers([]))
    path.write_bytes(b"second")
    repair(str(path), Observers([]))
    aside = {file.read_bytes() for file in path.parent.iterdir() if "corrupt" in file.name}
    assert aside == {b"first", b"second"}


def test_repair_of_a_whole_store_changes_nothing(kept: Kept) -> None:
    path = kept.put(kept.document, kept.previous)
    with pytest.raises(StoreError, match="there is nothing to repair"):
        repair(str(path), Observers([]))
    assert path.read_bytes() == kept.document


def test_repair_without_a_whole_previous_save_changes_nothing(kept: Kept) -> None:
    path = kept.put(b"junk", kept.previous[:-9])
    with pytest.raises(CorruptStoreError, match="its totals are lost"):
        repair(str(path), Observers([]))
    assert path.read_bytes() == b"junk"


def test_damage_that_loses_nothing_is_mended_at_open(kept: Kept) -> None:
    # Opened again, a store is saved again, so that both of its saves hold the same totals.
    path = kept.put(kept.document, kept.previous)
    assert total_of(path) == TOTAL
    whole = path.read_bytes()
    damaged = whole.replace(b'"p"', b'"q"')
    assert damaged != whole
    path.write_bytes(damaged)
    with SavingsTracker(path) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == TOTAL
        assert tracker.snapshot().by_provider_model.keys() == {("p", "m")}
        seen = samples(SavingsCollector(tracker))
    assert seen['savings_recoveries_total{kind="corrupt_document"}'] == 1
    assert seen['savings_recoveries_total{kind="previous_document"}'] == 1
    assert [file.read_bytes() for file in path.parent.glob("*corrupt*")] == [damaged]


def test_a_bit_flipped_anywhere_after_a_second_open_never_costs_anything_in_silence(kept: Kept) -> None:
    path = kept.put(kept.document, kept.previous)
    assert total_of(path) == TOTAL
    whole, previous = path.read_bytes(), Path(previous_path(str(path))).read_bytes()
    outcomes = {refusal_of(kept.put(damaged, previous)) is None for damaged in flips(whole)}
    assert outcomes == {True, False}


@pytest.mark.parametrize("damaged", [b"", b"junk", b"\xff" * 99, b'{"schema_version": 7}'])
def test_a_damaged_previous_save_alone_is_harmless(kept: Kept, damaged: bytes) -> None:
    path = kept.put(kept.document, damaged)
    assert any("previous: is damaged" in problem for problem in inspect(str(path)).problems)
    assert total_of(path) == TOTAL
    assert inspect(str(path)).problems == ()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_headroom_document_cut_short_is_refused(kept: Kept, share: float) -> None:
    data = (DATA / "headroom" / "v6-latest" / "proxy_savings.json").read_bytes()
    path = kept.put(data[: int(len(data) * share)])
    refusal = refusal_of(path)
    assert refusal is not None
    assert "is damaged: not JSON" in refusal
