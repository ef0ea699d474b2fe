"""RTK: its SQLite history of commands, of which it keeps 90 days.

RTK writes its database in WAL mode. A read-only connection needs the file ``-shm`` beside it, which exists while RTK
runs, and this program must not create files in RTK's directory. So there are three ways to read:

- with ``-shm``: a read-only connection, which RTK's locks and ours keep consistent;
- without ``-shm`` and without content in ``-wal``: SQLite's mode ``immutable``, which looks for no other file. What was
  read counts only if the database had been left alone for a while, and did not change in the meantime;
- without ``-shm``, and with content in ``-wal``, as a copied or restored database can be: a copy of both files in a
  temporary directory.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import datetime, timedelta, timezone
from typing import Any, NamedTuple
from urllib.parse import quote

import msgspec

from savings_exporter.model.cursors import OVERSIZED
from savings_exporter.model.names import UNKNOWN
from savings_exporter.model.record import MAX_TOKENS, SavingsRecord, parse_timestamp
from savings_exporter.sources.building import StepBuilder
from savings_exporter.sources.source import Progress, SourceError, Step
from savings_exporter.storage.filesystem import LOCAL, Identity

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KIND = "rtk"

MOST_INPUT_TOKENS = 7_500
"""A command with more input tokens does not count, as in ``rtk gain`` since RTK 1.1."""

_ROWS_AT_ONCE = 2000
_ATTEMPTS = 4
_PATIENCE_SECONDS = 1.0
_PAUSE_SECONDS = 0.05
# The time of a change has the resolution of the kernel's clock. Two changes at the same time cannot be told apart.
_LEFT_ALONE_SECONDS = 0.02
_DIGEST_BYTES = 12
_CLOCK_DIFFERENCE = timedelta(days=1)
_LONGEST_CONFIG_BYTES = 1024 * 1024

_COLUMNS = "id, timestamp, original_cmd, rtk_cmd, input_tokens, output_tokens, saved_tokens, project_path"
_AFTER = f"SELECT {_COLUMNS} FROM commands WHERE id > ? ORDER BY id LIMIT {_ROWS_AT_ONCE}"
_AT = f"SELECT {_COLUMNS} FROM commands WHERE id = ?"
_LAST = "SELECT max(id) FROM commands"

# Python 3.10 reads at most six digits of a second. RTK writes up to nine.
_FRACTION = re.compile(r"(\.\d{6})\d+")


class _Row(NamedTuple):
    """A row of ``commands``. SQLite stores values of any type in any column."""

    id: int
    timestamp: Any
    original_cmd: Any
    rtk_cmd: Any
    input_tokens: Any
    output_tokens: Any
    saved_tokens: Any
    project_path: Any

    @property
    def digest(self) -> str:
        return hashlib.blake2b(repr(self).encode(errors="replace"), digest_size=_DIGEST_BYTES).hexdigest()

    @property
    def stamp(self) -> str:
        """The time in a form that can be compared; empty without one."""
        moment = parse_timestamp(_FRACTION.sub(r"\1", self.timestamp)) if isinstance(self.timestamp, str) else None
        return moment.isoformat(timespec="microseconds") if moment is not None else ""


class _Place(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where reading continues.

    Attributes:
        id, digest: the last row that was read, and its content. Ids begin again at 1 after a reset.
        newest: the time of the newest row that was read. If the last row is no longer there, later rows are new.
    """

    id: int = 0
    digest: str = ""
    newest: str = ""


class _ChangedError(Exception):
    """The database was changed while it was read."""


