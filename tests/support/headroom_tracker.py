"""A real Headroom that runs beside a test, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.paths import HEADROOM_PYTHON

_PROGRAM = """
import json, sys
from headroom.proxy.savings_tracker import SavingsTracker
def answer(**values):
    print(json.dumps(values), flush=True)
tracker = SavingsTracker(path=sys.argv[1], save_flush_every=int(sys.argv[2]))
answer(ready=True)
for line in sys.stdin:
    name, arguments = json.loads(line)
    if name == "record":
        for request in arguments:
            tracker.record_request(**request)
        answer(done=True)
    elif name == "lifetime":
        answer(**tracker.snapshot()["lifetime"])
    elif name == "metrics":
        answer(**tracker.lifetime_response())
    elif name == "health":
        answer(**tracker.lifetime_response()["persistence"])
    elif name == "series":
        answer(rows=tracker.history_response()["series"][arguments])
    elif name == "snapshot":
        answer(**tracker.snapshot())
    else:
        tracker.flush()
        answer(done=True)
"""


class Headroom:
    """A tracker of a real Headroom that is open."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def record(self, *requests: Mapping[str, Any]) -> None:
        """Record requests; Headroom saves after each ``save_flush_every`` of them."""
        self._ask("record", requests)

    def flush(self) -> None:
        """Save what is not saved yet, as at the end of the proxy."""
        self._ask("flush", None)

    def lifetime(self) -> dict[str, Any]:
        """The lifetime totals in its memory."""
        return self._ask("lifetime", None)

    def snapshot(self) -> dict[str, Any]:
        """All that its dashboard gets."""
        return self._ask("snapshot", None)

    def health(self) -> dict[str, Any]:
        """What it says of its own persistence."""
        return self._ask("health", None)

    def metrics(self) -> dict[str, Any]:
        """The further lifetime totals of its dashboard."""
        return self._ask("metrics", None)

    def series(self, name: str) -> list[dict[str, Any]]:
        """The rows of ``hourly`` or ``daily``, with their breakdowns."""
        rows: list[dict[str, Any]] = self._ask("series", name)["rows"]
        return rows

    def _ask(self, name: str, arguments: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([name, arguments]) + "\n")
        self.process.stdin.flush()
        return answer_of(self.process)


@contextmanager
def running_headroom(path: Path, *, flush_every: int = 1, wrapped_by: Sequence[str] = ()) -> Iterator[Headroom]:
    """A Headroom that has read a document. It is killed at the end, so that it saves nothing more.

    Args:
        path: the document's path.
        flush_every: after how many records it saves; its proxy uses 25.
        wrapped_by: a command that runs it, such as strace.
    """
    command = [*wrapped_by, str(HEADROOM_PYTHON), "-c", _PROGRAM, str(path), str(flush_every)]
    environment = {**os.environ, "HEADROOM_TELEMETRY": "off", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            answer_of(process)
            yield Headroom(process)
        finally:
            process.kill()


def answer_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next answer."""
    assert process.stdout is not None
    assert process.stderr is not None
    line = process.stdout.readline()
    if not line:
        process.wait()
        raise AssertionError(process.stderr.read())
    answer: dict[str, Any] = json.loads(line)
    return answer
