"""Documents that Headroom wrote, of every schema, read as Headroom reads them; and what is damage in them."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from savings_exporter.errors import CorruptStoreError, StoreError
from savings_exporter.formats.document import Document, decode, encode
from savings_exporter.model.totals import AMOUNTS, COUNTS, Ledger, Totals, total_of
from tests.support.paths import DATA
from tests.unit.model.samples import counted, one

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
    return decode(encode(msgspec.structs.replace(document, store="0123456789abcdef")))


def assert_totals(totals: Totals, reported: dict[str, Any]) -> None:
    shared = {name: value for name, value in reported.items() if name in NUMBERS}
    assert shared
    assert {name: getattr(totals, name) for name in shared} == shared
    if "last_activity_at" in reported:
        assert totals.last_activity_at == reported["last_activity_at"]


def assert_reads_as(ledger: Ledger, expected: dict[str, Any]) -> None:
    assert_totals(ledger.lifetime, expected["lifetime"])
    for key in ("projects", "by_model"):
        reported = expected[key] or {}
        assert getattr(ledger, key).keys() == reported.keys()
        for name, totals in reported.items():
            # Headroom's share of a project leaves tool schemas out, and so do its projects.
            assert_totals(getattr(ledger, key)[name], totals)


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


def test_every_schema_is_among_the_files() -> None:
    assert [folder(path) for path in HEADROOM_FILES] == ["v2", "v3", "v4", "v5", "v6", "v6-latest"]


@pytest.mark.parametrize("path", HEADROOM_FILES, ids=folder)
def test_headroom_file(path: Path) -> None:
    document, expected = decode(path.read_bytes()), expected_of(path)
    assert_reads_as(document.ledger, expected)
    assert len(document.ledger.history) == expected["history_points"]
    assert document.ledger.records == expected["driven"]["requests"]
    assert total_of(document.ledger.by_provider_model.values()) == document.ledger.lifetime
    assert not document.problems
    assert not document.is_ours
    assert document.legacy is None


@pytest.mark.parametrize("path", HEADROOM_FILES, ids=folder)
def test_written_as_schema_6(path: Path) -> None:
    read = decode(path.read_bytes())
    again = rewritten(read)
    assert again.ledger == read.ledger
    assert again.kept == read.kept
    assert again.is_ours
    before, after = json.loads(path.read_bytes()), json.loads(encode(again))
    assert after["schema_version"] == 6
    for key in before.keys() - {"schema_version", "history"}:
        assert_contains(after[key], before[key])
    assert_contains(after["history"], before["history"])
    assert after["lifetime"]["savings_basis"] == (before["lifetime"].get("savings_basis") or "list")


@pytest.mark.parametrize("path", HEADROOM_FILES, ids=folder)
def test_written_again_the_same(path: Path) -> None:
    once = encode(rewritten(decode(path.read_bytes())))
    assert encode(decode(once)) == once


@pytest.mark.parametrize("path", HEADROOM_FILES, ids=folder)
def test_records_on_top_of_headroom(path: Path) -> None:
    before = rewritten(decode(path.read_bytes())).ledger
    after = counted(before, [one("gpt-5", saved=5, project="web")])
    assert after.lifetime.tokens_saved == before.lifetime.tokens_saved + 5
    assert after.records == before.records + 1
    assert after.history.points[-1]["total_tokens_saved"] == after.lifetime.tokens_saved


GOOD = {"requests": 2, "tokens_saved": 7, "total_input_tokens": 9, "compression_savings_usd": 0.5}
POINT = {
    "timestamp": "2026-03-02T12:00:00Z",
    "total_tokens_saved": 50,
    "compression_savings_usd": 2.5,
    "total_input_tokens": 600,
    "cache_read_tokens": 70,
    "output_tokens_saved": 8,
    "tool_tokens_saved": 9,
}

# JSON of what is not a figure.
UNREADABLE = [
    *('"text"', '"abc"', '"nan"', '""', "null", "[1]", "{}", "NaN", "Infinity", "-Infinity", "1e999"),
    *("1" + "0" * 30, "9" * 400, '"' + "9" * 30 + '"', "-5", "-1e30"),
]


def with_figure(where: str, name: str, figure: str) -> bytes:
    """A document, one figure of which is this JSON."""
    parts: dict[str, Any] = {"lifetime": dict(GOOD), "by_model": {"m": dict(GOOD)}, "projects": {"p": dict(GOOD)}}
    parts["history"] = [{"timestamp": "2026-03-01T12:00:00Z"}, dict(POINT)]
    parts["lifetime"] |= {"tokens_saved": 50, "total_input_tokens": 600}
    entry = {"lifetime": parts["lifetime"], "by_model": parts["by_model"]["m"], "projects": parts["projects"]["p"]}
    (entry | {"history": parts["history"][1]})[where][name] = "@"
    return document_of(**parts).replace(b'"@"', figure.encode())


NAMES = {
    "lifetime": "lifetime.{}",
    "by_model": "by_model['m'].{}",
    "projects": "projects['p'].{}",
    "history": "history[1].{}",
}


@pytest.mark.parametrize("figure", UNREADABLE, ids=lambda text: text[:9])
@pytest.mark.parametrize("name", ["tokens_saved", "cache_read_tokens", "total_input_cost_usd"])
@pytest.mark.parametrize("where", NAMES)
def test_unreadable_figure_is_damage(where: str, name: str, figure: str) -> None:
    key = "total_tokens_saved" if (where, name) == ("history", "tokens_saved") else name
    with pytest.raises(CorruptStoreError) as caught:
        decode(with_figure(where, key, figure))
    assert caught.value.field == NAMES[where].format(key)
    assert caught.value.field in str(caught.value)
    assert len(str(caught.value)) < 200


def test_compression_can_cost() -> None:
    cost = {"requests": 1, "compression_savings_usd": -5}
    history = [{"timestamp": "2026-03-02T12:00:00Z", "compression_savings_usd": -6}]
    document = decode(document_of(lifetime=cost, by_model={"m": cost}, projects={"p": cost}, history=history))
    for ledger in (document.ledger, rewritten(document).ledger):
        for totals in (ledger.lifetime, ledger.by_model["m"], ledger.projects["p"]):
            assert totals.compression_savings_usd == -5
        assert ledger.history.points[0]["compression_savings_usd"] == -6


@pytest.mark.parametrize("where", NAMES)
def test_cost_beyond_any(where: str) -> None:
    with pytest.raises(CorruptStoreError):
        decode(with_figure(where, "compression_savings_usd", "-1e30"))


@pytest.mark.parametrize("figure", ["[]", "5", '"gone"', "true"])
def test_lifetime_that_is_no_object(figure: str) -> None:
    with pytest.raises(CorruptStoreError, match="lifetime cannot be read") as caught:
        decode(b'{"schema_version": 6, "lifetime": ' + figure.encode() + b"}")
    assert caught.value.field == "lifetime"


@pytest.mark.parametrize("value", [*UNREADABLE, "true", "1.5", "7", "[]"], ids=lambda text: text[:9])
@pytest.mark.parametrize("where", ["by_model", "projects"])
def test_entry_that_is_no_object(value: str, where: str) -> None:
    document = decode(f'{{"schema_version": 6, "{where}": {{"bad": {value}, "good": {{"requests": 3}}}}}}'.encode())
    assert getattr(document.ledger, where)["good"] == Totals(requests=3)
    assert bool(document.problems) == (value != "{}")
    assert rewritten(document).ledger == document.ledger


@pytest.mark.parametrize("value", ["true", "5", '"x"', "[[[1]]]", '[{"timestamp": 5}]', '[["2026"], [], 5, null]'])
@pytest.mark.parametrize("where", ["by_model", "projects", "history"])
def test_part_of_another_type(value: str, where: str) -> None:
    parts = {
        "lifetime": '{"requests": 3}',
        "by_model": '{"m": {"requests": 3}}',
        "projects": '{"p": {"requests": 3}}',
        "history": "[]",
        where: value,
    }
    data = "{" + ", ".join(f'"{key}": {text}' for key, text in {"schema_version": "6", **parts}.items()) + "}"
    document = decode(data.encode())
    assert document.ledger.lifetime.requests == 3
    assert document.problems
    assert all(problem.startswith(where) for problem in document.problems)
    if where != "by_model":
        assert document.ledger.by_model == {"m": Totals(requests=3)}
    if where != "projects":
        assert document.ledger.projects == {"p": Totals(requests=3)}
    assert rewritten(document).ledger == document.ledger


def test_last_activity_that_is_no_time() -> None:
    document = decode(document_of(lifetime={"requests": 1, "last_activity_at": "never"}))
    assert document.ledger.lifetime == Totals(requests=1)
    assert document.problems == ("lifetime.last_activity_at is not a timestamp: 'never'",)
    assert not decode(document_of(lifetime={"requests": 1, "last_activity_at": None})).problems


def test_last_activity() -> None:
    """Headroom's totals name no time: the newest one that the document names anywhere counts."""
    history = [{"timestamp": "2026-03-01T12:00:00Z"}]
    assert decode(document_of(history=history)).ledger.newest == "2026-03-01T12:00:00Z"
    projects = {"p": {"last_activity_at": "2026-03-01T13:00:00+00:00"}, "q": {"last_activity_at": "never"}}
    assert decode(document_of(history=history, projects=projects)).ledger.newest == "2026-03-01T13:00:00Z"
    session = {"last_activity_at": "2026-03-01T15:00:00+01:00"}
    document = document_of(history=history, projects=projects, display_session=session)
    assert decode(document).ledger.newest == "2026-03-01T14:00:00Z"
    for strange in ("never", 5, None):
        assert decode(document_of(lifetime={}, display_session={"last_activity_at": strange})).ledger.newest is None


