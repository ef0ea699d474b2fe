"""Run the commands and programs of README and docs as printed, in a new copy and with a new home directory."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.paths import DATA, ROOT
from tests.support.wait import WAIT_SECONDS, eventually

DOCUMENTS = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))]
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SERVICE = re.compile(r"make run|savings-exporter (serve|watch)\b|/(uvicorn|gunicorn) ")
PORTS = (9478, 8000)

NOT_RUN = {
    "make test": "it is what runs this",
    "apt-get install": "it changes the machine",
    "make bench": "it takes half an hour; the unit tests run each work for a moment",
}
EXAMPLES = "docs/embedding.md"
"""Its Python is in files that have tests of their own."""


def blocks(document: str, kind: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return [content for language, content in BLOCK.findall(text) if language == kind]


def commands(block: str) -> list[str]:
    return [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def is_listening(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_SECONDS)
    try:
        connection.request("GET", "/")
        return bool(connection.getresponse().status)
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


class Copy:
    """A copy of the files in git, with an environment as ``make run`` creates it, and a home directory."""

    def __init__(self, folder: Path) -> None:
        self.path, self.home = folder / "copy", folder / "home"
        known = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, known.split("\0")):
            target = self.path / name
            if (ROOT / name).exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, target)
        (self.home / ".headroom").mkdir(parents=True)
        shutil.copy(DATA / "headroom" / "v6-latest" / "proxy_savings.json", self.home / ".headroom")
        # Variables of the tests' own environment must not affect the copy.
        names = [name for name in os.environ if not name.startswith(("PYTHON", "VIRTUAL_ENV", "SAVINGS_", "XDG_"))]
        self.environment = {
            name: os.environ[name] for name in names if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
        }
        self.environment |= {"HOME": str(self.home), "PYTHON": sys.executable}

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=self.path, env=self.environment, capture_output=True, text=True, check=False)

    @contextmanager
    def service(self, command: str) -> Iterator[None]:
        """A command that runs until it is stopped, once it answers."""
        process = subprocess.Popen(["bash", "-c", command], cwd=self.path, env=self.environment, start_new_session=True)
        try:
            eventually(lambda: process.poll() is not None or any(map(answers, PORTS)), f"{command} to answer")
            assert process.poll() is None, f"{command} ended with {process.returncode}"
            yield
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(WAIT_SECONDS)
            eventually(lambda: not any(map(is_listening, PORTS)), "the service to end")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    copy = Copy(tmp_path_factory.mktemp("fresh"))
    done = copy.run("make", ".venv/.package")
    assert done.returncode == 0, done.stderr
    return copy


@pytest.mark.needs("linux", "curl", "usual-ports")
@pytest.mark.parametrize("document", [document for document in DOCUMENTS if blocks(document, "sh")])
def test_commands(copy: Copy, document: str) -> None:
    with ExitStack() as services:
        for command in [command for block in blocks(document, "sh") for command in commands(block)]:
            if command.startswith(tuple(NOT_RUN)):
                continue
            if SERVICE.search(command):
                # The documents say that one service is stopped before the other starts.
                services.close()
                services.enter_context(copy.service(command))
            else:
                done = copy.run("bash", "-c", command)
                assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
                assert '"status":4' not in done.stdout


@pytest.mark.parametrize(
    "document", [document for document in DOCUMENTS if blocks(document, "python") and document != EXAMPLES]
)
def test_programs(tmp_path: Path, document: str) -> None:
    """All blocks of a document are one program."""
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks(document, "python"))],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "proxy_savings.json").exists()


def test_each_document_is_linked() -> None:
    """A reader finds each page from the README."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [document for document in DOCUMENTS[1:] if f"({document})" not in readme] == []


@pytest.mark.parametrize("document", [*DOCUMENTS, "CONTRIBUTING.md"])
def test_links(document: str) -> None:
    """Each link leads to a file that is there, and to a heading in it."""
    text = (ROOT / document).read_text(encoding="utf-8")
    wrong = []
    for link in re.findall(r"\]\(([^):]+)\)", text):
        name, _, anchor = link.partition("#")
        target = (ROOT / document).parent / name if name else ROOT / document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert wrong == []


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
