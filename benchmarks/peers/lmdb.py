"""LMDB with its defaults (``sync`` and ``metasync`` on), through py-lmdb: one write transaction per record."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from importlib import import_module
from operator import itemgetter
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.measuring import LeftOutError, Opened, Recorder
from benchmarks.peers import schema
from benchmarks.workload import Fields

RECORDS, TOTALS = b"records", b"totals"

# An upper bound of the file's size, not its actual size.
_MAP_BYTES = 16 * 1024**3

_SUMS = struct.Struct(f"<{1 + len(schema.TOKENS)}q{len(schema.USD)}d32s")
_KEY = struct.Struct(">Q")

_sums_of = itemgetter(*schema.SUMS)
_row = msgspec.msgpack.Encoder().encode


@contextmanager
def lmdb(directory: Path) -> Iterator[Opened]:
    """An environment. Each process opens it for itself, and can open it only once."""
    _client()
    yield partial(_opened, directory / "environment")


def environment(path: Path) -> Any:
    """The environment, opened."""
    return _client().open(str(path), map_size=_MAP_BYTES, max_dbs=2)


def key_of(table: str, fields: Fields) -> bytes:
    """The key of the totals that include a request."""
    return "\0".join([table, *(fields[name] for name in schema.TOTALS[table])]).encode()


def sums_in(value: bytes) -> tuple[int, int]:
    """The numbers of requests and of saved tokens in a value of the totals."""
    requests, *sums = _SUMS.unpack(value)
    return requests, sums[schema.SUMS.index("tokens_saved")]


def version() -> str:
    """LMDB's version."""
    return ".".join(map(str, _client().version()))


def _client() -> Any:
    try:
        return import_module("lmdb")
    except ImportError:
        raise LeftOutError("py-lmdb is not installed (make bench installs it)") from None


@contextmanager
def _opened(path: Path) -> Iterator[Recorder]:
    with closing(environment(path)) as opened:
        records, totals = opened.open_db(RECORDS), opened.open_db(TOTALS)

        def record(fields: Fields) -> None:
            row = schema.stamped(fields)
            part = (1, *_sums_of(row), row["timestamp"].encode())
            with opened.begin(write=True) as transaction:
                cursor = transaction.cursor(records)
                number = _KEY.unpack(cursor.key())[0] + 1 if cursor.last() else 1
                cursor.put(_KEY.pack(number), _row(row), append=True)
                for table in schema.TOTALS:
                    key = key_of(table, row)
                    before = transaction.get(key, db=totals)
                    transaction.put(key, _SUMS.pack(*(_added(before, part) if before else part)), db=totals)

        yield record


def _added(before: bytes, part: tuple[Any, ...]) -> list[Any]:
    *sums, newest = _SUMS.unpack(before)
    return [*map(sum, zip(sums, part, strict=False)), max(newest.rstrip(b"\0"), part[-1])]
