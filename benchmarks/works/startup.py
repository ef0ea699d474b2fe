"""The duration of a command from process start to exit. A shell hook may run one for each command."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

from benchmarks.measuring import Bound, Result, Setup
from benchmarks.ours import NAME

_COMMAND = [sys.executable, "-m", "savings_exporter"]
_PEER = [sys.executable, "-c", "import msgspec, typer"]


def start_version(setup: Setup) -> Result:
    """Only the modules that print the version are imported."""
    return _compared(setup, "savings-exporter --version", [*_COMMAND, "--version"])


def start_record(setup: Setup) -> Result:
    """Only the modules that record are imported; a store is opened, committed to and closed."""
    with setup.fresh() as directory:
        saving = ["--model", "m", "--tokens-saved", "1", "--store", str(directory / NAME)]
        return _compared(setup, "savings-exporter record", [*_COMMAND, "record", *saving])


def _compared(setup: Setup, work: str, command: list[str]) -> Result:
    return Result(
        work=work,
        peer='python -c "import msgspec, typer"',
        unit="ms",
        **setup.taking_turns(_median_of(command, setup), _median_of(_PEER, setup)),
        bound=Bound(1.5, at_least=False),
    )


def _median_of(command: list[str], setup: Setup) -> Callable[[], float]:
    _milliseconds(command)  # so that all modules are compiled, as pip does at installation

    def median() -> float:
        return sorted(_milliseconds(command) for _ in range(setup.count(11)))[setup.count(11) // 2]

    return median


def _milliseconds(command: list[str]) -> float:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=env)
    return (time.perf_counter() - began) * 1e3
