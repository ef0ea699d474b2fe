"""The benchmarks run, each peer does the same work as the store, and a missed target is reported."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import pytest

from benchmarks.__main__ import as_json, table
from benchmarks.measuring import Bound, LeftOutError, Moment, Opened, Result, Run, Setup, Store, cpu, rate
from benchmarks.ours import journal_lines, make_crashed_store
from benchmarks.peers import lmdb, postgresql, redis, schema, server, sqlite
from benchmarks.workload import REQUESTS, many
from benchmarks.works import WORKS
from savings_exporter import SavingsRecord, SavingsTracker
from tests.support.paths import ROOT
from tests.support.wait import WAIT_SECONDS

# The requests and the saved tokens under each table and name, and how many rows of records there are.
Kept = tuple[dict[tuple[str, ...], tuple[int, int]], int]


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that a server can reach when it runs as another user; pytest's own is closed to others."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o711)
        yield Path(directory)


@pytest.mark.slow
@pytest.mark.parametrize(
    "work",
    [
        *("one-thread", "one-thread-sqlite", "processes", "keyed-processes", "batches", "latency"),
        *("tracing-sampled", "tracing-all", "saving", "opening", "scrape"),
    ],
)
def test_a_work_runs(work: str, tmp_path: Path) -> None:
    result = WORKS[work](Setup(directory=tmp_path, repeat=2, scale=0.001))
    assert len(result.ours) == len(result.theirs) == 2
    assert min(*result.ours, *result.theirs) > 0
    assert not list(tmp_path.iterdir()), "it left something behind"


def test_cpu_against_a_fixed_figure(tmp_path: Path) -> None:
    result = WORKS["cpu-threads"](Setup(directory=tmp_path, repeat=2, scale=0.001))
    assert len(result.ours) == 2
    assert min(result.ours) > 0
    assert list(result.theirs) == [85.0]


def test_scrapes_have_as_many_samples(tmp_path: Path) -> None:
    (note,) = WORKS["scrape"](Setup(directory=tmp_path, repeat=1, scale=0.001)).notes
    ours, theirs = note.removesuffix(" samples").replace(" samples", "").split(" against ")
    assert ours == theirs


def test_rate_and_cpu_of_runs() -> None:
    runs = [
        Run([0.5, 0.5], Moment(time=10.0, cpu=2.0), Moment(time=11.0, cpu=2.6)),
        Run([0.5, 1.0], Moment(time=10.5, cpu=2.2), Moment(time=12.0, cpu=3.0)),
    ]
    assert (rate(runs), cpu(runs)) == (2.0, 0.25)


def _kept_by_sql(rows_of: Callable[[str], list[Any]]) -> Kept:
    totals: dict[tuple[str, ...], tuple[int, int]] = {}
    for name, keys in schema.TOTALS.items():
        for requests, tokens, *names in rows_of(f"SELECT {', '.join(['requests', 'tokens_saved', *keys])} FROM {name}"):
            key = (name, *names)
            totals[key] = (requests, tokens)
    ((records,),) = rows_of("SELECT count(*) FROM records")
    return totals, records


def _kept_by_sqlite(path: Path) -> Kept:
    with closing(sqlite3.connect(path)) as database:
        return _kept_by_sql(lambda query: database.execute(query).fetchall())


def _kept_by_postgresql(sockets: Path) -> Kept:
    with postgresql.connect(sockets) as connection:
        return _kept_by_sql(lambda query: connection.execute(query).fetchall())


def _kept_by_redis(socket: Path) -> Kept:
    with closing(import_module("redis").Redis(unix_socket_path=str(socket), decode_responses=True)) as connection:
        totals = {}
        for key in set(connection.scan_iter()) - {redis.RECORDS}:
            requests, tokens = connection.hmget(key, "requests", "tokens_saved")
            totals[tuple(key.split("\0"))] = (int(requests), int(tokens))
        return totals, connection.xlen(redis.RECORDS)


def _kept_by_lmdb(path: Path) -> Kept:
    with closing(lmdb.environment(path)) as environment:
        records, sums = environment.open_db(lmdb.RECORDS), environment.open_db(lmdb.TOTALS)
        with environment.begin() as transaction:
            totals = {
                tuple(bytes(key).decode().split("\0")): lmdb.sums_in(value) for key, value in transaction.cursor(sums)
            }
            return totals, transaction.stat(records)["entries"]


@pytest.mark.parametrize(
    ("store", "kept_by"),
    [
        (sqlite.sqlite, _kept_by_sqlite),
        (partial(sqlite.sqlite_batches, requests=REQUESTS), _kept_by_sqlite),
        (redis.redis, _kept_by_redis),
        (postgresql.postgresql, _kept_by_postgresql),
        (lmdb.lmdb, _kept_by_lmdb),
    ],
    ids=["sqlite", "sqlite-batches", "redis", "postgresql", "lmdb"],
)
def test_a_peer_keeps_our_totals(
    store: Store, kept_by: Callable[[Path], Kept], directory: Path, store_path: Path
) -> None:
    try:
        with store(directory) as opened:
            for _ in range(2):
                with opened() as record:
                    for fields in [{}] if isinstance(store, partial) else REQUESTS:
                        record(fields)
            totals, records = kept_by(_place_of(opened))
    except LeftOutError as error:
        pytest.skip(str(error))
    with SavingsTracker(store_path) as tracker:
        tracker.record_many(SavingsRecord(**fields) for fields in (*REQUESTS, *REQUESTS))
        ours = tracker.snapshot()
    expected: dict[tuple[str, ...], Any] = {
        ("lifetime",): ours.lifetime,
        **{("by_model", name): total for name, total in ours.by_model.items()},
        **{("by_project", name): total for name, total in ours.projects.items()},
        **{("by_provider_model", *pair): total for pair, total in ours.by_provider_model.items()},
    }
    assert totals == {name: (total.requests, total.tokens_saved) for name, total in expected.items()}
    assert records == 2 * len(REQUESTS)


def _place_of(opened: Opened) -> Path:
    """The file, socket or directory that each connection is made to."""
    return cast("Path", cast("partial[Any]", opened).args[0])


@pytest.mark.parametrize(
    ("client", "store", "said"),
    [
        ("redis", redis.redis, "redis-py is not installed (make bench"),
        ("psycopg", postgresql.postgresql, "psycopg is not installed (make bench"),
        ("lmdb", lmdb.lmdb, "py-lmdb is not installed (make bench"),
    ],
)
def test_a_missing_client_is_named(
    client: str, store: Store, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, client, None)
    with pytest.raises(LeftOutError) as raised, store(tmp_path):
        pass
    assert str(raised.value).startswith(said)


@pytest.mark.parametrize(
    ("version", "said"),
    [(redis.version, "apt-get install redis-server"), (postgresql.version, "apt-get install postgresql")],
)
def test_a_missing_server_is_named(
    version: Callable[[], str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(postgresql, "_DEBIAN", tmp_path)
    with pytest.raises(LeftOutError, match=said):
        version()


# Writes its process id, then waits to be ended.
_SERVER = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
_DEAF_SERVER = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {_SERVER}"


@pytest.mark.parametrize("program", [_SERVER, _DEAF_SERVER], ids=["stops", "must be killed"])
def test_a_server_is_stopped(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_STOP_SECONDS", 0.5)
    pid_file = tmp_path / "pid"

    def is_ready() -> bool:
        return pid_file.exists() and pid_file.read_text() != ""

    with (
        pytest.raises(KeyboardInterrupt),
        server.running([sys.executable, "-c", program, str(pid_file)], log=tmp_path / "log", is_ready=is_ready),
    ):
        raise KeyboardInterrupt
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_a_server_that_does_not_start(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no room')"]
    with (
        pytest.raises(RuntimeError, match="no room"),
        server.running(command, log=tmp_path / "log", is_ready=lambda: False),
    ):
        pass


def test_a_crashed_store_has_its_journal(tmp_path: Path) -> None:
    make_crashed_store(tmp_path, 50)
    lines = journal_lines(tmp_path)
    assert len(lines) in (49, 50), "the first record may be in the document"
    for line, fields in zip(lines, many(50)[-len(lines) :], strict=True):
        (record,) = json.loads(line).get("records", [json.loads(line)])
        assert record["project"] == fields["project"]


@pytest.mark.parametrize(
    ("bound", "figure", "met"),
    [
        (Bound(5, at_least=True), 4.0, False),
        (Bound(4, at_least=True), 4.0, True),
        (Bound(3, at_least=False), 4.0, False),
        (Bound(5, at_least=False), 4.0, True),
        (Bound(29, at_least=False, is_difference=True), 30.0, False),
        (Bound(30, at_least=False, is_difference=True), 30.0, True),
    ],
)
def test_medians_are_compared(bound: Bound, figure: float, met: bool) -> None:
    result = Result("ours", "theirs", "MB", ours=[40, 1, 90], theirs=[500, 10, 10], bound=bound, notes=["by the way"])
    shown = json.loads(json.dumps(as_json(result)))
    assert (shown["figure"], shown["met"], shown["runs"]["ours"]) == (figure, met, [40, 1, 90])
    _, _, row, _, note = table([result]).splitlines()
    assert row.endswith("| yes |" if met else "| no  |")
    assert "by the way" in note


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "there is no work 'nothing'"),
        (["--repeat", "0"], "--repeat must be at least 1"),
        (["--directory", "nowhere"], "nowhere is not a directory"),
    ],
)
def test_a_mistake_is_said_in_a_line(arguments: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=WAIT_SECONDS
    )
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]


def test_every_work_is_documented() -> None:
    described = (ROOT / "docs" / "benchmarks.md").read_text()
    assert [work for work in WORKS if f"| `{work}` |" not in described] == []
