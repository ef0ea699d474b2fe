"""Documents: Headroom's of every schema read as it reads them, ours written and read again with nothing lost."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from savings_exporter import NewerSchemaError, SavingsRecord, SavingsTracker, StoreError
from savings_exporter.documents import Document, decode, encode
from savings_exporter.totals import AMOUNTS, COUNTS, Ledger, Totals, total_of
from tests.support.paths import DATA

HEADROOM_FILES = sorted((DATA / "headroom").glob("*/proxy_savings.json"))
NUMBERS = {*COUNTS, *AMOUNTS, "savings_percent", "headline_tokens_saved"}


def folder(path: Path) -> str:
    return path.parent.name


def expected_of(path: Path) -> dict[str, Any]:
    expected: dict[str, Any] = json.loads(path.with_name("expected.json").read_text())
    return expected


def document_of(**members: Any) -> bytes:
    return json.dumps({"schema_version": 6, **members}).encode()


def rewritten(document: Document) -> Document:
    ours = msgspec.structs.replace(document, store="0123456789abcdef")
    return decode(encode(ours))


def assert_totals(totals: Totals, reported: dict[str, Any]) -> None:
    shared = {name: value for name, value in reported.items() if name in NUMBERS}
    assert shared
    assert {name: getattr(totals, name) for name in shared} == shared
    if "last_activity_at" in reported:
        assert totals.last_activity_at == reported["last_activity_at"]


def assert_reads_as(ledger: Any, expected: dict[str, Any]) -> None:
    assert_totals(ledger.lifetime, expected["lifetime"])
    for key in ("projects", "by_model"):
        reported = expected[key] or {}
        assert getattr(ledger, key).keys() == reported.keys()
        for name, totals in reported.items():
            # Headroom's share of a project leaves tool schemas out, and so do its projects.
            assert_totals(getattr(ledger, key)[name], totals)


def test_every_schema_is_among_the_files() -> None:
    assert [folder(path) for path in HEADROOM_FILES] == ["v2", "v3", "v4", "v5", "v6", "v6-latest"]


@pytest.mark.parametrize("path", HEADROOM_FILES, ids=folder)
def test_a_headroom_file_reads_as_headroom_reads_it(path: Path) -> None:
    document, expected = decode(path.read_bytes()), expected_of(path)
    assert_reads_as(document.ledger, expected)
    assert len(document.ledger.history) == expected["history_points"]
    assert document.ledger.sequence == expected["driven"]["requests"]
    assert total_of(document.ledger.by_provider_model.values()) == document.ledger.lifetime
    assert not document.problems
    assert not document.is_ours


@pytest.mark.parametrize("path", HEADROOM_FILES, ids=folder)
def test_a_tracker_takes_a_headroom_file_over(path: Path, store_path: Path) -> None:
    store_path.write_bytes(path.read_bytes())
    for _ in range(2):
        with SavingsTracker(store_path) as tracker:
            assert_reads_as(tracker.snapshot(), expected_of(path))
    assert json.loads(store_path.read_bytes())["schema_version"] == 6


@pytest.mark.parametrize("path", HEADROOM_FILES, ids=folder)
def test_a_headroom_file_is_written_as_schema_6_with_nothing_lost(path: Path) -> None:
    read = decode(path.read_bytes())
    again = rewritten(read)
    assert again.ledger == read.ledger
    assert again.is_ours
    before, after = json.loads(path.read_bytes()), json.loads(encode(again))
    assert after["schema_version"] == 6
    for key in before.keys() - {"schema_version", "history"}:
        assert_contains(after[key], before[key])
    assert_contains(after["history"], before["history"])


def assert_contains(after: Any, before: Any) -> None:
    if isinstance(before, dict):
        assert before.keys() <= after.keys()
        for key, value in before.items():
            assert_contains(after[key], value)
    elif isinstance(before, list):
        assert len(after) == len(before)
        for new, old in zip(after, before, strict=True):
            assert_contains(new, old)
    else:
        assert after == before


@pytest.mark.parametrize("path", HEADROOM_FILES, ids=folder)
def test_writing_again_changes_not_a_byte(path: Path) -> None:
    once = encode(rewritten(decode(path.read_bytes())))
    assert encode(decode(once)) == once


def test_keys_that_are_not_known_survive_a_tracker(store_path: Path) -> None:
    unknown = {"later": [1, {"a": None}], "name": "\ud800é", "nan": math.inf}
    entry = {"requests": 1, "tokens_saved": 5, "later": unknown}
    raw = {
        "lifetime": {**entry, "savings_basis": "counterfactual"},
        "by_model": {"m": entry},
        "projects": {"p": entry},
        "display_session": {"requests": 1, "later": unknown},
        "lifetime_metrics": {"stacks": {"python": 3}},
        "of_tomorrow": unknown,
    }
    store_path.write_bytes(document_of(**raw))
    for _ in range(2):
        with SavingsTracker(store_path) as tracker:
            assert tracker.record_request(model="m", tokens_saved=1, project="p").durable
    after = json.loads(store_path.read_bytes())
    counted = {"requests": 3, "tokens_saved": 7}
    raw["lifetime"] = {**entry, "savings_basis": "counterfactual", **counted}
    raw["by_model"], raw["projects"] = {"m": {**entry, **counted}}, {"p": {**entry, **counted}}
    assert_contains(after, raw)


@pytest.mark.parametrize("version", [7, 8, 10**30])
def test_a_newer_schema_is_refused_and_left_alone(version: int, store_path: Path) -> None:
    assert_refused_as_newer(document_of(schema_version=version, lifetime={"tokens_saved": 5}), store_path)


def test_a_newer_format_of_our_own_is_refused_and_left_alone(store_path: Path) -> None:
    ours = json.loads(encode(Document(store="0123456789abcdef")))
    ours["savings_exporter"]["format"] += 1
    assert_refused_as_newer(json.dumps(ours).encode(), store_path)


def assert_refused_as_newer(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    with pytest.raises(NewerSchemaError, match="newer program") as caught:
        SavingsTracker(path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == data
    assert {left.name for left in path.parent.iterdir()} == {path.name, path.name + ".lock"}


def test_an_older_schema_than_any_release_wrote_is_refused() -> None:
    for version in (1, 0, -1, None, "6", True, 6.0):
        with pytest.raises(StoreError, match="schema_version is"):
            decode(document_of(schema_version=version))


WRONG = ['"text"', "[1]", "null", "NaN", "Infinity", "-Infinity", "1e999", "9" * 400, "-5", "{}", '"nan"', '""']


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("where", ["lifetime", "by_model", "projects"])
def test_a_wrong_value_costs_only_itself(value: str, where: str) -> None:
    good = '"requests": 2, "tokens_saved": 7, "total_input_tokens": 9, "compression_savings_usd": 0.5'
    wrong = f'"cache_read_tokens": {value}, "tool_schema_savings_usd": {value}, "last_activity_at": {value}'
    entry = dict.fromkeys(("lifetime", "by_model", "projects"), "{" + good + "}")
    entry[where] = "{" + good + ", " + wrong + "}"
    document = decode(
        f'{{"schema_version": 6, "lifetime": {entry["lifetime"]}, "by_model": {{"m": {entry["by_model"]}}}, '
        f'"projects": {{"p": {entry["projects"]}}}}}'.encode()
    )
    expected = Totals(requests=2, tokens_saved=7, total_input_tokens=9, compression_savings_usd=0.5)
    assert document.ledger.by_model == {"m": expected}
    assert document.ledger.projects == {"p": expected}
    assert document.ledger.lifetime == msgspec.structs.replace(expected, compression_savings_list_usd=0.5)
    assert bool(document.problems) == (value != "-5")
    assert rewritten(document).ledger == document.ledger


@pytest.mark.parametrize("value", [*WRONG, "true", "{}", "1.5", "7", "[]"])
@pytest.mark.parametrize("where", ["by_model", "projects"])
def test_an_entry_that_is_no_object_does_not_cost_the_others(value: str, where: str) -> None:
    document = decode(f'{{"schema_version": 6, "{where}": {{"bad": {value}, "good": {{"requests": 3}}}}}}'.encode())
    assert getattr(document.ledger, where)["good"] == Totals(requests=3)
    assert getattr(document.ledger, where).get("bad", Totals()) == Totals()
    assert rewritten(document).ledger == document.ledger


@pytest.mark.parametrize("value", [*WRONG, "true", "[[[1]]]", '[{"timestamp": 5}]', '[["2026"], [], 5, null]'])
@pytest.mark.parametrize("where", ["lifetime", "by_model", "projects", "history", "display_session"])
def test_a_part_that_is_no_part_does_not_cost_the_others(value: str, where: str) -> None:
    parts = {
        "lifetime": '{"requests": 3}',
        "by_model": '{"m": {"requests": 3}}',
        "projects": '{"p": {"requests": 3}}',
        "history": "[]",
        "display_session": "{}",
        where: value,
    }
    data = "{" + ", ".join(f'"{key}": {text}' for key, text in {"schema_version": "6", **parts}.items()) + "}"
    document = decode(data.encode())
    assert document.ledger.lifetime.requests == 3 or where in ("lifetime", "by_model")
    if where != "by_model":
        assert document.ledger.by_model == {"m": Totals(requests=3)}
        assert document.ledger.lifetime.requests == 3
    if where != "projects":
        assert document.ledger.projects == {"p": Totals(requests=3)}
    assert rewritten(document).ledger == document.ledger


def test_numbers_written_as_text_count() -> None:
    lifetime = {"tokens_saved": "12", "compression_savings_usd": "-1.5", "total_input_tokens": 7.9, "requests": True}
    ledger = decode(document_of(lifetime=lifetime)).ledger
    assert ledger.lifetime == Totals(
        requests=1,
        tokens_saved=12,
        total_input_tokens=7,
        compression_savings_usd=-1.5,
        compression_savings_list_usd=-1.5,
    )


def test_history_in_lists_is_read() -> None:
    history = [["2026-03-01T12:00:00Z", 10, 0.5, 100, 0.25], ["2026-03-02T12:00:00+02:00", 12], ["never", 99], [], 5]
    ledger = decode(document_of(schema_version=2, history=history)).ledger
    assert [(point["timestamp"], point["total_tokens_saved"]) for point in ledger.history] == [
        ("2026-03-01T12:00:00Z", 10),
        ("2026-03-02T10:00:00Z", 12),
    ]
    assert ledger.lifetime.tokens_saved == 12


POINT = {
    "timestamp": "2026-03-02T12:00:00Z",
    "total_tokens_saved": 50,
    "compression_savings_usd": 2.5,
    "total_input_tokens": 600,
    "cache_read_tokens": 70,
    "output_tokens_saved": 8,
    "tool_tokens_saved": 9,
}


@pytest.mark.parametrize("lifetime", [None, [], "gone", {}, {"tokens_saved": "?"}, {"tokens_saved": 49}])
def test_a_lifetime_that_is_behind_is_made_up_from_history(lifetime: Any) -> None:
    earlier = {"timestamp": "2026-03-01T12:00:00Z", "total_tokens_saved": 30}
    totals = decode(document_of(lifetime=lifetime, history=[POINT, earlier])).ledger.lifetime
    assert totals == Totals(
        tokens_saved=50,
        compression_savings_usd=2.5,
        compression_savings_list_usd=2.5,
        total_input_tokens=600,
        cache_read_tokens=70,
        output_tokens_saved=8,
        tool_tokens_saved=9,
    )


def test_money_may_have_fallen_below_the_last_point_of_history() -> None:
    counts = {"tokens_saved": 50, "total_input_tokens": 600, "cache_read_tokens": 70}
    counts |= {"output_tokens_saved": 8, "tool_tokens_saved": 9}
    lifetime = {**counts, "compression_savings_usd": 2.25}
    assert decode(document_of(lifetime=lifetime, history=[POINT])).ledger.lifetime.compression_savings_usd == 2.25


def test_a_lifetime_is_never_less_than_its_models() -> None:
    by_model = {"a": {"requests": 2, "tokens_saved": 5}, "b": {"requests": 1, "tokens_saved": 6}}
    lifetime = decode(document_of(lifetime={"requests": 1, "tokens_saved": 3}, by_model=by_model)).ledger.lifetime
    assert (lifetime.requests, lifetime.tokens_saved) == (3, 11)


def test_what_an_older_document_did_not_break_down_is_unknown() -> None:
    ledger = decode(document_of(lifetime={"requests": 9, "tokens_saved": 90}, by_model={"a": {"requests": 2}})).ledger
    assert ledger.by_provider_model == {
        ("unknown", "a"): Totals(requests=2),
        ("unknown", "unknown"): Totals(requests=7, tokens_saved=90),
    }


def test_halves_of_surrogate_pairs_in_names_are_survived(store_path: Path) -> None:
    text = r'{"schema_version": 6, "by_model": {"gpt\ud800-4": {"requests": 1}, "gpt-4": {"requests": 2}, '
    text += r'"\udfff": {"requests": 4}}, "projects": {"\ud800": {"requests": 1}, "web\udc00": {"requests": 2}}}'
    store_path.write_text(text)
    with SavingsTracker(store_path) as tracker:
        snapshot = tracker.snapshot()
    assert {name: totals.requests for name, totals in snapshot.by_model.items()} == {"gpt-4": 3, "unknown": 4}
    assert {name: totals.requests for name, totals in snapshot.projects.items()} == {"web": 2}
    assert snapshot.lifetime.requests == 7


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
        b'{"a": ' * 100_000 + b"}" * 100_000,
        b"\xff\xfe\x00",
        b'{"schema_version": 6, "savings_exporter": 5}',
        b'{"schema_version": 6, "savings_exporter": {"format": 1}}',
        b'{"schema_version": 6, "savings_exporter": {"format": "1", "checksum": "sha256:"}}',
    ],
    ids=lambda data: data[:24].decode("latin-1") or "empty",
)
def test_what_is_no_document_is_refused_in_words(data: bytes) -> None:
    with pytest.raises(StoreError, match=r"\w+ \w+"):
        decode(data)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for document in (data, b'{"schema_version": 6, "lifetime": ' + data + b"}"):
        with suppress(StoreError):
            decode(document)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*COUNTS[:3], "m", "x"]), inner),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(["lifetime", "by_model", "projects", "history", "display_session", "x"]), json_values
    )
)
def test_any_headroom_document_is_read_and_written_and_read_the_same(members: dict[str, Any]) -> None:
    document = decode(document_of(**members))
    assert rewritten(document).ledger == document.ledger


counts = st.integers(0, 2**62)
amounts = st.integers(-(10**15), 10**15).map(lambda number: number / 1e9)
any_name = st.text(st.characters(exclude_categories=()), max_size=20)
totals = st.builds(
    Totals,
    **dict.fromkeys(COUNTS, counts),
    **dict.fromkeys(AMOUNTS, amounts),
    last_activity_at=st.none() | st.just("2026-06-15T12:30:00Z"),
)
points = st.builds(
    lambda second, saved: {"timestamp": f"2026-06-15T12:30:{second:02}Z", "total_tokens_saved": saved},
    st.integers(0, 59),
    counts,
)
ledgers = st.builds(
    Ledger,
    sequence=counts,
    lifetime=totals,
    by_model=st.dictionaries(any_name, totals, max_size=3),
    projects=st.dictionaries(any_name, totals, max_size=3),
    by_provider_model=st.dictionaries(st.tuples(any_name, any_name), totals, max_size=3),
    history=st.lists(points, max_size=3).map(tuple),
)


@given(ledgers, st.none() | st.datetimes(timezones=st.just(timezone.utc)))
def test_what_is_written_is_read(ledger: Ledger, saved_at: datetime | None) -> None:
    document = Document(ledger=ledger, store="store", epoch=3, offset=4096, keys="a2V5", saved_at=saved_at)
    again = decode(encode(document))
    assert msgspec.structs.replace(again, kept={}) == document
    assert encode(again) == encode(document) or again.kept


def test_a_document_is_ascii_with_an_entry_a_line() -> None:
    records = [SavingsRecord(model=name, tokens_saved=1, project=name) for name in ("é", "日本", 'quo"te')]
    ledger = Ledger(by_model={record.model: Totals(requests=1) for record in records})
    lines = encode(Document(ledger=ledger, store="store")).decode("ascii").splitlines()
    assert sum('"requests": 1' in line for line in lines) == 3
