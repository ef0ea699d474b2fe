"""What is logged, and how often."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import pytest

from savings_exporter.service import logs


@pytest.fixture(autouse=True)
def _root_logger() -> Iterator[None]:
    """The handlers of the test run, restored at the end."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def test_collector_that_is_down_is_a_line_a_minute(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From all exporters together; lines of other programs are not held back."""
    seconds = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: seconds)
    logs.configure("info", "logfmt")
    spans = logging.getLogger("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    metrics = logging.getLogger("opentelemetry.exporter.otlp.proto.grpc.exporter")
    for minute in range(3):
        seconds = 1000.0 + 60 * minute
        for attempt in range(4):
            spans.warning("refused, attempt %d", attempt)
            metrics.error("refused")
            seconds += 10
    logging.getLogger("savings_exporter").warning("another")
    lines = [line.partition("msg=")[2] for line in capsys.readouterr().err.splitlines()]
    left_out = "(7 lines since the last one left out)"
    assert lines == [
        '"refused, attempt 0"',
        f'"refused, attempt 0 {left_out}"',
        f'"refused, attempt 0 {left_out}"',
        "another",
    ]
