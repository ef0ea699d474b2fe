"""Our own documents are written and read back without loss, and all damage is reported."""

from __future__ import annotations

import hashlib
import json
import math
import re
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from savings_exporter.errors import CorruptStoreError, NewerSchemaError, OtherFileError, StoreError
from savings_exporter.formats.document import Document, LegacyJournal, WriterState, decode, encode
from savings_exporter.model.history import History
from savings_exporter.model.keys import NO_FINGERPRINT, KeyEntry, KeyTable, digest_of
from savings_exporter.model.operations import OperationCounts
from savings_exporter.model.totals import AMOUNTS, COUNTS, Ledger, Totals, total_of
from tests.support.paths import DATA
from tests.unit.model.samples import NOW, counted, many_records, one

STORE = "0123456789abcdef"

counts = st.integers(0, 2**70)
amounts = st.integers(-(10**15), 10**15).map(lambda number: number / 1e9)
any_name = st.text(st.characters(exclude_categories=()), max_size=20)
totals = st.builds(
    Totals,
    **dict.fromkeys(COUNTS, counts),
    **dict.fromkeys(AMOUNTS, amounts),
    last_activity_at=st.none() | st.just("2026-06-15T12:30:00Z"),
)
named_totals = st.dictionaries(any_name, totals, max_size=3)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | any_name,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_name, inner, max_size=3),
    max_leaves=6,
)
points = st.builds(
    lambda second, saved, more: {"timestamp": f"2026-06-15T12:30:{second:02}Z", "total_tokens_saved": saved, "x": more},
    st.integers(0, 59),
    counts,
    json_values,
)
ledgers = st.builds(
    Ledger,
    records=counts,
    lifetime=totals,
    by_model=named_totals,
    projects=named_totals,
    agents=named_totals,
    by_provider_model=st.dictionaries(st.tuples(any_name, any_name), totals, max_size=3),
    history=st.lists(points, max_size=3).map(History),
)
writer_ids = st.binary(min_size=8, max_size=8).map(bytes.hex)
documents = st.builds(
    Document,
    ledger=ledgers,
    store=st.just(STORE),
    writers=st.dictionaries(
        writer_ids, st.builds(WriterState, through=st.integers(0, 2**63), ended=st.booleans()), max_size=3
    ),
    keys=st.integers(0, 3).map(lambda count: table_of(count)),
    operations=st.builds(
        OperationCounts,
        counts=st.dictionaries(any_name, st.floats(allow_nan=False), max_size=3),
        latest=st.dictionaries(any_name, st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)), max_size=2),
    ),
    saved_at=st.none() | st.datetimes(timezones=st.just(timezone.utc)),
    created_at=st.datetimes(timezones=st.just(timezone.utc)),
)


def table_of(count: int) -> KeyTable:
    table = KeyTable()
    for number in range(count):
        table.claim(digest_of(f"key-{number}"), KeyEntry(bytes([number + 1] * 8), b"writer-1", number))
    return table


@given(documents)
def test_what_is_written_is_read(document: Document) -> None:
    data = encode(document)
    again = decode(data)
    assert again.is_ours
    assert msgspec.structs.replace(again, kept={}) == document
    assert again.kept in ({}, {"lifetime": {"savings_basis": "unknown"}})
    assert encode(again) == data
    assert encode(decode(encode(again))) == data


@given(many_records)
def test_totals_are_exact_after_reading(records: Any) -> None:
    ledger = counted(Ledger(), records)
    again = decode(encode(Document(ledger=ledger, store=STORE))).ledger
    assert again == ledger
    more = [one("new", saved=7, usd=0.1)]
    assert counted(again, more) == counted(ledger, more)


unknown_keys = st.dictionaries(any_name.map("x{}".format), json_values, max_size=4)


@given(unknown_keys, unknown_keys)
def test_unknown_keys_are_kept(members: dict[str, Any], entry: dict[str, Any]) -> None:
    known = {"requests": 1, "tokens_saved": 5}
    raw = {
        **members,
        "schema_version": 6,
        "lifetime": {**entry, **known},
        "by_model": {"m": {**entry, **known}},
        "projects": {"p": {**entry, **known}},
        "history": [{**entry, "timestamp": "2026-06-15T12:30:00Z", "total_tokens_saved": 5}],
    }
    data = encode(msgspec.structs.replace(decode(json.dumps(raw).encode()), store=STORE))
    after = json.loads(data)
    for where in (after["lifetime"], after["by_model"]["m"], after["projects"]["p"], after["history"][0]):
        assert {name: where[name] for name in entry} == entry
    assert {name: after[name] for name in members} == members
    assert encode(decode(data)) == data


