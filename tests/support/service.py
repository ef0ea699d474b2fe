"""The command line tool, run to its end or as a service that answers."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.support.paths import ROOT
from tests.support.scrape import parsed
from tests.support.wait import WAIT_SECONDS


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
    """A running ``savings-exporter`` process that answers at ``url``. ``context`` trusts its certificate."""

    def __init__(self, process: subprocess.Popen[str], announcement: str, url: str) -> None:
        self.process = process
        self.announcement = announcement
        self.url = url
        self.context: ssl.SSLContext | None = None

    def tell(self, command: str) -> None:
        """Send a command to ``tests.support.faulty``, and wait until it is done."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(command)
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def get(self, path: str, headers: dict[str, str] | None = None) -> tuple[int, str]:
        """GET a path. Return status and body."""
        return self._answer(urllib.request.Request(self.url + path, headers=headers or {}))

    def post(
        self, body: Any, path: str = "/v1/savings", headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, Any]]:
        """POST an object (or bytes) as JSON. Return the status and the decoded answer."""
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
        """Send a signal and wait for the end. Return the exit status and the output."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=WAIT_SECONDS)
        return self.process.returncode, out, err

    def _answer(self, request: urllib.request.Request) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(request, timeout=WAIT_SECONDS, context=self.context) as response:
                return response.status, response.read().decode(errors="replace")  # a picture
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()


@contextmanager
def running(
    *arguments: str,
    env: dict[str, str] | None = None,
    address: str = "127.0.0.1:0",
    faulty: bool = False,
    preexec_fn: Callable[[], None] | None = None,
) -> Iterator[Service]:
    """A ``savings-exporter`` command, by default on a free loopback port. It is killed at the end if it still runs.

    With ``faulty`` its disk fails and hangs on command.
    """
    module, given = "tests.support.faulty" if faulty else "savings_exporter", env or {}
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments, "--web.listen-address", address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **given, "PYTHONPATH": os.pathsep.join(filter(None, (given.get("PYTHONPATH"), str(ROOT))))},
        preexec_fn=preexec_fn,
    )
    try:
        assert process.stdout is not None
        announcement = "".join(_through_last_line(process.stdout))
        found = re.search(r"https?://127\.0\.0\.1:\d+", announcement)
        if found is None:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"the service did not start: {announcement}{out}{err}")
        yield Service(process, announcement, found[0])
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def _through_last_line(output: Iterable[str]) -> Iterator[str]:
    """The lines of a service's announcement; all output of a command that printed none."""
    for line in output:
        yield line
        if line.startswith("metrics: "):
            return


def free_port() -> int:
    """A loopback port that is not in use now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
