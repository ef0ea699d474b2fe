"""What the lab's processes do until they are killed, and how some of them are broken on purpose."""

from __future__ import annotations

import inspect
import logging
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from savings_exporter import SavingsRecord, SavingsTracker, StoreError
from savings_exporter.storage import filesystem
from tests.crash.ledger import Ledger, Stream, size_of

BATCHES = (1, 200, 1, 3, 1, 1000, 1, 6000, 1, 30_000)
"""Records a batch, in turn: large ones, so that whatever the engine fills with records is filled soon, small ones that
fit where a large one did not, and one that is larger than a segment.
"""

BURST = 8
"""Records that are sent without waiting before their receipts are looked at."""

THREADS = 4
"""Streams of a writer with threads; every second one does not wait."""

SAVE_EVERY = 16
"""Who sends one record after the other asks for a save of the document after so many records."""

LONGEST_SYNC_SECONDS = 0.01
"""How long a slow disk takes for a sync at most."""

RAISED = ".raised"
"""What a writer's last traceback is called, after its ledger."""

KEYED = "idempotency_key" in inspect.signature(SavingsTracker.record_request).parameters
"""Whether this engine knows idempotency keys."""


DATA_SYNCS = [name for name in ("fsync_file", "sync_data") if hasattr(filesystem, name)]
"""How this engine has a file's data on the disk."""


def run(kind: str, store: Path, streams: list[Stream], sabotage: str | None) -> None:
    """Be a process of the lab. What it raises is left beside its ledger, for the judge."""
    logging.disable()
    try:
        if sabotage is not None:
            SABOTAGES[sabotage](store.parent, Ledger(streams[0].ledger))
        with SavingsTracker(store) as tracker:
            KINDS[kind](tracker, streams)
    except StoreError:
        pass  # the disk failed while the store was being opened
    except BaseException:
        streams[0].ledger.with_suffix(RAISED).write_text(traceback.format_exc())
        raise


def alone(tracker: SavingsTracker, streams: list[Stream]) -> None:
    """Send one record after the other."""
    _send_each(tracker, streams[0])


def threads(tracker: SavingsTracker, streams: list[Stream]) -> None:
    """Send from several threads at once; every second one does not wait for each record."""
    senders = islice(cycle((_send_each, _send_bursts)), len(streams))
    with ThreadPoolExecutor(len(streams)) as pool:
        for done in [pool.submit(send, tracker, stream) for send, stream in zip(senders, streams, strict=True)]:
            done.result()


def batches(tracker: SavingsTracker, streams: list[Stream]) -> None:
    """Send batches."""
    ledger = Ledger(streams[0].ledger)
    records = batch_of(streams[0].name, max(BATCHES))
    for number in streams[0].numbers():
        batch = records[: size_of(number, BATCHES)]
        ledger.attempt(number)
        ledger.answer(number, tracker.record_many(batch, **key(streams[0].name, number)))


def reader(tracker: SavingsTracker, streams: list[Stream]) -> None:
    """Note every lifetime total that a scrape would have shown."""
    ledger = Ledger(streams[0].ledger)
    shown = -1
    while True:
        tokens = tracker.snapshot().lifetime.tokens_saved
        if tokens != shown:
            ledger.seen(tokens)
            shown = tokens
        time.sleep(0.0005)


def key(name: str, number: int) -> dict[str, Any]:
    """The idempotency key of a stream's record, where the engine knows such keys."""
    return {"idempotency_key": f"{name}-{number}"} if KEYED else {}


def batch_of(model: str, size: int) -> list[SavingsRecord]:
    """As many large records."""
    return [SavingsRecord(model=model, tokens_saved=1, project=f"{n % 100:0128}") for n in range(size)]


def _send_each(tracker: SavingsTracker, stream: Stream) -> None:
    """Send one record after the other, and now and then have the document saved."""
    ledger = Ledger(stream.ledger)
    for number in stream.numbers():
        ledger.attempt(number)
        receipt = tracker.record_request(model=stream.name, tokens_saved=1, **key(stream.name, number))
        ledger.answer(number, receipt)
        if number % SAVE_EVERY == 0 and receipt.sequence is not None and tracker.save():
            ledger.saved(receipt.sequence)


