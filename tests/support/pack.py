"""The programs that are shipped together, started as the compose file starts them."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from support import ROOT, WAIT_SECONDS, eventually

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DASHBOARDS = ROOT / "dashboards"

# Debian names the program differently.
ALERTMANAGER = shutil.which("prometheus-alertmanager") or "alertmanager"


def dockerfile(instruction: str) -> list[str]:
    """What follows an instruction, each time that it is given."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return re.findall(rf"^{instruction}\s+(.*)$", text, flags=re.MULTILINE)


def healthcheck() -> list[str]:
    """The image's healthcheck, as a command."""
    command: list[str] = json.loads(dockerfile("HEALTHCHECK")[-1].partition("CMD")[2])
    return command


def mounts(service: str) -> list[list[str]]:
    """Source and target of a service's mounts, and ``ro`` where it must not write."""
    return [mount.split(":") for mount in SERVICES[service].get("volumes", [])]


def laid_out(service: str, root: Path) -> list[str]:
    """Lay a service's mounts out below a directory as they are in its container; its command, with paths in there."""
    for source, target, *_ in mounts(service):
        place = root / target.lstrip("/")
        if source.startswith("."):
            shutil.copytree(ROOT / source, place)
        else:
            place.mkdir(parents=True)
    command = [*SERVICES[service].get("entrypoint", []), *SERVICES[service]["command"]]
    return [re.sub(r"^(--?[\w.-]+=)?/", rf"\g<1>{root}/", argument) for argument in command]


def edit(path: Path, *changes: tuple[str, str]) -> None:
    """Replace patterns in a file, each of which must be there."""
    text = path.read_text()
    for pattern, replacement in changes:
        text, count = re.subn(pattern, replacement, text)
        assert count, f"{path} has no {pattern}"
    path.write_text(text)


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
    """A program, from when it answers at an address."""
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
    """The service as the image starts it, with its store and its port elsewhere; its address."""
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
    """An Alertmanager as the compose file starts it, with changes in its configuration; its address."""
    command = [ALERTMANAGER, *laid_out("alertmanager", root), f"--web.listen-address=127.0.0.1:{port}"]
    edit(root / "etc/alertmanager/alertmanager.yml", *changes)
    url = f"http://127.0.0.1:{port}"
    with started(command, root / "log", f"{url}/-/ready"):
        yield url


@contextmanager
def prometheus(
    root: Path, port: int, targets: list[str], alertmanager_port: int, *changes: tuple[str, str]
) -> Iterator[str]:
    """A Prometheus as the compose file starts it, with its targets and intervals replaced; its address.

    ``changes`` are made in its rules.
    """
    url = f"http://127.0.0.1:{port}"
    command = [argument.replace("http://localhost:9090", url) for argument in laid_out("prometheus", root)]
    command = ["prometheus", *command, f"--web.listen-address=127.0.0.1:{port}"]
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
    """A server that answers every POST with a status, or hangs up on None; its address."""

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
