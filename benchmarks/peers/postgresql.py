"""PostgreSQL with ``synchronous_commit=on``, through psycopg 3: one function call per record, one transaction each.

The function contains the statements that SQLite receives one by one. In short runs with one thread it was 1.2 to 2.5
times as fast as the alternatives: a transaction of five prepared statements, the same transaction in psycopg's pipeline
mode, and one statement with data-modifying CTEs.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.measuring import LeftOutError, Opened, Recorder
from benchmarks.peers import schema, server
from benchmarks.workload import Fields

_USER = "postgres"
_DEBIAN = Path("/usr/lib/postgresql")

_TYPES = {
    **dict.fromkeys((*schema.NAMES, "timestamp"), "text"),
    **dict.fromkeys(schema.TOKENS, "bigint"),
    **dict.fromkeys(schema.USD, "double precision"),
}
_PARAMETERS = ", ".join(f"p_{name} {_TYPES[name]}" for name in schema.FIELDS)
_BODY = " ".join(f"{statement};" for statement in (schema.insert("p_{}"), *schema.upserts("p_{}", "greatest")))
_FUNCTION = f"CREATE FUNCTION record({_PARAMETERS}) RETURNS void LANGUAGE plpgsql AS $$ BEGIN {_BODY} END $$"
_CALL = f"SELECT record({', '.join(f'%({name})s::{_TYPES[name]}' for name in schema.FIELDS)})"


@contextmanager
def postgresql(directory: Path) -> Iterator[Opened]:
    """A new cluster with Debian's defaults; each thread or process has its own connection.

    The server refuses to run as root. If this process is root, the server runs as the user ``postgres``.
    """
    client, programs, user = _client(), _programs(), _user()
    data = directory / "cluster"
    data.mkdir()
    server.give_to(data, user)
    _insist_on_access(data, user)
    options = ["-c", "listen_addresses=", "-c", "synchronous_commit=on", "-c", "fsync=on"]
    locale = ["--encoding", "UTF8", "--locale", "C"]
    with server.socket_directory(user) as sockets:
        _run_as(user, programs / "initdb", "--pgdata", data, "--username", _USER, "--auth", "trust", *locale)
        with server.running(
            [str(programs / "postgres"), "-D", str(data), "-k", str(sockets), *options],
            log=directory / "postgresql.log",
            is_ready=lambda: _answers(client, sockets),
            # The fast shutdown, which does not wait for clients.
            stop_signal=signal.SIGINT,
            user=user,
        ):
            with connect(sockets) as connection:
                for statement in (*schema.tables("BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY"), _FUNCTION):
                    connection.execute(statement)
            yield partial(_connected, sockets)


def connect(sockets: Path) -> Any:
    """A connection to the server with its sockets in this directory; each statement is a transaction."""
    return _client().connect(host=str(sockets), user=_USER, dbname="postgres", autocommit=True)


def version() -> str:
    """The server's version."""
    shown = subprocess.run([_programs() / "postgres", "--version"], check=True, stdout=subprocess.PIPE, text=True)
    return shown.stdout.split()[2]


def _client() -> Any:
    try:
        return import_module("psycopg")
    except ImportError:
        raise LeftOutError("psycopg is not installed (make bench installs it)") from None


def _programs() -> Path:
    """The directory of ``initdb`` and ``postgres``. Debian has one directory per version, which is not on the PATH."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    versions = [path.parent for path in _DEBIAN.glob("*/bin/initdb")]
    if not versions:
        raise LeftOutError("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    return max(versions, key=lambda path: [int(part) for part in re.findall(r"\d+", str(path))])


def _user() -> str | None:
    """The user that the server runs as; None is the user of this process."""
    if os.geteuid() != 0:
        return None
    import pwd

    try:
        return pwd.getpwnam(_USER).pw_name
    except KeyError:
        raise LeftOutError(f"PostgreSQL does not run as root, and there is no user {_USER}") from None


def _insist_on_access(directory: Path, user: str | None) -> None:
    if subprocess.run(["test", "-w", str(directory)], cwd="/", **server.as_user(user)).returncode != 0:
        raise LeftOutError(f"the user {user} has no access to {directory}: name another --directory")


def _run_as(user: str | None, *command: str | Path) -> None:
    done = subprocess.run(
        [str(part) for part in command], cwd="/", capture_output=True, text=True, **server.as_user(user)
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr}")


def _answers(client: Any, sockets: Path) -> bool:
    try:
        connect(sockets).close()
    except client.OperationalError:
        return False
    return True


@contextmanager
def _connected(sockets: Path) -> Iterator[Recorder]:
    with connect(sockets) as connection:

        def record(fields: Fields) -> None:
            connection.execute(_CALL, schema.stamped(fields), prepare=True)

        yield record
