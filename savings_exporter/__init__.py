"""Keeps the LLM tokens you saved, durably, and shows every step of it.

``SavingsTracker`` is the whole of it for a program; ``savings_exporter.telemetry.metrics.SavingsCollector`` shows a
tracker to Prometheus.
"""

from savings_exporter.errors import CorruptStoreError, NewerSchemaError, StoreError
from savings_exporter.records import Receipt, SavingsRecord
from savings_exporter.tracker import SavingsTracker, Snapshot

__all__ = [
    "CorruptStoreError",
    "NewerSchemaError",
    "Receipt",
    "SavingsRecord",
    "SavingsTracker",
    "Snapshot",
    "StoreError",
]
