"""Tables of any program: CSV files and files of JSON lines, with a mapping of their columns.

A program may append to such a file, rename it and begin a new one, or truncate it (see ``lines``). A line that cannot
be read is rejected, and the lines after it are read.

A record of a CSV file can have line breaks within quotes. A record whose last line is not there yet is read later. If a
record with line breaks cannot be read, each of its lines is read as a record: a missing quote must not hide the savings
below it. A field can have 128 KiB, which is the limit of Python's reader, and a record 512 KiB. The header is kept in
the state, because a program that goes on after its file was truncated writes no second one.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from savings_exporter.model.names import clean_name
from savings_exporter.model.totals import Sums
from savings_exporter.prices import Prices
from savings_exporter.sources.building import StepBuilder
from savings_exporter.sources.fields import FieldMap, value_at
from savings_exporter.sources.lines import Block, blocks, place_of
from savings_exporter.sources.source import SourceError, Step

CSV = "csv"
JSON_LINES = "jsonl"
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")
"""The ends of the names of files of JSON lines. Any other file is a CSV file."""

_DELIMITERS = (",", ";", "\t")
_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_LONGEST_HEADER = 8192
_SHOWN_CHARACTERS = 200
_MOST_ROWS = 2000


class Table:
    """A table as a source.

    Args:
        path: the file. Its name says what it is.
        fields: the mapping of its columns.
        source: the layer that saved; without it, ``csv`` or ``jsonl``.
        prices: prices for records without ``savings_usd``.
    """

    def __init__(self, path: str, fields: FieldMap, source: str = "", prices: Prices | None = None) -> None:
        form = JSON_LINES if path.lower().endswith(JSON_LINES_SUFFIXES) else CSV
        self.path = path
        self.kind = clean_name("source", source) or form
        self.name = f"{form}:{os.path.realpath(path)}"
        self._fields = fields
        self._prices = prices
        self._is_csv = form == CSV

    def steps(self, state: Mapping[str, Any] | None, *, is_complete: bool) -> Iterator[Step]:
        """The lines that follow a state.

        Raises:
            SourceError: the file cannot be read, has no header, or its header lacks a column.
        """
        while (block := next(blocks(self.path, place_of(state), is_complete=is_complete), None)) is not None:
            if block.first_line == 1 and block.data.startswith(_UTF16_MARKS):
                raise SourceError(f"{self.path}: is in UTF-16. Convert it to UTF-8", path=self.path)
            step = self._step(block, state)
            if step is None:
                return
            yield step
            state = step.state

    def _step(self, block: Block, state: Mapping[str, Any] | None) -> Step | None:
        """The records of a block, or the first ones; None when the only record is not complete yet."""
        builder, end = StepBuilder(state), 0
        form: _Format = _Csv(self.path, self._fields, self.kind, state) if self._is_csv else _JsonLines(self._fields)
        for found in form.found(block):
            end = found.end
            if found.problem:
                builder.reject(f"line {found.line}", found.problem)
            elif found.values is not None:
                self._add(builder, found)
            if len(builder) >= _MOST_ROWS:
                break
        if not end:
            return None
        part = block.until(end) if end < len(block.data) else block
        step = builder.build({"place": msgspec.to_builtins(part.place), **form.members()}, part.progress)
        return step._replace(prices=self._prices.basis) if self._prices is not None else step

    def _add(self, builder: StepBuilder, found: _Found) -> None:
        place = f"line {found.line}"
        try:
            record, before = self._fields.parsed(found.values or {}, self.kind)
        except (TypeError, ValueError) as error:
            builder.reject(place, str(error))
            return
        sums = Sums()
        sums.add_all((record,) if self._prices is None else self._prices.priced((record,)))
        (row,) = sums.rows()
        if not self._fields.is_dated:
            row = msgspec.structs.replace(row, undated=True)
        builder.add_sum(row, place, before=before)


class _Found(NamedTuple):
    """What a part of a block is: a record, a problem, or neither.

    Attributes:
        end: where it ends in the block.
        line: the number of its first line.
        values: the values of the columns, by field.
        problem: why it cannot be read.
    """

    end: int
    line: int
    values: Mapping[str, Any] | None = None
    problem: str = ""


class _Format(Protocol):
    def found(self, block: Block) -> Iterator[_Found]:
        """The parts of a block in their order."""

    def members(self) -> Mapping[str, Any]:
        """What has to be in the state."""


class _JsonLines:
    def __init__(self, fields: FieldMap) -> None:
        self._columns = fields.columns

    def found(self, block: Block) -> Iterator[_Found]:
        end = 0
        for number, line in enumerate(_lines(block), block.first_line):
            end += len(line)
            data = line.removeprefix(_UTF8_MARK) if number == 1 else line
            yield self._parsed(data, end, number) if data.strip() else _Found(end, number)

    def members(self) -> Mapping[str, Any]:
        return {}

    def _parsed(self, data: bytes, end: int, number: int) -> _Found:
        try:
            value = msgspec.json.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            return _Found(end, number, problem=f"is not JSON: {error}")
        if not isinstance(value, dict):
            return _Found(end, number, problem="is not a JSON object")
        return _Found(end, number, {field: value_at(value, path) for field, path in self._columns.items()})


class _Csv:
    def __init__(self, path: str, fields: FieldMap, source: str, state: Mapping[str, Any] | None) -> None:
        self._path = path
        self._fields = fields
        self._source = source
        self._header: list[str] = (state or {}).get("header", [])
        self._delimiter: str = (state or {}).get("delimiter", ",")

    def members(self) -> Mapping[str, Any]:
        return {"header": self._header, "delimiter": self._delimiter} if self._header else {}

    def found(self, block: Block) -> Iterator[_Found]:
        lines = _CsvLines(block)
        if block.first_line == 1 or not self._header:
            for line in lines:
                is_empty = not line.strip()
                if is_empty or self._is_begun_by(line, lines.number):
                    yield lines.found()
                else:
                    lines.go_back()
                if not is_empty:
                    break
            if not self._header:
                return
        self._require_columns(self._header, "the header that was read before")
        reader = csv.reader(lines, delimiter=self._delimiter, strict=True)
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error:
                if lines.is_over and (lines.is_begun or block.can_grow):
                    return
                # A quote may be missing. The lines that follow it are not lost.
                for line in lines.again():
                    yield self._of_line(line, lines)
                continue
            yield self._of_row(row, lines)

    def _is_begun_by(self, line: str, number: int) -> bool:
        """Whether the first line of a file is a header. Otherwise it is a record below the header of the last file."""
        rows = [(cells, delimiter) for delimiter in _DELIMITERS if (cells := _cells(line, delimiter))]
        header, delimiter = max(rows, key=lambda row: (not self._missing(row[0]), len(row[0])), default=([], ","))
        if self._header and header != self._header and self._is_record(line):
            return False
        self._require_columns(header, f"line {number}")
        if len(line) > _LONGEST_HEADER:
            raise SourceError(f"{self._path}: line {number} is too long for a header", path=self._path)
        self._header, self._delimiter = header, delimiter
        return True

    def _is_record(self, line: str) -> bool:
        cells = _cells(line, self._delimiter)
        if len(cells) != len(self._header) or self._missing(self._header):
            return False
        try:
            self._fields.parsed(self._values(cells), self._source)
        except (TypeError, ValueError):
            return False
        return True

    def _of_line(self, line: str, lines: _CsvLines) -> _Found:
        """What a line is that is no part of a longer record."""
        try:
            row = next(csv.reader([line], delimiter=self._delimiter, strict=True))
        except csv.Error as error:
            return lines.found(problem=f"is not CSV: {str(error).partition(' - ')[0]}")
        return self._of_row(row, lines)

    def _of_row(self, row: Sequence[str], lines: _CsvLines) -> _Found:
        cells = list(map(str.strip, row))
        if not any(cells) or cells == self._header:
            return lines.found()
        if len(cells) != len(self._header):
            return lines.found(problem=f"has {len(cells)} fields, and the header has {len(self._header)}")
        values = self._values(cells)
        try:
            "".join(values.values()).encode()
        except UnicodeEncodeError:
            return lines.found(problem="is not UTF-8")
        return lines.found(values)

    def _values(self, cells: Sequence[str]) -> Mapping[str, str]:
        return {field: cells[self._header.index(column)] for field, column in self._fields.columns.items()}

    def _missing(self, header: Sequence[str]) -> Sequence[str]:
        """The columns that a header does not have, or has twice."""
        return [column for column in self._fields.columns.values() if header.count(column) != 1]

    def _require_columns(self, header: Sequence[str], what: str) -> None:
        if missing := self._missing(header):
            raise SourceError(
                f"{self._path}: {what} has no column {missing[0]!r}, or more than one. Its columns are "
                f"{repr(header)[:_SHOWN_CHARACTERS]}. A file of JSON lines needs a name that ends in "
                f"{', '.join(JSON_LINES_SUFFIXES)}",
                path=self._path,
            )


class _CsvLines:
    """The lines of a block, for a reader that takes more than one for a record with line breaks.

    Attributes:
        is_over: whether another line was wanted than there are.
    """

    def __init__(self, block: Block) -> None:
        self.is_over = False
        self._lines = _lines(block)
        self._first_line = block.first_line
        self._begun = self._taken = self._end = 0

    @property
    def is_begun(self) -> bool:
        """Whether there is something before the current record."""
        return self._begun > 0

    @property
    def number(self) -> int:
        """The number of the current record's first line."""
        return self._first_line + self._begun

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        if self._taken == len(self._lines):
            self.is_over = True
            raise StopIteration
        line, number = self._lines[self._taken], self._first_line + self._taken
        self._taken += 1
        self._end += len(line)
        # Bytes that are not UTF-8 matter only in the columns that are used.
        return (line.removeprefix(_UTF8_MARK) if number == 1 else line).decode(errors="surrogateescape")

    def go_back(self) -> None:
        """Give the lines of the current record again."""
        self._end -= sum(map(len, self._lines[self._begun : self._taken]))
        self._taken = self._begun
        self.is_over = False

    def again(self) -> Iterator[str]:
        """The lines of the current record again, each as a record."""
        end = self._taken
        self.go_back()
        while self._taken < end:
            yield next(self)

    def found(self, values: Mapping[str, Any] | None = None, problem: str = "") -> _Found:
        """The current record. The next line begins another one."""
        found = _Found(self._end, self.number, values, problem)
        self._begun = self._taken
        return found


def _lines(block: Block) -> Sequence[bytes]:
    return [line + b"\n" for line in block.data.removesuffix(b"\n").split(b"\n")]


def _cells(line: str, delimiter: str) -> list[str]:
    """The cells of a line; none when it is not a whole record."""
    try:
        return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter, strict=True), [])]
    except csv.Error:
        return []
