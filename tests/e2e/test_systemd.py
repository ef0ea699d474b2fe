"""The unit in a real systemd: the sandbox, the user that exists only meanwhile, reload, restart and the watchdog."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT
from tests.support.service import free_port
from tests.support.systemd import LIBRARY_PATH, UNIT, Manager, systemd
from tests.support.wait import WAIT_SECONDS, eventually

pytestmark = [pytest.mark.needs("linux", "root", "mount", "systemd"), pytest.mark.slow]

STORE = "/var/lib/private/savings-exporter/proxy_savings.json"


@pytest.fixture
def address() -> str:
    return f"127.0.0.1:{free_port()}"


def asked(address: str, body: Any = None, token: str = "") -> Any:
    """The answer of ``/v1/savings``; the status of one that is refused."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(f"http://{address}/v1/savings", data, headers)
        with urllib.request.urlopen(request, timeout=WAIT_SECONDS) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def record(address: str, tokens: int) -> None:
    assert asked(address, {"model": "m", "tokens_saved": tokens})["durable"]


def total(address: str) -> int:
    saved: int = asked(address)["lifetime"]["tokens_saved"]
    return saved


def start(manager: Manager) -> None:
    """Start the unit: systemctl returns when the service is ready."""
    try:
        manager.run("systemctl", "start", UNIT)
    except AssertionError:
        raise AssertionError(manager.run("cat", "/run/service.log")) from None


def test_service_keeps_its_store_in_the_sandbox(tmp_path: Path, address: str) -> None:
    with systemd(tmp_path, address) as manager:
        start(manager)
        assert manager.property("StatusText") == "answers requests"
        record(address, 1)
        process = manager.property("MainPID")
        manager.run("systemctl", "reload", UNIT)
        record(address, 2)
        assert manager.property("MainPID") == process
        manager.run("systemctl", "restart", UNIT)
        assert manager.property("MainPID") != process
        record(address, 4)
        assert total(address) == 7
        manager.run("systemctl", "stop", UNIT)
        owner, mode = manager.run("stat", "--format=%u %a", STORE).split()
        assert (int(owner) >= 61184, mode) == (True, "600")
        assert (manager.property("Result"), manager.property("NRestarts")) == ("success", "0")
        assert "level=error" not in manager.run("cat", "/run/service.log")


def test_command_as_the_user_of_the_service(tmp_path: Path, address: str) -> None:
    """While the service runs and while it does not. The files remain those of the service."""
    with systemd(tmp_path, address) as manager:
        start(manager)
        record(address, 1)
        run_as_service(manager, "record", "--model", "m", "--tokens-saved", "2")
        assert total(address) == 3
        manager.run("systemctl", "stop", UNIT)
        run_as_service(manager, "verify", "--repair")
        run_as_service(manager, "record", "--model", "m", "--tokens-saved", "4")
        start(manager)
        record(address, 8)
        assert total(address) == 15


def run_as_service(manager: Manager, *arguments: str) -> None:
    """Run a command as docs/deploy.md says, but without --pipe and --wait, which need a D-Bus daemon."""
    text = (ROOT / "docs/deploy.md").read_text()
    (documented,) = re.findall(r"^ *systemd-run (.*) \\\n *(\S+) verify --repair$", text, re.MULTILINE)
    options = [option for option in documented[0].split() if option not in ("--pipe", "--wait")]
    library = f"--property=Environment={LIBRARY_PATH}"
    manager.run("systemd-run", "--unit=command", *options, library, documented[1], *arguments)
    eventually(lambda: manager.property("ActiveState", "command") in ("inactive", "failed"), "the command to end")
    assert manager.property("Result", "command") == "success"


def test_watchdog_restarts_a_service_that_hangs(tmp_path: Path, address: str) -> None:
    with systemd(tmp_path, address, "WatchdogSec=2\nRestartSec=100ms\n") as manager:
        start(manager)
        record(address, 5)
        manager.run("kill", "-STOP", manager.property("MainPID"))
        eventually(lambda: manager.property("NRestarts") == "1", "the service to be restarted")
        eventually(lambda: manager.property("ActiveState") == "active", "the service to be ready again")
        assert total(address) == 5


def test_token_as_a_credential(tmp_path: Path, address: str) -> None:
    """As docs/deploy.md says."""
    (tmp_path / "web.yml").write_text("authorization: {credentials_file: token}")
    (tmp_path / "token").write_text("secret")
    (tmp_path / "token").chmod(0o600)
    drop_in = (
        f"LoadCredential=web.yml:{tmp_path}/web.yml\nLoadCredential=token:{tmp_path}/token\n"
        "Environment=SAVINGS_EXPORTER_WEB_CONFIG_FILE=%d/web.yml\n"
    )
    with systemd(tmp_path, address, drop_in) as manager:
        start(manager)
        assert asked(address) == 401
        assert asked(address, token="secret")["lifetime"]["requests"] == 0
        manager.run("systemctl", "reload", UNIT)
        assert asked(address, token="secret")["lifetime"]["requests"] == 0
