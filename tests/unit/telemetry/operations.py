"""Operations that tests make up."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from savings_exporter.storage.observers import Observer
from savings_exporter.storage.operation import COMMIT, COMMIT_STEPS, SAVE, SAVE_STEPS, FsyncTarget, Operation

TARGETS: dict[str, FsyncTarget] = {"fsync_file": "file", "fsync_dir": "directory", "fsync_journal": "journal"}


def error(number: int = errno.EIO) -> OSError:
    return OSError(number, os.strerror(number))


def run(
    observer: Observer,
    name: str = COMMIT,
    steps: Sequence[str] = (),
    *,
    failing: str | None = None,
    number: int = errno.EIO,
    records: int = 1,
    drill: bool = False,
    **arguments: Any,
) -> Operation:
    """Run an operation to its end; the step ``failing`` fails, ``prepare`` before the first step."""
    operation = Operation(name, observer, is_drill=drill, **arguments)
    operation.records = records
    with suppress(OSError), operation:
        if failing == "prepare":
            raise error(number)
        for step in steps or {COMMIT: COMMIT_STEPS[:2], SAVE: SAVE_STEPS}[name]:
            with operation.step(step, TARGETS.get(step)):
                if step == failing:
                    raise error(number)
    return operation
