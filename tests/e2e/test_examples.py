"""Run each example of docs/embedding.md as the page says, with real servers and workers."""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from savings_exporter import SavingsTracker
from tests.support.paths import ROOT
from tests.support.scrape import parsed
from tests.support.service import free_port
from tests.support.wait import WAIT_SECONDS, eventually

FOLDER = ROOT / "docs" / "examples"
PAGE = (ROOT / "docs" / "embedding.md").read_text(encoding="utf-8")
REQUESTS = 40

GUNICORN = ["gunicorn", "--workers", "4"]
SERVED = {
    "fastapi": ["uvicorn", "fastapi_app:app", "--workers", "4"],
    "flask": [*GUNICORN, "flask_app:application"],
    "flask-preload": [*GUNICORN, "--preload", "flask_app:application"],
    "django": [*GUNICORN, "django_app:application"],
    "django-preload": [*GUNICORN, "--preload", "django_app:application"],
}


def environment(store: Path) -> dict[str, str]:
    return {**os.environ, "SAVINGS_STORE": str(store), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


@contextmanager
def served(name: str, store: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """One of the servers, on a free port, in its own process group."""
    port = free_port()
    command, *arguments = SERVED[name]
    at = ["--port", str(port)] if command == "uvicorn" else ["--bind", f"127.0.0.1:{port}"]
    process = subprocess.Popen(
        [sys.executable, "-m", command, *arguments, *at], cwd=FOLDER, env=environment(store), start_new_session=True
    )
    try:
        yield process, port
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ask(port: int, method: str, path: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_SECONDS)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        body = answer.read().decode()
        if answer.status in (301, 307):
            return ask(port, method, f"/{answer.headers['Location'].split('/', 3)[3]}")
        assert answer.status == 200, body
        return body
    finally:
        connection.close()


def is_up(port: int) -> bool:
    try:
        return bool(ask(port, "GET", "/savings/metrics"))
    except (OSError, http.client.HTTPException):
        return False


def totals(store: Path) -> tuple[int, list[str]]:
    """The requests in a store, and the journals that its document does not hold."""
    left = [path.name for path in store.parent.iterdir() if ".journal." in path.name]
    with SavingsTracker(store) as tracker:
        return tracker.snapshot().lifetime.requests, left


@pytest.mark.needs("frameworks")
@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("name", SERVED)
def test_server(store_path: Path, name: str, how: str) -> None:
    """Every worker shows the sum of all. After a stop the document is complete; after a kill nothing is lost."""
    with served(name, store_path) as (process, port):
        eventually(lambda: is_up(port), f"{name} to answer")
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: ask(port, "POST", "/complete"), range(REQUESTS)))
        assert [re.sub(r"\s", "", answer) for answer in answers] == ['{"durable":true}'] * REQUESTS
        for _ in range(8):
            scraped = parsed(ask(port, "GET", "/savings/metrics"))
            assert sum(n for key, n in scraped.items() if key.startswith("savings_requests_total{")) == REQUESTS
        if how == "SIGTERM":
            process.terminate()
            assert process.wait(WAIT_SECONDS) == 0
        else:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    requests, left = totals(store_path)
    assert requests == REQUESTS
    if how == "SIGTERM":
        assert left == []


@pytest.mark.parametrize(
    ("name", "said", "records"), [("script.py", "durable", 1), ("asyncio_app.py", "20 durable", 20)]
)
def test_program(store_path: Path, name: str, said: str, records: int) -> None:
    done = subprocess.run(
        [sys.executable, FOLDER / name], env=environment(store_path), capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{said}\n"
    assert totals(store_path) == (records, [])


def test_page_shows_the_examples() -> None:
    """The page holds each file as it is, and no other Python."""
    shown = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert sorted(shown) == sorted(path.read_text(encoding="utf-8") for path in FOLDER.glob("*.py"))