def test_numbers_as_text() -> None:
    lifetime = {"tokens_saved": "12", "compression_savings_usd": "-1.5", "total_input_tokens": 7.9, "requests": True}
    history = [{"timestamp": "2026-03-01T12:00:00Z", "total_tokens_saved": "12"}]
    ledger = decode(document_of(lifetime=lifetime, history=history)).ledger
    assert ledger.history.points[0]["total_tokens_saved"] == 12
    assert ledger.lifetime == Totals(
        requests=1,
        tokens_saved=12,
        total_input_tokens=7,
        compared_tokens_saved=12,
        priced_requests=1,
        compression_savings_usd=-1.5,
        compression_savings_list_usd=-1.5,
        last_activity_at="2026-03-01T12:00:00Z",
    )


def test_history_in_lists() -> None:
    history = [["2026-03-01T12:00:00Z", 10, 0.5, 100, 0.25], ["2026-03-02T12:00:00+02:00", 12], ["never", 99], [], 5]
    document = decode(document_of(schema_version=2, history=history))
    assert [(point["timestamp"], point["total_tokens_saved"]) for point in document.ledger.history.points] == [
        ("2026-03-01T12:00:00Z", 10),
        ("2026-03-02T10:00:00Z", 12),
    ]
    assert document.ledger.lifetime.tokens_saved == 12
    assert len(document.problems) == 3


