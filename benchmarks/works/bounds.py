"""Works for quantities that must not grow: bytes on the device, time and memory after many records."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

from benchmarks.measuring import Bound, LeftOutError, Recorder, Result, Setup, one_thread, rate
from benchmarks.ours import NAME, NEVER, fill, record_bytes, recorder
from benchmarks.peers.bare_file import appending
from benchmarks.workload import many
from savings_exporter import SavingsTracker

_BLOCK_BYTES = 4096
_SECTOR_BYTES = 512

# Before bytes are counted, this number of records fills the small first segments, and a pause lets the background
# thread create the next segment.
_SETTLING_RECORDS = 1_000
_SETTLING_SECONDS = 1.0


def device_bytes(setup: Setup) -> Result:
    """Bytes written to the device per commit, while no segment is created and no document is saved."""
    records, size = setup.count(2_000), record_bytes(setup)
    with loop_ext4(setup) as (mounted, written):
        runs = iter(range(3 * setup.repeat))

        def bytes_of(record: Recorder) -> float:
            for fields in many(setup.count(_SETTLING_RECORDS)):
                record(fields)
            time.sleep(_SETTLING_SECONDS)
            os.sync()
            before = written()
            for fields in many(records):
                record(fields)
            return (written() - before) / records

        def ours() -> float:
            directory = _made(mounted / str(next(runs)))
            with SavingsTracker(directory / NAME, save_interval=NEVER) as tracker:
                return bytes_of(recorder(tracker))

        def bare(size: int) -> float:
            with appending(mounted / str(next(runs)), size) as record:
                return bytes_of(record)

        figures = setup.taking_turns(ours, lambda: bare(_BLOCK_BYTES))
        same_bytes = statistics.median(bare(size) for _ in range(setup.repeat))
    return Result(
        work="bytes that reach the device for a record",
        peer="pwrite + fdatasync of one 4 KiB block",
        unit="bytes",
        **figures,
        bound=Bound(1.0, at_least=False),
        notes=[f"{size} bytes a record; pwrite + fdatasync of just these, one after the other: {same_bytes:,.0f}"],
    )


def after_a_million(setup: Setup) -> Result:
    """The cost of a record does not depend on the number of records."""
    large, small = setup.count(1_000_000), setup.count(1_000)
    with (
        setup.fresh() as directory,
        SavingsTracker(_made(directory / "large") / NAME) as old,
        SavingsTracker(_made(directory / "small") / NAME) as new,
    ):
        fill(old, large)
        fill(new, small)

        def cost(tracker: SavingsTracker) -> float:
            return 1e6 / rate(one_thread(lambda: nullcontext(recorder(tracker)), setup.seconds))

        return Result(
            work=f"a record after {large:,} records",
            peer=f"after {small:,}",
            unit="µs",
            **setup.taking_turns(lambda: cost(old), lambda: cost(new)),
            bound=Bound(1.1, at_least=False),
        )


def memory(setup: Setup) -> Result:
    """Memory does not grow with the number of records."""
    if not sys.platform.startswith("linux"):
        raise LeftOutError("a process's memory is read from /proc, which only Linux has")
    large, small = setup.count(1_000_000), setup.count(10_000)
    figures: list[tuple[float, float]] = []
    for _ in range(setup.repeat):
        spawn = multiprocessing.get_context("spawn")
        with setup.fresh() as directory, ProcessPoolExecutor(1, mp_context=spawn) as pool:
            figures.append(pool.submit(_memory_after, directory / NAME, small, large).result())
    return Result(
        work=f"memory after {large:,} records",
        peer=f"after {small:,}, the same process",
        unit="MB",
        ours=[after_large for _, after_large in figures],
        theirs=[after_small for after_small, _ in figures],
        bound=Bound(5, at_least=False, is_difference=True),
    )


@contextmanager
def loop_ext4(setup: Setup) -> Iterator[tuple[Path, Callable[[], int]]]:
    """An ext4 file system on a loop device, and the number of bytes written to it.

    The periodic commit of time stamps by the kernel is postponed, because no record causes it.
    """
    if os.geteuid() != 0 or shutil.which("losetup") is None or shutil.which("mkfs.ext4") is None:
        raise LeftOutError("it mounts an ext4 on a loop device: that needs root, losetup and mkfs.ext4")
    with setup.fresh() as directory:
        image, mounted = directory / "image", _made(directory / "mounted")
        with image.open("wb") as file:
            file.truncate(512 * 1024 * 1024)
        _run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(image))
        device = _run("losetup", "--find", "--show", str(image)).strip()
        try:
            _run("mount", "-o", "noatime,commit=600", device, str(mounted))
            try:
                statistics_file = Path("/sys/block", Path(device).name, "stat")
                yield mounted, lambda: int(statistics_file.read_text().split()[6]) * _SECTOR_BYTES
            finally:
                _run("umount", str(mounted))
        finally:
            _run("losetup", "--detach", device)


def _memory_after(path: Path, small: int, large: int) -> tuple[float, float]:
    """The memory of this process in MB after each of two numbers of records."""
    with SavingsTracker(path) as tracker:
        record = recorder(tracker)

        def after(records: int) -> float:
            for fields in many(records // 10):
                record(fields)
            fill(tracker, records - records // 10)
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            return pages * os.sysconf("SC_PAGESIZE") / 1e6

        return after(small), after(large - small)


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True)
    return directory


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
