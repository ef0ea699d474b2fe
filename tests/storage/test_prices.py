"""Prices in a store: what is recorded stays as it was priced, for all processes and across restarts."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from savings_exporter import KeyConflictError, SavingsCollector, SavingsTracker
from savings_exporter.model.record import SavingsRecord
from savings_exporter.prices import Prices, load_prices
from savings_exporter.storage.repair import inspect
from savings_exporter.watched import WatchedFile
from tests.support.faults import FaultyFileSystem
from tests.support.paths import DATA
from tests.support.scrape import samples

DOCUMENT = "proxy_savings.json"


def prices_of(directory: Path, rate: float, name: str = "prices.yml") -> Prices:
    """The prices of a file with one rate for all models that have ``m`` in their name."""
    path = directory / name
    path.write_text(f'models: {{"*m*": {{input: {rate}}}}}')
    prices = load_prices(str(path))
    assert prices is not None
    return prices


def unpriced(tracker: SavingsTracker) -> dict[str, float]:
    found = samples(SavingsCollector(tracker))
    return {name: value for name, value in found.items() if name.startswith("savings_unpriced_requests_total")}


def test_change_of_prices(store_path: Path, tmp_path: Path) -> None:
    old, new = prices_of(tmp_path, 2, "old.yml"), prices_of(tmp_path, 500, "new.yml")
    with SavingsTracker(store_path, prices=old) as tracker:
        assert tracker.record_request(model="m", tokens_saved=1000, input_tokens=10).durable
        assert tracker.snapshot().lifetime.savings_usd == 0.002
    with SavingsTracker(store_path, prices=new) as tracker:
        assert tracker.record_request(model="m", tokens_saved=1000).durable
        assert tracker.record_request(model="m", tokens_saved=1000, savings_usd=-0.25).durable
        snapshot = tracker.snapshot()
        assert (snapshot.lifetime.savings_usd, snapshot.lifetime.input_cost_usd) == (0.252, 0.00002)
        assert set(snapshot.price_bases) == {old.basis, new.basis}
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_request(model="m", tokens_saved=1000).durable
        snapshot = tracker.snapshot()
        assert (snapshot.lifetime.savings_usd, snapshot.lifetime.unpriced_requests) == (0.252, 1)
        assert set(snapshot.price_bases) == {old.basis, new.basis}


def test_model_without_a_price(store_path: Path, tmp_path: Path) -> None:
    with SavingsTracker(store_path, prices=prices_of(tmp_path, 2)) as tracker:
        for _ in range(3):
            tracker.record_request(model="private", tokens_saved=1000)
        tracker.record_request(model="private", tokens_saved=0, output_tokens_saved=4)
        tracker.record_request(model="m", tokens_saved=1000)
        expected = {
            'savings_unpriced_requests_total{model="m"}': 0,
            'savings_unpriced_requests_total{model="private"}': 3,
            'savings_unpriced_requests_total{model="unknown"}': 0,
        }
        assert unpriced(tracker) == expected
    with SavingsTracker(store_path) as tracker:
        assert unpriced(tracker) == expected
        assert tracker.snapshot().by_model["private"].savings_usd is None


def test_retry_after_a_change_of_prices(store_path: Path, tmp_path: Path) -> None:
    """The fingerprint of a keyed record is that of what the caller gave."""
    arguments = {"model": "m", "tokens_saved": 1000, "idempotency_key": "key"}
    with SavingsTracker(store_path, prices=prices_of(tmp_path, 2)) as tracker:
        first = tracker.record_request(**arguments)  # type: ignore[arg-type]
    for prices in (prices_of(tmp_path, 500), None):
        with SavingsTracker(store_path, prices=prices) as tracker:
            again = tracker.record_request(**arguments)  # type: ignore[arg-type]
            assert (again.duplicate, again.sequence) == (True, first.sequence)
            assert tracker.snapshot().lifetime.savings_usd == 0.002
            with pytest.raises(KeyConflictError):
                tracker.record_request(**{**arguments, "savings_usd": 0.002})  # type: ignore[arg-type]


def test_records_of_the_caller_are_unchanged(store_path: Path, tmp_path: Path) -> None:
    record = SavingsRecord(model="m", tokens_saved=1000)
    with SavingsTracker(store_path, prices=prices_of(tmp_path, 2)) as tracker:
        assert tracker.record_many([record, record]).durable
        assert record.savings_usd is None
        assert tracker.snapshot().lifetime.savings_usd == 0.004


CHILD = """
import os, sys
from savings_exporter import SavingsTracker
from savings_exporter.prices import load_prices
tracker = SavingsTracker(sys.argv[1], prices=load_prices(sys.argv[2]))
assert tracker.record_request(model="m", tokens_saved=1000).durable
assert tracker.record_request(model="private", tokens_saved=1000).durable
os.kill(os.getpid(), 9)
"""


def test_killed_processes(store_path: Path, tmp_path: Path) -> None:
    """Amounts and basis are durable with the records, before any save."""
    own = prices_of(tmp_path, 2)
    for _ in range(2):
        command = [sys.executable, "-c", CHILD, str(store_path), str(tmp_path / "prices.yml")]
        assert subprocess.run(command, check=False).returncode == -9
    for _ in range(2):
        snapshot = WatchedFile(store_path).snapshot()
        assert (snapshot.lifetime.savings_usd, snapshot.lifetime.unpriced_requests) == (0.004, 2)
        (basis,) = snapshot.price_bases
        assert (basis.prices, basis.since >= own.basis.since) == (own.basis.prices, True)
        with SavingsTracker(store_path) as tracker:
            assert tracker.snapshot().price_bases == (basis,)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_forked_child(store_path: Path, tmp_path: Path) -> None:
    with SavingsTracker(store_path, prices=prices_of(tmp_path, 2)) as tracker:
        child = os.fork()
        if child == 0:
            os._exit(0 if tracker.record_request(model="m", tokens_saved=1000).durable else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert tracker.snapshot().lifetime.savings_usd == 0.002


def test_tasks(store_path: Path, tmp_path: Path) -> None:
    record = SavingsRecord(model="m", tokens_saved=1000)

    async def recorded(tracker: SavingsTracker) -> None:
        assert (await tracker.record_request_async(model="m", tokens_saved=1000)).durable
        # So many are accepted in a thread.
        assert (await tracker.record_many_async([record] * 101)).durable

    with SavingsTracker(store_path, prices=prices_of(tmp_path, 2)) as tracker:
        asyncio.run(recorded(tracker))
        assert tracker.snapshot().lifetime.savings_usd == 0.204


def test_two_processes_at_the_same_time(store_path: Path, tmp_path: Path) -> None:
    one, other = prices_of(tmp_path, 2, "one.yml"), prices_of(tmp_path, 3, "other.yml")
    with SavingsTracker(store_path, prices=one) as first, SavingsTracker(store_path, prices=other) as second:
        assert first.record_request(model="m", tokens_saved=1000).durable
        assert second.record_request(model="m", tokens_saved=1000).durable
        for tracker in (first, second):
            snapshot = tracker.snapshot()
            assert snapshot.lifetime.savings_usd == 0.005
            assert set(snapshot.price_bases) == {one.basis, other.basis}


def test_records_that_were_folded(store_path: Path, tmp_path: Path, faults: FaultyFileSystem) -> None:
    """While a disk fails, only the sums of records are kept."""
    prices = prices_of(tmp_path, 2)
    with SavingsTracker(store_path, filesystem=faults, prices=prices) as tracker:
        tracker.record_request(model="m", tokens_saved=0)
        faults.fail("pwrite", errno.EIO)
        many = [SavingsRecord(model=model, tokens_saved=1000) for model in ("m", "private")] * 500
        for _ in range(12):
            tracker.record_many(many, wait=False)
        faults.mend()
        assert tracker.save()
        lifetime = tracker.snapshot().lifetime
        assert (lifetime.requests, lifetime.unpriced_requests, lifetime.savings_usd) == (12_001, 6000, 12.0)
        assert tracker.snapshot().price_bases == (prices.basis,)


# A store of a version without prices. The process was killed after four records, and the document holds two of them.


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    shutil.copytree(DATA / "unpriced", tmp_path / "unpriced")
    return tmp_path / "unpriced" / DOCUMENT


def test_store_of_an_earlier_version(earlier: Path, tmp_path: Path) -> None:
    assert inspect(str(earlier)).problems == ()
    before = WatchedFile(earlier).snapshot()
    # The document does not say which of its requests have no price. The journal does.
    assert (before.lifetime.requests, before.lifetime.tokens_saved, before.lifetime.unpriced_requests) == (4, 6253, 1)
    assert (before.lifetime.savings_usd, before.lifetime.priced_requests, before.price_bases) == (0.512288, 2, ())
    with SavingsTracker(earlier, prices=prices_of(tmp_path, 2)) as tracker:
        assert tracker.snapshot().lifetime == before.lifetime
        repeat = {"model": "gpt-5", "provider": "openai", "tokens_saved": 7, "savings_usd": 0.5}
        assert tracker.record_request(**repeat, idempotency_key="key-1").duplicate  # type: ignore[arg-type]
        assert tracker.record_request(model="m", tokens_saved=1000).durable
        days = tracker.days()
    after = WatchedFile(earlier).snapshot().lifetime
    assert (after.requests, after.savings_usd, after.unpriced_requests) == (5, 0.514288, 1)
    assert sum(row.numbers[0] for row in days.rows) == 5
    assert inspect(str(earlier)).problems == ()
