"""CSV files and files of JSON lines as sources: each record counts once, and a damaged line is named."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from savings_exporter import SavingsTracker
from savings_exporter.model.cursors import DAMAGED, JUMP, SAVED_MORE_THAN_INPUT
from savings_exporter.sources.building import kept_out_of
from savings_exporter.sources.fields import parse_mapping
from savings_exporter.sources.importing import Importing
from savings_exporter.sources.source import SourceError, Step
from savings_exporter.sources.table import Table
from savings_exporter.storage.repair import inspect
from tests.support.sources import imported

FIELDS = parse_mapping(["tokens_saved=saved", "model=llm", "timestamp=when"], ["provider=openai"])
SAVED = parse_mapping(["tokens_saved=saved"])
HEADER = "when,llm,saved\n"


@pytest.fixture
def tracker(store_path: Path) -> Iterator[SavingsTracker]:
    with SavingsTracker(store_path) as tracker:
        yield tracker


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs" / "usage.csv"


def line(number: int) -> str:
    return f"2026-11-{1 + number % 28:02}T{number % 24:02}:00:00.{number:06}Z,gpt-5,{number}\n"


def saved(tracker: SavingsTracker) -> int:
    return tracker.snapshot().lifetime.tokens_saved


def read(table: Table, state: Mapping[str, Any] | None = None, *, is_complete: bool = True) -> list[Step]:
    return list(table.steps(state, is_complete=is_complete))


def savings(steps: Sequence[Step]) -> int:
    return sum(row.counts[0] for step in steps for row in step.rows)


def problems(steps: Sequence[Step]) -> list[str]:
    return [problem for step in steps for problem in step.problems]


def test_csv_counts_by_day_and_names(table: Path, tracker: SavingsTracker) -> None:
    table.write_text(HEADER + "2026-11-01T23:00:00Z,gpt-5,100\n2026-11-02T00:00:00Z,gpt-5-mini,20\n")
    source = Table(str(table), FIELDS, "squeeze")
    assert (source.kind, source.name) == ("squeeze", f"csv:{table}")
    imported(tracker, source)
    snapshot = tracker.snapshot()
    assert snapshot.by_provider_model.keys() == {("openai", "gpt-5"), ("openai", "gpt-5-mini")}
    assert snapshot.sources["squeeze"].tokens_saved == 120
    assert [(row.day, row.numbers[1]) for row in tracker.days().rows] == [("2026-11-01", 100), ("2026-11-02", 20)]


@pytest.mark.parametrize("name", ["usage.jsonl", "usage.NDJSON", "usage.json"])
def test_json_lines(name: str, tmp_path: Path, tracker: SavingsTracker) -> None:
    path = tmp_path / name
    lines = [
        {"usage": {"saved": 100}, "attributes": {"gen_ai.request.model": "gpt-5"}, "when": 1769860800},
        {"usage": {"saved": 20}, "when": 1769860800000},
        {"usage": None, "when": 1769860800},
    ]
    path.write_text("\ufeff" + "".join(json.dumps(line) + "\r\n" for line in lines) + "\n[1]\n{\n", "utf-8")
    fields = parse_mapping(["tokens_saved=usage.saved", "model=attributes.gen_ai.request.model", "timestamp=when"])
    source = Table(str(path), fields)
    assert (source.kind, source.name) == ("jsonl", f"jsonl:{path}")
    summary = imported(tracker, source)
    assert {name: totals.tokens_saved for name, totals in tracker.snapshot().by_model.items()} == {
        "gpt-5": 100,
        "unknown": 20,
    }
    assert summary.rejected == {DAMAGED: 3}
    assert summary.problems[:2] == ["line 3: tokens_saved is missing", "line 5: is not a JSON object"]
    assert summary.problems[2].startswith("line 6: is not JSON: ")


def test_deeply_nested_line_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    path.write_bytes(b"[" * 100_000 + b'\n{"saved": "\xff"}\n{"saved": 5}\n')
    steps = read(Table(str(path), SAVED))
    assert savings(steps) == 5
    assert [problem.partition(":")[0] for problem in problems(steps)] == ["line 1", "line 2"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_delimiters_marks_and_line_ends(delimiter: str, mark: str, end: str, table: Path) -> None:
    lines = ["", 'llm;"saved";when', "gpt-5; 100;2026-11-01", " ", ";;", '"a;b";"20";2026-11-01']
    table.write_text(mark + end.join(lines).replace(";", delimiter), "utf-8")
    steps = read(Table(str(table), FIELDS))
    assert not problems(steps)
    assert savings(steps) == 120
    assert {row.model for step in steps for row in step.rows} == {"gpt-5", f"a{delimiter}b".replace("\t", "")}


def test_damaged_and_implausible_lines_are_named(table: Path, tracker: SavingsTracker) -> None:
    fields = parse_mapping(["tokens_saved=saved", "input_before=before", "model=llm"])
    lines = [
        b"before,llm,saved",
        b"100,gpt-5,60",
        b"100,gpt-5",
        b"100,gpt-5,60,",
        b"100,gpt-5,101",
        b'100,"gpt"-5,60',
        b"100,\xff,60",
        b"100,gpt-5,many\x1b[31m",
        b'100,gpt-5,"1,000"',
        b"90000000,gpt-5,80000000",
        b"100,gpt-5,30",
    ]
    table.write_bytes(b"\n".join(lines))
    summary = imported(tracker, Table(str(table), fields))
    totals = tracker.snapshot().lifetime
    assert (totals.tokens_saved, totals.total_input_tokens) == (90, 110)
    assert summary.rejected == {DAMAGED: 6, SAVED_MORE_THAN_INPUT: 1, JUMP: 1}
    assert [problem.partition(":")[0] for problem in summary.problems] == [f"line {n}" for n in range(3, 11)]
    assert summary.problems[:2] == [
        "line 3: has 2 fields, and the header has 3",
        "line 4: has 4 fields, and the header has 3",
    ]
    assert all(problem.isprintable() for problem in summary.problems)
    state = tracker.snapshot().cursors[f"csv:{table}"].state
    assert [kept.id for kept in kept_out_of(state)] == ["line 5", "line 10"]
    assert inspect(str(tracker.storage_path)).problems == ()


def test_bytes_that_are_not_utf8_in_another_column(table: Path) -> None:
    table.write_bytes(b"saved,text\n5,caf\xe9\n")
    assert savings(read(Table(str(table), SAVED))) == 5


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_utf16_is_refused(encoding: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes("\ufeffsaved\n5\n".encode(encoding))
    with pytest.raises(SourceError, match=r"is in UTF-16\. Convert it to UTF-8"):
        read(Table(str(tmp_path / name), SAVED))


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        ("when,llm", r"line 1 has no column 'saved', or more than one\. Its columns are \['when', 'llm'\]"),
        ("saved,saved", "line 1 has no column 'saved', or more than one"),
        ("Saved", "line 1 has no column 'saved'"),
        ('{"saved": 5}', r"JSON lines needs a name that ends in \.jsonl"),
        ('\n"saved', "line 2 has no column 'saved'"),
        ("\x1b[31m", r"Its columns are \['\\x1b\[31m'\]"),
        ("saved," + "x" * 9000, "line 1 is too long for a header"),
    ],
)
def test_header_that_cannot_be_used(header: str, problem: str, table: Path) -> None:
    table.write_text(header + "\n5,5\n")
    with pytest.raises(SourceError, match=problem) as raised:
        read(Table(str(table), SAVED))
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize("content", ["", "\n", "\ufeff", "\n\n \n"])
def test_file_without_a_record(content: str, table: Path, tracker: SavingsTracker) -> None:
    source = Table(str(table), SAVED)
    table.write_text(content, "utf-8")
    imported(tracker, source)
    with table.open("a") as file:
        file.write("saved\n5\n")
    imported(tracker, source)
    assert saved(tracker) == 5


def test_records_without_a_time_belong_to_no_day(table: Path, tracker: SavingsTracker) -> None:
    table.write_text("saved\n5\n7\n")
    imported(tracker, Table(str(table), SAVED))
    days = tracker.days()
    assert (saved(tracker), days.undated[1], days.rows) == (12, 12, [])
    assert inspect(str(tracker.storage_path)).problems == ()


def test_same_file_again_adds_what_is_new(table: Path, store_path: Path) -> None:
    table.write_text(HEADER + "".join(map(line, range(100))))
    for _ in range(2):
        with SavingsTracker(store_path) as tracker:
            imported(tracker, Table(str(table), FIELDS))
            assert saved(tracker) == sum(range(100))
    with table.open("a") as file:
        file.writelines(map(line, range(100, 150)))
    with SavingsTracker(store_path) as tracker:
        imported(tracker, Table(str(table), FIELDS))
        assert saved(tracker) == sum(range(150))


@pytest.mark.parametrize("name", ["usage.csv", "usage.jsonl"])
def test_more_rows_than_a_step_has(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    rows = [(f"model-{number}", number) for number in range(5000)]
    if name.endswith("csv"):
        path.write_text("llm,saved\n" + "".join(f"{model},{tokens}\n" for model, tokens in rows))
    else:
        path.write_text("".join(json.dumps({"llm": model, "saved": tokens}) + "\n" for model, tokens in rows))
    steps = read(Table(str(path), parse_mapping(["tokens_saved=saved", "model=llm"])))
    assert [len(step.rows) for step in steps] == [2000, 2000, 1000]
    assert savings(steps) == sum(range(5000))
    assert steps[-1].progress.done == steps[-1].progress.total == path.stat().st_size


def test_renamed_file_and_a_new_one(table: Path, tracker: SavingsTracker) -> None:
    source = Table(str(table), FIELDS)
    table.write_text(HEADER + "".join(map(line, range(10))))
    imported(tracker, source, is_complete=False)
    with table.open("a") as file:
        file.writelines(map(line, range(10, 20)))
    table.rename(table.with_suffix(".csv.1"))
    table.write_text(HEADER + "".join(map(line, range(20, 30))))
    imported(tracker, source, is_complete=False)
    assert saved(tracker) == sum(range(30))


@pytest.mark.parametrize("header", [HEADER, "", "\ufeff" + HEADER])
def test_truncated_file_with_or_without_a_header(header: str, table: Path, tracker: SavingsTracker) -> None:
    source = Table(str(table), FIELDS)
    table.write_text(HEADER + "".join(map(line, range(10))))
    imported(tracker, source, is_complete=False)
    table.write_text(header + "".join(map(line, range(10, 13))), "utf-8")
    summary = imported(tracker, source, is_complete=False)
    assert saved(tracker) == sum(range(13))
    assert not summary.problems


def test_new_file_with_other_columns(table: Path, tracker: SavingsTracker) -> None:
    source = Table(str(table), FIELDS)
    table.write_text(HEADER + line(1))
    imported(tracker, source)
    table.write_text("llm;saved;extra;when\ngpt-5;5;7;2026-11-01\n")
    imported(tracker, source)
    assert saved(tracker) == 6
    table.write_text("llm;tokens;when\ngpt-5;5;2026-11-01\n")
    with pytest.raises(SourceError, match="line 1 has no column 'saved'"):
        imported(tracker, source)
    assert saved(tracker) == 6


def test_program_that_writes_its_header_at_each_start(table: Path) -> None:
    table.write_text((HEADER + line(5)) * 3)
    steps = read(Table(str(table), FIELDS))
    assert savings(steps) == 15
    assert not problems(steps)


def test_mapping_with_a_column_that_the_known_header_lacks(table: Path, tracker: SavingsTracker) -> None:
    table.write_text(HEADER + line(5))
    imported(tracker, Table(str(table), FIELDS))
    with table.open("a") as file:
        file.write(line(6))
    with pytest.raises(SourceError, match="the header that was read before has no column 'team'"):
        imported(tracker, Table(str(table), parse_mapping(["tokens_saved=saved", "project=team"])))


def test_missing_quote_hides_no_record(table: Path) -> None:
    table.write_text('text,saved\n"a,1\nb,2\nc,3\n"d",4\ne,5\n')
    steps = read(Table(str(table), SAVED))
    assert savings(steps) == 2 + 3 + 4 + 5
    assert [problem.partition(":")[0] for problem in problems(steps)] == ["line 2"]


def test_line_breaks_in_a_field(table: Path, tracker: SavingsTracker) -> None:
    source = Table(str(table), SAVED)
    table.write_text('text,saved\n"a\n1,100\n\n""b""",5\n"c,\n')
    imported(tracker, source, is_complete=False)
    assert saved(tracker) == 5
    with table.open("a") as file:
        file.write('2,200\n",7\nd,many\n')
    summary = imported(tracker, source, is_complete=False)
    assert saved(tracker) == 12
    assert [problem.partition(":")[0] for problem in summary.problems] == ["line 9"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["usage.csv", "usage.jsonl"])
