"""A real systemd as process 1 of namespaces of its own, which runs one unit of ours and nothing of the machine's."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.paths import ROOT
from tests.support.wait import WAIT_SECONDS, eventually

UNIT = "savings-exporter.service"
TARGETS = ("sysinit", "basic", "shutdown", "umount", "multi-user", "network-online")

PROGRAM = """#!/opt/python/bin/{python}
import sys
sys.path[:0] = ["/opt/project", "/opt/packages"]
from savings_exporter.cli import main
main()
"""

# For a Python that was built with a shared library.
LIBRARY_PATH = "LD_LIBRARY_PATH=/opt/python/lib"

DROP_IN = f"""[Service]
Environment=SAVINGS_EXPORTER_WEB_LISTEN_ADDRESS={{address}} {LIBRARY_PATH}
StandardError=append:/run/service.log
StandardOutput=append:/run/service.log
"""

# /run, /etc/systemd/system and /var/lib are the namespace's own, and so is /opt, which has the program.
BOOT = """
set -e
mount --make-rprivate /
mount -t proc proc /proc
umount --recursive /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
for place in /run /var/lib /opt; do mount -t tmpfs -o mode=755 tmpfs $place; done
mkdir -p /run/units /opt/savings-exporter/bin /opt/python /opt/packages /opt/project
mount --bind {base} /opt/python
mount --bind {packages} /opt/packages
mount --bind {project} /opt/project
cp {folder}/savings-exporter /opt/savings-exporter/bin
cp -R {folder}/units/. /run/units
mount --make-rshared /  # systemd expects it of a container
export container=test SYSTEMD_UNIT_PATH=/run/units
exec /lib/systemd/systemd --system --unit=multi-user.target --log-target=console --show-status=no
"""


class Manager:
    """The running systemd."""

    def __init__(self, process_id: int) -> None:
        self._inside = ("nsenter", "--target", str(process_id), "--all")

    def run(self, *command: str) -> str:
        """Run a command in the namespaces, and return its output."""
        done = subprocess.run([*self._inside, *command], capture_output=True, text=True, timeout=WAIT_SECONDS)
        assert done.returncode == 0, f"{shlex.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def property(self, name: str, unit: str = UNIT) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", unit, f"--property={name}", "--value").strip()


@contextmanager
def systemd(folder: Path, address: str, drop_in: str = "") -> Iterator[Manager]:
    """The unit as the project ships it, at an address, and with a drop-in. It is not started yet."""
    units = folder / "units"
    (units / f"{UNIT}.d").mkdir(parents=True)
    (units / UNIT).write_bytes((ROOT / "deploy/systemd" / UNIT).read_bytes())
    (units / f"{UNIT}.d" / "test.conf").write_text(DROP_IN.format(address=address) + drop_in)
    for target in TARGETS:
        (units / f"{target}.target").write_text(f"[Unit]\nDescription={target}\nDefaultDependencies=no\n")
    program = folder / "savings-exporter"
    program.write_text(PROGRAM.format(python=f"python{sys.version_info.major}.{sys.version_info.minor}"))
    program.chmod(0o755)
    places = {"base": sys.base_prefix, "packages": sysconfig.get_path("purelib"), "project": ROOT, "folder": folder}
    boot = BOOT.format(**{name: shlex.quote(str(place)) for name, place in places.items()})
    namespaces = ("--mount", "--pid", "--fork", "--uts", "--ipc", "--cgroup", "--kill-child")
    log = folder / "systemd.log"
    with _control_group(folder / "cgroup") as enter, log.open("wb") as output:
        command = ["unshare", *namespaces, "sh", "-c", boot]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, preexec_fn=enter, start_new_session=True
        )
        try:
            yield Manager(eventually(lambda: _booted(process), f"systemd to start: {log.read_text()}"))
        finally:
            process.kill()
            process.wait()


def _booted(process: subprocess.Popen[bytes]) -> int:
    """The process id of the systemd that answers; 0 while none does."""
    assert process.poll() is None
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    if not children:
        return 0
    asked = ("nsenter", "--target", children[0], "--all", "systemctl", "show", "--property=Version")
    return int(children[0]) if subprocess.run(asked, capture_output=True).returncode == 0 else 0


@contextmanager
def _control_group(mountpoint: Path) -> Iterator[Callable[[], object]]:
    """A control group that is removed at the end. Yields a function that moves the calling process into it."""
    mountpoint.mkdir()
    subprocess.run(["mount", "-t", "cgroup2", "cgroup2", mountpoint], check=True)
    group = mountpoint / f"savings-exporter-test-{os.getpid()}"
    try:
        group.mkdir()
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        eventually(lambda: "populated 0" in (group / "cgroup.events").read_text(), "all processes to end")
        for path, _, _ in os.walk(group, topdown=False):
            os.rmdir(path)
        subprocess.run(["umount", mountpoint], check=True)
