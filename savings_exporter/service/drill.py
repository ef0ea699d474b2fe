"""Fire drills: for a limited time, simulated failures are reported to a store's observers, to test alerting.

The store itself is not touched: records that are acknowledged during a drill are durable. Simulated failures stay in
the counters like real ones, because a counter must not go back. A service accepts drills over a socket beside its
document, which only processes of its own user and root on the same host can reach.
"""

from __future__ import annotations

import errno
import logging
import os
import shlex
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import msgspec

from savings_exporter.errors import SettingsError
from savings_exporter.storage.filesystem import LOCAL, opened_directory, socket_at
from savings_exporter.storage.operation import (
    COMMIT,
    FSYNC_DIR,
    FSYNC_FILE,
    FSYNC_JOURNAL,
    SAVE,
    FsyncTarget,
    Operation,
)
from savings_exporter.tracker import SavingsTracker

logger = logging.getLogger(__name__)

LONGEST_SECONDS = 3600

_PAUSE_SECONDS = 1.0
_SLOW_SAVE_SECONDS = 2.0
_MOST_BYTES = 4096
_PATIENCE_SECONDS = 5.0
# A question arrives in one piece. A client that sends nothing delays the stop of the service by at most this time.
_QUESTION_SECONDS = 1.0
_MARKED = {"drill": "true"}


class DrillError(Exception):
    """A drill cannot begin. The message says why."""


class _Question(msgspec.Struct):
    drill: str
    seconds: float


class _Answer(msgspec.Struct):
    refused: str = ""


class Kind(NamedTuple):
    """What a drill simulates: a step of an operation fails or, where ``seconds`` is given, takes that long."""

    operation: str
    step: str
    target: FsyncTarget
    seconds: float | None
    usual_seconds: float
    """How long the drill lasts by default: long enough for its alert to fire."""
    alert: str


KINDS = {
    "dir-fsync": Kind(SAVE, FSYNC_DIR, "directory", None, 60, "SavingsDirectoryFsyncFailing"),
    "file-fsync": Kind(SAVE, FSYNC_FILE, "file", None, 60, "SavingsFileFsyncFailing"),
    "journal-fsync": Kind(COMMIT, FSYNC_JOURNAL, "journal", None, 60, "SavingsJournalFsyncFailing"),
    "save-latency": Kind(SAVE, FSYNC_FILE, "file", _SLOW_SAVE_SECONDS, 900, "SavingsSaveLatencyHigh"),
}


