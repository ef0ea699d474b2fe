"""Days: what was saved on each day adds up to the lifetime, and closed days are moved to a file of their own."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

import msgspec
import pytest

from savings_exporter import SavingsRecord, SavingsTracker, StoreError
from savings_exporter.formats.days import ClosedDays, encode_closed
from savings_exporter.formats.document import decode, encode
from savings_exporter.model.days import Dated, Names, grouped
from savings_exporter.model.figures import ZERO, Totals, added
from savings_exporter.storage.filesystem import FileSystem, Identity
from savings_exporter.storage.repair import inspect
from savings_exporter.telemetry.metrics import SavingsCollector
from savings_exporter.watched import WatchedFile
from tests.support.faults import FaultyFileSystem
from tests.support.paths import DATA
from tests.support.scrape import samples
from tests.support.service import run_cli
from tests.support.wait import eventually

NOW = datetime.now(timezone.utc)
ROWS = 2200
"""So many rows of closed days are moved at the next save."""


def past(number: int) -> str:
    """A time some days ago."""
    return (NOW - timedelta(days=2 + number)).isoformat()


def records(rows: int, model: str = "m") -> list[SavingsRecord]:
    """A record of each row, on eleven days."""
    return [
        SavingsRecord(model=f"{model}{n % 199}", tokens_saved=n, timestamp=past(n // 200))  # type: ignore[arg-type]
        for n in range(rows)
    ]


def by_day(some: Iterable[SavingsRecord]) -> Counter[str]:
    counted: Counter[str] = Counter()
    for record in some:
        assert record.timestamp is not None
        counted[record.timestamp.date().isoformat()] += record.tokens_saved
    return counted


def shown(dated: Dated) -> Counter[str]:
    """The tokens saved by day; what belongs to no day has an empty one."""
    days = Counter({day or "": numbers[1] for (day,), numbers in grouped(dated.rows, ["day"]).items()})
    return days + Counter({"": dated.undated[1]})


def files(store: Path) -> list[str]:
    return sorted(file.name.rpartition(".")[2] for file in store.parent.glob("*.days.*"))


def assert_whole(store: Path, expected: Counter[str]) -> None:
    """A reader, and a process that opens the store, both see these days, and they add up."""
    assert shown(WatchedFile(store).days()) == expected
    found = inspect(str(store))
    assert found.problems == ()
    assert found.ledger is not None
    assert found.ledger.lifetime.tokens_saved == expected.total()
    with SavingsTracker(store) as tracker:
        assert shown(tracker.days()) == expected


def test_days_add_up(store_path: Path) -> None:
    """Within a batch, over saves and restarts, and for records that arrive late."""
    recorded: list[SavingsRecord] = []
    for rows in (3, ROWS, 5, ROWS):
        batch = records(rows)
        with SavingsTracker(store_path) as tracker:
            assert tracker.record_many(batch).durable
            recorded += batch
            assert shown(tracker.days()) == by_day(recorded)
            assert tracker.save()
            assert shown(tracker.days()) == by_day(recorded)
        assert_whole(store_path, by_day(recorded))
    assert len(files(store_path)) == 1


def test_once_an_hour(store_path: Path) -> None:
    """Few rows of closed days wait in the document until the next hour."""
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_request(model="m", tokens_saved=1, timestamp=past(0)).durable
        assert tracker.save()
        assert files(store_path) == ["00000001"]
        # As if this save were an hour ago.
        document = decode(store_path.read_bytes())
        assert document.saved_at is not None
        earlier = msgspec.structs.replace(document, saved_at=document.saved_at - timedelta(hours=1))
        store_path.write_bytes(encode(earlier))
        for number in (1, 2):
            assert tracker.record_request(model="m", tokens_saved=1, timestamp=past(number)).durable
            assert tracker.save()
            document = decode(store_path.read_bytes())
            assert document.saved_at is not None
            if document.saved_at.hour == NOW.hour:  # otherwise an hour began during the test
                assert (document.days_file, len(document.ledger.days)) == (2, number - 1)


def test_range_of_days(store_path: Path) -> None:
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_many(records(ROWS)).durable
        assert tracker.save()
        assert tracker.record_request(model="m1", tokens_saved=1, timestamp=past(3)).durable
        first, last = past(4)[:10], past(3)[:10]
        found = shown(tracker.days(first, last))
    assert found == Counter({day: tokens for day, tokens in by_day(records(ROWS)).items() if first <= day <= last}) + (
        Counter({last: 1})
    )


def test_names_of_a_record(store_path: Path) -> None:
    """Each name of a record can be asked for, and a time in the future counts today."""
    later = NOW + timedelta(days=3)
    with SavingsTracker(store_path) as tracker:
        for moment in (past(0), later.isoformat()):
            tracker.record_request(
                model="m", provider="p", project="x", agent="a", source="s", tokens_saved=7, timestamp=moment
            )
        (old, new) = tracker.days().rows
    assert old.names == new.names == ("p", "m", "x", "a", "s")
    assert old.day == past(0)[:10]
    assert old.day < new.day < later.date().isoformat()


def test_older_than_two_years(store_path: Path) -> None:
    with SavingsTracker(store_path) as tracker:
        for days in (720, 740):
            assert tracker.record_request(model="m", tokens_saved=days, timestamp=past(days)).durable
    assert_whole(store_path, Counter({past(720)[:10]: 720, "": 740}))


def test_document_without_days(store_path: Path) -> None:
    """What another program's document holds belongs to no day."""
    shutil.copy(DATA / "headroom" / "v6" / "proxy_savings.json", store_path)
    before = WatchedFile(store_path).snapshot().lifetime.tokens_saved
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_request(model="m", tokens_saved=5, timestamp=past(0)).durable
    assert_whole(store_path, Counter({"": before, past(0)[:10]: 5}))


