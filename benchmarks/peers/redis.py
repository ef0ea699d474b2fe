"""Redis with ``appendfsync always``, through redis-py: per record one stream entry, hashes of totals, one script call.

A script (EVALSHA) is one round trip and as atomic as MULTI/EXEC. The same commands in a pipeline with MULTI/EXEC
reached two thirds of its rate in a short run with one thread.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.measuring import LeftOutError, Opened, Recorder
from benchmarks.peers import schema, server
from benchmarks.workload import Fields

RECORDS = "records"

_SCRIPT = f"""
redis.call('XADD', KEYS[1], '*', unpack(ARGV))
local first, tokens, all = {2 * len(schema.NAMES) + 1}, {len(schema.TOKENS)}, {len(schema.SUMS)}
local newest = ARGV[#ARGV]
for key = 2, #KEYS do
  local name = KEYS[key]
  redis.call('HINCRBY', name, 'requests', 1)
  for number = 0, all - 1 do
    local increment = number < tokens and 'HINCRBY' or 'HINCRBYFLOAT'
    redis.call(increment, name, ARGV[first + 2 * number], ARGV[first + 2 * number + 1])
  end
  local before = redis.call('HGET', name, 'last_activity_at')
  if not before or before < newest then
    redis.call('HSET', name, 'last_activity_at', newest)
  end
end
"""


@contextmanager
def redis(directory: Path) -> Iterator[Opened]:
    """A server that syncs its append-only file before it answers; each thread or process has its own connection."""
    client, command = _client(), _server()
    with server.socket_directory() as sockets:
        socket = sockets / "redis.sock"
        arguments = ["--port", "0", "--unixsocket", str(socket), "--dir", str(directory), "--save", ""]
        arguments += ["--appendonly", "yes", "--appendfsync", "always"]
        with server.running(
            [command, *arguments], log=directory / "redis.log", is_ready=lambda: _answers(client, socket)
        ):
            yield partial(_connected, socket)


def key_of(table: str, fields: Fields) -> str:
    """The key of the hash of the totals that include a request."""
    return "\0".join([table, *(fields[name] for name in schema.TOTALS[table])])


def version() -> str:
    """The server's version."""
    shown = subprocess.run([_server(), "--version"], check=True, stdout=subprocess.PIPE, text=True).stdout
    return shown.partition("v=")[2].split()[0]


def _client() -> Any:
    try:
        return import_module("redis")
    except ImportError:
        raise LeftOutError("redis-py is not installed (make bench installs it)") from None


def _server() -> str:
    found = shutil.which("redis-server")
    if found is None:
        raise LeftOutError("Redis is not installed (Debian: apt-get install redis-server)")
    return found


def _answers(client: Any, socket: Path) -> bool:
    # Connect only when the socket exists, because the client would wait for seconds before its next attempt.
    if not socket.exists():
        return False
    try:
        with closing(client.Redis(unix_socket_path=str(socket))) as connection:
            return bool(connection.ping())
    except client.RedisError:
        return False


@contextmanager
def _connected(socket: Path) -> Iterator[Recorder]:
    with closing(_client().Redis(unix_socket_path=str(socket))) as connection:
        script = connection.register_script(_SCRIPT)

        def record(fields: Fields) -> None:
            row = schema.stamped(fields)
            arguments = [part for name in schema.FIELDS for part in (name, row[name])]
            script(keys=[RECORDS, *(key_of(table, row) for table in schema.TOTALS)], args=arguments)

        yield record
