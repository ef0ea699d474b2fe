"""What a systemd unit relies on: notifications, the watchdog, reload, the state directory."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from savings_exporter.service.systemd import Systemd
from tests.support.paths import ROOT
from tests.support.service import run_cli, running
from tests.support.wait import WAIT_SECONDS, eventually

pytestmark = pytest.mark.needs("linux")

UNIT = ROOT / "deploy/systemd/savings-exporter.service"
SAVING = {"model": "m", "tokens_saved": 1}
TENTH_OF_A_SECOND = "100000"


class Manager:
    """The socket of a service manager, and the variables that name it."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(f"\0{address[1:]}" if address.startswith("@") else address)
        self.socket.settimeout(WAIT_SECONDS)
        self.variables = {"NOTIFY_SOCKET": address}

    def told(self) -> list[str]:
        """The lines of the next notification."""
        return self.socket.recv(4096).decode().splitlines()

    def told_at_last(self, line: str) -> list[str]:
        """The lines of the next notification that has this one."""
        while line not in (lines := self.told()):
            pass
        return lines

    def forget(self) -> None:
        """Drop the notifications that have come so far."""
        self.socket.setblocking(False)
        try:
            while self.socket.recv(4096):
                pass
        except BlockingIOError:
            self.socket.settimeout(WAIT_SECONDS)


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    made = Manager(str(tmp_path / "notify") if request.param == "path" else f"@savings-exporter-test-{os.getpid()}")
    yield made
    made.socket.close()


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit, with this environment's program: systemd-analyze looks whether there is one."""
    copy = tmp_path / UNIT.name
    program = Path(sys.executable).parent / "savings-exporter"
    copy.write_text(UNIT.read_text().replace("/opt/savings-exporter/bin/savings-exporter", str(program)))
    return copy


def analyze(*arguments: str | Path) -> str:
    done = subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=WAIT_SECONDS)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.needs("systemd")
def test_unit_is_valid(unit: Path) -> None:
    analyze("verify", "--man=no", unit)


@pytest.mark.needs("systemd")
def test_unit_is_hardened(unit: Path) -> None:
    shown = re.search(r"exposure level for \S+: ([\d.]+)", analyze("security", "--offline=true", unit))
    assert shown is not None
    assert float(shown[1]) < 2.0


def test_ready_and_stopping(store_path: Path, manager: Manager) -> None:
    with running("serve", "--store", str(store_path), env=manager.variables) as service:
        assert manager.told() == ["READY=1", "STATUS=answers requests"]
        assert service.get("/-/ready")[0] == 200
        service.process.send_signal(signal.SIGTERM)
        assert manager.told()[0] == "STOPPING=1"
        assert service.stop()[0] == 0


def test_watch_notifies(store_path: Path, manager: Manager) -> None:
    assert run_cli("record", "--store", str(store_path), "--model", "m", "--tokens-saved", "1").returncode == 0
    with running("watch", str(store_path), env=manager.variables):
        assert manager.told()[0] == "READY=1"


def test_not_ready_if_the_store_does_not_open(store_path: Path, manager: Manager) -> None:
    store_path.write_text("not a document")
    (store_path.parent / f"{store_path.name}.days.00000001").mkdir()
    done = run_cli("serve", "--store", str(store_path), "--web.listen-address", "127.0.0.1:0", env=manager.variables)
    assert done.returncode == 1
    manager.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        manager.told()


@pytest.mark.needs("root")
def test_watchdog_is_fed_while_the_disk_hangs(store_path: Path, manager: Manager) -> None:
    """A restart would lose the pending records, and the disk would still hang."""
    variables = {**manager.variables, "WATCHDOG_USEC": TENTH_OF_A_SECOND}
    with running("serve", "--store", str(store_path), env=variables, faulty=True) as service:
        service.tell("hang fsync_journal")
        sending = threading.Thread(target=service.post, args=(SAVING,), daemon=True)
        sending.start()
        eventually(lambda: service.metrics()["savings_records_pending"] == 1, "the record to be pending")
        manager.forget()
        assert [manager.told() for _ in range(3)] == [["WATCHDOG=1"]] * 3
        service.tell("mend")
        sending.join()


def test_watchdog_is_not_fed_by_a_loop_that_hangs(manager: Manager) -> None:
    async def hang_after_start() -> list[str]:
        Systemd({**manager.variables, "WATCHDOG_USEC": "10000"}).ready("answers")
        assert manager.told()[0] == "READY=1"
        manager.told_at_last("WATCHDOG=1")
        # Ten periods, in which the loop does not run.
        time.sleep(0.05)
        manager.socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            manager.told()
        manager.socket.settimeout(WAIT_SECONDS)
        return await asyncio.to_thread(manager.told)

    assert asyncio.run(hang_after_start()) == ["WATCHDOG=1"]


def test_watchdog_of_another_process(store_path: Path, manager: Manager) -> None:
    variables = {**manager.variables, "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}
    with running("serve", "--store", str(store_path), env=variables) as service:
        assert manager.told()[0] == "READY=1"
        service.process.send_signal(signal.SIGTERM)
        assert manager.told()[0] == "STOPPING=1"


def test_reload_without_a_file_does_not_stop_it(store_path: Path, manager: Manager) -> None:
    with running("serve", "--store", str(store_path), env=manager.variables) as service:
        manager.told()
        service.process.send_signal(signal.SIGHUP)
        assert service.post(SAVING)[0] == 200
        assert service.process.poll() is None
        service.process.send_signal(signal.SIGTERM)
        assert manager.told()[0] == "STOPPING=1"


@pytest.mark.parametrize("address", ["/nowhere/notify", "relative", "@nothing-listens-here", ""])
def test_a_manager_that_is_gone_stops_nothing(store_path: Path, address: str) -> None:
    variables = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "many"}
    with running("serve", "--store", str(store_path), env=variables) as service:
        assert service.post(SAVING)[0] == 200
        assert service.stop()[0] == 0


def test_made_up_savings_are_not_in_the_state_directory(tmp_path: Path) -> None:
    with running("serve", "--demo", env={"STATE_DIRECTORY": str(tmp_path)}) as service:
        assert str(tmp_path) not in service.announcement
    assert list(tmp_path.iterdir()) == []


def test_a_command_of_names_changes_the_store_of_names(tmp_path: Path) -> None:
    """Also if the environment names another as the default."""
    state, store = tmp_path / "state", tmp_path / "mine.json"
    state.mkdir()
    assert run_cli("record", "--store", str(store), "--model", "m", "--tokens-saved", "1").returncode == 0
    done = run_cli("names", "--store", str(store), "fold", "model", "m", env={"STATE_DIRECTORY": str(state)})
    assert (done.returncode, done.stderr) == (0, "")
    assert list(state.iterdir()) == []


def test_default_store_in_the_state_directory(tmp_path: Path) -> None:
    state, other = tmp_path / "state", tmp_path / "other"
    state.mkdir()
    other.mkdir()
    variables = {"STATE_DIRECTORY": f"{state}:{other}"}
    recorded = run_cli("record", "--model", "m", "--tokens-saved", "7", env=variables)
    assert (recorded.returncode, recorded.stderr) == (0, "")
    with running("serve", env=variables) as service:
        assert json.loads(service.get("/v1/savings")[1])["lifetime"]["tokens_saved"] == 7
        assert str(state / "proxy_savings.json") in service.announcement
    assert str(state) in run_cli("doctor", env=variables).stdout
    elsewhere = str(other / "mine.json")
    run_cli("record", "--store", elsewhere, "--model", "m", "--tokens-saved", "1", env=variables)
    assert (other / "mine.json").exists()
