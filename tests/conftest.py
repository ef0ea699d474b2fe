"""What every tier shares: fixtures, which tests are run, and the list of what was left out.

A test says what it needs with ``@pytest.mark.needs("prometheus", "strace")``. Where that is missing, the test is
left out and the run ends with a line that says so; with ``REQUIRE_ALL=1`` leaving anything out is a failure. With
``INSTALL_PEERS=1`` (``make test``) what the selected tests need is installed before, where make has a target for it.
"""

from __future__ import annotations

import importlib
import os
import shlex
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from savings_exporter import SavingsTracker
from tests.support.faults import FaultyFileSystem
from tests.support.needs import NEEDS
from tests.support.paths import ROOT
from tests.support.spans import Traced

_SLOW = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="leave out the tests that are marked slow")


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts what runs in its background with this signal ignored, and our children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "needs(*names): leave the test out where one of these is missing")
    config.addinivalue_line("markers", "slow: its cases take longer than half a second; --fast leaves it out")
    config.stash[_SLOW] = 0


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow and config.getoption("--fast"):
        items[:] = [item for item in items if item not in slow]
        config.hook.pytest_deselected(items=slow)
        config.stash[_SLOW] = len(slow)


def pytest_collection_finish(session: pytest.Session) -> None:
    if os.environ.get("INSTALL_PEERS") == "1" and not session.config.option.collectonly:
        needed = {name for item in session.items for name in _needs_of(item)}
        for target in {NEEDS[name].target for name in needed if not NEEDS[name].is_there()} - {""}:
            _make(target, session.config)


def _make(target: str, config: pytest.Config) -> None:
    """Make a target. Where that fails, the tests that need it are left out."""
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        subprocess.run(["make", "--no-print-directory", target], cwd=ROOT, check=False)
    importlib.invalidate_caches()


def _needs_of(item: pytest.Item) -> list[str]:
    return [name for marker in item.iter_markers("needs") for name in marker.args]


@pytest.fixture(autouse=True)
def _needs(request: pytest.FixtureRequest) -> None:
    missing = [name for name in _needs_of(request.node) if not NEEDS[name].is_there()]
    if missing:
        why = "; ".join(NEEDS[name].why_left_out for name in missing)
        if os.environ.get("REQUIRE_ALL") == "1":
            pytest.fail(f"left out, and REQUIRE_ALL=1 allows nothing to be: {why}")
        pytest.skip(why)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    left_out = Counter(_reason(report) for report in terminalreporter.stats.get("skipped", []))
    left_out["they are slow (make test runs them)"] = config.stash[_SLOW]
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        terminalreporter.line(f"no test is selected by: {shlex.join(config.invocation_params.args)}")
        if not left_out.total():
            return
    terminalreporter.section("left out")
    for why, tests in sorted(left_out.items()):
        if tests:
            terminalreporter.line(f"{tests} tests: {why}")
    if not left_out.total():
        terminalreporter.line("nothing")


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why a test or a module was skipped."""
    return report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else report.longreprtext


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    """Where a test's store goes."""
    return tmp_path / "proxy_savings.json"


@pytest.fixture
def faults() -> Iterator[FaultyFileSystem]:
    """A file system whose steps fail and hang; at the end none does."""
    faults = FaultyFileSystem()
    yield faults
    faults.mend()


@pytest.fixture
def tracker(store_path: Path, faults: FaultyFileSystem) -> Iterator[SavingsTracker]:
    """A tracker on a new store, on the file system ``faults``."""
    with SavingsTracker(store_path, filesystem=faults) as tracker:
        yield tracker


@pytest.fixture
def traced(store_path: Path, faults: FaultyFileSystem) -> Iterator[Traced]:
    """A tracker on a new store, whose spans are kept, on the file system ``faults``."""
    traced = Traced(store_path, faults)
    yield traced
    traced.tracker.close()
