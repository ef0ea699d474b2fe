"""Run our store and a peer in turn, and compare the results."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypedDict

from benchmarks.workload import REQUESTS, Fields

Recorder = Callable[[Fields], object]
"""Records one request, and returns when it is durable."""

Opened = Callable[[], AbstractContextManager[Recorder]]
"""Opens a recorder. Every measured thread or process opens its own."""

Store = Callable[[Path], AbstractContextManager[Opened]]
"""A store of the tracker or of a peer in an empty directory. It stops at its end everything that it started."""

# Longer than the default save_interval, so that every run of our store includes a save of the document.
_RUN_SECONDS = 6.0
_WARM_UP = 0.1
_START_TOGETHER_SECONDS = 120.0

_start: threading.Barrier


class LeftOutError(Exception):
    """A work cannot be measured here; the message says why and what to do."""


class Turns(TypedDict):
    """The figures of both sides, one per run."""

    ours: list[float]
    theirs: list[float]


@dataclass(frozen=True)
class Setup:
    """Where and how long to measure. ``scale`` multiplies the duration of the runs and the numbers of records."""

    directory: Path
    repeat: int = 5
    scale: float = 1.0

    @property
    def seconds(self) -> float:
        """The duration of one run, in seconds."""
        return _RUN_SECONDS * self.scale

    def count(self, records: int) -> int:
        """A number of records."""
        return max(round(records * self.scale), 1)

    @contextmanager
    def fresh(self) -> Iterator[Path]:
        """An empty directory for one run."""
        with tempfile.TemporaryDirectory(dir=self.directory) as directory:
            # A server that runs as another user has to reach its own directory in this one.
            os.chmod(directory, 0o711)
            yield Path(directory)

    def taking_turns(self, ours: Callable[[], float], peer: Callable[[], float]) -> Turns:
        """Run the peer and our store alternately, so that a slow phase of the machine affects both.

        The peer runs first, so that no time is lost if it is not installed.
        """
        figures = [(peer(), ours()) for _ in range(self.repeat)]
        return {"ours": [figure for _, figure in figures], "theirs": [figure for figure, _ in figures]}


@dataclass(frozen=True)
class Bound:
    """A target: a ratio (``x``) of ours to the peer's figure, or a difference in the figures' own unit."""

    value: float
    at_least: bool
    is_difference: bool = False


@dataclass(frozen=True)
class Result:
    """The figures of one work, one per run, in ``unit``; the medians are compared."""

    work: str
    peer: str
    unit: str
    ours: Sequence[float]
    theirs: Sequence[float]
    bound: Bound
    notes: Sequence[str] = ()

    @property
    def figure(self) -> float:
        """The ratio or the difference."""
        ours, theirs = statistics.median(self.ours), statistics.median(self.theirs)
        return ours - theirs if self.bound.is_difference else ours / theirs

    @property
    def is_met(self) -> bool:
        """Whether the figure meets its target."""
        return self.figure >= self.bound.value if self.bound.at_least else self.figure <= self.bound.value


class Moment(NamedTuple):
    """The time, and the CPU time of the process (user and system), in seconds."""

    time: float
    cpu: float

    @classmethod
    def now(cls) -> Moment:
        """The current moment."""
        return cls(time.perf_counter(), time.process_time())


class Run(NamedTuple):
    """The run of one thread or process: the seconds that each record took, and the begin and end of the run."""

    took: list[float]
    began: Moment
    ended: Moment


Workers = Callable[[Opened, float], list[Run]]
"""Records for a number of seconds, in threads or processes that start together after a warm-up."""


def threads(count: int) -> Workers:
    """Run in a number of threads of this process."""

    def run(opened: Opened, seconds: float) -> list[Run]:
        barrier = threading.Barrier(count)
        with ThreadPoolExecutor(count, initializer=_start_at, initargs=(barrier,)) as pool:
            return _runs(pool, opened, count, seconds)

    return run


def processes(count: int) -> Workers:
    """Run in a number of processes with one thread each."""

    def run(opened: Opened, seconds: float) -> list[Run]:
        spawn = multiprocessing.get_context("spawn")
        barrier = spawn.Barrier(count)
        with ProcessPoolExecutor(count, mp_context=spawn, initializer=_start_at, initargs=(barrier,)) as pool:
            return _runs(pool, opened, count, seconds)

    return run


one_thread = threads(1)


def rate(runs: Sequence[Run]) -> float:
    """Records per second of all runs together, from the begin of the first to the end of the last."""
    return _records(runs) / (max(run.ended.time for run in runs) - min(run.began.time for run in runs))


def cpu(runs: Sequence[Run]) -> float:
    """CPU time per record, in seconds. It is the CPU time of the whole process, for the runs of its threads."""
    return (max(run.ended.cpu for run in runs) - min(run.began.cpu for run in runs)) / _records(runs)


def p99(runs: Sequence[Run]) -> float:
    """The 99th percentile of the time per record, in seconds."""
    took = sorted(itertools.chain.from_iterable(run.took for run in runs))
    return took[math.ceil(len(took) * 0.99) - 1]


def _records(runs: Sequence[Run]) -> int:
    return sum(len(run.took) for run in runs)


def _runs(pool: Executor, opened: Opened, workers: int, seconds: float) -> list[Run]:
    return [future.result() for future in [pool.submit(_measured, opened, seconds) for _ in range(workers)]]


def _start_at(barrier: threading.Barrier) -> None:
    global _start
    _start = barrier


def _measured(opened: Opened, seconds: float) -> Run:
    try:
        with opened() as record:
            _repeated(record, seconds * _WARM_UP)
            _start.wait(_START_TOGETHER_SECONDS)
            return _repeated(record, seconds)
    except BaseException:
        # The other threads must not wait for a thread that failed.
        _start.abort()
        raise


def _repeated(record: Recorder, seconds: float) -> Run:
    took: list[float] = []
    began = Moment.now()
    now = began.time
    for fields in itertools.cycle(REQUESTS):
        record(fields)
        before, now = now, time.perf_counter()
        took.append(now - before)
        if now - began.time >= seconds:
            break
    return Run(took, began, Moment.now())
