"""Something else in the place of a file: a FIFO, a socket, a directory, a device, or a symlink to itself.

Opening a FIFO waits for another process unless it is opened with O_NONBLOCK.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.paths import DATA
from tests.support.service import run_cli, running

HEADROOM = DATA / "headroom" / "v6-latest" / "proxy_savings.json"
RECORD = ("record", "--model", "m", "--tokens-saved", "1")


def _socket(path: Path) -> None:
    # Relative, because the address of a socket is short.
    command = "import socket, sys; socket.socket(socket.AF_UNIX).bind(sys.argv[1])"
    subprocess.run([sys.executable, "-c", command, path.name], cwd=path.parent, check=True)


THINGS: dict[str, Callable[[Path], None]] = {
    "fifo": os.mkfifo,
    "socket": _socket,
    "directory": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/null"),
    "loop": lambda path: path.symlink_to(path.name),
}
SAID = r"[Nn]ot a regular file|[Ii]s a directory|Too many levels of symbolic links"


def put(thing: str, path: Path) -> None:
    """Put something else in the place of a file."""
    path.unlink(missing_ok=True)
    THINGS[thing](path)


@pytest.mark.slow
@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("name", ["", ".lock", ".import"])
def test_error_names_the_file(store_path: Path, name: str, thing: str) -> None:
    assert run_cli(*RECORD, "--store", str(store_path)).returncode == 0
    path = Path(f"{store_path}{name}")
    put(thing, path)
    commands = (["import", str(HEADROOM)], *([RECORD, ["show"], ["verify"]] if name != ".import" else []))
    for command in commands:
        done = run_cli(*command, "--store", str(store_path))
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert str(path) in done.stderr or os.path.realpath(path) in done.stderr
        assert re.search(SAID, done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("option", ["import", "watch", "--prices", "--web.config.file", "--settings"])
def test_other_files(tmp_path: Path, store_path: Path, option: str, thing: str) -> None:
    path = tmp_path / "proxy_savings.json"
    put(thing, path)
    command = {
        "import": ["import", "--store", str(store_path)],
        "watch": ["watch"],
        "--prices": [*RECORD, "--store", str(store_path), option],
        "--web.config.file": ["serve", "--store", str(store_path), option],
        "--settings": ["assets", "--output", str(tmp_path / "assets"), option],
    }[option]
    done = run_cli(*command, str(path))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert str(path) in done.stderr or os.path.realpath(path) in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("thing", ["fifo", "directory"])
@pytest.mark.parametrize("pattern", ["s.json", "s.json.lock", "s.json.previous", "s.json.writer.*", "s.json.journal.*"])
def test_running_service_answers(tmp_path: Path, pattern: str, thing: str) -> None:
    store = tmp_path / "s.json"
    saving = {"model": "m", "tokens_saved": 5}
    with running("serve", "--store", str(store)) as service, running("watch", str(store)) as watching:
        assert service.post(saving)[0] == 200
        assert watching.metrics()
        for path in tmp_path.glob(pattern):
            put(thing, path)
        assert service.post(saving)[0] in (200, 202)
        for each in (service, watching):
            assert each.metrics()
            for route in ("/v1/savings", "/-/healthy", "/"):
                assert each.get(route)[0] in (200, 503)
            assert each.stop(signal.SIGTERM)[0] in (0, 1)
