"""``python -m benchmarks``: run the works, print a table, write ``build/bench.json``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.measuring import LeftOutError, Result, Setup
from benchmarks.peers import lmdb, postgresql, redis, sqlite
from benchmarks.works import WORKS

_BUILD = Path(__file__).parent.parent / "build"


def main() -> None:
    """Measure what the arguments name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("works", nargs="*", metavar="WORK", help=f"what to measure (default: all): {', '.join(WORKS)}")
    parser.add_argument("--directory", type=Path, default=_BUILD, help="where to write (default: build/)")
    parser.add_argument("--repeat", type=int, default=5, help="runs of each side; medians are compared (default: 5)")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="multiplies seconds and records; below 1 for a quick look only"
    )
    arguments = parser.parse_args()
    for work in arguments.works:
        if work not in WORKS:
            parser.error(f"there is no work {work!r}; there are {', '.join(WORKS)}")
    if arguments.repeat < 1 or not arguments.scale > 0:
        parser.error("--repeat must be at least 1, --scale more than 0")
    _BUILD.mkdir(exist_ok=True)
    if not arguments.directory.is_dir():
        parser.error(f"{arguments.directory} is not a directory")
    filesystem = _filesystem(arguments.directory)
    if filesystem == "tmpfs":
        parser.error(f"{arguments.directory} is on a tmpfs, where nothing is durable; name a --directory on a disk")

    # Peer servers must be stopped when this process exits, even because of a signal.
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, lambda number, _frame: sys.exit(128 + number))

    about = {**machine(filesystem), "repeat": arguments.repeat, "scale": arguments.scale}
    results: dict[str, Result] = {}
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.directory) as directory:
        # A server that runs as another user must be able to access its own directory in this one.
        os.chmod(directory, 0o711)
        setup = Setup(directory=Path(directory), repeat=arguments.repeat, scale=arguments.scale)
        for work in arguments.works or WORKS:
            print(f"{work} ...", end=" ", file=sys.stderr, flush=True)
            try:
                results[work] = WORKS[work](setup)
                print(_row(results[work])[4], file=sys.stderr)
            except LeftOutError as error:
                left_out[work] = str(error)
                print(f"left out: {error}", file=sys.stderr)
    report = {
        "about": about,
        "works": {work: as_json(result) for work, result in results.items()},
        "left_out": left_out,
    }
    (_BUILD / "bench.json").write_text(json.dumps(report, indent=2) + "\n")
    print("\n" + ", ".join(f"{name} {value}" for name, value in about.items()) + "\n")
    print(table(list(results.values())))
    for work, reason in left_out.items():
        print(f"\nLeft out: {work}: {reason}")


def table(results: Sequence[Result]) -> str:
    """The results as a table in Markdown, followed by their notes."""
    heads = ["work", "against", "ours", "the peer", "figure", "target", "met"]
    rows = [heads, *([*_row(result)] for result in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    rows.insert(1, ["-" * width for width in widths])
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    notes = [f"- {result.work}, against {result.peer}: {note}" for result in results for note in result.notes]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def as_json(result: Result) -> dict[str, Any]:
    """All data of a result, including the figures of each run."""
    return {
        "work": result.work,
        "peer": result.peer,
        "unit": result.unit,
        "ours": statistics.median(result.ours),
        "theirs": statistics.median(result.theirs),
        "figure": result.figure,
        "figure_is": "difference" if result.bound.is_difference else "ratio",
        "target": result.bound.value,
        "target_is": "at least" if result.bound.at_least else "at most",
        "met": result.is_met,
        "runs": {"ours": list(result.ours), "theirs": list(result.theirs)},
        "notes": list(result.notes),
    }


def machine(filesystem: str) -> Mapping[str, Any]:
    """The environment that the figures depend on."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "savings-exporter": version("savings-exporter"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processors": os.cpu_count(),
        "filesystem": filesystem,
        "Python": platform.python_version(),
        **_peers(),
    }


def _peers() -> dict[str, str]:
    """The versions of the peers that are installed."""
    versions = {}
    for name, version_of in {
        "SQLite": sqlite.version,
        "Redis": redis.version,
        "PostgreSQL": postgresql.version,
        "LMDB": lmdb.version,
    }.items():
        with suppress(LeftOutError):
            versions[name] = version_of()
    return versions


def _row(result: Result) -> tuple[str, ...]:
    bound = result.bound
    unit = f" {result.unit}" if bound.is_difference else " x"
    return (
        result.work,
        result.peer,
        f"{_number(statistics.median(result.ours))} {result.unit}",
        f"{_number(statistics.median(result.theirs))} {result.unit}",
        ("+" if bound.is_difference and result.figure >= 0 else "") + _number(result.figure) + unit,
        ("at least " if bound.at_least else "at most ")
        + ("+" if bound.is_difference else "")
        + f"{bound.value:g}{unit}",
        "yes" if result.is_met else "no",
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"


def _filesystem(directory: Path) -> str:
    """The type of the file system of a directory, as the kernel names it."""
    shown = subprocess.run(["df", "--output=fstype", str(directory)], capture_output=True, text=True)
    return shown.stdout.split()[-1] if shown.returncode == 0 else "unknown"


if __name__ == "__main__":
    main()
