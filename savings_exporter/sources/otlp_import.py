"""Makes token usage in OpenTelemetry metrics durable, each point once."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from savings_exporter.model.cursors import Cursor
from savings_exporter.sources.otlp import OUTCOMES, SOURCE, Bucket, Outcome, Point
from savings_exporter.tracker import SavingsTracker
from savings_exporter.tracking.importing import Importer
from savings_exporter.tracking.receipt import Receipt

_PATIENCE_SECONDS = 5.0


class OtlpImport(Collector):
    """Imports points into the store of a tracker, as a context manager. It collects metrics of this.

    From the first points on, no other process can import into the store.
    """

    def __init__(self, tracker: SavingsTracker) -> None:
        self._tracker = tracker
        self._lock = threading.Lock()
        self._importer: Importer | None = None
        self._cursors: dict[str, Cursor] = {}
        # The cursors that were written and are not durable yet. Nothing more is read of their series until they are.
        self._pending: dict[str, tuple[Cursor, Receipt]] = {}
        self._counts: Counter[str] = Counter()

    def __enter__(self) -> OtlpImport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            if self._importer is not None:
                self._importer.__exit__(kind, error, traceback)
                self._importer = None

    def add(self, points: Sequence[Point], outcome: Outcome) -> bool:
        """Add what is new in points, in a call that may block for some seconds.

        Returns:
            Whether everything that is new is durable. If not, send the points again: they count once.

        Raises:
            StoreError: another process imports into the store, or it cannot be written.
            RuntimeError: the tracker is closed.
        """
        buckets: dict[str, list[Point]] = defaultdict(list)
        for point in points:
            buckets[f"{SOURCE}:{point.bucket:02x}"].append(point)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        with self._lock:
            if buckets and self._importer is None:
                with ExitStack() as stack:
                    importer = stack.enter_context(self._tracker.importing())
                    self._cursors = dict(importer.cursors())
                    # Keep it entered only if its cursors could be read.
                    stack.pop_all()
                self._importer = importer
            is_durable = all(self._add(name, some, outcome, deadline) for name, some in buckets.items())
            self._counts.update(outcome.counts)
        return is_durable

    def _add(self, name: str, points: Sequence[Point], outcome: Outcome, deadline: float) -> bool:
        if not self._is_settled(name, deadline):
            return False
        cursor = self._cursors.get(name)
        bucket = Bucket(cursor.state if cursor is not None else None)
        for point in points:
            bucket.add(point, outcome)
        if not bucket.has_changed:
            return True
        assert self._importer is not None
        self._pending[name] = self._importer.add(
            cursor, name=name, source=SOURCE, state=bucket.state(), rows=bucket.rows()
        )
        return self._is_settled(name, deadline)

    def _is_settled(self, name: str, deadline: float) -> bool:
        """Whether nothing of a bucket is pending."""
        if name in self._pending:
            cursor, receipt = self._pending[name]
            if not receipt.wait(max(deadline - time.monotonic(), 0)):
                return False
            self._cursors[name] = cursor
            del self._pending[name]
        return True

    def collect(self) -> Iterator[Metric]:
        """The points that this process received, by what became of them."""
        counts: Mapping[str, int] = self._counts.copy()
        family = CounterMetricFamily(
            "savings_otlp_points", "Points of OpenTelemetry metrics that this process received.", labels=["outcome"]
        )
        for outcome in OUTCOMES:
            family.add_metric([outcome], counts.get(outcome, 0))
        yield family
