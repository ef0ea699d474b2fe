"""Shared by all test suites: fixtures, the selection of tests, and the list of skipped tests.

A test names what it needs with ``@pytest.mark.needs("prometheus", "strace")``. If a need is missing, the test is
skipped, and the run ends with a line that says so. With ``REQUIRE_ALL=1`` a skipped test is a failure. With
``INSTALL_PEERS=1`` (``make test``) the needs of the selected tests are installed first, if make has a target for them.
Tests that take too long for a run are deselected, and the run ends with a line that says so, too.

A test that needs Prometheus or Alertmanager runs twice: with the installed programs, and with those of Debian unstable.
One that names ``unstable``, too, runs with the latter only.
"""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from savings_exporter import SavingsTracker
from tests.support.faults import FaultyFileSystem
from tests.support.needs import NEEDS
from tests.support.paths import ROOT, UNSTABLE
from tests.support.spans import Traced

_DESELECTED = pytest.StashKey[Counter[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="leave out the tests that are marked slow")


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts background jobs with this signal ignored, and child processes of the tests would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # nohup does the same to SIGHUP. A handler is not inherited.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)
    config.addinivalue_line("markers", "needs(*names): leave the test out where one of these is missing")
    config.addinivalue_line("markers", "slow: its cases take longer than half a second; --fast leaves it out")
    config.addinivalue_line("markers", "image: it builds the image; only BUILD_IMAGE=1 selects it")
    config.stash[_DESELECTED] = Counter()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = {name for marker in metafunc.definition.iter_markers("needs") for name in marker.args}
    if names & {"prometheus", "alertmanager"}:
        metafunc.fixturenames.append("programs")
        unstable = pytest.param("unstable", marks=pytest.mark.needs("unstable"))
        metafunc.parametrize("programs", [unstable] if "unstable" in names else ["installed", unstable], indirect=True)


@pytest.fixture
def programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which Prometheus and Alertmanager are found: the installed ones, or those of Debian unstable."""
    if request.param == "unstable":
        monkeypatch.setenv("PATH", f"{UNSTABLE / 'bin'}{os.pathsep}{os.environ['PATH']}")
        for name in ("prometheus", "promtool", "prometheus-alertmanager", "amtool"):
            assert (shutil.which(name) or "").startswith(str(UNSTABLE)), f"{name} is not unpacked: make unstable"
    which: str = request.param
    return which


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--fast"):
        _deselect("slow", "they are slow (make test runs them)", config, items)
    if os.environ.get("BUILD_IMAGE") != "1":
        _deselect("image", "they build the image (make image runs them)", config, items)


def _deselect(marker: str, why: str, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the tests with a marker out, and report it at the end."""
    if marked := [item for item in items if item.get_closest_marker(marker)]:
        items[:] = [item for item in items if item not in marked]
        config.hook.pytest_deselected(items=marked)
        config.stash[_DESELECTED][why] = len(marked)


def pytest_collection_finish(session: pytest.Session) -> None:
    if os.environ.get("INSTALL_PEERS") == "1" and not session.config.option.collectonly:
        needed = {name for item in session.items for name in _needs_of(item)}
        for target in {NEEDS[name].target for name in needed if not NEEDS[name].is_there()} - {""}:
            _make(target, session.config)


def _make(target: str, config: pytest.Config) -> None:
    """Run a make target. If it fails, the tests that need it are skipped."""
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
    deselected = config.stash[_DESELECTED]
    left_out = deselected + Counter(_reason(report) for report in terminalreporter.stats.get("skipped", []))
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
    """The reason why a test or a module was skipped."""
    return report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else report.longreprtext


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    """The path of a test's store."""
    return tmp_path / "proxy_savings.json"


@pytest.fixture
def faults() -> Iterator[FaultyFileSystem]:
    """A file system whose steps can fail and hang; it is repaired at the end."""
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
    """A tracker on a new store, with its spans kept in memory, on the file system ``faults``."""
    traced = Traced(store_path, faults)
    yield traced
    traced.tracker.close()
