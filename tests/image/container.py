"""Run the image as the compose file says, with the runtime that Docker uses as well (runc)."""

from __future__ import annotations

import ctypes
import json
import re
import signal
import socket
import subprocess
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from tests.image.build import BuiltImage
from tests.support.compose import SERVICES, compose_file, mounts
from tests.support.wait import WAIT_SECONDS, eventually

SERVICE = SERVICES["exporter"]

PORT = int(SERVICE["ports"][0].rpartition(":")[2])

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET


class Container:
    """A running container."""

    def __init__(self, name: str, image: BuiltImage, directory: Path, process: subprocess.Popen[bytes]) -> None:
        self._name = name
        self._image = image
        self._directory = directory
        self._process = process

    @property
    def log(self) -> str:
        """What the container has printed so far."""
        return (self._directory / "log").read_text()

    def exec(self, *command: str, user: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command in the container to its end, as ``docker exec`` does: by default as the container's user."""
        as_user = ["--user", user] if user else []
        return subprocess.run(
            [*_runc(self._directory), "exec", *as_user, self._name, *command],
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS * 2,
        )

    def has_started(self) -> bool:
        """Whether the service has printed its whole announcement, which it does when it listens."""
        assert self._process.poll() is None, self.log
        return "\nmetrics: " in self.log

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, str]:
        """Send a request to the published port. Return status and body."""
        connection = _Published((self._directory / "pid").read_text())
        try:
            sent = json.dumps(body) if body is not None else None
            connection.request(method, path, sent, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def stop(self) -> int:
        """Send the stop signal, as ``docker stop`` does. Return the exit status. A container that is late fails."""
        number = signal.Signals[self._image.config.get("StopSignal") or "SIGTERM"]
        subprocess.run([*_runc(self._directory), "kill", self._name, str(int(number))], check=True)
        return self._process.wait(timeout=_grace_seconds())


@contextmanager
def started(image: BuiltImage, directory: Path, volume: Path, **environment: str) -> Iterator[Container]:
    """A container whose service listens. Nothing of it is left at the end, except what it wrote to the volume.

    ``volume`` is created if needed. ``environment`` is that of ``docker compose up``; with ``SAVINGS_EXPORTER_WEB`` it
    is used with ``deploy/compose/secure.yml``.
    """
    directory.mkdir()
    if not volume.exists():
        _make_volume(image, volume)
    _configure(image, directory, volume, environment)
    name = f"savings-test-{uuid.uuid4().hex}"
    command = [*_runc(directory), "run", "--bundle", str(directory), "--pid-file", str(directory / "pid"), name]
    with (directory / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        container = Container(name, image, directory, process)
        try:
            eventually(container.has_started, "the service in the container to start")
            yield container
        finally:
            # Without this process a container goes on running. One that has ended is deleted already.
            process.kill()
            deleted = subprocess.run([*_runc(directory), "delete", "--force", name], capture_output=True, text=True)
            assert not (directory / "state" / name).exists(), deleted.stderr


def _runc(directory: Path) -> list[str]:
    """The runtime, which keeps the state of a container in its directory."""
    return ["runc", "--root", str(directory / "state")]


def _make_volume(image: BuiltImage, volume: Path) -> None:
    """Make a new volume as Docker does: with the contents, the owner and the mode of the image's directory."""
    (target,) = image.config["Volumes"]
    subprocess.run(["cp", "--archive", image.root / target.lstrip("/"), volume], check=True)


def _configure(image: BuiltImage, directory: Path, volume: Path, environment: dict[str, str]) -> None:
    """Write the runtime's configuration: its default, the image's configuration and the compose file's service."""
    subprocess.run(["runc", "spec", "--bundle", directory], check=True)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["root"] = {"path": str(image.root), "readonly": SERVICE.get("read_only", False)}
    config["process"].update(
        terminal=False,
        user=dict(zip(("uid", "gid"), map(int, (image.config.get("User") or "0:0").split(":")), strict=True)),
        args=[*image.config["Entrypoint"], *image.config["Cmd"]],
        env=[*image.config["Env"], *_variables(environment)],
        cwd=image.config.get("WorkingDir") or "/",
        noNewPrivileges="no-new-privileges:true" in SERVICE.get("security_opt", []),
        rlimits=[],
    )
    if "ALL" in SERVICE.get("cap_drop", []):
        config["process"]["capabilities"] = {}
    config["mounts"] += [
        {"destination": target, "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=1777"]}
        for target in SERVICE.get("tmpfs", [])
    ]
    (data,) = [target for _, target in mounts("exporter")]
    binds = [(str(volume), data, "rw"), *_mounts_of_web_config(environment)]
    config["mounts"] += [
        {"destination": target, "type": "bind", "source": source, "options": ["bind", mode]}
        for source, target, mode in binds
    ]
    path.write_text(json.dumps(config))


def _services(environment: dict[str, str]) -> list[dict[str, Any]]:
    """The service in the compose files that are used."""
    files = ["docker-compose.yml", *(["deploy/compose/secure.yml"] if "SAVINGS_EXPORTER_WEB" in environment else [])]
    return [compose_file(name, **environment)["services"]["exporter"] for name in files]


def _variables(environment: dict[str, str]) -> list[str]:
    variables = {name: value for service in _services(environment) for name, value in service["environment"].items()}
    return [f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in variables.items()]


def _mounts_of_web_config(environment: dict[str, str]) -> list[tuple[str, str, str]]:
    return [
        (source, target, options.partition(",")[0])
        for service in _services(environment)[1:]
        for source, target, options in (mount.split(":") for mount in service["volumes"])
    ]


def _grace_seconds() -> int:
    """How long Docker waits for the end of the service before it kills it."""
    units = {"m": 60, "s": 1}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([ms])", SERVICE["stop_grace_period"]))


class _Published(HTTPConnection):
    """A connection to the published port.

    Docker forwards it to an address of the container that is not 127.0.0.1, so a service that listens only there is
    not reached. The container's network has no way out, but 127.0.0.2 is such an address as well.
    """

    def __init__(self, pid: str) -> None:
        super().__init__("127.0.0.2", PORT, timeout=WAIT_SECONDS)
        self._pid = pid

    def connect(self) -> None:
        """Connect from the container's network. A socket stays in the network in which it was created."""
        # A thread enters a network, not a process; this thread ends after that.
        with ThreadPoolExecutor(1) as pool:
            self.sock = pool.submit(self._connected).result()

    def _connected(self) -> socket.socket:
        with open(f"/proc/{self._pid}/ns/net") as network:
            if ctypes.CDLL(None, use_errno=True).setns(network.fileno(), _NEW_NETWORK) != 0:
                raise OSError(ctypes.get_errno(), "setns")
        return socket.create_connection((self.host, self.port), timeout=self.timeout)
