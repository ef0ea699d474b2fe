"""Our side: trackers that record through the public API, and the few functions that depend on a store's files."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import secrets
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from opentelemetry.trace import NoOpTracerProvider, TracerProvider

from benchmarks.measuring import Opened, Recorder, Setup
from benchmarks.workload import Fields, many
from savings_exporter import SavingsRecord, SavingsTracker

NAME = "proxy_savings.json"
BATCH = 1_000

NEVER = 1e9
"""A ``save_interval``, in seconds, for works that inspect the journal: a save of the document would replace it."""


@contextmanager
def shared_tracker(directory: Path, **options: Any) -> Iterator[Opened]:
    """One tracker for all threads."""
    with SavingsTracker(directory / NAME, **options) as tracker:
        yield lambda: nullcontext(recorder(tracker))


@contextmanager
def tracker_each(directory: Path, *, keyed: bool = False) -> Iterator[Opened]:
    """One tracker per process, all on one store."""
    yield partial(_recorder_of_store, directory / NAME, keyed=keyed)


@contextmanager
def batch_tracker(directory: Path, records: Sequence[SavingsRecord]) -> Iterator[Opened]:
    """A tracker that records all given records in one call of ``record_many``."""
    with SavingsTracker(directory / NAME) as tracker:
        yield lambda: nullcontext(lambda _fields: check(tracker.record_many(records)))


@contextmanager
def traced_caller(directory: Path, provider: TracerProvider, *, ours_too: bool) -> Iterator[Opened]:
    """A proxy that opens a span for each request that it records. ``ours_too``: the tracker creates spans as well."""
    caller = provider.get_tracer("caller")
    with SavingsTracker(directory / NAME, tracer_provider=provider if ours_too else NoOpTracerProvider()) as tracker:
        record = recorder(tracker)

        def request(fields: Fields) -> None:
            with caller.start_as_current_span("POST /v1/messages"):
                record(fields)

        yield lambda: nullcontext(request)


def recorder(tracker: SavingsTracker) -> Recorder:
    """Records one request and fails if it is not durable."""

    def record(fields: Fields) -> None:
        check(tracker.record_request(**fields))

    return record


def keyed_recorder(tracker: SavingsTracker) -> Recorder:
    """The same, with a unique idempotency key for each request."""
    prefix, numbers = secrets.token_hex(8), itertools.count()

    def record(fields: Fields) -> None:
        check(tracker.record_request(**fields, idempotency_key=f"{prefix}-{next(numbers)}"))

    return record


def check(receipt: object) -> None:
    """Stop the run if a record is not durable."""
    if not receipt:
        raise RuntimeError("a record of ours was not durable: look at the disk, and at the log above")


def fill(tracker: SavingsTracker, records: int) -> None:
    """Record a number of requests, a thousand at a time."""
    batch = [SavingsRecord(**fields) for fields in many(BATCH)]
    for first in range(0, records, BATCH):
        check(tracker.record_many(batch[: records - first]))


def record_bytes(setup: Setup) -> int:
    """The bytes that one record takes in the journal, including its share of the unused rest of a block."""
    records = 500
    with setup.fresh() as directory, SavingsTracker(directory / NAME, save_interval=NEVER) as tracker:
        for fields in many(records):
            check(tracker.record_request(**fields))
        used = sum(len(path.read_bytes().rstrip(b"\0")) for path in segments(directory))
    return round(used / records)


def make_crashed_store(directory: Path, records: int) -> None:
    """A store whose only writer was killed: every record is in its journal, each in a separate commit."""
    writer = multiprocessing.get_context("spawn").Process(target=_record_and_die, args=(directory / NAME, records))
    writer.start()
    writer.join()
    if writer.exitcode != -signal.SIGKILL:
        raise RuntimeError(f"the writer of a crashed store ended with {writer.exitcode}: look at the log above")


def journal_lines(directory: Path) -> list[bytes]:
    """The contents of a store's journal: the JSON in each frame.

    Only this function and ``segments`` depend on the format of the journal.
    """
    return [line for path in segments(directory) for line in _json_objects(path.read_bytes())]


def segments(directory: Path) -> list[Path]:
    """The segments of the journals in a store's directory."""
    return sorted(directory.glob(f"{NAME}.journal.*"))


def document_format() -> tuple[Callable[[bytes], Any], Callable[[Any], bytes]]:
    """The functions that decode and encode a document.

    They are not public. The public API cannot save a document with this many points, because it thins the history.
    """
    try:
        document = import_module("savings_exporter.formats.document")
    except ModuleNotFoundError:
        document = import_module("savings_exporter.documents")
    return document.decode, document.encode


@contextmanager
def _recorder_of_store(path: Path, *, keyed: bool) -> Iterator[Recorder]:
    with SavingsTracker(path) as tracker:
        yield keyed_recorder(tracker) if keyed else recorder(tracker)


def _record_and_die(path: Path, records: int) -> None:
    with SavingsTracker(path, save_interval=NEVER) as tracker:
        record = recorder(tracker)
        for fields in many(records):
            record(fields)
        os.kill(os.getpid(), signal.SIGKILL)


def _json_objects(data: bytes) -> Iterator[bytes]:
    """The JSON objects between other bytes, such as the headers of frames."""
    # In Latin-1 each byte is one character, so that positions in the text are positions in the data.
    text = data.rstrip(b"\0").decode("latin-1")
    decode = json.JSONDecoder().raw_decode
    start = text.find('{"')
    while start >= 0:
        try:
            _, end = decode(text, start)
            yield data[start:end]
        except ValueError:
            end = start + 1
        start = text.find('{"', end)
