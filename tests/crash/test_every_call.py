"""Every system call of a run on the store's directory fails once with each error, or the process is killed at it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from savings_exporter.storage.segment import SyncMethod
from tests.crash import scenario
from tests.crash.lab import LONG, METHODS, Figures, Lab, reported
from tests.support.paths import ROOT
from tests.support.wait import WAIT_SECONDS

pytestmark = pytest.mark.needs("linux", "strace")

READS = ("openat", "pread64", "flock")

CHANGES = (
    *("write", "pwrite64", "pwritev", "pwritev2", "ftruncate", "fallocate", "fsync", "fdatasync"),
    *("rename", "renameat", "renameat2", "link", "linkat", "unlink", "unlinkat"),
)

FAULTS = ("error=EIO", "signal=KILL", "error=ENOSPC", "error=EROFS", "error=EINVAL")
"""As strace understands them."""

EVERY_CHANGE, EVERY_READ = (2, 2, 8, 8, 8), (16, 32, 32, 32, 32)
"""In the long form each fault meets each call; in the short form only every n-th one, other ones in each mode."""

MOST_NOT_MADE = 8

DOCUMENT = "proxy_savings.json"

BEFORE = "before"
"""The stream of the process that was killed before."""


class Call(NamedTuple):
    """The n-th call of this name that a thread makes on the store's directory."""

    name: str
    number: int


class Prepared(NamedTuple):
    """A store that a killed process left, the answers to the process, and the calls of the scenario on the store."""

    directory: Path
    method: SyncMethod
    files: tuple[str, ...]
    calls: tuple[Call, ...]


class Run(NamedTuple):
    """A run of the scenario that met a fault."""

    directory: Path
    method: SyncMethod
    status: int
    stderr: str
    log: str


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("method", METHODS)
def test_any_call_may_fail(tmp_path: Path, method: SyncMethod, fault: str) -> None:
    prepared = prepare(tmp_path, method)
    calls = prepared.calls if LONG else some_of(prepared.calls, FAULTS.index(fault), METHODS.index(method))
    figures = reported(f"every call, {method}, {fault.partition('=')[2]}")
    wrong, not_made = [], []
    with ThreadPoolExecutor(2) as pool:
        for call, run in zip(calls, pool.map(lambda call: meet(fault, call, prepared), calls), strict=True):
            try:
                if not judge(run, figures):
                    not_made.append(call)
            except AssertionError as found:
                wrong.append(f"{fault} at {call.name} number {call.number}: {found}")
            shutil.rmtree(run.directory)
    assert not wrong, "\n".join(wrong)
    # The thread that creates a segment differs between runs.
    assert len(not_made) <= MOST_NOT_MADE, not_made


def prepare(directory: Path, method: SyncMethod) -> Prepared:
    """Leave a store to recover, and find out which calls a run of the scenario makes on it."""
    prepared = directory / "prepared"
    (prepared / "store").mkdir(parents=True)
    with Lab(prepared / "store" / DOCUMENT, prepared / "outside", Figures(), method) as lab:
        lab.start(BEFORE, "alone")
        lab.goes_on()
    # The first run finds the names of the files; the second counts the calls on these files as strace counts them.
    run = run_scenario(prepared, directory / "names", method, ["-y"])
    names = {Path(found).name for found in re.findall(rf'[<"]{re.escape(str(run.directory))}/store/([^>"]*)', run.log)}
    run = run_scenario(prepared, directory / "calls", method, watching(directory / "calls", tuple(names)))
    made = Counter(re.findall(r"^(\d+) +(\w+)\(", run.log, re.MULTILINE))
    most = {name: max(count for (_, other), count in made.items() if other == name) for _, name in made}
    assert run.status == 0, run.stderr
    # Every storage engine opens, writes, syncs, renames and removes files.
    assert {"openat", "pread64", "write", "pwrite64", "fsync", "rename", "unlink", "flock"} <= most.keys()
    assert {"link", "linkat"} & most.keys()
    assert ({"pwritev", "pwritev2"} if method == "direct" else {"fdatasync"}) & most.keys()
    calls = (Call(name, number) for name, last in sorted(most.items()) for number in range(1, last + 1))
    return Prepared(prepared, method, tuple(names), tuple(calls))


def some_of(calls: Sequence[Call], fault: int, method: int) -> list[Call]:
    """The calls that a fault meets in the short form."""
    changes = [call for call in calls if call.name in CHANGES][method :: EVERY_CHANGE[fault]]
    reads = [call for call in calls if call.name in READS][fault + 5 * method :: EVERY_READ[fault]]
    return changes + reads


def meet(fault: str, call: Call, prepared: Prepared) -> Run:
    """Run the scenario with a fault at one call."""
    directory = prepared.directory.parent / f"{call.name}-{call.number}"
    inject = ["-e", f"inject={call.name}:{fault}:when={call.number}"]
    return run_scenario(prepared.directory, directory, prepared.method, [*watching(directory, prepared.files), *inject])


def judge(run: Run, figures: Figures) -> bool:
    """The process came to its end, was killed, or could not open the store, and nothing is lost.

    Returns:
        Whether the fault was met.
    """
    injected, killed = run.log.count("(INJECTED)"), run.log.count("+++ killed by SIGKILL +++")
    figures.faults_injected += injected
    figures.crashes += min(killed, 1)
    assert run.status in ((-signal.SIGKILL,) if killed else (0, scenario.REFUSED)), run.stderr
    lab = Lab(run.directory / "store" / DOCUMENT, run.directory / "outside", figures, run.method)
    for name in (BEFORE, scenario.SINGLE, scenario.LATER, scenario.LAST):
        lab.account(name)
    lab.account(scenario.BATCHED, sizes=(scenario.BATCH,))
    lab.check()
    return bool(injected or killed)


def watching(directory: Path, files: tuple[str, ...]) -> list[str]:
    """The options with which strace looks at the store's directory and the files in it, and at nothing else."""
    store = directory / "store"
    return [option for path in (store, *(store / name for name in files)) for option in ("-P", str(path))]


def run_scenario(prepared: Path, directory: Path, method: SyncMethod, options: list[str]) -> Run:
    """Run the scenario on a copy of the prepared store, under strace."""
    shutil.copytree(prepared, directory)
    log = directory / "strace.log"
    command = ["strace", "-f", "-e", f"trace={','.join(READS + CHANGES)}", *options, "-o", str(log)]
    arguments = [directory / "store" / DOCUMENT, directory / "outside", method]
    command += [sys.executable, "-m", scenario.__name__, *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True, timeout=2 * WAIT_SECONDS, check=False)
    return Run(directory, method, done.returncode, done.stderr, log.read_text())
