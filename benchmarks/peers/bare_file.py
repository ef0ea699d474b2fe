"""A bare file: the minimum cost of a durable record, without a store."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks.measuring import Opened, Recorder
from benchmarks.workload import Fields

_FILE_BYTES = 4 * 1024 * 1024


@contextmanager
def bare_file(directory: Path, size: int) -> Iterator[Opened]:
    """``pwrite`` and ``fdatasync`` of ``size`` bytes per record, into a file of zeros."""
    yield partial(appending, directory / "bare", size)


@contextmanager
def appending(path: Path, size: int) -> Iterator[Recorder]:
    """A file of zeros, written sequentially. At its end, writing continues at its beginning, as in a new segment."""
    path.write_bytes(bytes(_FILE_BYTES))
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
        data = b"x" * size
        offsets = itertools.cycle(range(0, _FILE_BYTES - size + 1, size))

        def record(_fields: Fields) -> None:
            os.pwrite(descriptor, data, next(offsets))
            os.fdatasync(descriptor)

        yield record
    finally:
        os.close(descriptor)
