"""Durable records per second, and the latency of a record."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from benchmarks.measuring import Bound, Result, Run, Setup, Store, Workers, one_thread, p99, processes, rate, threads
from benchmarks.ours import BATCH, NAME, batch_tracker, record_bytes, shared_tracker, tracker_each
from benchmarks.peers.bare_file import bare_file
from benchmarks.peers.headroom import fill_headroom, headroom_rate
from benchmarks.peers.lmdb import lmdb
from benchmarks.peers.postgresql import postgresql
from benchmarks.peers.redis import redis
from benchmarks.peers.sqlite import sqlite, sqlite_batches
from benchmarks.workload import many
from savings_exporter import SavingsRecord

_AHEAD = 1.0
_SERVERS: Mapping[str, tuple[str, Store]] = {
    "redis": ("Redis, a script a record, appendfsync always", redis),
    "postgresql": ("PostgreSQL, a transaction a record, synchronous_commit on", postgresql),
    "lmdb": ("LMDB, a transaction a record, sync on", lmdb),
}


def one_thread_bare(setup: Setup) -> Result:
    """The minimum cost of a durable record on a disk."""
    size = record_bytes(setup)
    bare = partial(bare_file, size=size)
    return Result(
        work="one thread, each record durable",
        peer="pwrite + fdatasync of the same bytes",
        unit="records/s",
        **setup.taking_turns(
            lambda: rate_of(setup, shared_tracker, one_thread), lambda: rate_of(setup, bare, one_thread)
        ),
        bound=Bound(0.85, at_least=True),
        notes=[f"{size} bytes a record"],
    )


def bare_latency(setup: Setup) -> Result:
    """The 99th percentile of the latency of a record."""
    bare = partial(bare_file, size=record_bytes(setup))
    return Result(
        work="p99 of a record, 8 threads",
        peer="p99 of pwrite + fdatasync, one thread",
        unit="µs",
        **setup.taking_turns(
            lambda: 1e6 * p99(runs_of(setup, shared_tracker, threads(8))),
            lambda: 1e6 * p99(runs_of(setup, bare, one_thread)),
        ),
        bound=Bound(8, at_least=False),
    )


def headroom_rates(setup: Setup) -> Result:
    """Headroom saves its whole history for each record."""
    points = setup.count(5_000)
    with setup.fresh() as prefilled:
        fill_headroom(prefilled / NAME, points)

        def ours() -> float:
            with setup.fresh() as directory:
                shutil.copy(prefilled / NAME, directory)
                with shared_tracker(directory) as opened:
                    return rate(one_thread(opened, setup.seconds))

        def peer() -> float:
            with setup.fresh() as directory:
                return headroom_rate(Path(shutil.copy(prefilled / NAME, directory)), setup.seconds)

        return Result(
            work=f"one thread, each record durable, {points:,} points of history",
            peer="Headroom, which saves every record",
            unit="records/s",
            **setup.taking_turns(ours, peer),
            bound=Bound(250, at_least=True),
        )


def batches(setup: Setup) -> Result:
    """A batch is committed completely or not at all."""
    requests = many(BATCH)
    ours = partial(batch_tracker, records=[SavingsRecord(**fields) for fields in requests])
    peer = partial(sqlite_batches, requests=requests)
    return Result(
        work=f"record_many of {BATCH:,}",
        peer=f"SQLite, a transaction of {BATCH:,}",
        unit="records/s",
        **setup.taking_turns(
            lambda: BATCH * rate_of(setup, ours, one_thread), lambda: BATCH * rate_of(setup, peer, one_thread)
        ),
        bound=Bound(1.0, at_least=True),
    )


def rate_of(setup: Setup, store: Store, workers: Workers) -> float:
    """Records per second, with a fresh store."""
    return rate(runs_of(setup, store, workers))


def runs_of(setup: Setup, store: Store, workers: Workers) -> list[Run]:
    """The runs of threads or processes on a fresh store."""
    with setup.fresh() as directory, store(directory) as opened:
        return workers(opened, setup.seconds)


def _compared(
    work: str, peer: str, ours: tuple[Store, Workers], theirs: tuple[Store, Workers], at_least: float
) -> Callable[[Setup], Result]:
    """A work that compares the rates of two stores, each with its own threads or processes."""

    def measured(setup: Setup) -> Result:
        return Result(
            work=work,
            peer=peer,
            unit="records/s",
            **setup.taking_turns(lambda: rate_of(setup, *ours), lambda: rate_of(setup, *theirs)),
            bound=Bound(at_least, at_least=True),
        )

    return measured


def _one_thread_against(peer: str, store: Store, at_least: float) -> Callable[[Setup], Result]:
    return _compared(
        "one thread, each record durable", peer, (shared_tracker, one_thread), (store, one_thread), at_least
    )


def _processes_against(peer: str, store: Store, at_least: float) -> Callable[[Setup], Result]:
    four = processes(4)
    return _compared("4 processes of one thread, one store", peer, (tracker_each, four), (store, four), at_least)


_keyed = partial(tracker_each, keyed=True)

RATES: Mapping[str, Callable[[Setup], Result]] = {
    "one-thread": one_thread_bare,
    "one-thread-sqlite": _one_thread_against("SQLite, a transaction a record", sqlite, 1.25),
    **{f"one-thread-{name}": _one_thread_against(*peer, _AHEAD) for name, peer in _SERVERS.items()},
    "threads": _compared(
        "64 threads, one tracker",
        "SQLite, 64 threads, a connection each",
        (shared_tracker, threads(64)),
        (sqlite, threads(64)),
        8,
    ),
    "processes": _processes_against("SQLite, 4 processes", sqlite, 2.5),
    **{f"processes-{name}": _processes_against(*peer, _AHEAD) for name, peer in _SERVERS.items()},
    "many-processes": _compared(
        "16 processes of one thread, one store",
        "the same with 4",
        (tracker_each, processes(16)),
        (tracker_each, processes(4)),
        0.9,
    ),
    "keyed-processes": _compared(
        "4 processes, every record with a key",
        "the same with 1",
        (_keyed, processes(4)),
        (_keyed, processes(1)),
        0.9,
    ),
    "batches": batches,
}
"""The works that compare rates, by name."""
