"""The work of the lab's processes until they are killed."""

from __future__ import annotations

import logging
import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from itertools import count, cycle, islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from savings_exporter import CorruptStoreError, SavingsRecord, SavingsTracker, StoreError
from savings_exporter.storage.filesystem import FileSystem
from savings_exporter.storage.segment import SyncMethod
from savings_exporter.watched import WatchedFile
from tests.crash.ledger import Ledger, Stream, size_of
from tests.crash.sabotage import filesystem

BATCHES = (*(1, 50, 1, 3, 1, 200, 1, 20) * 4, 1500, 1, 10_000, 1)
"""Records a batch, in turn: large ones, so that whatever the engine fills with records is filled soon, small ones that
fit where a large one did not, and one that is larger than a segment.
"""

DAYS = 37
"""The days of a batch's records. With the names of its projects they make more rows than a document keeps open."""

BURST = 8
"""Records that are sent without waiting before their receipts are looked at."""

STREAMS = {"threads": 4, "forks": 3}
"""How many streams a writer has, where it is not one: one a thread, of which every second one does not wait; one for
the parent, and one for each of its children that live at the same time.
"""

SAVE_EVERY = 16
"""A writer of single records requests a save of the document after this number of records."""

LONGEST_STAY = 8
"""The maximum number of records that a visitor or a forked child sends before it ends."""

PAUSE_SECONDS = 0.02
"""How long a visitor that could not open the store waits before it tries again, and a writer of batches after each of
them. Without a pause, these writers are faster than all readers together, and the others do not go on.
"""

RAISED, REFUSED = ".raised", ".refused"
"""What is left beside a writer's ledger: the traceback of what it raised, and why it could not open the store."""


class Store(NamedTuple):
    """A store as a process of the lab uses it."""

    path: Path
    method: SyncMethod
    disk: FileSystem

    def open(self) -> SavingsTracker:
        """A tracker on it."""
        return SavingsTracker(self.path, sync_method=self.method, filesystem=self.disk)


def run(
    kind: str, path: Path, streams: list[Stream], sabotage: str | None, method: SyncMethod, _alive: Connection
) -> None:
    """Be a process of the lab.

    Each child of this process has a copy of the connection. When all have ended, the other end detects it.
    """
    os.setsid()  # so that all of them are killed together
    logging.disable()
    with left_behind(streams[0]):
        try:
            KINDS[kind](Store(path, method, filesystem(sabotage, Ledger(streams[0].ledger))), streams)
        except StoreError as error:
            refuse_damage(error)
            streams[0].ledger.with_suffix(REFUSED).write_text(str(error))


@contextmanager
def left_behind(stream: Stream) -> Iterator[None]:
    """Write exceptions to a file beside the stream's ledger, for the checker."""
    try:
        yield
    except BaseException:
        stream.ledger.with_suffix(RAISED).write_text(traceback.format_exc())
        raise


def refuse_damage(error: StoreError) -> None:
    """A store cannot be opened on a disk that has failed; it is never found to be damaged.

    Raises:
        CorruptStoreError: it is.
    """
    if isinstance(error, CorruptStoreError):
        raise error


def alone(store: Store, streams: list[Stream]) -> None:
    """Send one record after the other."""
    with store.open() as tracker:
        _send_each(tracker, streams[0], streams[0].numbers())


def threads(store: Store, streams: list[Stream]) -> None:
    """Send from several threads at once; every second one does not wait for each record."""
    senders = islice(cycle((_send_each, _send_bursts)), len(streams))
    with store.open() as tracker, ThreadPoolExecutor(len(streams)) as pool:
        sent = [
            pool.submit(send, tracker, stream, stream.numbers()) for send, stream in zip(senders, streams, strict=True)
        ]
        for done in sent:
            done.result()


def batches(store: Store, streams: list[Stream]) -> None:
    """Send batches."""
    ledger = Ledger(streams[0].ledger)
    records = batch_of(streams[0].name, max(BATCHES))
    with store.open() as tracker:
        for number in streams[0].numbers():
            batch = records[: size_of(number, BATCHES)]
            ledger.attempt(number)
            ledger.answer(number, tracker.record_many(batch, **key(streams[0].name, number)))
            time.sleep(PAUSE_SECONDS)


