"""Whole documents and journals: saving, opening, scraping."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import datetime, timedelta, timezone
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from benchmarks.measuring import Bound, Result, Setup, one_thread, rate
from benchmarks.ours import NAME, NEVER, check, document_format, journal_lines, make_crashed_store
from benchmarks.workload import Fields, request
from savings_exporter import SavingsRecord, SavingsTracker
from savings_exporter.sources.headroom import HeadroomLedger
from savings_exporter.sources.importing import Importing
from savings_exporter.telemetry.metrics import SavingsCollector

_LEDGER_BEGAN = datetime(2026, 1, 1, tzinfo=timezone.utc)
_LEDGER_MODELS = (("claude-sonnet-4-5", "anthropic"), ("gpt-4o", "openai"), ("gemini-2.5-pro", "google"))

_MANY_NAMES = [request(n, "openai", f"model-{n}", f"project-{n}") for n in range(200)]


def saving(setup: Setup) -> Result:
    """A save encodes the whole document, and competes with recording for the processor.

    The document is read before each measurement, as in a process that saves after another process did. Only the data
    that reading keeps is therefore in memory. History points that were read do not change any more.
    """
    points = setup.count(5_000)
    decode, encode = document_format()
    foreign = _document_with_history(setup, _hourly(points))
    document = encode(msgspec.structs.replace(decode(foreign), store="0123456789abcdef"))
    content = json.loads(document)
    if len(content["history"]) != points:
        raise RuntimeError(f"the document holds {len(content['history'])} of {points} points of history")
    first_time = _median_ms(setup, prepare=lambda: decode(foreign), work=encode)
    kept, whole_save = _save_ms(setup)
    return Result(
        work=f"encoding a document of 200 models, 200 projects, {points:,} points",
        peer="json.dumps of its content",
        unit="ms",
        **setup.taking_turns(
            lambda: _median_ms(setup, prepare=lambda: decode(document), work=encode),
            lambda: _median_ms(setup, prepare=lambda: content, work=json.dumps),
        ),
        bound=Bound(0.3, at_least=False),
        notes=[
            f"{len(document):,} bytes; the first time, every point anew: {first_time:.3g} ms",
            f"a whole save, with its syncs, of the {kept:,} points that a tracker keeps: {whole_save:.3g} ms",
        ],
    )


def opening(setup: Setup) -> Result:
    """Opening after a crash replays the journal."""
    records = setup.count(200_000)
    with setup.fresh() as directory:
        store, payload = directory / "crashed", directory / "lines.json"
        store.mkdir()
        make_crashed_store(store, records)
        lines = journal_lines(store)
        if len(lines) < records * 0.99:
            raise RuntimeError(f"the journal holds {len(lines)} of {records} records: it was cut short by a save")
        payload.write_bytes(b"\n".join(line.strip() for line in lines))

        def ours() -> float:
            with setup.fresh() as copy:
                shutil.copytree(store, copy, dirs_exist_ok=True)
                began = time.perf_counter()
                tracker = SavingsTracker(copy / NAME)
                took = time.perf_counter() - began
                tracker.close()
                return took

        def decoded(decode: Callable[[bytes], Any]) -> float:
            began = time.perf_counter()
            for line in payload.read_bytes().splitlines():
                decode(line)
            return time.perf_counter() - began

        figures = setup.taking_turns(ours, lambda: decoded(json.loads))
        by_msgspec = statistics.median(decoded(msgspec.json.decode) for _ in range(setup.repeat))
    return Result(
        work=f"opening with {len(lines):,} records in the journal",
        peer="reading and decoding the same lines (json)",
        unit="s",
        **figures,
        bound=Bound(4, at_least=False),
        notes=[f"decoded by msgspec: {by_msgspec:.2g} s"],
    )


def importing(setup: Setup) -> Result:
    """An import of Headroom's ledger decodes each line, and makes sums durable."""
    lines = setup.count(1_000_000)
    with setup.fresh() as directory:
        ledger = directory / "savings_events.jsonl"
        ledger.write_text("".join(map(_ledger_line, range(lines))))

        def ours() -> float:
            with setup.fresh() as store, SavingsTracker(store / NAME) as tracker:
                began = time.perf_counter()
                with tracker.importing() as importer:
                    for _step in Importing(importer, HeadroomLedger(str(ledger))).steps(is_complete=True):
                        pass
                took = time.perf_counter() - began
                if tracker.snapshot().lifetime.requests != lines:
                    raise RuntimeError("an import left out lines")
                return took

        def decoded() -> float:
            began = time.perf_counter()
            with ledger.open("rb") as file:
                for line in file:
                    msgspec.json.decode(line)
            return time.perf_counter() - began

        figures = setup.taking_turns(ours, decoded)
    return Result(
        work=f"importing {lines:,} lines of Headroom's ledger",
        peer="reading and decoding the same lines (msgspec)",
        unit="s",
        **figures,
        bound=Bound(2, at_least=False),
    )