@pytest.mark.parametrize("step", ["write", "fsync_file", "fsync_dir", "replace"])
def test_failing_step(store_path: Path, faults: FaultyFileSystem, step: str) -> None:
    """Nothing is lost, nothing counts twice, and at most one file that no document names is left."""
    with SavingsTracker(store_path, filesystem=faults) as tracker:
        first = records(ROWS)
        assert tracker.record_many(first).durable
        assert tracker.save()
        second = records(ROWS, "n")
        assert tracker.record_many(second).durable
        for _ in range(3):
            faults.fail(step, errno.EIO)
            assert not tracker.save()
            assert len(files(store_path)) <= 2
            assert shown(tracker.days()) == by_day([*first, *second])
            faults.mend()
        assert tracker.save()
        assert shown(tracker.days()) == by_day([*first, *second])
    assert_whole(store_path, by_day([*first, *second]))
    assert len(files(store_path)) == 1


def test_killed_at_each_step(store_path: Path, faults: FaultyFileSystem) -> None:
    """A copy of the files before each step of a save that closes days has every day."""
    copies: list[Path] = []

    def copy(_step: str) -> None:
        folder = store_path.parent / f"copy{len(copies)}"
        shutil.copytree(store_path.parent, folder, ignore=shutil.ignore_patterns("copy*"))
        copies.append(folder / store_path.name)

    with SavingsTracker(store_path, filesystem=faults, save_interval=3600) as tracker:
        recorded = records(ROWS)
        assert tracker.record_many(recorded).durable
        assert tracker.save()
        recorded += records(ROWS, "n")
        assert tracker.record_many(records(ROWS, "n")).durable
        faults.before = copy
        assert tracker.save()
        faults.before = lambda _step: None
    # Of the file of closed days: write and two syncs; of the document: write, sync, replace and a sync.
    assert len(copies) >= 7
    for path in copies:
        assert_whole(path, by_day(recorded))


def test_previous_document_has_its_days(store_path: Path) -> None:
    """The file of closed days that the previous document names stays until that is replaced."""
    with SavingsTracker(store_path) as tracker:
        recorded = records(ROWS)
        assert tracker.record_many(recorded).durable
        assert tracker.save()
        for number in range(3):
            batch = records(ROWS, f"{number}-")
            assert tracker.record_many(batch).durable
            recorded += batch
            assert tracker.save()
            copy = store_path.parent / "copy"
            shutil.copytree(store_path.parent, copy, ignore=shutil.ignore_patterns("copy"))
            (copy / store_path.name).write_bytes(b"damaged")
            with SavingsTracker(copy / store_path.name) as other:
                assert shown(other.days()) == by_day(recorded)
            shutil.rmtree(copy)


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_file_that_is_damaged(store_path: Path, damage: str) -> None:
    """The totals stay. The days are reported, not invented, and a repair makes them add up again."""
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_many(records(ROWS)).durable
    total = by_day(records(ROWS)).total()
    (file,) = store_path.parent.glob("*.days.*")
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes().replace(b'"m1"', b'"m2"'))
    with pytest.raises(StoreError, match=f"{file.name}: (is missing|its checksum does not match)") as raised:
        WatchedFile(store_path).days()
    assert "verify --repair" in str(raised.value)
    verified = run_cli("verify", "--store", str(store_path))
    assert (verified.returncode, "the totals are complete" in verified.stdout + verified.stderr) == (1, True)
    with SavingsTracker(store_path) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == total
        assert tracker.record_request(model="m", tokens_saved=5, timestamp=past(0)).durable
    repaired = run_cli("verify", "--repair", "--store", str(store_path))
    assert repaired.returncode == 0, repaired.stdout + repaired.stderr
    assert_whole(store_path, Counter({"": total, past(0)[:10]: 5}))


