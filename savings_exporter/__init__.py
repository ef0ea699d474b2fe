"""Keeps the LLM tokens you saved, durably, and shows every step of it.

``SavingsTracker`` is the API for a program; ``SavingsCollector`` shows a tracker to Prometheus.
"""

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
