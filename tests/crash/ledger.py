"""The attempts of a stream of records and the answers to them, logged where no experiment can lose them.

A stream is one model name: its records are worth one token each and are sent one after the other, so how many of
them a store holds says which ones they can be. A stream of batches sends many records at a time, as many as ``sizes``
says in turn.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

from savings_exporter import Receipt

_END = "."


def size_of(number: int, sizes: tuple[int, ...]) -> int:
    """The number of records that a stream sends under a number."""
    return sizes[number % len(sizes)]


class Stream(NamedTuple):
    """The input of a writer about the stream that it continues.

    ``again`` are the numbers that a writer before it sent and got no answer for. They are sent once more, where
    their idempotency keys keep them from counting twice.
    """

    ledger: Path
    first: int
    again: tuple[int, ...]

    @property
    def name(self) -> str:
        """The model's name."""
        return self.ledger.name

    def numbers(self) -> Iterator[int]:
        """The numbers to send."""
        return chain(self.again, count(self.first))


class Ledger:
    """The writer's side. A writer that is killed while it writes a line leaves a partial line, which does not count."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
        os.write(self._file, b"\n")

    def attempt(self, number: int) -> None:
        """Log this before sending."""
        self._note("attempted", number)

    def answer(self, number: int, receipt: Receipt, patience: float | None = None) -> None:
        """Log the receipt's answer. Wait for a pending record, up to this number of seconds (None: without a limit)."""
        if not receipt.durable:
            self.failed()
            receipt.wait(patience)
        if receipt.durable:
            assert receipt.sequence is not None
            assert receipt.writer is not None
            self._note("acknowledged", number, int(receipt.writer, 16), receipt.sequence)

    def failed(self) -> None:
        """Log that the disk has failed."""
        self._note("failed")

    def saved(self, records: int) -> None:
        """Log that the document was saved with at least this number of records."""
        self._note("saved", records)

    def seen(self, tokens: int) -> None:
        """Log that a reader saw this lifetime total."""
        self._note("seen", tokens)

    def torn(self, size: int) -> None:
        """Log that the writer dies now, after this number of bytes of a write reached the file."""
        self._note("torn", size)

    def _note(self, *words: object) -> None:
        os.write(self._file, " ".join(map(str, (*words, _END))).encode() + b"\n")


class Answer(NamedTuple):
    """An acknowledgement: under which number something was sent, and the place in the store that its receipt named."""

    number: int
    writer: int
    sequence: int


class Account:
    """The checker's side: the minimum and maximum number of records of a stream that the store must contain."""

    def __init__(self, path: Path, *, sizes: tuple[int, ...] = (1,), keyed: bool = False) -> None:
        self.path = path
        self.sizes = sizes
        self.keyed = keyed
        self.attempted: set[int] = set()
        self.acknowledged: set[int] = set()
        self.answers: list[Answer] = []
        self.notes: Counter[str] = Counter()
        self.records: Counter[str] = Counter()
        self.saved = 0
        self.seen: list[int] = []
        self.torn_bytes = 0
        self._known = 0
        self._next = 1
        self._read_bytes = 0

    def read(self) -> None:
        """Read the log entries since the last call."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read_bytes)
            lines = file.read().splitlines(keepends=True)
        for line in lines:
            if not line.endswith(b"\n"):
                break  # it is being written now
            self._read_bytes += len(line)
            what, *rest = line.decode().split() or [""]
            if rest[-1:] == [_END]:
                self._take_in(what, [int(number) for number in rest[:-1]])

    def _take_in(self, what: str, numbers: list[int]) -> None:
        self.notes[what] += 1
        if what in ("attempted", "acknowledged"):
            self.records[what] += size_of(numbers[0], self.sizes)
        if what == "attempted":
            self.attempted.add(numbers[0])
            self._next = max(self._next, numbers[0] + 1)
        elif what == "acknowledged":
            self.acknowledged.add(numbers[0])
            self.answers.append(Answer(*numbers))
        elif what == "saved":
            self.saved = max(self.saved, numbers[0])
        elif what == "seen":
            self.seen.append(numbers[0])
        elif what == "torn":
            self.torn_bytes += numbers[0]

    @property
    def stream(self) -> Stream:
        """The input of the next writer of the stream."""
        unanswered = self.attempted - self.acknowledged if self.keyed else ()
        return Stream(self.path, self._next, tuple(sorted(unanswered)))

    @property
    def least(self) -> int:
        """The number of records in the store if nothing is lost."""
        return self._known + self._records_of(self.acknowledged)

    @property
    def most(self) -> int:
        """The number of records in the store if nothing is counted twice."""
        return self._known + self._records_of(self.attempted)

    def allows(self, recovered: int) -> bool:
        """Whether this number of records can be all acknowledged ones and some of the rest, with no partial batch."""
        possible = {self.least}
        for number in self.attempted - self.acknowledged:
            possible |= {records + size_of(number, self.sizes) for records in possible}
        return recovered in possible

    def _records_of(self, numbers: Iterable[int]) -> int:
        return sum(size_of(number, self.sizes) for number in numbers)

    def settle(self, recovered: int) -> None:
        """After a crash: an unanswered record that is not sent again was either recovered or not, and this is final."""
        if not self.keyed:
            self._known = recovered
            self.attempted.clear()
            self.acknowledged.clear()