@pytest.mark.parametrize("seed", range(4))
def test_each_record_counts_once_across_restarts(name: str, seed: int, tmp_path: Path, store_path: Path) -> None:
    """The program appends, renames and truncates its file. The reader stops after any step, and its store is opened
    again.
    """
    chance, path, written = random.Random(seed), tmp_path / name, 0
    is_csv = name.endswith("csv")

    def write(count: int) -> None:
        nonlocal written
        with path.open("a") as file:
            if is_csv and not file.tell():
                file.write("when,llm,saved\n")
            for _ in range(count):
                written += 1
                values = (f"2026-11-01T00:00:00.{written:06}Z", f"model {written % 3000}\n", written)
                text = json.dumps(dict(zip(("when", "llm", "saved"), values, strict=True)))
                file.write('{},"{}",{}\n'.format(*values) if is_csv else text + "\n")

    write(5000)
    for _ in range(6):
        with SavingsTracker(store_path) as tracker:
            for _ in range(2):
                with tracker.importing() as importer:
                    steps = Importing(importer, Table(str(path), FIELDS)).steps(is_complete=False)
                    for _ in zip(range(chance.randrange(1, 4)), steps, strict=False):
                        pass
            if chance.random() < 0.5:
                imported(tracker, Table(str(path), FIELDS), is_complete=False)
                assert saved(tracker) == written * (written + 1) // 2
                match chance.randrange(3):
                    case 0:
                        path.rename(path.with_name(name + ".1"))
                    case 1:
                        path.write_bytes(b"")
        write(chance.choice([1, 100, 3000]))
    with SavingsTracker(store_path) as tracker:
        imported(tracker, Table(str(path), FIELDS))
        assert tracker.snapshot().lifetime.requests == written
        assert saved(tracker) == written * (written + 1) // 2