def visitors(store: Store, streams: list[Stream]) -> None:
    """Open the store, send some records, close it, again and again."""
    ledger, numbers = Ledger(streams[0].ledger), streams[0].numbers()
    while True:
        try:
            with store.open() as tracker:
                _send_each(tracker, streams[0], islice(numbers, random.randint(0, LONGEST_STAY)))
        except StoreError as error:
            refuse_damage(error)
            ledger.failed()
            time.sleep(PAUSE_SECONDS)


def forks(store: Store, streams: list[Stream]) -> None:
    """Fork children that send some records and end in one way or another; send records meanwhile."""
    own, *of_children = [stream.numbers() for stream in streams]
    with store.open() as tracker:
        for round_ in count():
            children: list[int] = []
            for stream, numbers in zip(streams[1:], of_children, strict=True):
                part = list(islice(numbers, random.randint(0, LONGEST_STAY)))
                end = ENDS[(round_ + len(children)) % len(ENDS)]
                children.append(_forked(tracker, stream, part, end))
            _send_each(tracker, streams[0], islice(own, LONGEST_STAY))
            for child in children:
                os.waitpid(child, 0)


def _forked(tracker: SavingsTracker, stream: Stream, numbers: list[int], end: Callable[[SavingsTracker], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            with left_behind(stream):
                _send_each(tracker, stream, numbers)
                end(tracker)
        finally:
            os._exit(0)
    return child


def _close(tracker: SavingsTracker) -> None:
    tracker.close()


def _only_exit(_tracker: SavingsTracker) -> None:
    pass


def _kill_oneself(_tracker: SavingsTracker) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


ENDS = (_close, _only_exit, _kill_oneself)


def reader(store: Store, streams: list[Stream]) -> None:
    """Log every lifetime total that a scrape would have shown."""
    with store.open() as tracker:
        _note_totals(tracker, streams[0])


def watcher(store: Store, streams: list[Stream]) -> None:
    """Log every lifetime total that a watching process would have shown."""
    while True:
        try:
            watched = WatchedFile(store.path, store.disk)
        except StoreError as error:
            # There is no document before the first save.
            refuse_damage(error)
            time.sleep(PAUSE_SECONDS)
        else:
            _note_totals(watched, streams[0])


def _note_totals(source: SavingsTracker | WatchedFile, stream: Stream) -> None:
    ledger = Ledger(stream.ledger)
    shown = -1
    while True:
        tokens = source.snapshot().lifetime.tokens_saved
        if tokens != shown:
            ledger.seen(tokens)
            shown = tokens
        time.sleep(0.0005)


def key(name: str, number: int) -> dict[str, Any]:
    """The idempotency key of a stream's record."""
    return {"idempotency_key": f"{name}-{number}"}


def batch_of(model: str, size: int) -> list[SavingsRecord]:
    """As many large records, of some 500 bytes each, on several days, so that saves close days."""
    today = datetime.now(timezone.utc)
    days = [today - timedelta(days=day) for day in range(DAYS)]
    return [
        SavingsRecord(
            model=model,
            tokens_saved=1,
            project=f"{n % 100:0128}",
            provider="p" * 128,
            agent="a" * 128,
            timestamp=days[n % DAYS],
        )
        for n in range(size)
    ]


def _send_each(tracker: SavingsTracker, stream: Stream, numbers: Iterable[int]) -> None:
    """Send one record after another, and save the document from time to time."""
    ledger = Ledger(stream.ledger)
    for number in numbers:
        ledger.attempt(number)
        receipt = tracker.record_request(model=stream.name, tokens_saved=1, **key(stream.name, number))
        ledger.answer(number, receipt)
        if number % SAVE_EVERY == 0 and receipt.durable:
            durable = tracker.snapshot().sequence
            if tracker.save():
                ledger.saved(durable)


def _send_bursts(tracker: SavingsTracker, stream: Stream, numbers: Iterable[int]) -> None:
    """Send several records without waiting, then look at their receipts."""
    ledger, left = Ledger(stream.ledger), iter(numbers)
    while burst := list(islice(left, BURST)):
        receipts = []
        for number in burst:
            ledger.attempt(number)
            known = key(stream.name, number)
            receipts.append(tracker.record_request(model=stream.name, tokens_saved=1, wait=False, **known))
        for number, receipt in zip(burst, receipts, strict=True):
            receipt.wait()
            ledger.answer(number, receipt)


KINDS: dict[str, Callable[[Store, list[Stream]], None]] = {
    "alone": alone,
    "threads": threads,
    "batches": batches,
    "visitors": visitors,
    "forks": forks,
    "reader": reader,
    "watcher": watcher,
}
