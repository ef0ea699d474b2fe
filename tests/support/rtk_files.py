"""A program that writes a database as RTK 1.1.0 does."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import datetime, timedelta, timezone
from pathlib import Path

_SCHEMA = """
CREATE TABLE commands (id INTEGER PRIMARY KEY, timestamp TEXT NOT NULL, original_cmd TEXT NOT NULL,
  rtk_cmd TEXT NOT NULL, input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, saved_tokens INTEGER NOT NULL,
  savings_pct REAL NOT NULL, exec_time_ms INTEGER DEFAULT 0, project_path TEXT DEFAULT '');
"""
INSERT = (
    "INSERT INTO commands (timestamp, original_cmd, rtk_cmd, input_tokens, output_tokens, saved_tokens, savings_pct,"
    " project_path) VALUES (?, 'ls', 'rtk ls', ?, ?, ?, 0.0, ?)"
)


class Rtk:
    """An RTK that writes a database. ``saved`` is what it has saved in truth."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now = datetime(2026, 11, 1, tzinfo=timezone.utc)
        self.saved = 0
        with closing(sqlite3.connect(path)) as db:
            db.executescript(_SCHEMA)
            db.execute("PRAGMA journal_mode=WAL")

    def command(self, read: int, written: int, project: str = "/home/ana/billing-api") -> None:
        self.now += timedelta(seconds=1)
        self.saved += max(read - written, 0)
        stamp = self.now.strftime("%Y-%m-%dT%H:%M:%S.%f") + "123+00:00"
        self.change(INSERT, stamp, read, written, read - written, project)

    def change(self, statement: str, *values: object) -> None:
        with closing(sqlite3.connect(self.path)) as db:
            db.execute(statement, values)
            db.commit()
