"""Observers are notified when an operation of the store has ended. Metrics and traces are two of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

from savings_exporter.storage.operation import Operation

logger = logging.getLogger(__name__)


class Observer(Protocol):
    """Receives notifications about operations."""

    def ended(self, operation: Operation) -> None:
        """Called when an operation has ended. The operation and its steps are complete."""

    def recovered(self, kind: str) -> None:
        """Called when an open or a save recovered from damage.

        ``kind`` is ``torn_tail``, ``previous_document`` or ``corrupt_document``.
        """


class Observers:
    """Notifies several observers in this order. An exception of an observer is logged and does not reach the store."""

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        self._observers = tuple(observers)

    def ended(self, operation: Operation) -> None:
        """Tell each observer."""
        for observer in self._observers:
            try:
                observer.ended(operation)
            except Exception:
                _log_failure()

    def recovered(self, kind: str) -> None:
        """Tell each observer."""
        for observer in self._observers:
            try:
                observer.recovered(kind)
            except Exception:
                _log_failure()


def _log_failure() -> None:
    logger.exception("an observer of the store failed; the store is not affected")
