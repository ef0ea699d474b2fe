"""The works: what is recorded, against which peer, and what is required."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from benchmarks.measuring import Bound, LeftOutError, Recorder, Result, Setup, in_processes, in_threads, p99, rate
from benchmarks.peers import bare_file, fill_headroom, headroom_rate, make_database, sqlite, sqlite_many
from benchmarks.workload import Fields, many, request
from savings_exporter import SavingsRecord, SavingsTracker
from savings_exporter.storage import journal
from savings_exporter.telemetry.metrics import SavingsCollector

_NAME = "proxy_savings.json"
_BLOCK_BYTES = 4096
_SECTOR_BYTES = 512
_BATCH = 1_000

# A save of the document would take the journal's place, so none is made where the journal is looked at.
_NEVER = 1e9


def one_thread(setup: Setup) -> Result:
    """The least that a disk takes for a durable record."""
    size = record_bytes(setup)

    def peer() -> float:
        with setup.fresh() as directory:
            return rate(in_threads(lambda: bare_file(directory / "bare", size), 1, setup.seconds))

    return Result(
        work="one thread, each record durable",
        peer="pwrite + fdatasync of the same bytes",
        unit="records/s",
        **_turns(setup, lambda: _tracker_rate(setup, threads=1), peer),
        bound=Bound(0.80, at_least=True),
        notes=[f"{size} bytes a record"],
    )


def one_thread_sqlite(setup: Setup) -> Result:
    """A transaction a record."""
    return Result(
        work="one thread, each record durable",
        peer="SQLite, a transaction a record",
        unit="records/s",
        **_turns(setup, lambda: _tracker_rate(setup, threads=1), lambda: _sqlite_rate(setup, threads=1)),
        bound=Bound(1.2, at_least=True),
    )


def one_thread_headroom(setup: Setup) -> Result:
    """Headroom saves its whole history for each record."""
    points = setup.count(5_000)
    with setup.fresh() as prefilled:
        fill_headroom(prefilled / _NAME, points)

        def ours() -> float:
            return _tracker_rate(setup, threads=1, document=prefilled / _NAME)

        def peer() -> float:
            with setup.fresh() as directory:
                return headroom_rate(Path(shutil.copy(prefilled / _NAME, directory)), setup.seconds)

        return Result(
            work=f"one thread, each record durable, {points:,} points of history",
            peer="Headroom, which saves every record",
            unit="records/s",
            **_turns(setup, ours, peer),
            bound=Bound(250, at_least=True),
        )


def many_threads(setup: Setup) -> Result:
    """Threads that share a tracker share commits."""
    return Result(
        work="64 threads",
        peer="SQLite, 64 threads, a connection each",
        unit="records/s",
        **_turns(setup, lambda: _tracker_rate(setup, threads=64), lambda: _sqlite_rate(setup, threads=64)),
        bound=Bound(5, at_least=True),
    )


def processes(setup: Setup) -> Result:
    """Processes share a store."""

    def ours() -> float:
        with setup.fresh() as directory:
            return rate(in_processes(partial(recorder_of_store, directory / _NAME), 4, setup.seconds))

    def peer() -> float:
        with setup.fresh() as directory:
            make_database(directory / "peer.db")
            return rate(in_processes(partial(sqlite, directory / "peer.db"), 4, setup.seconds))

    return Result(
        work="4 processes of one thread",
        peer="SQLite, 4 processes",
        unit="records/s",
        **_turns(setup, ours, peer),
        bound=Bound(1.5, at_least=True),
    )


def batches(setup: Setup) -> Result:
    """All of a batch or none of it."""
    requests = many(_BATCH)
    records = [SavingsRecord(**fields) for fields in requests]

    def ours() -> float:
        with setup.fresh() as directory, SavingsTracker(directory / _NAME) as tracker:

            def record(_fields: Fields) -> None:
                _check(tracker.record_many(records))

            return _BATCH * rate(in_threads(lambda: nullcontext(record), 1, setup.seconds))

    def peer() -> float:
        with setup.fresh() as directory:
            make_database(directory / "peer.db")
            opened = partial(sqlite_many, directory / "peer.db", requests)
            return _BATCH * rate(in_threads(opened, 1, setup.seconds))

    return Result(
        work="record_many of 1,000",
        peer="SQLite, a transaction of 1,000",
        unit="records/s",
        **_turns(setup, ours, peer),
        bound=Bound(1.0, at_least=True),
    )


def tracing(setup: Setup) -> Result:
    """Every span is made, and thrown away where it would be sent."""

    def traced() -> float:
        provider = TracerProvider(sampler=ALWAYS_ON)
        provider.add_span_processor(BatchSpanProcessor(_Nowhere()))
        try:
            return _tracker_rate(setup, threads=1, tracer_provider=provider)
        finally:
            provider.shutdown()

    return Result(
        work="one thread, tracing on",
        peer="the same, tracing off",
        unit="records/s",
        **_turns(setup, traced, lambda: _tracker_rate(setup, threads=1)),
        bound=Bound(0.85, at_least=True),
    )


def latency(setup: Setup) -> Result:
    """The slowest of a hundred records."""
    size = record_bytes(setup)

    def ours() -> float:
        with setup.fresh() as directory, SavingsTracker(directory / _NAME) as tracker:
            return 1e6 * p99(in_threads(lambda: nullcontext(recorder(tracker)), 8, setup.seconds))

    def peer() -> float:
        with setup.fresh() as directory:
            return 1e6 * p99(in_threads(lambda: bare_file(directory / "bare", size), 1, setup.seconds))

    return Result(
        work="p99 of a record, 8 threads",
        peer="p99 of pwrite + fdatasync, one thread",
        unit="µs",
        **_turns(setup, ours, peer),
        bound=Bound(8, at_least=False),
    )


def device_bytes(setup: Setup) -> Result:
    """What reaches the device for each commit, while neither a segment is made nor the document saved."""
    records, size = setup.count(2_000), record_bytes(setup)
    with loop_ext4(setup) as (mounted, written):
        runs = iter(range(3 * setup.repeat))

        def bytes_of(record: Recorder) -> float:
            for fields in many(10):
                record(fields)
            os.sync()
            before = written()
            for fields in many(records):
                record(fields)
            return (written() - before) / records

        def ours() -> float:
            directory = _made(mounted / str(next(runs)))
            with SavingsTracker(directory / _NAME, save_interval=_NEVER) as tracker:
                return bytes_of(recorder(tracker))

        def bare(size: int) -> float:
            with bare_file(mounted / str(next(runs)), size) as record:
                return bytes_of(record)

        figures = _turns(setup, ours, lambda: bare(_BLOCK_BYTES))
        same_bytes = statistics.median(bare(size) for _ in range(setup.repeat))
    return Result(
        work="bytes that reach the device for a record",
        peer="pwrite + fdatasync of one 4 KiB block",
        unit="bytes",
        **figures,
        bound=Bound(1.0, at_least=False),
        notes=[f"{size} bytes a record; pwrite + fdatasync of just these, one after the other: {same_bytes:,.0f}"],
    )


def after_a_million(setup: Setup) -> Result:
    """A record costs the same however many there are."""
    large, small = setup.count(1_000_000), setup.count(1_000)
    with (
        setup.fresh() as directory,
        SavingsTracker(_made(directory / "large") / _NAME) as old,
        SavingsTracker(_made(directory / "small") / _NAME) as new,
    ):
        fill(old, large)
        fill(new, small)

        def cost(tracker: SavingsTracker) -> float:
            return 1e6 / rate(in_threads(lambda: nullcontext(recorder(tracker)), 1, setup.seconds))

        return Result(
            work=f"a record after {large:,} records",
            peer=f"after {small:,}",
            unit="µs",
            **_turns(setup, lambda: cost(old), lambda: cost(new)),
            bound=Bound(1.1, at_least=False),
        )


def memory(setup: Setup) -> Result:
    """Memory does not grow with the number of records."""
    if not sys.platform.startswith("linux"):
        raise LeftOutError("a process's memory is read from /proc, which only Linux has")
    large, small = setup.count(1_000_000), setup.count(10_000)
    figures: list[tuple[float, float]] = []
    for _ in range(setup.repeat):
        spawn = multiprocessing.get_context("spawn")
        with setup.fresh() as directory, ProcessPoolExecutor(1, mp_context=spawn) as pool:
            figures.append(pool.submit(_memory_after, directory / _NAME, small, large).result())
    return Result(
        work=f"memory after {large:,} records",
        peer=f"after {small:,}, the same process",
        unit="MB",
        ours=[after_large for _, after_large in figures],
        theirs=[after_small for after_small, _ in figures],
        bound=Bound(5, at_least=False, is_difference=True),
    )


def opening(setup: Setup) -> Result:
    """Opening after a crash replays the journal."""
    records = setup.count(200_000)
    with setup.fresh() as directory:
        store = _made(directory / "crashed")
        make_crashed_store(store, records)
        lines = journal_lines(store)
        if len(lines) < records * 0.99:
            raise RuntimeError(f"the journal holds {len(lines)} of {records} records: it was cut short by a save")
        payload = directory / "lines.json"
        payload.write_bytes(b"".join(lines))

        def ours() -> float:
            with setup.fresh() as copy:
                shutil.copytree(store, copy, dirs_exist_ok=True)
                began = time.perf_counter()
                tracker = SavingsTracker(copy / _NAME)
                took = time.perf_counter() - began
                tracker.close()
                return took

        def decoded(decode: Callable[[bytes], Any]) -> float:
            began = time.perf_counter()
            for line in payload.read_bytes().splitlines():
                decode(line)
            return time.perf_counter() - began

        figures = _turns(setup, ours, lambda: decoded(json.loads))
        by_msgspec = statistics.median(decoded(msgspec.json.decode) for _ in range(setup.repeat))
    return Result(
        work=f"opening with {len(lines):,} records in the journal",
        peer="reading and decoding the same lines (json)",
        unit="s",
        **figures,
        bound=Bound(4, at_least=False),
        notes=[f"decoded by msgspec: {by_msgspec:.2g} s"],
    )


def scrape(setup: Setup) -> Result:
    """A scrape reads the store."""
    disable_created_metrics()  # type: ignore[no-untyped-call]
    with setup.fresh() as directory, SavingsTracker(directory / _NAME) as tracker:
        requests = [request(n, "openai", f"model-{n}", f"project-{n}") for n in range(200)]
        _check(tracker.record_many(SavingsRecord(**fields) for fields in requests))
        ours = CollectorRegistry()
        ours.register(SavingsCollector(tracker))
        plain = _plain_copy(ours)

        def cost(registry: CollectorRegistry) -> float:
            def scrape(_fields: Fields) -> None:
                generate_latest(registry)

            return 1e3 / rate(in_threads(lambda: nullcontext(scrape), 1, setup.seconds))

        figures = _turns(setup, lambda: cost(ours), lambda: cost(plain))
    return Result(
        work="a scrape, 200 models and 200 projects",
        peer="the same families in a plain registry",
        unit="ms",
        **figures,
        bound=Bound(2, at_least=False),
        notes=[f"{_samples(ours):,} samples against {_samples(plain):,}"],
    )


WORKS: Mapping[str, Callable[[Setup], Result]] = {
    "one-thread": one_thread,
    "one-thread-sqlite": one_thread_sqlite,
    "one-thread-headroom": one_thread_headroom,
    "threads": many_threads,
    "processes": processes,
    "batches": batches,
    "tracing": tracing,
    "latency": latency,
    "device-bytes": device_bytes,
    "after-a-million": after_a_million,
    "memory": memory,
    "opening": opening,
    "scrape": scrape,
}
"""Each work by the name that the command takes."""


def recorder(tracker: SavingsTracker) -> Recorder:
    """Records one request and insists that it is durable."""

    def record(fields: Fields) -> None:
        _check(tracker.record_request(**fields))

    return record


@contextmanager
def recorder_of_store(path: Path) -> Iterator[Recorder]:
    """A tracker of its own, on a store that others may share."""
    with SavingsTracker(path) as tracker:
        yield recorder(tracker)


def fill(tracker: SavingsTracker, records: int) -> None:
    """Record so many requests, a thousand at a time."""
    batch = [SavingsRecord(**fields) for fields in many(_BATCH)]
    for first in range(0, records, _BATCH):
        _check(tracker.record_many(batch[: records - first]))


def record_bytes(setup: Setup) -> int:
    """The bytes that one record takes in the journal, its share of what is left of a block included."""
    records = 500
    with setup.fresh() as directory, SavingsTracker(directory / _NAME, save_interval=_NEVER) as tracker:
        for fields in many(records):
            _check(tracker.record_request(**fields))
        used = sum(len(path.read_bytes().rstrip(b"\0")) for path in _segments(directory))
    return round(used / records)


def make_crashed_store(directory: Path, records: int) -> None:
    """A store as a kill leaves it, with every record in a journal of one segment, each in a commit of its own."""
    living = _made(directory / "living")
    with (
        mock.patch.object(journal, "SEGMENT_BYTES", 128 * 1024 * 1024),
        SavingsTracker(living / _NAME, save_interval=_NEVER) as tracker,
    ):
        record = recorder(tracker)
        for fields in many(records):
            record(fields)
        for path in living.iterdir():
            shutil.copy(path, directory)
    shutil.rmtree(living)


def journal_lines(directory: Path) -> list[bytes]:
    """The records in a store's journal, a line of JSON each, without the frames around them."""
    return [line for path in _segments(directory) for line in re.findall(rb'\{"[a-z_]+":[^\n]*\}\n', path.read_bytes())]