def test_field_that_does_not_end(table: Path) -> None:
    table.write_text('text,saved\na,5\n"b,6\nc,7\nd,8\n')
    source = Table(str(table), SAVED)
    (step,) = read(source, is_complete=False)
    assert savings([step]) == 5
    assert not read(source, step.state, is_complete=False)
    rest = read(source, step.state)
    assert savings(rest) == 15
    assert problems(rest) == ["line 3: is not CSV: unexpected end of data"]
    table.rename(table.with_suffix(".csv.1"))
    table.write_text("text,saved\na,1\n")
    rest = read(source, step.state, is_complete=False)
    assert savings(rest) == 16
    assert problems(rest) == ["line 3: is not CSV: unexpected end of data"]


def test_line_breaks_at_the_end_of_a_block(table: Path) -> None:
    table.write_text("notes,saved\n" + '"ab\nc",5\n' * 100_000)  # the first block of 512 KiB ends after "ab
    steps = read(Table(str(table), SAVED))
    assert savings(steps) == 500_000
    assert not problems(steps)


@pytest.mark.parametrize("size", [20_000, 60_000])
def test_field_that_is_too_long(size: int, table: Path) -> None:
    table.write_text('text,saved\na,5\n"' + "xxxxxxxxx\n" * size + '",6\nc,7\n"d",8\n')
    steps = read(Table(str(table), SAVED))
    assert savings(steps) == 20
    assert problems(steps)[0].startswith("line 3: ")