def test_nan_and_surrogates_are_kept() -> None:
    unknown = {"a": math.nan, "b": [math.inf, -math.inf], "c": "\ud800", "\udfff": None, "d": 10**400}
    raw = {"schema_version": 6, "of_tomorrow": unknown, "by_model": {"m": {"requests": 1, "x": unknown}}}
    raw["history"] = [{"timestamp": "2026-06-15T12:30:00Z", "x": unknown}]
    data = encode(msgspec.structs.replace(decode(json.dumps(raw).encode()), store=STORE))
    after = json.loads(encode(decode(data)))
    for where in (after["of_tomorrow"], after["by_model"]["m"]["x"], after["history"][0]["x"]):
        assert json.dumps(where) == json.dumps(unknown)


def test_ascii_with_an_entry_a_line() -> None:
    names = ("é", "日本", 'quo"te', "plain")
    ledger = counted(Ledger(), [one(name, project=name, agent=name) for name in names])
    lines = encode(Document(ledger=ledger, store=STORE)).decode("ascii").splitlines()
    assert sum('"requests":1' in line for line in lines) == 4 * 4
    assert all(line.count('"requests"') <= 1 for line in lines)


def test_readable_by_any_reader() -> None:
    ledger = counted(Ledger(), [one("é", project="x", agent="a", saved=5)])
    document = json.loads(encode(Document(ledger=ledger, store=STORE, saved_at=NOW)))
    assert document["schema_version"] == 6
    assert document["lifetime"]["tokens_saved"] == document["by_model"]["é"]["tokens_saved"] == 5
    assert document["history"][-1]["total_tokens_saved"] == 5
    block = document["savings_exporter"]
    assert block["format"] == 2
    assert block["records"] == 1
    assert block["totals"][0]["provider"] == "p"
    assert block["agents"]["a"]["requests"] == 1


def sample() -> bytes:
    ledger = counted(Ledger(), [one("m", project="x", agent="a", usd=0.5)])
    return encode(Document(ledger=ledger, store=STORE, writers={"00" * 8: WriterState(through=3)}, keys=table_of(2)))


def test_every_byte_is_in_the_checksum() -> None:
    data = sample()
    for position in range(len(data)):
        damaged = data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
        with suppress(NewerSchemaError), pytest.raises(CorruptStoreError, match=r"\w+ \w+"):
            decode(damaged)


def test_cut_off_documents() -> None:
    data = sample()
    for length in range(len(data) - 1):
        with pytest.raises(CorruptStoreError, match=r"\w+ \w+"):
            decode(data[:length])


def test_name_like_a_checksum() -> None:
    name = '"checksum": "sha256:' + "0" * 64
    document = Document(ledger=counted(Ledger(), [one(name, project=name, agent=name)]), store=STORE, writers={})
    assert decode(encode(document)).ledger == document.ledger


def resealed(text: str) -> bytes:
    """A changed document with the checksum that it should have."""
    blank = re.sub(r"sha256:[0-9a-f]{64}", "sha256:" + "0" * 64, text, count=1)
    digest = hashlib.sha256(blank.encode()).hexdigest()
    return blank.replace("0" * 64, digest, 1).encode()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"records": 1', '"records": "many"'),
        ('"records": 1,', ""),
        ('"writers": {', '"writers": [], "x": {'),
        ('"through":3', '"through":"3"'),
        ('"history": [', '"history": {}, "x": ['),
        ('{"timestamp":', '{"time":'),
        ('"idempotency_keys": "', '"idempotency_keys": "x'),
        ('"saved_at": null', '"saved_at": "never"'),
        ('"tokens_saved":1,', '"tokens_saved":"1",'),
        ('"provider":"p",', ""),
        ('"lifetime"', '"lifetimes"'),
        ('"lifetime": {', '"lifetime": [], "x": {'),
        ('"projects": {', '"projects": {"y": [], '),
    ],
)
def test_damage_with_a_checksum(old: str, new: str) -> None:
    text = sample().decode()
    assert old in text
    assert decode(resealed(text)).is_ours
    with pytest.raises(CorruptStoreError, match="its checksum matches"):
        decode(resealed(text.replace(old, new, 1)))


@pytest.mark.parametrize("block", ["5", "{}", '{"format": 2}', '{"format": "1", "checksum": "sha256:"}', "null"])
def test_broken_block(block: str) -> None:
    with pytest.raises(CorruptStoreError, match="checksum is missing"):
        decode(f'{{"schema_version": 6, "savings_exporter": {block}}}'.encode())


def test_damaged_name_of_block() -> None:
    with pytest.raises(CorruptStoreError, match="name of its savings_exporter block"):
        decode(sample().replace(b'"savings_exporter"', b'"savings_exportes"'))


@pytest.mark.parametrize("newer", [3, 10**30])
def test_newer_format(newer: int) -> None:
    with pytest.raises(NewerSchemaError, match="its format is"):
        decode(sample().replace(b'"format": 2', b'"format": %d' % newer))


@pytest.mark.parametrize("schema", [7, 8, 10**30])
def test_newer_schema(schema: int) -> None:
    with pytest.raises(NewerSchemaError, match="schema_version is"):
        decode(b'{"schema_version": %d, "lifetime": {"tokens_saved": 5}}' % schema)