class Drills:
    """The drills of one tracker, one at a time."""

    def __init__(self, tracker: SavingsTracker) -> None:
        self._tracker = tracker
        self._stopped = threading.Event()
        self._running: threading.Thread | None = None

    def begin(self, name: str, seconds: float) -> None:
        """Begin a drill that ends by itself.

        Raises:
            DrillError: another one is running, there is no such drill, or no thread could be started.
        """
        if name not in KINDS or not 0 < seconds <= LONGEST_SECONDS:
            raise DrillError(f"a drill is one of {', '.join(KINDS)}, and lasts {LONGEST_SECONDS:.0f} seconds at most")
        if self._running is not None and self._running.is_alive():
            raise DrillError("another drill is running; wait for its end")
        thread = threading.Thread(target=self._run, args=(name, seconds), name="savings-drill", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise DrillError(f"the service cannot run it now: {error}") from None
        self._running = thread

    def stop(self) -> None:
        """End the drill that is running, if one is."""
        self._stopped.set()
        if self._running is not None:
            self._running.join()

    def _run(self, name: str, seconds: float) -> None:
        path, counters = self._tracker.storage_path, self._tracker.counters
        logger.warning("%s: fire drill %s begins and lasts %.0f s; nothing is lost", path, name, seconds, extra=_MARKED)
        end = time.monotonic() + seconds
        counters.drilling(name, active=True)
        try:
            while time.monotonic() < end and not self._stopped.is_set():
                self._simulate(KINDS[name])
                self._stopped.wait(_PAUSE_SECONDS)
        finally:
            counters.drilling(name, active=False)
            logger.warning("%s: fire drill %s has ended", path, name, extra=_MARKED)

    def _simulate(self, kind: Kind) -> None:
        operation = Operation(kind.operation, self._tracker.observers, is_drill=True)
        with suppress(OSError), operation, operation.step(kind.step, kind.target):
            if kind.seconds is not None:
                self._stopped.wait(kind.seconds)
                logger.warning("fire drill: %s took %.1f s", kind.step, kind.seconds, extra=_MARKED)
                return
            error = OSError(errno.EIO, os.strerror(errno.EIO))
            logger.error("fire drill: %s failed: %s (EIO)", kind.step, error.strerror, extra=_MARKED)
            raise error


@contextmanager
def taking_drills(tracker: SavingsTracker) -> Iterator[None]:
    """Accept drills for a tracker while the block runs.

    Raises:
        SettingsError: drills cannot be accepted here, or another service on the store accepts them.
    """
    path = LOCAL.resolved(tracker.storage_path)
    with _bound(path) as listener:
        drills, over = Drills(tracker), threading.Event()
        thread = threading.Thread(target=_answer_all, args=(listener, drills, over), name="savings-drills", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            # Ends the accept that the thread is waiting in.
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            drills.stop()


def ask(path: str, name: str, seconds: float) -> None:
    """Make the service that keeps a store begin a drill.

    Raises:
        DrillError: there is no service that accepts drills, or it refused this one.
    """
    path = LOCAL.resolved(path)
    no_service = (
        f"{path}: no service that accepts drills uses this store; start it, or restart it, with: savings-exporter "
        f"serve --enable-drill --store {shlex.quote(path)}"
    )
    try:
        answer = _exchange(path, _Question(name, seconds))
    except (FileNotFoundError, ConnectionRefusedError):
        raise DrillError(no_service) from None
    except (OSError, ValueError) as error:
        raise DrillError(f"{path}: its service cannot be asked for a drill: {error}") from None
    if answer.refused:
        raise DrillError(f"{path}: {answer.refused}")


def _exchange(path: str, question: _Question) -> _Answer:
    with _socket() as asking:
        asking.settimeout(_PATIENCE_SECONDS)
        _at(path, asking.connect)
        asking.sendall(msgspec.json.encode(question))
        return msgspec.json.decode(asking.recv(_MOST_BYTES), type=_Answer)


@contextmanager
def _bound(path: str) -> Iterator[socket.socket]:
    with _socket() as listener:
        try:
            with suppress(FileNotFoundError, ConnectionRefusedError), _socket() as other:
                _at(path, other.connect)
                raise SettingsError(
                    f"{path}: another service accepts drills for this store; stop it, or start this one without drills"
                )
            if socket_at(_socket_path(path)) is not None:
                LOCAL.discard(_socket_path(path))
            # Set before the socket exists, so that no other user can ever connect.
            before = os.umask(0o177)
            try:
                _at(path, listener.bind)
            finally:
                os.umask(before)
            ours = socket_at(_socket_path(path))
            listener.listen()
        except OSError as error:
            raise SettingsError(f"{_socket_path(path)}: cannot accept drills: {error.strerror or error}") from None
        try:
            yield listener
        finally:
            # Another service may have taken the name since this one stopped answering.
            if socket_at(_socket_path(path)) == ours:
                LOCAL.discard(_socket_path(path))


def _answer_all(listener: socket.socket, drills: Drills, over: threading.Event) -> None:
    while not over.is_set():
        try:
            connection, _ = listener.accept()
        except OSError:
            # The listener is shut down, or no descriptor is left for now.
            over.wait(_PAUSE_SECONDS)
            continue
        with connection:
            _answer(connection, drills)


def _answer(connection: socket.socket, drills: Drills) -> None:
    answer = _Answer()
    with suppress(OSError):
        connection.settimeout(_QUESTION_SECONDS)
        try:
            question = msgspec.json.decode(connection.recv(_MOST_BYTES), type=_Question)
            drills.begin(question.drill, question.seconds)
        except DrillError as error:
            answer.refused = str(error)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            answer.refused = "the request is not a drill"
        connection.sendall(msgspec.json.encode(answer))


def _socket() -> socket.socket:
    if not hasattr(socket, "AF_UNIX"):
        raise SettingsError("drills need Unix domain sockets, which this platform does not have")
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)


def _socket_path(path: str) -> str:
    directory, name = os.path.split(path)
    return os.path.join(directory, f".{name}.drill")


def _at(path: str, act: Callable[[str], object]) -> None:
    """Bind or connect at a path of any length: an address has room for some hundred bytes only (unix(7))."""
    directory, name = os.path.split(_socket_path(path))
    if not os.path.isdir("/proc/self/fd"):
        act(os.path.join(directory, name))
        return
    with opened_directory(directory) as descriptor:
        act(f"/proc/self/fd/{descriptor}/{name}")
