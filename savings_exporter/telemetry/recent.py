"""What the latest commits and saves of this process did: the times, outcomes and durations of their steps."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from savings_exporter.storage.operation import SAVE, Operation, Step, error_symbol

_MOST_DURATIONS = 1000
_MOST_SAVES = 5


class Failure(NamedTuple):
    """A step that failed. ``at`` is in seconds since 1970."""

    at: float
    error: str
    is_drill: bool


class StepRecord(NamedTuple):
    """What is known of a step. Durations are in seconds, of at most a thousand latest steps; None without any."""

    last_success: float | None
    last_failure: Failure | None
    p50: float | None
    p99: float | None


class RecentStep(NamedTuple):
    """A step of a recent save. ``offset`` is its time after the beginning of the save, in seconds."""

    name: str
    offset: float
    duration: float
    error: str


class RecentSave(NamedTuple):
    """A recent save. ``at`` is in seconds since 1970, ``duration`` in seconds; ``error`` is empty if it succeeded."""

    at: float
    duration: float
    steps: Sequence[RecentStep]
    error: str
    is_drill: bool


class RecentOperations:
    """Observes a store and remembers the latest operations, in bounded memory."""

    def __init__(self) -> None:
        self._steps: dict[str, _Step] = {}
        self._saves: deque[RecentSave] = deque(maxlen=_MOST_SAVES)

    def ended(self, operation: Operation) -> None:
        """Remember an operation and its steps."""
        for step in operation.steps:
            known = self._steps.get(step.name)
            if known is None:
                known = self._steps[step.name] = _Step()
            known.add(step)
        if operation.name == SAVE:
            self._saves.append(_save(operation))

    def recovered(self, kind: str) -> None:
        """Recoveries are counted elsewhere."""

    def step(self, name: str) -> StepRecord:
        """What is known of a step."""
        known = self._steps.get(name)
        if known is None:
            return StepRecord(None, None, None, None)
        durations = sorted(known.durations.copy())
        return StepRecord(known.succeeded, known.failed, _quantile(durations, 0.5), _quantile(durations, 0.99))

    def saves(self) -> Sequence[RecentSave]:
        """The latest saves, the newest first."""
        return tuple(self._saves.copy())[::-1]


class _Step:
    __slots__ = ("durations", "failed", "succeeded")

    def __init__(self) -> None:
        self.durations: deque[float] = deque(maxlen=_MOST_DURATIONS)
        self.succeeded: float | None = None
        self.failed: Failure | None = None

    def add(self, step: Step) -> None:
        if step.error is not None:
            self.failed = Failure(time.time(), error_symbol(step.error), step.is_drill)
        elif not step.is_drill:
            self.durations.append(step.duration)
            self.succeeded = time.time()


def _save(operation: Operation) -> RecentSave:
    steps = [
        RecentStep(
            step.name,
            (operation.began_ns(step) - operation.entered_ns) / 1e9,
            step.duration,
            error_symbol(step.error) if step.error is not None else "",
        )
        for step in operation.steps
    ]
    error = operation.error
    return RecentSave(
        at=operation.entered_ns / 1e9,
        duration=operation.duration,
        steps=steps,
        error=error_symbol(error) if error is not None else "",
        is_drill=operation.is_drill,
    )


def _quantile(durations: Sequence[float], share: float) -> float | None:
    """The smallest duration that this share of all does not exceed."""
    return durations[math.ceil(len(durations) * share) - 1] if durations else None
