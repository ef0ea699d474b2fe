"""Files of lines: each line is read once, whatever the other program does to the file, within what is promised."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from savings_exporter.sources.lines import Block, Place, blocks, place_of
from savings_exporter.sources.source import SourceError

BEGINNING = Place()


def read(path: Path, place: Place = BEGINNING, *, is_complete: bool = False) -> tuple[list[bytes], Place]:
    """All lines after a place, and the place after them."""
    lines: list[bytes] = []
    for block in blocks(str(path), place, is_complete=is_complete):
        lines += [line for _, line in block.numbered()]
        place = kept(block.place)
    return lines, place


def kept(place: Place) -> Place:
    """A place that was kept in a store."""
    return place_of({"place": json.loads(json.dumps(msgspec.to_builtins(place)))})


def numbered_lines(count: int, first: int = 0) -> bytes:
    return b"".join(b"line %d\n" % number for number in range(first, first + count))


class Program(RuleBasedStateMachine):
    """Another program that writes lines, and a reader that is interrupted after any block."""

    is_distinct = True

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.path = self.directory / "log"
        self.path.touch()
        self.written: list[bytes] = []  # whole lines, without their line breaks
        self.found: list[bytes] = []
        self.begun = b""  # the part of a line that is in the file
        self.place = Place()
        self.removed = 0  # how many of the lines are not in the file any more
        self.is_changed = False  # in one of the ways of which only one may come between two reads

    def teardown(self) -> None:
        # The program completes its line.
        self.append([1], is_partial=False)
        self.read_all()
        self.read_all()
        shutil.rmtree(self.directory)
        assert self.found == self.written

    @rule(sizes=st.lists(st.sampled_from([0, 1, 40, 40, 40, 700_000]), max_size=6), is_partial=st.booleans())
    def append(self, sizes: Sequence[int], is_partial: bool) -> None:
        for size in sizes:
            name = b"%d " % len(self.written) if self.is_distinct else b""
            line = self.begun + name + b"x\r" * (size // 2)
            self.written.append(line)
            with self.path.open("ab") as file:
                file.write(line[len(self.begun) :] + b"\n")
            self.begun = b""
        if is_partial and not self.begun:
            self.begun = b"part "
            with self.path.open("ab") as file:
                file.write(self.begun)

    @rule(most_blocks=st.integers(1, 3))
    def read_some(self, most_blocks: int) -> None:
        for _ in range(most_blocks):
            block = next(iter(blocks(str(self.path), self.place)), None)
            if block is None:
                return
            self.take(block)

    @rule(size=st.integers(0, 3))
    def read_a_part_of_a_block(self, size: int) -> None:
        block = next(iter(blocks(str(self.path), self.place)), None)
        lines = block.data.split(b"\n") if block is not None else []
        if block is not None and size and len(lines) > size:
            self.take(block.until(len(b"\n".join(lines[:size])) + 1))

    @rule()
    def read_all(self) -> None:
        for block in blocks(str(self.path), self.place):
            self.take(block)
            self.is_changed = False

    def take(self, block: Block) -> None:
        assert block.data.endswith(b"\n")
        self.found += [line for _, line in block.numbered()]
        assert self.found == self.written[: len(self.found)]
        self.place = kept(block.place)
        assert len(json.dumps(msgspec.to_builtins(self.place))) < 1000

    @precondition(lambda self: not self.begun and not self.is_changed and len(self.found) > self.removed)
    @rule(suffix=st.sampled_from([".1", "-20260101"]))
    def rename(self, suffix: str) -> None:
        self.path.rename(self.path.with_name(self.path.name + suffix))
        self.path.touch()
        self.removed, self.is_changed = len(self.written), True

    @precondition(lambda self: not self.begun and not self.is_changed)
    @rule(is_removed=st.booleans())
    def begin_again(self, is_removed: bool) -> None:
        self.read_all()
        if is_removed:
            self.path.unlink()
        self.path.write_bytes(b"")
        self.removed, self.is_changed = len(self.written), True

    @precondition(lambda self: not self.begun and not self.is_changed)
    @rule(share=st.floats(0, 1), is_replaced=st.booleans())
    def remove_old_lines(self, share: float, is_replaced: bool) -> None:
        read_of_it = max(0, len(self.found) - self.removed)
        removed = int(read_of_it * share)
        if removed == read_of_it - 1:
            removed = max(0, read_of_it - 2)
        self.removed, self.is_changed = self.removed + removed, True
        content = b"".join(line + b"\n" for line in self.written[self.removed :])
        new = self.directory / "new"
        new.write_bytes(content)
        if is_replaced:
            new.replace(self.path)
        else:
            self.path.write_bytes(content)
            new.unlink()


class EqualLines(Program):
    """Lines that are often equal, in a program that appends and renames."""

    is_distinct = False

    @precondition(lambda self: False)
    @rule()
    def begin_again(self) -> None:
        raise AssertionError

    @precondition(lambda self: False)
    @rule()
    def remove_old_lines(self) -> None:
        raise AssertionError


TestProgram = Program.TestCase
TestEqualLines = EqualLines.TestCase
TestProgram.settings = TestEqualLines.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_last_line_without_a_line_break(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\ntwo")
    lines, place = read(path)
    assert lines == [b"one"]
    assert read(path, place) == ([], place)
    lines, place = read(path, place, is_complete=True)
    assert lines == [b"two"]
    with path.open("ab") as file:
        file.write(b"\nthree\n")
    (block,) = blocks(str(path), place)
    assert list(block.numbered()) == [(2, b""), (3, b"three")]


def test_unfinished_line_of_a_renamed_file(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\ntw")
    _, place = read(path)
    path.rename(tmp_path / "log.1")
    path.touch()
    assert read(path, place) == ([], place)
    with (tmp_path / "log.1").open("ab") as file:
        file.write(b"o\n")
    lines, place = read(path, place)
    assert lines == [b"two"]
    path.write_bytes(b"three\n")
    assert read(path, place)[0] == [b"three"]


def test_last_line_of_a_renamed_file_without_a_line_break(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\ntwo")
    _, place = read(path)
    path.rename(tmp_path / "log.1")
    path.write_bytes(b"three\n")
    assert read(path, place)[0] == [b"two", b"three"]


def test_new_file_of_equal_lines(tmp_path: Path) -> None:
    """What is in the new file counts, although the old one had the same lines."""
    path = tmp_path / "log"
    path.write_bytes(b"5,gpt-5\n" * 20)
    lines, place = read(path)
    path.rename(tmp_path / "log.1")
    path.write_bytes(b"5,gpt-5\n" * 30)
    more, _ = read(path, place)
    assert (len(lines), len(more)) == (20, 30)


def test_truncated_file_repeats_one_old_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"a\nb\n")
    _, place = read(path)
    for content in (b"c\nb\nd\n", b"b\nc\nd\n"):
        path.write_bytes(content)
        (block,) = blocks(str(path), place)
        assert block.is_restart
        assert block.data == content


def test_numbers_of_lines_after_old_ones_were_removed(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(numbered_lines(20))
    _, place = read(path)
    path.write_bytes(numbered_lines(6, first=15))
    (block,) = blocks(str(path), place)
    assert list(block.numbered()) == [(6, b"line 20")]


def test_line_longer_than_a_block_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "log"
    last = b"y\n" + b"x" * 1_000_000 + b"\n"
    path.write_bytes(b"old\n" + last)
    _, place = read(path)
    path.write_bytes(last + b"new\n")
    assert read(path, place)[0] == [b"new"]


def test_part_of_a_block(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(numbered_lines(20))
    _, place = read(path)
    with path.open("ab") as file:
        file.write(numbered_lines(3, first=20))
    (block,) = blocks(str(path), place)
    part = block.until(len(b"line 20\n"))
    assert part.data == b"line 20\n"
    path.write_bytes(numbered_lines(10, first=15))
    assert read(path, kept(part.place))[0] == [b"line 21", b"line 22", b"line 23", b"line 24"]


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir], ids=["missing", "directory"])
def test_file_that_cannot_be_read(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "log")
    with pytest.raises(SourceError, match=r"log: cannot be read: "):
        read(tmp_path / "log")


@pytest.mark.needs("linux")
def test_locked_file_is_read_later(tmp_path: Path) -> None:
    import fcntl

    path = tmp_path / "log"
    path.write_bytes(b"one\n")
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert not list(blocks(str(path), Place(), locked=True))
        fcntl.flock(file, fcntl.LOCK_UN)
        assert [block.data for block in blocks(str(path), Place(), locked=True)] == [b"one\n"]
