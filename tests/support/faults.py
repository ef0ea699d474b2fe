"""A file system whose steps can fail or hang."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from savings_exporter.formats.frame import BLOCK_BYTES
from savings_exporter.storage.filesystem import DirectoryFsyncUnsupportedError, FileSystem
from tests.support.service import Service
from tests.support.wait import WAIT_SECONDS

ERRNOS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
"""The errors that disks and file systems report."""


class FaultyFileSystem(FileSystem):
    """Real files, with steps that fail or hang as a test requests. Pass it to a tracker as ``filesystem``.

    ``calls`` lists what was called, each call by the name of the step that it is: ``write``, ``fsync_file``,
    ``replace``, ``fsync_dir`` of a save; ``append``, ``fsync_journal`` of a commit (a direct, synchronous write is one
    ``fsync_journal``); ``watermark``; ``counters``. ``has_direct_io`` says whether direct writes are supported,
    ``has_directory_fsync`` whether a directory can be synced.
    ``before`` is called with each step's name before the step.
    """

    def __init__(self, *, has_direct_io: bool = True, has_directory_fsync: bool = True) -> None:
        self.calls: list[str] = []
        self.reached = threading.Event()
        self.has_direct_io = has_direct_io
        self.has_directory_fsync = has_directory_fsync
        self.before: Callable[[str], None] = lambda _step: None
        self._failing: dict[str, tuple[int, float]] = {}
        self._gates: dict[str, threading.Event] = {}
        self._paths: dict[int, str] = {}

    def fail(self, step: str, number: int, times: float = float("inf")) -> None:
        """Make the step fail with this errno, a number of times."""
        self._failing[step] = (number, times)

    def mend(self) -> None:
        """Repair the file system: no step fails or hangs any more."""
        self._failing.clear()
        for gate in self._gates.values():
            gate.set()
        self._gates.clear()

    def hang(self, step: str) -> None:
        """Make the step hang until ``mend`` is called; ``reached`` is set when a step hangs."""
        self._gates[step] = threading.Event()

    def create(self, path: str, like: str) -> int:
        return self._noted(super().create(path, like), path)

    def open_to_write(self, path: str) -> int:
        return self._noted(super().open_to_write(path), path)

    def open_direct(self, path: str) -> int:
        if not self.has_direct_io:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        return self._noted(super().open_direct(path), path)

    def write_all(self, descriptor: int, data: bytes | memoryview) -> None:
        self._call("append" if self._is_segment(descriptor) else "write")
        super().write_all(descriptor, data)

    def write_at(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        if self._is_segment(descriptor):
            self._call("append")
        elif ".writer." in self._paths.get(descriptor, ""):
            self._call("watermark" if offset < BLOCK_BYTES else "counters")
        super().write_at(descriptor, data, offset)

    def write_direct(self, descriptor: int, data: memoryview, offset: int) -> None:
        self._call("fsync_journal")
        super().write_direct(descriptor, data, offset)

    def fsync_file(self, descriptor: int) -> None:
        self._call("fsync_journal" if self._is_segment(descriptor) else "fsync_file")
        super().fsync_file(descriptor)

    def sync_data(self, descriptor: int) -> None:
        if self._is_segment(descriptor):
            self._call("fsync_journal")
        super().sync_data(descriptor)

    def fsync_directory(self, path: str) -> None:
        self._call("fsync_dir")
        if not self.has_directory_fsync:
            raise DirectoryFsyncUnsupportedError(os.strerror(errno.EINVAL))
        super().fsync_directory(path)

    def replace(self, temporary: str, path: str) -> None:
        if ".writer." not in path:
            self._call("replace")
        super().replace(temporary, path)

    def _noted(self, descriptor: int, path: str) -> int:
        self._paths[descriptor] = path
        return descriptor

    def _is_segment(self, descriptor: int) -> bool:
        return ".journal." in self._paths.get(descriptor, "")

    def _call(self, step: str) -> None:
        self.calls.append(step)
        self.before(step)
        if gate := self._gates.get(step):
            self.reached.set()
            gate.wait(WAIT_SECONDS)
        number, times = self._failing.get(step, (0, 0))
        if times > 0:
            self._failing[step] = (number, times - 1)
            raise OSError(number, os.strerror(number))


@contextmanager
def failing_directory_fsync(service: Service, directory: Path, when: str = "when=1+") -> Iterator[None]:
    """Make the service's directory fsyncs fail with EIO: all of them, or those that ``when`` selects (see strace)."""
    command = ["strace", "-f", "-p", str(service.process.pid), "-e", "trace=fsync", "-P", str(directory)]
    command += ["-e", f"inject=fsync:error=EIO:{when}", "-o", os.devnull]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        assert "attached" in strace.stderr.readline()
        try:
            yield
        finally:
            strace.send_signal(signal.SIGINT)
