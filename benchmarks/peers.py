"""What we are measured against: a bare file, SQLite, Headroom."""

from __future__ import annotations

import itertools
import json
import os
import sqlite3
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.measuring import LeftOutError, Recorder
from benchmarks.workload import REQUESTS, Fields

_BARE_FILE_BYTES = 4 * 1024 * 1024

_BUSY_SECONDS = 60.0

_TOKENS = (
    *("input_tokens", "tokens_saved", "tool_search_saved", "output_tokens_saved", "output_tokens"),
    *("cache_read_tokens", "cache_write_tokens", "uncached_input_tokens"),
)
_USD = ("savings_usd", "input_cost_usd")
_NAMES = ("model", "provider", "agent", "project")
_SUMS = (*_TOKENS, *_USD)
_FIELDS = (*_NAMES, *_SUMS, "timestamp")

# Each table of totals, and the values of its key.
_TOTALS: Mapping[str, Mapping[str, str]] = {
    "lifetime": {"id": "1"},
    "by_model": {"model": ":model"},
    "by_project": {"project": ":project"},
    "by_provider_model": {"provider": ":provider", "model": ":model"},
}

_HEADROOM_PYTHON = Path(__file__).parent.parent / ".venv-headroom" / "bin" / "python"

_HEADROOM_FILL = """
import json, sys
from datetime import datetime, timedelta, timezone
from headroom.proxy.savings_tracker import SavingsTracker
path, points, requests = json.load(sys.stdin)
tracker = SavingsTracker(path=path, save_flush_every=points, max_history_age_days=0)
now = datetime.now(timezone.utc)
for number in range(points):
    tracker.record_request(
        **requests[number % len(requests)], timestamp=(now - timedelta(hours=points - number)).isoformat()
    )
"""

_HEADROOM_RECORD = """
import itertools, json, sys, time
from headroom.proxy.savings_tracker import SavingsTracker
path, seconds, requests = json.load(sys.stdin)
tracker = SavingsTracker(path=path)
def record(seconds):
    began = time.perf_counter()
    for number in itertools.count(1):
        tracker.record_request(**requests[number % len(requests)])
        took = time.perf_counter() - began
        if took >= seconds:
            return number / took
record(seconds / 10)
json.dump(record(seconds), sys.stdout)
"""


@contextmanager
def bare_file(path: Path, size: int) -> Iterator[Recorder]:
    """The least that a durable record of ``size`` bytes takes: ``pwrite`` and ``fdatasync`` into a file of zeros.

    After its end the file is written from its beginning again, as a new segment would be.
    """
    path.write_bytes(bytes(_BARE_FILE_BYTES))
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
        data = b"x" * size
        offsets = itertools.cycle(range(0, _BARE_FILE_BYTES - size + 1, size))

        def record(_fields: Fields) -> None:
            os.pwrite(descriptor, data, next(offsets))
            os.fdatasync(descriptor)

        yield record
    finally:
        os.close(descriptor)


def make_database(path: Path) -> None:
    """A database in WAL mode: a row a record, and the totals that we keep."""
    sums = ", ".join([*(f"{name} INTEGER" for name in _TOKENS), *(f"{name} REAL" for name in _USD)])
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode=WAL")
        names = ", ".join(f"{name} TEXT" for name in _NAMES)
        database.execute(f"CREATE TABLE records (id INTEGER PRIMARY KEY, {names}, {sums}, timestamp TEXT)")
        for table, keys in _TOTALS.items():
            names = ", ".join(f"{key} INTEGER" if key == "id" else f"{key} TEXT" for key in keys)
            database.execute(
                f"CREATE TABLE {table} ({names}, requests INTEGER, {sums}, last_activity_at TEXT, "
                f"PRIMARY KEY ({', '.join(keys)}))"
            )


@contextmanager
def sqlite(path: Path) -> Iterator[Recorder]:
    """A connection of its own that commits each request in one transaction."""
    with _transactions(path) as commit:
        yield lambda fields: commit([_stamped(fields)])


@contextmanager
def sqlite_many(path: Path, requests: Sequence[Fields]) -> Iterator[Recorder]:
    """A connection that commits all these requests in one transaction, each time it is called."""
    rows = [_stamped(fields) for fields in requests]
    with _transactions(path) as commit:
        yield lambda _fields: commit(rows)


@contextmanager
def _transactions(path: Path) -> Iterator[Callable[[Sequence[Fields]], None]]:
    statements = [_INSERT, *(_upsert(table, keys) for table, keys in _TOTALS.items())]
    with closing(sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)) as database:
        database.execute("PRAGMA synchronous=FULL")

        def commit(rows: Sequence[Fields]) -> None:
            # At once a writer: a transaction that becomes one later fails when another was faster.
            database.execute("BEGIN IMMEDIATE")
            for statement in statements:
                if len(rows) == 1:
                    database.execute(statement, rows[0])
                else:
                    database.executemany(statement, rows)
            database.execute("COMMIT")

        yield commit


_INSERT = f"INSERT INTO records ({', '.join(_FIELDS)}) VALUES ({', '.join(f':{name}' for name in _FIELDS)})"


def _stamped(fields: Fields) -> Fields:
    return {**fields, "timestamp": datetime.now(timezone.utc).isoformat()}


def _upsert(table: str, keys: Mapping[str, str]) -> str:
    columns = ", ".join([*keys, "requests", *_SUMS, "last_activity_at"])
    values = ", ".join([*keys.values(), "1", *(f":{name}" for name in _SUMS), ":timestamp"])
    sums = ", ".join(f"{name} = {name} + excluded.{name}" for name in ("requests", *_SUMS))
    newest = "last_activity_at = max(last_activity_at, excluded.last_activity_at)"
    return f"INSERT INTO {table} ({columns}) VALUES ({values}) ON CONFLICT DO UPDATE SET {sums}, {newest}"


def fill_headroom(path: Path, points: int) -> None:
    """Let Headroom itself write a document with so many points of history."""
    _headroom(_HEADROOM_FILL, [str(path), points, _headroom_requests()])


def headroom_rate(path: Path, seconds: float) -> float:
    """Records a second of Headroom's tracker on this document, each saved with its fsyncs, after a warm-up."""
    return float(json.loads(_headroom(_HEADROOM_RECORD, [str(path), seconds, _headroom_requests()])))


def _headroom_requests() -> list[Fields]:
    """The same requests; Headroom prices them itself."""
    return [{name: value for name, value in fields.items() if name not in _USD} for fields in REQUESTS]


def _headroom(script: str, arguments: list[Any]) -> str:
    if not _HEADROOM_PYTHON.exists():
        raise LeftOutError(f"headroom-ai is not installed in {_HEADROOM_PYTHON.parent.parent.name} (make headroom)")
    return subprocess.run(
        [str(_HEADROOM_PYTHON), "-c", script],
        input=json.dumps(arguments),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "HEADROOM_TELEMETRY": "off", "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
    ).stdout