def test_damage_noticed_by_a_save(store_path: Path) -> None:
    """The next days that close begin a new file, and a copy of the damaged one is kept."""
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_many(records(ROWS)).durable
        assert tracker.save()
        for file in store_path.parent.glob("*.days.*"):
            file.write_bytes(b"damaged")
        second = records(ROWS, "n")
        assert tracker.record_many(second).durable
        assert tracker.save()
        assert shown(tracker.days()) == by_day(second) + Counter({"": by_day(records(ROWS)).total()})
        assert samples(SavingsCollector(tracker))['savings_recoveries_total{kind="closed_days"}'] == 1
    assert [file.read_bytes() for file in store_path.parent.glob("*.days.*corrupt*")] == [b"damaged"]
    assert_whole(store_path, by_day(second) + Counter({"": by_day(records(ROWS)).total()}))


def test_reader_of_replaced_files(store_path: Path) -> None:
    """Saves that remove the file while it is read make the reader start again."""
    with SavingsTracker(store_path) as tracker:
        recorded = records(ROWS)
        assert tracker.record_many(recorded).durable
        assert tracker.save()

        class Reading(FaultyFileSystem):
            saves = 2

            def read(self, path: str) -> tuple[bytes, object]:  # type: ignore[override]
                if ".days." in path and self.saves:
                    self.saves -= 1
                    for _ in range(2):
                        batch = records(ROWS, f"{self.saves}{_}")
                        assert tracker.record_many(batch).durable
                        recorded.extend(batch)
                        assert tracker.save()
                return super().read(path)

        assert shown(WatchedFile(store_path, Reading()).days()) == by_day(recorded)


def test_totals_and_days_up_to_the_same_record(store_path: Path) -> None:
    """Although a record is counted while the days are read."""
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_many(records(ROWS)).durable
        assert tracker.save()

        class Reading(FaultyFileSystem):
            def read(self, path: str) -> tuple[bytes, object]:  # type: ignore[override]
                if ".days." in path:
                    assert tracker.record_request(model="m", tokens_saved=1).durable
                return super().read(path)

        watched = WatchedFile(store_path, Reading())
        for _ in range(2):
            snapshot, dated = watched.snapshot_and_days()
            assert snapshot.lifetime.tokens_saved == shown(dated).total()


def test_damaged_file_name(store_path: Path) -> None:
    """Files of another store whose name begins with this one's are left alone."""
    other = store_path.with_name(f"{store_path.name}.days.00000001.json")
    other.write_text("{}")
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_many(records(ROWS)).durable
    assert other.read_text() == "{}"


@pytest.mark.parametrize("amounts", [[9_100_000.0], [123_456_789.01], [-5e8], [5e8, 0.012345671, -5e8]], ids=str)
def test_large_amounts(store_path: Path, amounts: list[float]) -> None:
    """The lifetime is a float, the days are exact: rounding is no damage."""
    amounts = [*amounts, *[0.012345671] * 4]
    with SavingsTracker(store_path) as tracker:
        for number, usd in enumerate(amounts):
            assert tracker.record_request(model="m", tokens_saved=1, savings_usd=usd, timestamp=past(number)).durable
    assert_whole(store_path, Counter({past(number)[:10]: 1 for number in range(len(amounts))}))


def test_days_that_do_not_add_up(store_path: Path) -> None:
    """They are reported, and a repair keeps them: only the difference belongs to no day."""
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_many(records(ROWS)).durable
    document = decode(store_path.read_bytes())
    missing = by_day(records(ROWS)).total() + 77
    lifetime = msgspec.structs.replace(document.ledger.lifetime, tokens_saved=missing)
    store_path.write_bytes(
        encode(msgspec.structs.replace(document, ledger=msgspec.structs.replace(document.ledger, lifetime=lifetime)))
    )
    verified = run_cli("verify", "--store", str(store_path))
    assert (verified.returncode, "the days do not add up" in verified.stdout + verified.stderr) == (1, True)
    assert run_cli("verify", "--repair", "--store", str(store_path)).returncode == 0
    assert inspect(str(store_path)).problems == ()
    assert shown(WatchedFile(store_path).days()) == by_day(records(ROWS)) + Counter({"": 77})