@pytest.mark.parametrize("lifetime", [None, {}, {"tokens_saved": 49}])
def test_lifetime_behind_history(lifetime: Any) -> None:
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
        compared_tokens_saved=59,
        priced_requests=1,
        last_activity_at=str(POINT["timestamp"]),
    )


def test_figures_that_a_document_does_not_have() -> None:
    project = {"requests": 3, "tokens_saved": 5, "compression_savings_usd": 0.5, "total_input_tokens": 15}
    lifetime = {"requests": 3, "tokens_saved": 5, "tool_tokens_saved": 7, "total_input_tokens": 15}
    document = document_of(lifetime=lifetime, projects={"a": project})
    found = decode(document).ledger.projects["a"]
    assert (found.known_tool_tokens_saved, found.savings_percent, found.savings_usd) == (None, 25.0, 0.5)
    assert (found.input_cost_usd, decode(document).ledger.lifetime.savings_usd) == (None, None)
    # Where there were none at all, none of them are the project's.
    lifetime["tool_tokens_saved"] = 0
    assert (
        decode(document_of(lifetime=lifetime, projects={"a": project})).ledger.projects["a"].known_tool_tokens_saved
        == 0
    )


def test_amount_below_last_point() -> None:
    counts = {"tokens_saved": 50, "total_input_tokens": 600, "cache_read_tokens": 70}
    counts |= {"output_tokens_saved": 8, "tool_tokens_saved": 9}
    lifetime = {**counts, "compression_savings_usd": 2.25}
    assert decode(document_of(lifetime=lifetime, history=[POINT])).ledger.lifetime.compression_savings_usd == 2.25


def test_lifetime_below_models() -> None:
    by_model = {"a": {"requests": 2, "tokens_saved": 5}, "b": {"requests": 1, "tokens_saved": 6}}
    lifetime = decode(document_of(lifetime={"requests": 1, "tokens_saved": 3}, by_model=by_model)).ledger.lifetime
    assert (lifetime.requests, lifetime.tokens_saved) == (3, 11)


def test_not_broken_down_is_unknown() -> None:
    ledger = decode(document_of(lifetime={"requests": 9, "tokens_saved": 90}, by_model={"a": {"requests": 2}})).ledger
    assert ledger.by_provider_model == {
        ("unknown", "a"): Totals(requests=2),
        ("unknown", "unknown"): Totals(requests=7, tokens_saved=90, unpriced_requests=7),
    }


def test_surrogates_in_names() -> None:
    text = r'{"schema_version": 6, "by_model": {"gpt\ud800-4": {"requests": 1}, "gpt-4": {"requests": 2}, '
    text += r'"\udfff": {"requests": 4}}, "projects": {"\ud800": {"requests": 1}, "web\udc00": {"requests": 2}}}'
    document = decode(text.encode())
    ledger = rewritten(document).ledger
    assert {name: totals.requests for name, totals in ledger.by_model.items()} == {"gpt-4": 3, "unknown": 4}
    assert {name: totals.requests for name, totals in ledger.projects.items()} == {"web": 2}
    assert ledger.lifetime.requests == 7
    assert len(document.problems) == 1


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
def test_any_document(members: dict[str, Any]) -> None:
    with suppress(StoreError):
        document = decode(document_of(**members))
        assert rewritten(document).ledger == document.ledger