def _send_bursts(tracker: SavingsTracker, stream: Stream) -> None:
    """Send several records without waiting, then look at their receipts."""
    ledger = Ledger(stream.ledger)
    numbers = stream.numbers()
    while burst := list(islice(numbers, BURST)):
        receipts = []
        for number in burst:
            ledger.attempt(number)
            known = key(stream.name, number)
            receipts.append(tracker.record_request(model=stream.name, tokens_saved=1, wait=False, **known))
        for number, receipt in zip(burst, receipts, strict=True):
            receipt.wait()
            ledger.answer(number, receipt)


def _skip_directory_fsync(_directory: Path, _ledger: Ledger) -> None:
    filesystem.fsync_directory = lambda path: None


def _skip_data_sync(_directory: Path, _ledger: Ledger) -> None:
    for name in DATA_SYNCS:
        setattr(filesystem, name, lambda descriptor: None)


def _sync_slowly(_directory: Path, _ledger: Ledger) -> None:
    """Be a slow disk: what is written and visible to others is not durable for a while."""

    def slow(sync: Callable[[Any], None]) -> Callable[[Any], None]:
        def sync_slowly(file: Any) -> None:
            time.sleep(random.uniform(0, LONGEST_SYNC_SECONDS))
            sync(file)

        return sync_slowly

    for name in ("fsync_directory", *DATA_SYNCS):
        setattr(filesystem, name, slow(getattr(filesystem, name)))


def _sync_again(_directory: Path, ledger: Ledger) -> None:
    """Believe the second sync of a file whose first one failed."""

    def believing(sync: Callable[[int], None]) -> Callable[[int], None]:
        def sync_again(descriptor: int) -> None:
            try:
                sync(descriptor)
            except OSError:
                ledger.failed()
                sync(descriptor)

        return sync_again

    for name in DATA_SYNCS:
        setattr(filesystem, name, believing(getattr(filesystem, name)))


def _die_in_a_write(directory: Path, ledger: Ledger) -> None:
    """At some write into the directory, let a part of the bytes through and end by SIGKILL."""
    life = random.randint(1, 20)

    def torn(descriptor: int, data: Any, write: Callable[[Any], int]) -> int:
        nonlocal life
        if _is_in(directory, descriptor) and len(data) > 1:
            life -= 1
            if life == 0:
                ledger.torn(write(data[: random.randrange(1, len(data))]))
                os.kill(os.getpid(), signal.SIGKILL)
        return write(data)

    real_write, real_pwrite = os.write, os.pwrite
    os.write = lambda descriptor, data: torn(descriptor, data, lambda part: real_write(descriptor, part))
    os.pwrite = lambda descriptor, data, offset: torn(
        descriptor, data, lambda part: real_pwrite(descriptor, part, offset)
    )


def _die_after_a_call(directory: Path, _ledger: Ledger) -> None:
    """End by SIGKILL right after some call that changes a file: what would have come next never does.

    Which one is counted from the first call of some kind, because those that matter most are rare.
    """
    calls = ("replace", "write", "pwrite", "fsync", "fdatasync", "unlink")
    first, life = random.choice(calls[:2]), random.randint(1, 10)
    is_dying = False

    def deadly(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def die_after(*arguments: Any, **options: Any) -> Any:
            nonlocal is_dying, life
            result = call(*arguments, **options)
            if _is_in(directory, arguments[0]):
                is_dying = is_dying or name == first
                life -= is_dying
                if life == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return result

        return die_after

    for name in calls:
        setattr(os, name, deadly(name, getattr(os, name)))


def _is_in(directory: Path, file: int | str) -> bool:
    """Whether a path or a descriptor is one of a file in a directory, or of the directory."""
    path = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else os.fspath(file)
    return Path(path) == directory or directory in Path(path).parents


SABOTAGES = {
    "no directory fsync": _skip_directory_fsync,
    "no data sync": _skip_data_sync,
    "slow syncs": _sync_slowly,
    "sync again": _sync_again,
    "torn write": _die_in_a_write,
    "sudden death": _die_after_a_call,
}
KINDS = {"alone": alone, "threads": threads, "batches": batches, "reader": reader}