def test_file_of_another_store(tmp_path: Path) -> None:
    """A document that another program rewrote begins a new store. The old one's days are not removed."""
    store = tmp_path / "proxy_savings.json"
    with SavingsTracker(store) as tracker:
        assert tracker.record_many(records(ROWS)).durable
    (file,) = tmp_path.glob("*.days.*")
    for leftover in tmp_path.glob("proxy_savings.json.*"):
        if leftover != file:
            leftover.unlink()
    shutil.copy(DATA / "headroom" / "v6" / "proxy_savings.json", store)
    with SavingsTracker(store) as tracker:
        assert tracker.record_many(records(ROWS)).durable
        assert tracker.save()
    assert file in tmp_path.glob("*.days.*")
    assert len(files(store)) == 2


def test_threads_end(store_path: Path) -> None:
    """Many trackers, each started by several threads at once, leave no thread."""
    before = threading.active_count()
    for number in range(30):
        with SavingsTracker(store_path) as tracker, ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: tracker.record_request(model="m", tokens_saved=1), range(8)))
        assert tracker.snapshot().lifetime.requests == 8 * (number + 1)
    eventually(lambda: threading.active_count() <= before, "the threads to end")


def with_file(store: Path, closed: ClosedDays) -> None:
    """Put a file of closed days in place of the store's, and a lifetime that these days add up to."""
    document = decode(store.read_bytes())
    ledger = document.ledger
    (file,) = store.parent.glob("*.days.*")
    file.write_bytes(encode_closed(closed, document.store))
    lifetime = Totals().plus(added(ledger.undated, closed.sum()), ledger.newest)
    ledger = msgspec.structs.replace(ledger, lifetime=lifetime, days={})
    store.write_bytes(encode(msgspec.structs.replace(document, ledger=ledger)))


def test_more_days_than_are_kept(store_path: Path) -> None:
    """The oldest days of the file belong to no day from then on."""
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_many(records(ROWS)).durable
    names = Names("p", "m", None, None, None)
    old = [(NOW - timedelta(days=20 + number)).date().isoformat() for number in range(735)]
    with_file(store_path, ClosedDays({}).with_days({day: {names: (1, 10, *ZERO[2:])} for day in old}))
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_many(records(ROWS)).durable
    expected = by_day(records(ROWS)) + Counter(dict.fromkeys(old[:720], 10)) + Counter({"": 150})
    assert_whole(store_path, expected)


def test_line_that_cannot_be_read(store_path: Path) -> None:
    """Its checksum matches, so another program wrote it. Saves go on all the same."""
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_many(records(ROWS)).durable
    (file,) = store_path.parent.glob("*.days.*")
    store = decode(store_path.read_bytes()).store
    day = past(0)[:10]
    line = f'{{"day": "{day}", "rows": [["p"]]}}\n'.encode()
    file.write_bytes(encode_closed(ClosedDays({day: line}), store))
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_many(records(ROWS, "n")).durable
        assert tracker.save()
    total = by_day(records(ROWS)).total()
    assert_whole(store_path, by_day(records(ROWS, "n")) + Counter({"": total}))


class Unreadable(FileSystem):
    """The files whose names contain ``part`` cannot be read."""

    part = "none"

    def read(self, path: str) -> tuple[bytes, Identity]:
        if self.part in path:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return super().read(path)


@pytest.mark.parametrize("part", [".days.", ".previous"])
def test_file_that_cannot_be_read(store_path: Path, part: str) -> None:
    """Saves succeed. The days are closed when the file can be read again."""
    disk = Unreadable()
    with SavingsTracker(store_path, filesystem=disk) as tracker:
        assert tracker.record_many(records(ROWS)).durable
        assert tracker.save()
        assert tracker.record_many(records(ROWS, "n")).durable
        disk.part = part
        assert tracker.save()
        closed_at = decode(store_path.read_bytes()).days_file
        assert closed_at == (1 if part == ".days." else 2)
        disk.part = "none"
        assert tracker.record_many(records(ROWS, "o")).durable
        assert tracker.save()
        assert decode(store_path.read_bytes()).days_file == closed_at + 1
    recorded = [*records(ROWS), *records(ROWS, "n"), *records(ROWS, "o")]
    assert_whole(store_path, by_day(recorded))
    assert len(files(store_path)) == 1


def test_today_stays_open(store_path: Path) -> None:
    """The last save of a process closes the days before, and leaves one file."""
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_many(records(ROWS)).durable
        assert tracker.save()
        assert tracker.record_many(records(ROWS, "n")).durable
        before = datetime.now(timezone.utc).date().isoformat()
        assert tracker.record_request(model="m", tokens_saved=3).durable
    document = decode(store_path.read_bytes())
    assert document.ledger.days.keys() == {before}
    assert document.days_file == 2
    assert files(store_path) == ["00000002"]