@pytest.mark.parametrize(
    "content", ['"a\n' * 50_000, 'x","y\n' * 50_000, '"""\n' * 50_000, 'x"y,"a\n' * 50_000, '"a"",\n' * 50_000]
)
def test_quotes_in_any_order_cost_little(content: str, table: Path) -> None:
    """Each line is looked at a few times. If each open quote began a search to the end, this would take hours."""
    table.write_text("text,saved\n" + content + "b,5\n")
    steps = read(Table(str(table), SAVED))
    assert sum(sum(step.rejected.values()) for step in steps) > 0
    assert savings(steps) in (0, 5)


@given(
    rows=st.lists(st.tuples(st.text(alphabet='ab",;\n\r ', max_size=6), st.integers(0, 999)), max_size=12),
    cuts=st.lists(st.integers(0, 400), max_size=6),
)
def test_any_csv_written_in_parts(
    rows: Sequence[tuple[str, int]], cuts: Sequence[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What Python's writer of CSV has written is read as it was, wherever a read comes in between."""
    path = tmp_path_factory.mktemp("table") / "usage.csv"
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("text", "saved"), *rows])
    data, state, steps = text.getvalue().encode(), None, []
    for end in [*sorted(cuts), len(data)]:
        path.write_bytes(data[:end])
        for step in Table(str(path), SAVED).steps(state, is_complete=end >= len(data)):
            steps.append(step)
            state = json.loads(json.dumps(step.state))
    assert savings(steps) == sum(tokens for _, tokens in rows)
    assert sum(row.requests for step in steps for row in step.rows) == len(rows)
    assert not problems(steps)


@pytest.mark.parametrize(("rows", "removed"), [(4, 1), (6, 1), (8, 1), (9, 1), (9, 2), (10, 4), (100, 95)])
def test_removed_lines_below_the_header(rows: int, removed: int, table: Path, tracker: SavingsTracker) -> None:
    lines = [line(number) for number in range(1, rows + 1)]
    table.write_text(HEADER + "".join(lines))
    imported(tracker, Table(str(table), FIELDS))
    table.write_text(HEADER + "".join(lines[removed:]))
    imported(tracker, Table(str(table), FIELDS))
    assert saved(tracker) == sum(range(1, rows + 1))
    with table.open("a") as file:
        file.write(line(1000))
    imported(tracker, Table(str(table), FIELDS))
    assert saved(tracker) == sum(range(1, rows + 1)) + 1000
