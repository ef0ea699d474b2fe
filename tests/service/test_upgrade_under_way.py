"""A package that is upgraded while a service runs: the service goes on with what it was started with.

The files of the package are removed, and an audit hook notes each module that is imported after that, also of
dependencies, and each document and page that is opened.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.paths import DATA, ROOT
from tests.support.service import Service, free_port
from tests.support.wait import WAIT_SECONDS, eventually

START = """
import os, sys

HERE = os.path.dirname(os.path.abspath(__file__))
MARK, NOTES = os.path.join(HERE, "upgraded"), os.path.join(HERE, "notes")

def note(event, arguments):
    if event == "import" or (event == "open" and isinstance(arguments[0], str) and arguments[0].endswith(LATE)):
        if os.path.exists(MARK):
            descriptor = os.open(NOTES, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(descriptor, f"{event} {arguments[0]}\\n".encode())
            os.close(descriptor)

LATE = (".md", ".svg", ".png", ".html", ".css", ".js", "METADATA")
sys.addaudithook(note)
from savings_exporter import cli
cli.main()
"""


class Installed:
    """A copy of the package that a service runs from."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "savings_exporter", directory / "savings_exporter", ignore=ignored)
        for shipped in ("docs", "dashboards", "deploy"):
            if (ROOT / shipped).exists():
                shutil.copytree(ROOT / shipped, directory / "savings_exporter" / shipped, ignore=ignored)
        (directory / "start.py").write_text(START)

    @contextmanager
    def running(self, *arguments: str, env: dict[str, str] | None = None) -> Iterator[Service]:
        """A service that runs from this copy."""
        address = f"127.0.0.1:{free_port()}"
        process = subprocess.Popen(
            [sys.executable, str(self._directory / "start.py"), *arguments, "--web.listen-address", address],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self._directory,
            env={**os.environ, **(env or {})},
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("metrics: "):
                    break
            yield Service(process, "", f"http://{address}")
        finally:
            process.kill()
            process.communicate()

    def upgrade(self) -> None:
        """Remove the package's files."""
        (self._directory / "upgraded").touch()
        shutil.rmtree(self._directory / "savings_exporter")

    def late(self) -> str:
        """What was looked up after that."""
        notes = self._directory / "notes"
        return notes.read_text() if notes.exists() else ""


@pytest.fixture
def installed(tmp_path: Path) -> Installed:
    """A copy of the package."""
    return Installed(tmp_path / "lib")


def use_each_route(service: Service) -> None:
    """Use the routes, also in ways that are refused."""
    for accept in (
        "text/plain",
        "application/openmetrics-text; version=1.0.0",
        "application/openmetrics-text;version=x",
    ):
        status, text = service.get("/metrics", {"Accept": accept, "Accept-Encoding": "identity"})
        assert (status, "savings_" in text) == (200, True)
    for path in ("/", "/v1/savings", "/v1/history", "/v1/history?format=csv&by=day", "/docs/runbook", "/docs/metrics"):
        assert service.get(path)[0] == 200
    for path in ("/-/healthy", "/-/ready"):
        assert service.get(path)[0] == 200
    for path in ("/none", "/docs/none", "/v1/history?by=none", "/v1/history?from=none"):
        assert service.get(path)[0] in (404, 422)
    headers = {"Accept-Encoding": "gzip", "traceparent": f"00-{'1' * 32}-{'2' * 16}-01"}
    with urllib.request.urlopen(urllib.request.Request(service.url, headers=headers), timeout=WAIT_SECONDS) as page:
        assert page.read()
    assert service.post({"model": "m", "tokens_saved": 5})[0] in (200, 405)
    for body in (b"{", b"\xff", b"[]", b'{"model": 5}', b'{"records": []}', b'{"model": "m", "tokens_saved": 1e400}'):
        assert service.post(body)[0] in (400, 405, 422)
    assert service.post({}, headers={"Content-Type": "text/plain"})[0] in (405, 415)
    assert service.post({"model": "m", "tokens_saved": 5}, headers={"Idempotency-Key": "k"})[0] in (200, 405)
    assert service.post({"model": "m", "tokens_saved": 6}, headers={"Idempotency-Key": "k"})[0] in (405, 422)
    host, _, port = service.url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=WAIT_SECONDS) as raw:
        raw.sendall(b"nonsense\r\n\r\n")
        assert raw.recv(1024).startswith(b"HTTP/1.1 400")


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables", [{}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_METRICS_EXPORTER": "otlp"}]
)
def test_serve(installed: Installed, store_path: Path, variables: dict[str, str]) -> None:
    with installed.running("serve", "--store", str(store_path), "--enable-drill", env=variables) as service:
        installed.upgrade()
        use_each_route(service)
        drill = [sys.executable, "-m", "savings_exporter", "drill", "dir-fsync", "--store", str(store_path)]
        assert subprocess.run(drill, cwd=ROOT, capture_output=True, timeout=WAIT_SECONDS).returncode == 0
        eventually(lambda: service.get("/-/healthy")[0] in (200, 503), "an answer")
        use_each_route(service)
        status, _, logged = service.stop()
    assert (status, "Traceback" in logged, "Error:" in logged) == (0, False, False)
    assert installed.late() == ""


