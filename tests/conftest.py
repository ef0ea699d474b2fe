"""What every tier shares: fixtures, and the list of what this machine could not run.

A test says what it needs with ``@pytest.mark.needs("prometheus", "strace")``. Where that is missing, the test is
left out and the run ends with a line that says so; with ``REQUIRE_ALL=1`` leaving anything out is a failure.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from savings_exporter import SavingsTracker
from tests.support.faults import Faults
from tests.support.mounts import can_make_user_namespaces, can_mount, can_mount_fuse
from tests.support.paths import HEADROOM_PYTHON
from tests.support.spans import Traced

_LEFT_OUT = pytest.StashKey[dict[str, list[str]]]()

_NEEDS = {
    "linux": lambda: sys.platform == "linux",
    "mount": can_mount,
    "fuse": can_mount_fuse,
    "root": lambda: hasattr(os, "geteuid") and os.geteuid() == 0,
    "user-namespace": can_make_user_namespaces,
    "prometheus": lambda: shutil.which("prometheus") and shutil.which("promtool"),
    "alertmanager": lambda: (
        (shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")) and shutil.which("amtool")
    ),
    "strace": lambda: shutil.which("strace"),
    "e2fsprogs": lambda: shutil.which("mkfs.ext4"),
    "xfsprogs": lambda: shutil.which("mkfs.xfs"),
    "oteltap": lambda: find_spec("oteltap"),
    "headroom": HEADROOM_PYTHON.exists,
}

_WHY = {
    "linux": "this is not Linux",
    "mount": "mounting needs root on Linux",
    "fuse": "mounting a FUSE filesystem needs root on Linux, and /dev/fuse",
    "root": "it needs root",
    "user-namespace": "making a user namespace needs root, and a kernel that allows it",
    "prometheus": "prometheus and promtool are not installed (Debian: apt-get install prometheus)",
    "alertmanager": "Alertmanager and amtool are not installed (Debian: apt-get install prometheus-alertmanager)",
    "strace": "strace is not installed (Debian: apt-get install strace)",
    "e2fsprogs": "mkfs.ext4 is not installed (Debian: apt-get install e2fsprogs)",
    "xfsprogs": "mkfs.xfs is not installed (Debian: apt-get install xfsprogs)",
    "oteltap": "oteltap is not installed (PyPI: oteltap)",
    "headroom": f"headroom-ai is not installed in {HEADROOM_PYTHON.parent.parent.name} (make headroom)",
}


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts what runs in its background with this signal ignored, and our children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "needs(*names): leave the test out where one of these is missing")
    config.stash[_LEFT_OUT] = {}


@pytest.fixture(autouse=True)
def _needs(request: pytest.FixtureRequest) -> None:
    missing = [name for marker in request.node.iter_markers("needs") for name in marker.args if not _NEEDS[name]()]
    if missing:
        why = "; ".join(_WHY[name] for name in missing)
        request.config.stash[_LEFT_OUT].setdefault(why, []).append(request.node.nodeid)
        if os.environ.get("REQUIRE_ALL") == "1":
            pytest.fail(f"left out, and REQUIRE_ALL=1 allows nothing to be: {why}")
        pytest.skip(why)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    left_out = config.stash[_LEFT_OUT]
    terminalreporter.section("left out on this machine")
    for why, tests in sorted(left_out.items()):
        terminalreporter.line(f"{len(tests)} tests: {why}")
    if not left_out:
        terminalreporter.line("nothing")


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    """Where a test's store goes."""
    return tmp_path / "proxy_savings.json"


@pytest.fixture
def tracker(store_path: Path) -> Iterator[SavingsTracker]:
    """A tracker on a new store."""
    with SavingsTracker(store_path) as tracker:
        yield tracker


@pytest.fixture
def traced(store_path: Path) -> Iterator[Traced]:
    """A tracker on a new store, whose spans are kept."""
    traced = Traced(store_path)
    yield traced
    traced.tracker.close()


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """Makes steps fail and hang; at the end none does."""
    faults = Faults(monkeypatch)
    yield faults
    faults.mend()