def _ledger_line(number: int) -> str:
    """A line as Headroom 0.42 writes it for a request of its proxy, every 2.6 seconds."""
    moment = _LEDGER_BEGAN + timedelta(seconds=2.6 * number)
    saved, after = number * 7919 % 9000, 1000 + number * 31 % 20_000
    model, provider = _LEDGER_MODELS[number % len(_LEDGER_MODELS)]
    event = {
        "v": 2,
        "ts": moment.isoformat(timespec="microseconds"),
        "before": after + saved,
        "after": after,
        "saved": saved,
        "cost_usd": round(saved * 3e-6, 6),
        "model": model,
        "client": "claude-code",
        "source": "proxy",
        "pid": 4242,
        "new_input": 250,
        "deferred": 0,
        "saved_tool_schema": saved // 10,
        "cache": {"cr": 9000, "cw5": 200, "un": 50},
        "provider": provider,
        "cost_effective_usd": round(saved * 2e-6, 6),
        "basis": "exact",
    }
    return msgspec.json.encode(event).decode() + "\n"


def scrape(setup: Setup) -> Result:
    """A scrape reads the store."""
    disable_created_metrics()  # type: ignore[no-untyped-call]
    with setup.fresh() as directory, SavingsTracker(directory / NAME) as tracker:
        check(tracker.record_many(SavingsRecord(**fields) for fields in _MANY_NAMES))
        ours = CollectorRegistry()
        ours.register(SavingsCollector(tracker))
        plain = _plain_copy(ours)

        def cost(registry: CollectorRegistry) -> float:
            def scrape(_fields: Fields) -> None:
                generate_latest(registry)

            return 1e3 / rate(one_thread(lambda: nullcontext(scrape), setup.seconds))

        figures = setup.taking_turns(lambda: cost(ours), lambda: cost(plain))
        note = f"{_samples(ours):,} samples against {_samples(plain):,}"
    return Result(
        work="a scrape, 200 models and 200 projects",
        peer="the same families in a plain registry",
        unit="ms",
        **figures,
        bound=Bound(2, at_least=False),
        notes=[note],
    )


def _save_ms(setup: Setup) -> tuple[int, float]:
    """The maximum number of history points of a tracker, and the median time of a save after one more record."""
    with setup.fresh() as directory:
        path = directory / NAME
        path.write_bytes(_document_with_history(setup, _hourly_then_daily()))
        with SavingsTracker(path, save_interval=NEVER) as tracker:

            def one_more() -> SavingsTracker:
                check(tracker.record_request(**_MANY_NAMES[0]))
                return tracker

            took = _median_ms(setup, prepare=one_more, work=SavingsTracker.save)
            return len(json.loads(path.read_bytes())["history"]), took


def _hourly(points: int) -> list[datetime]:
    """The ends of the last ``hours`` hours until now, the oldest first."""
    now = datetime.now(timezone.utc).replace(microsecond=0)
    return [now - timedelta(hours=number) for number in reversed(range(points))]


def _hourly_then_daily() -> list[datetime]:
    """The times of the points that a tracker keeps: every hour of two weeks, and every day of the two years before."""
    hours = _hourly(14 * 24)
    return [*(hours[0] - timedelta(days=number) for number in reversed(range(1, 2 * 365))), *hours]


def _document_with_history(setup: Setup, moments: Sequence[datetime]) -> bytes:
    """A document in Headroom's format, with a history point at each moment."""
    with setup.fresh() as directory:
        with SavingsTracker(directory / NAME) as tracker:
            check(tracker.record_many(SavingsRecord(**fields) for fields in _MANY_NAMES))
        content = json.loads((directory / NAME).read_bytes())
    last = content["history"][-1]
    history = [
        {"timestamp": moment.isoformat().replace("+00:00", "Z"), **_share(last, number / len(moments))}
        for number, moment in enumerate(moments, 1)
    ]
    theirs = {key: content[key] for key in ("schema_version", "lifetime", "projects", "by_model")}
    return json.dumps({**theirs, "history": history}).encode()


def _share(point: dict[str, Any], share: float) -> dict[str, Any]:
    """A fraction of a point's totals; integers stay integers."""
    return {key: type(value)(value * share) for key, value in point.items() if isinstance(value, (int, float))}


def _median_ms(setup: Setup, *, prepare: Callable[[], Any], work: Callable[[Any], object]) -> float:
    """The median time of a function, in milliseconds. Its argument is prepared again before each measurement."""
    took: list[float] = []
    ends_at = time.perf_counter() + setup.seconds
    while not took or time.perf_counter() < ends_at:
        prepared = prepare()
        began = time.perf_counter()
        work(prepared)
        took.append(time.perf_counter() - began)
    return 1e3 * statistics.median(took)


def _plain_copy(registry: CollectorRegistry) -> CollectorRegistry:
    """A registry of plain instruments with the same families, labels and values."""
    copy = CollectorRegistry()
    for family in registry.collect():
        samples = family.samples
        if not samples:
            # A family whose values are unknown. A plain instrument without labels would export zero.
            continue
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
