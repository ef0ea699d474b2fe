"""Headroom's own tracker, in the environment that ``make headroom`` creates. It saves its document for each record."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.measuring import LeftOutError
from benchmarks.peers.schema import USD
from benchmarks.workload import REQUESTS, Fields

_HEADROOM_PYTHON = Path(__file__).parents[2] / ".venv-headroom" / "bin" / "python"

_HEADROOM_FILL = """
import json, sys
from datetime import datetime, timedelta, timezone
from headroom.proxy.savings_tracker import SavingsTracker
path, points, requests = json.load(sys.stdin)
tracker = SavingsTracker(path=path, save_flush_every=points, max_history_age_days=0)
now = datetime.now(timezone.utc)
for number in range(points):
    tracker.record_request(
        **requests[number % len(requests)], timestamp=(now - timedelta(hours=points - number)).isoformat()
    )
"""

_HEADROOM_RECORD = """
import itertools, json, sys, time
from headroom.proxy.savings_tracker import SavingsTracker
path, seconds, requests = json.load(sys.stdin)
tracker = SavingsTracker(path=path)
def record(seconds):
    began = time.perf_counter()
    for number in itertools.count(1):
        tracker.record_request(**requests[number % len(requests)])
        took = time.perf_counter() - began
        if took >= seconds:
            return number / took
record(seconds / 10)
json.dump(record(seconds), sys.stdout)
"""


def fill_headroom(path: Path, points: int) -> None:
    """Let Headroom write a document with this number of history points."""
    _headroom(_HEADROOM_FILL, [str(path), points, _headroom_requests()])


def headroom_rate(path: Path, seconds: float) -> float:
    """Records per second of Headroom's tracker on this document, after a warm-up. Each record is saved and synced."""
    return float(json.loads(_headroom(_HEADROOM_RECORD, [str(path), seconds, _headroom_requests()])))


def _headroom_requests() -> list[Fields]:
    """The same requests; Headroom computes their prices itself."""
    return [{name: value for name, value in fields.items() if name not in USD} for fields in REQUESTS]


def _headroom(script: str, arguments: list[Any]) -> str:
    if not _HEADROOM_PYTHON.exists():
        raise LeftOutError(f"headroom-ai is not installed in {_HEADROOM_PYTHON.parent.parent.name} (make headroom)")
    return subprocess.run(
        [str(_HEADROOM_PYTHON), "-c", script],
        input=json.dumps(arguments),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "HEADROOM_TELEMETRY": "off", "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
    ).stdout
