"""Idempotency keys: what is remembered of them, how many, and when content is the same."""

from __future__ import annotations

import base64
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Barrier
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from savings_exporter.model.keys import (
    MAX_KEY_LENGTH,
    NO_FINGERPRINT,
    KeyEntry,
    KeyTable,
    checked_key,
    digest_of,
    fingerprint_of,
)
from savings_exporter.model.record import SavingsRecord
from tests.unit.model.samples import NOW, one, records

digests = st.binary(min_size=16, max_size=16)
entries = st.builds(
    KeyEntry, st.binary(min_size=8, max_size=8), st.binary(min_size=8, max_size=8), st.integers(0, 2**64 - 1)
)


def entry(sequence: int) -> KeyEntry:
    return KeyEntry(bytes([sequence] * 8), b"writer-1", sequence)


def table_of(count: int, max_keys: int = 100) -> KeyTable:
    table = KeyTable(max_keys)
    for number in range(count):
        table.claim(digest_of(f"key-{number}"), entry(number))
    return table


def test_get() -> None:
    table = table_of(3)
    assert table.get(digest_of("key-1")) == entry(1)
    assert table.get(digest_of("key-3")) is None
    assert len(table) == 3


def test_oldest_keys_are_forgotten() -> None:
    table = table_of(25, max_keys=10)
    assert len(table) == 10
    known = [number for number in range(25) if table.get(digest_of(f"key-{number}"))]
    assert known == list(range(15, 25))


def test_known_key_keeps_its_entry_and_its_age() -> None:
    table = table_of(10, max_keys=10)
    table.claim(digest_of("key-0"), entry(99))
    assert (len(table), table.get(digest_of("key-0"))) == (10, entry(0))
    assert len(table._oldest_first) == 10
    table.claim(digest_of("new"), entry(100))
    assert table.get(digest_of("key-0")) is None
    assert table.get(digest_of("key-1")) == entry(1)


@given(st.dictionaries(digests, entries, max_size=20), st.integers(1, 20))
def test_pack_and_unpack(keys: dict[bytes, KeyEntry], max_keys: int) -> None:
    table = KeyTable()
    for digest, found in keys.items():
        table.claim(digest, found)
    packed = table.pack()
    assert packed.isascii()
    again = KeyTable.unpack(packed)
    assert again == table
    assert (len(again), again.pack()) == (len(keys), packed)
    assert {digest: again.get(digest) for digest in keys} == keys
    assert again.pack() == packed
    newest = dict(list(keys.items())[-max_keys:])
    few = KeyTable.unpack(packed, max_keys)
    assert len(few) == len(newest)
    assert {digest: few.get(digest) for digest in keys} == {digest: newest.get(digest) for digest in keys}


@given(st.lists(digests, unique=True, max_size=12), st.integers(1, 5), st.integers(0, 12))
def test_unpacked_is_like_the_first(digests: list[bytes], max_keys: int, cut: int) -> None:
    """Keys can be added after packing and unpacking as before."""
    straight, table = KeyTable(max_keys), KeyTable(max_keys)
    for number, digest in enumerate(digests):
        if number == cut:
            table = KeyTable.unpack(table.pack(), max_keys)
        straight.claim(digest, entry(number))
        table.claim(digest, entry(number))
    assert table == straight


def test_threads_that_claim_a_key_get_the_same_entry() -> None:
    """A thread that saves and one that refreshes may find two records of one key: one of them counts."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            for round_ in range(150):
                table, start = KeyTable(), Barrier(2)
                names = [digest_of(f"{round_} {number}") for number in range(300)]

                def claim(writer: bytes, table: KeyTable = table, start: Barrier = start, names: Any = names) -> Any:
                    start.wait()
                    return [table.claim(name, KeyEntry(bytes(8), writer, 1)) for name in names]

                one, other = pool.map(claim, (b"writer-1", b"writer-2"))
                assert one == other == [table.get(name) for name in names]
                assert len(table) == len(table._oldest_first) == len(names)
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("text", ["x", "é", "a2V5", "====", base64.b64encode(bytes(41)).decode()])
def test_what_is_no_table(text: str) -> None:
    for unpack in (KeyTable.unpack, KeyTable.unpack_format_1):
        with pytest.raises(ValueError, match=r"\w"):
            unpack(text)


def test_keys_of_format_1() -> None:
    packed = b"".join(struct.pack("<16sQ", digest_of(f"key-{number}"), number) for number in range(5))
    table = KeyTable.unpack_format_1(base64.b64encode(packed).decode(), 3)
    assert len(table) == 3
    assert table.get(digest_of("key-4")) == KeyEntry(bytes(8), bytes(8), 4)
    assert table.get(digest_of("key-1")) is None


def test_unknown_fingerprint_matches_any() -> None:
    known, other = fingerprint_of([one()]), fingerprint_of([one(saved=2)])
    assert KeyEntry(known, bytes(8), 1).matches(known)
    assert not KeyEntry(known, bytes(8), 1).matches(other)
    assert KeyEntry(NO_FINGERPRINT, bytes(8), 1).matches(other)


@given(st.lists(records, max_size=4))
def test_fingerprint_ignores_timestamps(records: list[SavingsRecord]) -> None:
    later = [
        SavingsRecord(**{**msgspec.structs.asdict(record), "timestamp": NOW + timedelta(days=number)})
        for number, record in enumerate(records)
    ]
    assert fingerprint_of(later) == fingerprint_of(records)
    assert len(fingerprint_of(records)) == 8


CHANGES: dict[str, Any] = {
    "model": "n",
    "tokens_saved": 2,
    "input_tokens": 1,
    "tool_search_saved": 1,
    "output_tokens_saved": 1,
    "output_tokens": 1,
    "provider": "q",
    "agent": "a",
    "project": "x",
    "source": "s",
    "cache_read_tokens": 1,
    "cache_write_tokens": 1,
    "uncached_input_tokens": 1,
    "savings_usd": 0.0,
    "cache_savings_usd": 0.25,
    "input_cost_usd": 0.5,
}


def test_fingerprint_tells_every_field() -> None:
    assert CHANGES.keys() | {"timestamp"} == set(SavingsRecord.__struct_fields__)
    base: dict[str, Any] = {"model": "m", "tokens_saved": 1, "provider": "p", "timestamp": NOW}
    changed = [[SavingsRecord(**{**base, name: value})] for name, value in CHANGES.items()]
    first = [SavingsRecord(**base)]
    fingerprints = {fingerprint_of(group) for group in [first, *changed, first * 2, []]}
    assert len(fingerprints) == len(CHANGES) + 3


def test_fingerprint_is_fixed() -> None:
    """It is kept in documents, so no release may change it."""
    record = SavingsRecord(model="m", tokens_saved=1, provider="p", project="x", input_tokens=5, savings_usd=0.25)
    assert fingerprint_of([record]).hex() == "486d7b94f0d4a979"
    assert digest_of("key").hex() == "82af27c64245bfd15a520134b44e6bb1"


@pytest.mark.parametrize("key", ["x", "é" * MAX_KEY_LENGTH, "\n"])
def test_keys_that_are_taken(key: str) -> None:
    assert checked_key(key) == key


def test_no_key() -> None:
    assert checked_key(None) is None


@pytest.mark.parametrize(
    ("key", "error"), [("", ValueError), ("x" * 256, ValueError), ("\ud800", ValueError), (5, TypeError)]
)
def test_keys_that_are_refused(key: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^idempotency_key must"):
        checked_key(key)
