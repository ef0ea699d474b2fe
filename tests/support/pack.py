"""Start the programs of the compose file in the same way as the compose file."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.support.compose import dockerfile, edit, laid_out
from tests.support.service import run_cli
from tests.support.wait import WAIT_SECONDS, eventually


def fetched(url: str, data: Any = None) -> bytes:
    headers = {"Content-Type": "application/json"}
    body = json.dumps(data).encode() if data is not None else None
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=WAIT_SECONDS) as response:
        content: bytes = response.read()
        return content


def answers(url: str) -> bool:
    try:
        fetched(url)
    except (OSError, http.client.HTTPException):
        return False
    return True


@contextmanager
def started(command: list[str], log: Path, ready: str, env: dict[str, str] | None = None) -> Iterator[None]:
    """A running program. The block begins when the program answers at an address."""
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output, env=env) as process:

        def is_ready() -> bool:
            assert process.poll() is None, log.read_text()
            return answers(ready)

        try:
            eventually(is_ready, f"{ready} to answer")
            yield
        finally:
            process.terminate()


@contextmanager
def exporter(directory: Path, port: int, **environment: str) -> Iterator[str]:
    """The service as the image starts it, with another store and port. Yields its address."""
    assert json.loads(dockerfile("ENTRYPOINT")[-1]) == ["savings-exporter"]
    command = [sys.executable, "-m", "savings_exporter", *json.loads(dockerfile("CMD")[-1])]
    env = dict(line.split("=", 1) for line in dockerfile("ENV") if line.startswith("SAVINGS_EXPORTER_"))
    env = {name: value.replace("/data", str(directory)) for name, value in env.items()}
    env = {name: value.replace("0.0.0.0:9478", f"127.0.0.1:{port}") for name, value in env.items()}
    url = f"http://127.0.0.1:{port}"
    with started(command, directory / "exporter.log", f"{url}/-/ready", {**env, **environment}):
        yield url


@contextmanager
def alertmanager(root: Path, port: int, *changes: tuple[str, str]) -> Iterator[str]:
    """An Alertmanager as the compose file starts it, with changes to its configuration. Yields its address."""
    # Debian uses another name for the program.
    program = shutil.which("prometheus-alertmanager") or "alertmanager"
    command = [program, *laid_out("alertmanager", root), f"--web.listen-address=127.0.0.1:{port}"]
    edit(root / "etc/alertmanager/alertmanager.yml", *changes)
    url = f"http://127.0.0.1:{port}"
    with started(command, root / "log", f"{url}/-/ready"):
        yield url


@contextmanager
def prometheus(
    root: Path, port: int, targets: list[str], alertmanager_port: int, runbook: str, *changes: tuple[str, str]
) -> Iterator[str]:
    """A Prometheus as the compose file starts it, with other targets and intervals. Yields its address.

    Its rules are written for the address ``runbook``, and then ``changes`` are made in them.
    """
    url = f"http://127.0.0.1:{port}"
    command = [argument.replace("http://localhost:9090", url) for argument in laid_out("prometheus", root)]
    command = ["prometheus", *command, f"--web.listen-address=127.0.0.1:{port}"]
    address = {"SAVINGS_EXPORTER_RUNBOOK_URL": runbook}
    written = run_cli("assets", "--output", str(root / "etc"), "--force", env=address)
    assert written.returncode == 0, written.stderr
    edit(
        root / "etc/prometheus/prometheus.yml",
        ('"exporter:9478"', ", ".join(f'"{target}"' for target in targets)),
        ("alertmanager:9093", f"127.0.0.1:{alertmanager_port}"),
        ("localhost:9090", f"127.0.0.1:{port}"),
        (r"_interval: 15s", "_interval: 500ms"),
    )
    for name in ("recording.yml", "alerts.yml"):
        text = (root / "etc/prometheus/rules" / name).read_text()
        edit(root / "etc/prometheus/rules" / name, *[change for change in changes if re.search(change[0], text)])
    with started(command, root / "log", f"{url}/-/ready"):
        yield url


@contextmanager
def listening(answer: Callable[[BaseHTTPRequestHandler, bytes], int | None]) -> Iterator[str]:
    """A server that answers every POST with a status, or closes the connection if it is None. Yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status = answer(self, self.rfile.read(int(self.headers["Content-Length"])))
            if status is not None:
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

        def do_GET(self) -> None:
            self.send_error(answer(self, b"") or 500)

        def log_message(self, *_arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
