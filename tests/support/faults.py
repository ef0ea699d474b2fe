"""Steps of a save or a commit that fail or hang."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from savings_exporter.storage.journal import SEGMENT_BYTES
from tests.support.service import Service
from tests.support.wait import WAIT_SECONDS

ERRNOS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
"""What disks say."""


class Faults:
    """Makes a step of a save or a commit fail, by making the ``os`` call it stands for raise.

    ``calls`` lists what was called, each call named after the step it is: ``write``, ``fsync_file``, ``replace``,
    ``fsync_dir``, ``append``, ``fsync_journal``.
    """

    def __init__(self, monkeypatch: Any) -> None:
        self.calls: list[str] = []
        self._failing: dict[str, tuple[int, float]] = {}
        self._gates: dict[str, threading.Event] = {}
        self.reached = threading.Event()
        real_fsync, real_write, real_replace = os.fsync, os.write, os.replace
        real_pwrite, real_fdatasync = os.pwrite, os.fdatasync

        def is_segment(descriptor: int) -> bool:
            # The other file that is written at an offset and synced so is the lock file, with its mark.
            return os.fstat(descriptor).st_size == SEGMENT_BYTES

        def fsync(descriptor: int) -> None:
            self._call("fsync_dir" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "fsync_file")
            real_fsync(descriptor)

        def write(descriptor: int, data: Any) -> int:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                self._call("write")
            return real_write(descriptor, data)

        def replace(source: Any, target: Any) -> None:
            self._call("replace")
            real_replace(source, target)

        def pwrite(descriptor: int, data: Any, offset: int) -> int:
            if is_segment(descriptor):
                self._call("append")
            return real_pwrite(descriptor, data, offset)

        def fdatasync(descriptor: int) -> None:
            if is_segment(descriptor):
                self._call("fsync_journal")
            real_fdatasync(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "write", write)
        monkeypatch.setattr(os, "replace", replace)
        monkeypatch.setattr(os, "pwrite", pwrite)
        monkeypatch.setattr(os, "fdatasync", fdatasync)

    def fail(self, step: str, number: int, times: float = float("inf")) -> None:
        """Let the step fail with this errno, so many times."""
        self._failing[step] = (number, times)

    def mend(self) -> None:
        """No step fails or hangs from now on."""
        self._failing.clear()
        for gate in self._gates.values():
            gate.set()
        self._gates.clear()

    def hang(self, step: str) -> None:
        """Let the step hang until ``mend``; ``reached`` is set when one does."""
        self._gates[step] = threading.Event()

    def _call(self, step: str) -> None:
        self.calls.append(step)
        if gate := self._gates.get(step):
            self.reached.set()
            gate.wait(WAIT_SECONDS)
        number, times = self._failing.get(step, (0, 0))
        if times > 0:
            self._failing[step] = (number, times - 1)
            raise OSError(number, os.strerror(number))


@contextmanager
def failing_directory_fsync(service: Service, directory: Path, when: str = "when=1+") -> Iterator[None]:
    """Let the kernel answer EIO to the service's fsyncs of a directory: to all, or as strace understands ``when``."""
    command = ["strace", "-f", "-p", str(service.process.pid), "-e", "trace=fsync", "-P", str(directory)]
    command += ["-e", f"inject=fsync:error=EIO:{when}", "-o", os.devnull]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        assert "attached" in strace.stderr.readline()
        try:
            yield
        finally:
            strace.send_signal(signal.SIGINT)
