"""Keeps lifetime LLM token savings durably, for Prometheus and OpenTelemetry.

``SavingsTracker`` is the API for a program; ``SavingsCollector`` shows a tracker to Prometheus.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from savings_exporter.errors import (
        CorruptStoreError,
        KeyConflictError,
        NewerSchemaError,
        OtherFileError,
        SavingsError,
        StoreError,
    )
    from savings_exporter.model.record import SavingsRecord
    from savings_exporter.model.snapshot import Health, Snapshot
    from savings_exporter.model.totals import Totals
    from savings_exporter.telemetry.metrics import SavingsCollector
    from savings_exporter.tracker import SavingsTracker
    from savings_exporter.tracking.receipt import Receipt

__all__ = [
    "CorruptStoreError",
    "Health",
    "KeyConflictError",
    "NewerSchemaError",
    "OtherFileError",
    "Receipt",
    "SavingsCollector",
    "SavingsError",
    "SavingsRecord",
    "SavingsTracker",
    "Snapshot",
    "StoreError",
    "Totals",
]

_MODULES = {
    "Health": "model.snapshot",
    "Receipt": "tracking.receipt",
    "SavingsCollector": "telemetry.metrics",
    "SavingsRecord": "model.record",
    "SavingsTracker": "tracker",
    "Snapshot": "model.snapshot",
    "Totals": "model.totals",
}


def __getattr__(name: str) -> Any:
    """Import a public name with its first use (PEP 562): a command that needs few of them starts faster."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
