"""Tools of the tests: faults at a step, a service as a process of its own, metrics read back."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from savings_exporter.storage.journal import SEGMENT_BYTES

ROOT = Path(__file__).parent.parent
HEADROOM_PYTHON = ROOT / ".venv-headroom" / "bin" / "python"
DATA = Path(__file__).parent / "data"

WAIT_SECONDS = 30.0
"""How long a test waits for what must come; never how long it takes."""


def can_mount() -> bool:
    """Whether this user may mount a tmpfs."""
    return sys.platform == "linux" and os.geteuid() == 0


def can_mount_fuse() -> bool:
    """Whether this user may mount a FUSE filesystem that a test answers for."""
    return can_mount() and os.path.exists("/dev/fuse")


def can_make_user_namespaces() -> bool:
    """Whether this user is root and may make a user namespace (util-linux's unshare)."""
    return (
        can_mount()
        and subprocess.run(["unshare", "--user", "--map-root-user", "true"], capture_output=True).returncode == 0
    )


@contextmanager
def mounted(mountpoint: Path, kind: str, *, source: str = "savings-test", options: str = "rw") -> Iterator[None]:
    """A filesystem mounted on a directory, which is made if needed; unmounted at the end."""
    mountpoint.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", kind, "-o", options, source, mountpoint], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", mountpoint], check=True)


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


def samples(collector: Collector) -> dict[str, float]:
    """Every sample of a collector, as Prometheus would read them: ``name{label="value",...}`` to value."""
    registry = CollectorRegistry()
    registry.register(collector)
    return parsed(generate_latest(registry).decode())


def parsed(text: str) -> dict[str, float]:
    """Samples of an exposition, labels in alphabetical order."""
    return {
        sample.name
        + ("{" + ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items())) + "}")
        * bool(sample.labels): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def run_cli(*arguments: str, env: dict[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line tool to its end."""
    return subprocess.run(
        [sys.executable, "-m", "savings_exporter", *arguments],
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS * 2,
        env={**os.environ, **(env or {})},
        **options,
    )


class Service:
    """A running ``savings-exporter`` process that answers at ``url``."""

    def __init__(self, process: subprocess.Popen[str], first_line: str, url: str) -> None:
        self.process = process
        self.first_line = first_line
        self.url = url

    def tell(self, command: str) -> None:
        """Give a command to ``faulty.py``, and wait until it is carried out."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(command)
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def get(self, path: str, headers: dict[str, str] | None = None) -> tuple[int, str]:
        """GET a path: status and body."""
        return self._answer(urllib.request.Request(self.url + path, headers=headers or {}))

    def post(
        self, body: Any, path: str = "/v1/savings", headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, Any]]:
        """POST an object (or bytes) as JSON: status and the answer's object."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, text = self._answer(
            urllib.request.Request(
                self.url + path, data=data, headers={"Content-Type": "application/json", **(headers or {})}
            )
        )
        return status, json.loads(text)

    def metrics(self) -> dict[str, float]:
        """One scrape."""
        status, text = self.get("/metrics")
        assert status == 200, text
        return parsed(text)

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        """Send a signal and wait for the end: exit status and what was printed."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=WAIT_SECONDS)
        return self.process.returncode, out, err

    def _answer(self, request: urllib.request.Request) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(request, timeout=WAIT_SECONDS) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()


@contextmanager
def running(
    *arguments: str, env: dict[str, str] | None = None, address: str = "127.0.0.1:0", faulty: bool = False
) -> Iterator[Service]:
    """A ``savings-exporter`` command, by default on a free port of the loopback, killed at the end if it still runs.

    With ``faulty`` its disk fails and hangs as it is told.
    """
    program = [str(Path(__file__).with_name("faulty.py"))] if faulty else ["-m", "savings_exporter"]
    process = subprocess.Popen(
        [sys.executable, *program, *arguments, "--web.listen-address", address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        if found is None:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"the service did not start: {line}{out}{err}")
        yield Service(process, line, found[0])
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


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


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def eventually(condition: Callable[[], Any], what: str) -> Any:
    """Poll until the condition holds, and give its value; fail with what was waited for."""
    pause = threading.Event()
    for _ in range(int(WAIT_SECONDS / 0.02)):
        if value := condition():
            return value
        pause.wait(0.02)
    raise AssertionError(f"waited {WAIT_SECONDS:.0f} s in vain for {what}")


ERRNOS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
"""What disks say."""
