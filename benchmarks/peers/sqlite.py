"""SQLite, from the standard library: WAL mode, ``synchronous=FULL``, one transaction per record."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

from benchmarks.measuring import Opened, Recorder
from benchmarks.peers import schema
from benchmarks.workload import Fields

DATABASE = "peer.db"

_BUSY_SECONDS = 60.0
_STATEMENTS = [schema.insert(":{}"), *schema.upserts(":{}", "max")]


@contextmanager
def sqlite(directory: Path) -> Iterator[Opened]:
    """A database; each connection commits each request in a separate transaction."""
    _make_database(directory / DATABASE)
    yield partial(_connected, directory / DATABASE)


@contextmanager
def sqlite_batches(directory: Path, requests: Sequence[Fields]) -> Iterator[Opened]:
    """A database; each call of the recorder commits all given requests in one transaction."""
    _make_database(directory / DATABASE)
    yield partial(_connected_for_batches, directory / DATABASE, requests)


def version() -> str:
    """SQLite's version."""
    return sqlite3.sqlite_version


def _make_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode=WAL")
        for statement in schema.tables("INTEGER PRIMARY KEY"):
            database.execute(statement)


@contextmanager
def _connected(path: Path) -> Iterator[Recorder]:
    with _transactions(path) as commit:
        yield lambda fields: commit([schema.stamped(fields)])


@contextmanager
def _connected_for_batches(path: Path, requests: Sequence[Fields]) -> Iterator[Recorder]:
    rows = [schema.stamped(fields) for fields in requests]
    with _transactions(path) as commit:
        yield lambda _fields: commit(rows)


@contextmanager
def _transactions(path: Path) -> Iterator[Callable[[Sequence[Fields]], None]]:
    with closing(sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)) as database:
        database.execute("PRAGMA synchronous=FULL")

        def commit(rows: Sequence[Fields]) -> None:
            # A transaction that takes the write lock after its beginning fails if another one took it first.
            database.execute("BEGIN IMMEDIATE")
            for statement in _STATEMENTS:
                if len(rows) == 1:
                    database.execute(statement, rows[0])
                else:
                    database.executemany(statement, rows)
            database.execute("COMMIT")

        yield commit
