"""CPU time: the cost of a record if the disk is fast.

The peer is a fixed figure, because the first engine is no longer part of the code. The figure depends on the processor
and on how it was measured (docs/benchmarks.md, Limits). The report includes the CPU time of a bare write in the run.
"""

from __future__ import annotations

from functools import partial

from benchmarks.measuring import Bound, Result, Setup, Workers, cpu, one_thread, threads
from benchmarks.ours import record_bytes, shared_tracker
from benchmarks.peers.bare_file import bare_file
from benchmarks.works.rates import runs_of

# Microseconds per record on a machine of two cores with a virtio disk; not measured with these works.
_FIRST_ENGINE_ONE_THREAD = 323.0
_FIRST_ENGINE_64_THREADS = 85.0


def cpu_one_thread(setup: Setup) -> Result:
    """With one thread, each record needs a whole commit."""
    return _against_first_engine(
        setup, "CPU time of a record, one thread", one_thread, _FIRST_ENGINE_ONE_THREAD, at_most=0.4
    )


def cpu_threads(setup: Setup) -> Result:
    """With many threads, records share commits, and only the cost of each record itself remains."""
    return _against_first_engine(
        setup, "CPU time of a record, 64 threads", threads(64), _FIRST_ENGINE_64_THREADS, at_most=0.5
    )


def _against_first_engine(setup: Setup, work: str, workers: Workers, first_engine: float, *, at_most: float) -> Result:
    bare = partial(bare_file, size=record_bytes(setup))
    bare_cpu = 1e6 * cpu(runs_of(setup, bare, one_thread))
    return Result(
        work=work,
        peer="the first engine, a fixed figure",
        unit="µs",
        ours=[1e6 * cpu(runs_of(setup, shared_tracker, workers)) for _ in range(setup.repeat)],
        theirs=[first_engine],
        bound=Bound(at_most, at_least=False),
        notes=[f"pwrite + fdatasync of the same bytes, one thread, in the same run: {bare_cpu:.3g} µs"],
    )