class RtkDatabase:
    """The history of one RTK.

    Args:
        path: the database.
        most_input_tokens: commands with more input tokens are kept out.
    """

    kind = KIND

    def __init__(self, path: str, most_input_tokens: int = MOST_INPUT_TOKENS) -> None:
        self.path = path
        self.name = f"rtk:{os.path.realpath(path)}"
        self._most_input_tokens = most_input_tokens
        # The files and the place at which nothing was new.
        self._seen: tuple[tuple[Identity | None, ...], _Place] | None = None

    def steps(self, state: Mapping[str, Any] | None, *, is_complete: bool) -> Iterator[Step]:
        """The commands that follow a state. Whether the file is complete makes no difference.

        Raises:
            SourceError: the database is missing, damaged or locked.
        """
        del is_complete
        while True:
            seen = self._files(), _place(state)
            if state is not None and seen == self._seen:
                return
            rows, place, total = self._read(seen[1])
            if not rows:
                self._seen = seen
                return
            builder = StepBuilder(state)
            for row in rows:
                if row.id > place.id or row.stamp > place.newest:
                    self._add(builder, row)
            # A row far in the future comes from a wrong clock, and must not hide later ones after a reset.
            limit = (datetime.now(timezone.utc) + _CLOCK_DIFFERENCE).isoformat(timespec="microseconds")
            newest = max([place.newest, *(row.stamp for row in rows if row.stamp <= limit)])
            following = _Place(rows[-1].id, rows[-1].digest, newest)
            step = builder.build({"place": msgspec.to_builtins(following)}, Progress(rows[-1].id, total))
            yield step
            state = step.state

    def _read(self, place: _Place) -> tuple[Sequence[_Row], _Place, int]:
        """The next rows, the place that they follow, and the last id."""
        for attempt in range(_ATTEMPTS, 0, -1):
            try:
                with self._opened() as connection:
                    connection.execute("BEGIN")
                    (last,) = connection.execute(_LAST).fetchone()
                    found = connection.execute(_AT, (place.id,)).fetchone()
                    if place.id and (found is None or _Row(*found).digest != place.digest):
                        # RTK was reset, or has removed the row because of its age. No id says what is new.
                        place = _Place(sys.maxsize, newest=place.newest)
                    return self._rows(connection, place), place, last or 0
            except (sqlite3.Error, OSError, _ChangedError) as error:
                if attempt == 1:
                    raise self._problem(error) from None
                time.sleep(_PAUSE_SECONDS)
        raise AssertionError("the last attempt returns or raises")

    def _rows(self, connection: sqlite3.Connection, place: _Place) -> Sequence[_Row]:
        if place.id < sys.maxsize:
            return [_Row(*row) for row in connection.execute(_AFTER, (place.id,))]
        after = 0
        while rows := [_Row(*row) for row in connection.execute(_AFTER, (after,))]:
            if any(row.stamp > place.newest for row in rows):
                return rows
            after = rows[-1].id
        return []

    def _add(self, builder: StepBuilder, row: _Row) -> None:
        place = f"row {row.id}"
        tokens = (row.input_tokens, row.output_tokens, row.saved_tokens)
        if not all(isinstance(number, int) for number in tokens) or not 0 <= row.input_tokens <= MAX_TOKENS:
            builder.reject(place, "has no numbers of tokens")
            return
        if not row.stamp:
            builder.reject(place, f"has no time: {str(row.timestamp)[:40]!r}")
            return
        try:
            record = SavingsRecord(
                model=UNKNOWN,
                tokens_saved=max(row.saved_tokens, 0),
                input_tokens=row.output_tokens,
                project=_project(row.project_path),
                source=KIND,
                timestamp=parse_timestamp(row.stamp),
            )
        except (TypeError, ValueError) as error:
            builder.reject(place, str(error))
            return
        reason = OVERSIZED if row.input_tokens > self._most_input_tokens else ""
        builder.add(record, place, before=row.input_tokens, reason=reason)

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        """A connection that changes no file of RTK. Raises if the database has changed until the end."""
        before = self._files()
        if before[0] is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.path)
        database, wal, shm, journal = before
        if journal is not None and journal.size:
            raise _ChangedError
        if shm is not None:
            with closing(_connected(self.path, "mode=ro")) as connection:
                yield connection
            return
        if wal is not None and wal.size:
            with tempfile.TemporaryDirectory() as directory:
                copy = os.path.join(directory, "history.db")
                shutil.copyfile(self.path, copy)
                shutil.copyfile(f"{self.path}-wal", f"{copy}-wal")
                self._refuse_change(before)
                with closing(_connected(copy, "mode=rw")) as connection:
                    yield connection
            return
        if database is not None and time.time() - database.modified_ns / 1e9 < _LEFT_ALONE_SECONDS:
            raise _ChangedError
        with closing(_connected(self.path, "immutable=1")) as connection:
            yield connection
        self._refuse_change(before)

    def _refuse_change(self, before: tuple[Identity | None, ...]) -> None:
        if self._files() != before:
            raise _ChangedError

    def _files(self) -> tuple[Identity | None, ...]:
        """The database, ``-wal``, ``-shm`` and ``-journal``, as they are now."""
        try:
            return tuple(LOCAL.identity(self.path + suffix) for suffix in ("", "-wal", "-shm", "-journal"))
        except OSError as error:
            raise self._problem(error) from None

    def _problem(self, error: Exception) -> SourceError:
        if isinstance(error, _ChangedError):
            what = "is being changed; it is read again"
        elif isinstance(error, OSError):
            what = f"cannot be read: {error.strerror or error}"
        else:
            what = f"cannot be read: {error}"
        return SourceError(f"{self.path}: {what}", path=self.path)


def usual_paths(environ: Mapping[str, str]) -> Sequence[str]:
    """Where RTK keeps its history: the variable, else the configured path, else the usual place.

    Args:
        environ: the environment.
    """
    import platformdirs

    if path := environ.get("RTK_DB_PATH", ""):
        return [path]
    config = os.path.join(platformdirs.user_config_dir(roaming=True), "rtk", "config.toml")
    default = os.path.join(platformdirs.user_data_dir(), "rtk", "history.db")
    return [_configured_path(config) or default]


def _place(state: Mapping[str, Any] | None) -> _Place:
    return msgspec.convert((state or {}).get("place", {}), _Place)


def _configured_path(config: str) -> str:
    """The path in RTK's configuration file; empty when there is none."""
    try:
        with LOCAL.opened(config) as descriptor:
            content = tomllib.loads(LOCAL.read_at(descriptor, _LONGEST_CONFIG_BYTES, 0).decode())
    except (OSError, ValueError):
        return ""
    tracking = content.get("tracking")
    path = tracking.get("database_path") if isinstance(tracking, dict) else None
    return path if isinstance(path, str) else ""


def _connected(path: str, mode: str) -> sqlite3.Connection:
    connection = sqlite3.connect(f"file:{quote(path)}?{mode}", uri=True, timeout=_PATIENCE_SECONDS)
    connection.execute("PRAGMA query_only = ON")
    return connection


def _project(path: Any) -> str | None:
    """The last part of a project's path."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or None if isinstance(path, str) else None