@contextmanager
def loop_ext4(setup: Setup) -> Iterator[tuple[Path, Callable[[], int]]]:
    """An ext4 of its own on a loop device, and how many bytes were written to it.

    The kernel's own timed commit of time stamps is put off, because it is not a record's.
    """
    if os.geteuid() != 0 or shutil.which("losetup") is None or shutil.which("mkfs.ext4") is None:
        raise LeftOutError("it mounts an ext4 on a loop device: that needs root, losetup and mkfs.ext4")
    with setup.fresh() as directory:
        image, mounted = directory / "image", _made(directory / "mounted")
        with image.open("wb") as file:
            file.truncate(512 * 1024 * 1024)
        _run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(image))
        device = _run("losetup", "--find", "--show", str(image)).strip()
        try:
            _run("mount", "-o", "noatime,commit=600", device, str(mounted))
            try:
                statistics_file = Path("/sys/block", Path(device).name, "stat")
                yield mounted, lambda: int(statistics_file.read_text().split()[6]) * _SECTOR_BYTES
            finally:
                _run("umount", str(mounted))
        finally:
            _run("losetup", "--detach", device)


class _Nowhere(SpanExporter):
    def export(self, _spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.SUCCESS


def _turns(setup: Setup, ours: Callable[[], float], peer: Callable[[], float]) -> dict[str, Any]:
    figures, theirs = setup.taking_turns(ours, peer)
    return {"ours": figures, "theirs": theirs}


def _tracker_rate(setup: Setup, *, threads: int, document: Path | None = None, **options: Any) -> float:
    with setup.fresh() as directory:
        if document is not None:
            shutil.copy(document, directory)
        with SavingsTracker(directory / _NAME, **options) as tracker:
            return rate(in_threads(lambda: nullcontext(recorder(tracker)), threads, setup.seconds))


def _sqlite_rate(setup: Setup, *, threads: int) -> float:
    with setup.fresh() as directory:
        make_database(directory / "peer.db")
        return rate(in_threads(partial(sqlite, directory / "peer.db"), threads, setup.seconds))


def _memory_after(path: Path, small: int, large: int) -> tuple[float, float]:
    """This process's memory in MB after so many records, and after so many."""
    with SavingsTracker(path) as tracker:
        record = recorder(tracker)

        def after(records: int) -> float:
            for fields in many(records // 10):
                record(fields)
            fill(tracker, records - records // 10)
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            return pages * os.sysconf("SC_PAGESIZE") / 1e6

        return after(small), after(large - small)


def _plain_copy(registry: CollectorRegistry) -> CollectorRegistry:
    """A registry of plain instruments with the same families, labels and values."""
    copy = CollectorRegistry()
    for family in registry.collect():
        samples = family.samples
        labels = sorted({name for sample in samples for name in sample.labels} - {"le"})
        if family.type == "counter":
            counter = Counter(family.name, family.documentation, labels, registry=copy)
            for sample in samples:
                (counter.labels(**sample.labels) if labels else counter).inc(sample.value)
        elif family.type == "histogram":
            bounds = sorted({float(sample.labels["le"]) for sample in samples if "le" in sample.labels})
            histogram = Histogram(family.name, family.documentation, labels, buckets=bounds, registry=copy)
            for sample in samples:
                if sample.name.endswith("_sum"):
                    (histogram.labels(**sample.labels) if labels else histogram).observe(sample.value)
        else:
            suffix = "_info" if family.type == "info" else ""
            gauge = Gauge(family.name + suffix, family.documentation, labels, registry=copy)
            for sample in samples:
                (gauge.labels(**sample.labels) if labels else gauge).set(sample.value)
    return copy


def _samples(registry: CollectorRegistry) -> int:
    return sum(not line.startswith(b"#") for line in generate_latest(registry).splitlines())


def _segments(directory: Path) -> list[Path]:
    return sorted(directory.glob(f"{_NAME}.journal.*"))


def _check(receipt: object) -> None:
    if not receipt:
        raise RuntimeError("a record of ours was not durable: look at the disk, and at the log above")


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True)
    return directory


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
