"""``savings-exporter`` on a disk that fails and hangs on commands from standard input. It answers each with "done"."""

from __future__ import annotations

import errno
import os
import sys
import threading
from types import FrameType

import pytest

from savings_exporter import SavingsTracker, cli, tracker
from tests.support.faults import FaultyFileSystem
from tests.support.wait import eventually


def obey(faults: FaultyFileSystem) -> None:
    """``fail STEP``, ``hang STEP``, ``closing`` (wait until the last save has begun) and ``mend``."""
    # sys.stdin is not used, because a thread would still hold its lock when the process ends.
    while command := os.read(0, 1024).decode().split():
        match command:
            case ["fail", step]:
                faults.fail(step, errno.EIO)
            case ["hang", step]:
                faults.hang(step)
            case ["closing"]:
                eventually(is_closing, "the tracker to be closed")
            case ["mend"]:
                faults.mend()
        print("done", flush=True)


def is_closing() -> bool:
    """Whether the main thread is closing a tracker."""
    frame: FrameType | None = sys._current_frames()[threading.main_thread().ident or 0]
    while frame is not None:
        if frame.f_code is SavingsTracker.close.__code__:
            return True
        frame = frame.f_back
    return False


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        faults = FaultyFileSystem()
        patch.setattr(tracker, "LOCAL", faults)
        threading.Thread(target=obey, args=[faults], daemon=True).start()
        cli.main()