@pytest.mark.slow
def test_watch(installed: Installed, tmp_path: Path) -> None:
    path = tmp_path / "proxy_savings.json"
    document = (DATA / "headroom" / "v6-latest" / "proxy_savings.json").read_text()
    path.write_text(document)
    with installed.running("watch", str(path)) as service:
        installed.upgrade()
        for content in (
            document.replace("2026-05", "9999-05"),
            "{",
            '{"schema_version": 99}',
            json.dumps([]),
            document,
        ):
            path.write_text(content)
            assert service.metrics()
            service.get("/-/healthy")
        use_each_route(service)
        status, _, logged = service.stop(signal.SIGTERM)
    assert (status, "Traceback" in logged) == (0, False)
    assert installed.late() == ""


@pytest.mark.slow
def test_settings_that_change(installed: Installed, tmp_path: Path, store_path: Path) -> None:
    """The web configuration is read again, and sources are followed."""
    token, config, prices = tmp_path / "token", tmp_path / "web.yml", tmp_path / "prices.yml"
    token.write_text("first")
    config.write_text(f"authorization: {{credentials_file: {token}}}")
    prices.write_text("models: {m: {input: 1}}")
    headroom = tmp_path / "headroom"
    headroom.mkdir()
    document = DATA / "headroom" / "v6-latest" / "proxy_savings.json"
    shutil.copy(document, headroom)
    arguments = ["--web.config.file", str(config), "--prices", str(prices), "--discover", "--store", str(store_path)]
    with installed.running("serve", *arguments, env={"HEADROOM_WORKSPACE_DIR": str(headroom)}) as service:
        installed.upgrade()
        token.write_text("second")
        (headroom / document.name).write_text(document.read_text() + " ")
        service.process.send_signal(signal.SIGHUP)
        allowed = {"Authorization": "Bearer second"}
        eventually(lambda: service.get("/metrics", allowed)[0] == 200, "the token to be read again")
        assert service.post({"model": "m", "tokens_saved": 5}, headers=allowed)[0] == 200
        assert service.post({"model": "m", "tokens_saved": 5})[0] == 401
        good = config.read_text()
        for wrong in ("authorization: [", "authorization: {none: 1}", "tls_server_config: {cert_file: a, key_file: b}"):
            for content, successful in ((wrong, 0), (good, 1)):
                config.write_text(content)
                service.process.send_signal(signal.SIGHUP)
                shown = f"savings_web_config_last_reload_successful {successful}.0"
                eventually(lambda shown=shown: shown in service.get("/metrics", allowed)[1], shown)  # type: ignore[misc]
        followed = 'savings_source_tokens_saved_total{source="headroom"}'
        eventually(lambda: followed in service.get("/metrics", allowed)[1], "the savings of Headroom")
        status, _, logged = service.stop()
    assert (status, "Traceback" in logged) == (0, False)
    assert installed.late() == ""
