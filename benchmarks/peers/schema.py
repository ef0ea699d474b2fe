"""The data that every peer stores for a record: a row, and the same totals as the tracker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone

from benchmarks.workload import Fields

NAMES = ("model", "provider", "agent", "project")
TOKENS = (
    *("input_tokens", "tokens_saved", "tool_search_saved", "output_tokens_saved", "output_tokens"),
    *("cache_read_tokens", "cache_write_tokens", "uncached_input_tokens"),
)
USD = ("savings_usd", "input_cost_usd")
SUMS = (*TOKENS, *USD)
FIELDS = (*NAMES, *SUMS, "timestamp")

TOTALS: Mapping[str, Sequence[str]] = {
    "by_model": ("model",),
    "by_project": ("project",),
    "by_provider_model": ("provider", "model"),
    "lifetime": (),
}
"""Each table of totals and the fields that are its key.

Every transaction updates them in this order, so that two of them cannot deadlock. The one row of ``lifetime``, which
every transaction locks, comes last, so that it is locked for the shortest time.
"""


def stamped(fields: Fields) -> Fields:
    """The request with its arrival time, which the tracker also adds."""
    return {**fields, "timestamp": datetime.now(timezone.utc).isoformat()}


def tables(row_id: str) -> list[str]:
    """The SQL statements that create the tables; ``row_id`` declares the key of a record's row."""
    sums = ", ".join([*(f"{name} BIGINT" for name in TOKENS), *(f"{name} DOUBLE PRECISION" for name in USD)])
    names = ", ".join(f"{name} TEXT" for name in NAMES)
    return [
        f"CREATE TABLE records (id {row_id}, {names}, {sums}, timestamp TEXT)",
        *(_table_of_totals(table, sums) for table in TOTALS),
    ]


def insert(parameter: str) -> str:
    """The statement that inserts a record's row; ``parameter`` is the pattern of a parameter's name (``:{}``)."""
    return f"INSERT INTO records ({', '.join(FIELDS)}) VALUES ({', '.join(map(parameter.format, FIELDS))})"


def upserts(parameter: str, greatest: str) -> list[str]:
    """The statements that add a record to the totals; ``greatest`` is the function that gives the larger of two."""
    return [_upsert(table, parameter, greatest) for table in TOTALS]


def _table_of_totals(table: str, sums: str) -> str:
    keys = [f"{name} TEXT" for name in TOTALS[table]] or ["id INTEGER"]
    primary_key = f"PRIMARY KEY ({', '.join(_keys(table))})"
    return f"CREATE TABLE {table} ({', '.join(keys)}, requests BIGINT, {sums}, last_activity_at TEXT, {primary_key})"


def _upsert(table: str, parameter: str, greatest: str) -> str:
    keys = _keys(table)
    columns = [*keys, "requests", *SUMS, "last_activity_at"]
    values = [*(map(parameter.format, TOTALS[table]) if TOTALS[table] else ["1"]), "1"]
    values += map(parameter.format, (*SUMS, "timestamp"))
    updates = [f"{name} = {table}.{name} + excluded.{name}" for name in ("requests", *SUMS)]
    updates.append(f"last_activity_at = {greatest}({table}.last_activity_at, excluded.last_activity_at)")
    return (
        f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join(values)}) "
        f"ON CONFLICT ({', '.join(keys)}) DO UPDATE SET {', '.join(updates)}"
    )


def _keys(table: str) -> Sequence[str]:
    """The columns of the primary key; a table with one row has an ``id`` that is always 1."""
    return TOTALS[table] or ("id",)