@pytest.mark.parametrize("schema", [1, 0, -1, None, "6", True, 6.0, [], {}])
def test_unknown_schema(schema: Any) -> None:
    with pytest.raises(CorruptStoreError, match="schema_version is") as caught:
        decode(json.dumps({"schema_version": schema, "lifetime": {}}).encode())
    assert caught.value.field == "schema_version"


LISTS = {"schema_version": 3, "history": ["ls -l", "make"], "projects": {"website": "https://example.org"}}


@pytest.mark.parametrize(
    "members", [{}, {"name": "web", "version": "1.0"}, {"schema_version": 3}, {"projects": {}}, LISTS]
)
def test_something_else(members: dict[str, Any]) -> None:
    with pytest.raises(OtherFileError, match="is not a savings document"):
        decode(json.dumps(members).encode())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"  \n",
        b"\x00" * 4096,
        b"null",
        b"[]",
        b"5",
        b'"text"',
        b"{}",
        b"{",
        b'{"schema_version": 6',
        b'{"schema_version": 6} {}',
        b'{"schema_version": ' + b"9" * 5000 + b"}",
        b'{"schema_version": 6, "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"schema_version": 6, "history": [' + b"[" * 100_000 + b"]" * 100_000 + b"]}",
        b'{"a": ' * 100_000 + b"}" * 100_000,
        b"\xff\xfe\x00",
        b'{"schema_version": 6, "a": "\xff"}',
        b'{"schema_version": 6, "a": 1e}',
    ],
    ids=lambda data: data[:24].decode("latin-1") or "empty",
)
def test_what_is_no_document(data: bytes) -> None:
    with pytest.raises(StoreError, match=r"\w+ \w+"):
        decode(data)


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    for document in (data, b'{"schema_version": 6, "lifetime": ' + data + b"}"):
        with suppress(StoreError):
            decode(document)


LATER_FIELDS = {
    *("compared_tokens_saved", "priced_requests", "costed_requests", "untold_tool_requests", "unpriced_requests")
}


def without_records(entry: Totals | dict[str, Any]) -> dict[str, Any]:
    """Totals without the counts of records that gave a figure, which format 1 does not have."""
    fields = msgspec.structs.asdict(entry) if isinstance(entry, Totals) else entry
    return {name: value for name, value in fields.items() if name not in LATER_FIELDS}


FORMAT_1 = DATA / "format1" / "proxy_savings.json"


def test_format_1() -> None:
    expected = json.loads((DATA / "format1" / "expected.json").read_text())
    document = decode(FORMAT_1.read_bytes())
    ledger = document.ledger
    assert (ledger.records, document.store) == (expected["records"], expected["store"])
    assert document.legacy == LegacyJournal(**expected["journal"])
    assert document.saved_at == datetime.fromisoformat(expected["saved_at"])
    assert document.created_at == datetime.fromisoformat(expected["history"][0]["timestamp"].replace("Z", "+00:00"))
    assert without_records(ledger.lifetime) == expected["lifetime"]
    for name in ("by_model", "projects"):
        read = {key: without_records(totals) for key, totals in getattr(ledger, name).items()}
        assert read == expected[name]
    read_pairs = [[*pair, without_records(totals)] for pair, totals in ledger.by_provider_model.items()]
    assert read_pairs == expected["by_provider_model"]
    lifetime = ledger.lifetime
    # Not those of the model without input tokens.
    assert lifetime.compared_tokens_saved == lifetime.headline_tokens_saved - 40
    assert lifetime.savings_usd is not None
    assert total_of(ledger.by_provider_model.values()) == ledger.lifetime
    assert list(ledger.history.points) == expected["history"]
    assert (ledger.agents, document.writers, document.operations) == ({}, {}, OperationCounts())
    for key, sequence in expected["keys"].items():
        assert document.keys.get(digest_of(key)) == KeyEntry(NO_FINGERPRINT, bytes(8), sequence)
    assert len(document.keys) == len(expected["keys"])


def test_format_1_is_written_as_format_2() -> None:
    old = decode(FORMAT_1.read_bytes())
    new = decode(encode(old))
    assert new.legacy is None
    assert (new.ledger, new.keys, new.store) == (old.ledger, old.keys, old.store)
    before, after = json.loads(FORMAT_1.read_bytes()), json.loads(encode(new))
    assert json.dumps(after["display_session"]) == json.dumps(before["display_session"])
    for name in ("projects", "by_model"):
        assert {key: without_records(entry) for key, entry in after[name].items()} == before[name]
    assert without_records(after["lifetime"]) == before["lifetime"]
    assert after["history"] == before["history"]


def test_format_1_damaged() -> None:
    data = FORMAT_1.read_bytes()
    with pytest.raises(CorruptStoreError, match="checksum does not match"):
        decode(data.replace(b'"requests": 16', b'"requests": 17'))


def test_most_keys() -> None:
    data = encode(Document(store=STORE, keys=table_of(5)))
    assert len(decode(data, 3).keys) == 3
    assert decode(data, 3).keys.get(digest_of("key-4")) is not None
