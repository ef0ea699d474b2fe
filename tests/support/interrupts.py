"""Interrupt a call of a tracker with a signal before each line of the package in turn, each time in a new process.

``python -m tests.support.interrupts HANDLER STRIDE [CALL]...`` makes each ``CALL`` and runs ``HANDLER`` before its
first line, in another process before the line that comes ``STRIDE`` lines later, and so on until the call ends before
that. It prints how many lines there were, or what went wrong before which.
"""

from __future__ import annotations

import faulthandler
import fcntl
import linecache
import logging
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

from savings_exporter import Receipt, SavingsRecord, SavingsTracker
from tests.support.faults import FaultyFileSystem
from tests.support.wait import WAIT_SECONDS, eventually

PACKAGE = os.path.dirname(sys.modules["savings_exporter"].__file__ or "")
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
ENDED_BEFORE, FAILED = 3, 1

ONE: dict[str, Any] = {"model": "m", "tokens_saved": 1}


class Scenario:
    """A tracker, and the minimum and maximum number of records that it must have in the end.

    Accepted records count; a record whose call was interrupted may count.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.faults = FaultyFileSystem()
        self.tracker = SavingsTracker(path, filesystem=self.faults)
        self.accepted = self.attempted = 0
        self.keys: set[str] = set()
        self.accepted_keys: set[str] = set()
        self.interrupted_at = ""

    def record(self, **arguments: Any) -> Receipt:
        """Record one saving."""
        return self._recorded(1, lambda: self.tracker.record_request(**ONE, **arguments), arguments)

    def record_many(self, many: list[SavingsRecord]) -> Receipt:
        """Record several savings."""
        return self._recorded(len(many), lambda: self.tracker.record_many(many), {})

    def _recorded(self, count: int, call: Callable[[], Receipt], arguments: dict[str, Any]) -> Receipt:
        key = arguments.get("idempotency_key")
        attempted = count if key is None or key not in self.keys else 0
        self.attempted += attempted
        if key is not None:
            self.keys.add(key)
        try:
            receipt = call()
        except RuntimeError:
            # The tracker is closed.
            self.attempted -= attempted
            raise
        if key is None:
            self.accepted += count
        elif key not in self.accepted_keys:
            self.accepted_keys.add(key)
            self.accepted += count
        return receipt

    def check(self) -> None:
        """Check that nothing hangs, is lost or is counted twice, and that the next calls work."""
        tracker = self.tracker
        if is_refused(self.record):
            assert tracker.close()
        else:
            assert tracker.flush(WAIT_SECONDS), "not all became durable"
            eventually(self._lock_is_free, "the store's lock")
            assert tracker.save()
        total = tracker.snapshot().lifetime.requests
        assert self.accepted <= total <= self.attempted, (self.accepted, total, self.attempted)
        assert tracker.close()
        with SavingsTracker(self.path) as other:
            snapshot = other.snapshot()
            assert snapshot.lifetime.requests == total, (snapshot.lifetime.requests, total)
            assert sum(part.requests for part in snapshot.by_model.values()) == total
            left = [name for name in os.listdir(os.path.dirname(self.path)) if name.endswith(".tmp")]
            assert not left, left

    def _lock_is_free(self) -> bool:
        with open(f"{self.path}.lock", "rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True


def first(scenario: Scenario) -> Callable[[], Any]:
    return scenario.record


def record(scenario: Scenario) -> Callable[[], Any]:
    scenario.record()
    scenario.record()
    return scenario.record


def keyed(scenario: Scenario) -> Callable[[], Any]:
    scenario.record()
    return lambda: scenario.record(idempotency_key="k")


def repeat(scenario: Scenario) -> Callable[[], Any]:
    scenario.record(idempotency_key="k")
    return lambda: scenario.record(idempotency_key="k")


def rotate(scenario: Scenario) -> Callable[[], Any]:
    """Fill the first segment, so that the next commit starts another one."""
    many = [SavingsRecord(**ONE, project=f"{number:0128}") for number in range(270)]
    scenario.record_many(many)
    return lambda: scenario.record_many(many[:40])


def refused(scenario: Scenario) -> Callable[[], Any]:
    """The first commit fails."""
    scenario.record()
    scenario.faults.fail("fsync_journal", 5, times=1)
    return scenario.record


def failing(scenario: Scenario) -> Callable[[], Any]:
    """Commits have failed and continue to fail; the disk works again after the call has ended."""
    scenario.record()
    scenario.faults.fail("fsync_journal", 5)
    scenario.record()

    def call() -> None:
        try:
            scenario.record()
        finally:
            scenario.faults.mend()

    return call


def nowait(scenario: Scenario) -> Callable[[], Any]:
    scenario.record()
    return lambda: scenario.record(wait=False)


def save(scenario: Scenario) -> Callable[[], Any]:
    scenario.record()
    return scenario.tracker.save


def save_pending(scenario: Scenario) -> Callable[[], Any]:
    scenario.record()

    def call() -> None:
        scenario.record(wait=False)
        scenario.tracker.save()

    return call


def snapshot(scenario: Scenario) -> Callable[[], Any]:
    scenario.record(idempotency_key="other")
    scenario.record()
    return scenario.tracker.snapshot


def flush(scenario: Scenario) -> Callable[[], Any]:
    scenario.record()

    def call() -> None:
        scenario.record(wait=False)
        assert scenario.tracker.flush(WAIT_SECONDS)

    return call


def wait(scenario: Scenario) -> Callable[[], Any]:
    scenario.record()

    def call() -> None:
        assert scenario.record(wait=False).wait(WAIT_SECONDS)

    return call


def close(scenario: Scenario) -> Callable[[], Any]:
    scenario.record()
    scenario.record(wait=False)
    return scenario.tracker.close


CALLS = {
    call.__name__: call
    for call in (
        *(first, record, keyed, repeat, rotate, refused, failing),
        *(nowait, save, save_pending, snapshot, flush, wait, close),
    )
}


def is_refused(call: Callable[[], Any]) -> bool:
    """Make a call. Return whether it was refused because the tracker is closed."""
    try:
        call()
    except RuntimeError as error:
        if "is closed" not in str(error):
            raise
        return True
    return False


ENDLESS = ("failing",)
"""Calls during which a record cannot become durable."""


def interrupt(_scenario: Scenario) -> None:
    raise KeyboardInterrupt


HANDLERS: dict[str, Callable[[Scenario], object]] = {
    "interrupt": interrupt,
    "record": lambda scenario: is_refused(scenario.record),
    "nowait": lambda scenario: is_refused(lambda: scenario.record(wait=False)),
    "keyed": lambda scenario: is_refused(lambda: scenario.record(idempotency_key="k")),
    "save": lambda scenario: is_refused(scenario.tracker.save),
    "snapshot": lambda scenario: is_refused(scenario.tracker.snapshot),
    "health": lambda scenario: is_refused(scenario.tracker.health),
    "flush": lambda scenario: is_refused(scenario.tracker.flush),
    "wait": lambda scenario: is_refused(lambda: scenario.record(wait=False).wait()),
    "close": lambda scenario: is_refused(scenario.tracker.close),
}


WAITING = ("flush", "wait", "close")
"""Handlers that wait until their record is durable, or give up."""


def interrupting(number: int, handle: Callable[[FrameType], None]) -> Callable[[FrameType, str, Any], Any]:
    """A trace function that calls ``handle`` once before a line of the package.

    Not before a line that enters or leaves a lock: there a signal is handled after the lock was let go, and tracing
    would come before. Nor before ``try:``, where none is handled.
    """
    lines = 0

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal lines
        file = frame.f_code.co_filename
        if not file.startswith(PACKAGE):
            return None
        if event == "line" and not is_taken(linecache.getline(file, frame.f_lineno)):
            lines += 1
            if lines == number:
                sys.settrace(None)
                handle(frame)
        return trace

    return trace


def is_taken(line: str) -> bool:
    """Whether a handler runs after this line instead of before it."""
    return line.lstrip().startswith(("with ", "try:"))


def run(call: str, handler: str, number: int, path: str) -> int:
    """Make the call and run the handler before this line."""
    scenario, was_interrupted = Scenario(path), False

    def handle(frame: FrameType) -> None:
        nonlocal was_interrupted
        was_interrupted = True
        # Printed with the child's traceback if it fails.
        scenario.interrupted_at = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        HANDLERS[handler](scenario)

    made = CALLS[call](scenario)
    sys.settrace(interrupting(number, handle))
    try:
        with suppress(*([KeyboardInterrupt] if handler == "interrupt" else [])):
            # A handler may close the tracker before a call that records.
            is_refused(made)
    finally:
        sys.settrace(None)
    try:
        scenario.check()
    except BaseException:
        print(f"interrupted at {scenario.interrupted_at}", file=sys.stderr)
        raise
    return 0 if was_interrupted else ENDED_BEFORE


def run_in_child(call: str, handler: str, number: int) -> int:
    """Run it in a forked process, in a new directory. Return the exit status."""
    directory = tempfile.mkdtemp(dir=MEMORY)
    child = os.fork()
    if child == 0:
        faulthandler.dump_traceback_later(3 * WAIT_SECONDS, exit=True)
        status = FAILED
        try:
            status = run(call, handler, number, os.path.join(directory, "proxy_savings.json"))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    shutil.rmtree(directory)
    return os.waitstatus_to_exitcode(status)


def main(handler: str, stride: int, *calls: str) -> int:
    """Run all interrupts. Return 1 if one of them failed."""
    logging.disable()
    for call in calls or CALLS:
        if call in ENDLESS and handler in WAITING:
            continue
        number, ended = 1, 0
        # A call can be shorter than usual if the background thread did the work.
        while ended < 3:
            status = run_in_child(call, handler, number)
            if status not in (0, ENDED_BEFORE):
                print(f"{handler} before line {number} of {call}: status {status}", file=sys.stderr)
                return 1
            ended = ended + 1 if status == ENDED_BEFORE else 0
            number += stride
        print(f"{handler} before each line of {call}: {number - 3 * stride}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:]))
