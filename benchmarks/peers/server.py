"""A server of a peer, started in the benchmark's directory and stopped by its process id."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_START_SECONDS = 30.0
_STOP_SECONDS = 30.0
_POLL_SECONDS = 0.02
_SHOWN_LOG_BYTES = 2_000


@contextmanager
def running(
    command: Sequence[str],
    *,
    log: Path,
    is_ready: Callable[[], bool],
    stop_signal: signal.Signals = signal.SIGTERM,
    user: str | None = None,
) -> Iterator[None]:
    """A server that accepts connections. It is stopped at the end of the block, even after an exception.

    Args:
        command: starts the server in the foreground.
        log: the file for the output of the server.
        is_ready: whether it accepts connections.
        stop_signal: asks it to stop; a server that does not stop is killed after 30 seconds.
        user: the user that it runs as, if not the current one.

    Raises:
        RuntimeError: it did not start; the message contains the end of its log.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd="/", **as_user(user)
        )
    try:
        _wait_until_ready(process, log, is_ready)
        yield
    finally:
        process.send_signal(stop_signal)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def socket_directory(user: str | None = None) -> Iterator[Path]:
    """A directory with a short path, because the path of a Unix domain socket has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        give_to(Path(directory), user)
        yield Path(directory)


def give_to(path: Path, user: str | None) -> None:
    """Make a user the owner of a file or directory."""
    if user is not None:
        shutil.chown(path, user)


def as_user(user: str | None) -> dict[str, Any]:
    """The arguments of ``subprocess`` that run a command as a user, without this user's groups."""
    if user is None:
        return {}
    # Imported here because Windows has no such module.
    import pwd

    return {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path, is_ready: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + _START_SECONDS
    while not is_ready():
        if process.poll() is not None or time.monotonic() > give_up_at:
            said = log.read_bytes()[-_SHOWN_LOG_BYTES:].decode(errors="replace")
            raise RuntimeError(f"the server that writes {log.name} did not start:\n{said}")
        time.sleep(_POLL_SECONDS)
