"""What is logged, and how often."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator

import pytest

from savings_exporter.service import logs
from tests.support.wait import eventually


@pytest.fixture(autouse=True)
def _root_logger() -> Iterator[None]:
    """The handlers of the test run, restored at the end."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


class Clock:
    """The time that passes between log lines."""

    seconds = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that the test moves."""
    made = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: made.seconds)
    return made


def messages(capfd: pytest.CaptureFixture[str], handler: logging.Handler) -> list[str]:
    """The messages so far."""
    handler.flush()
    return [line.partition("msg=")[2].strip('"') for line in capfd.readouterr().err.splitlines()]


def test_collector_that_is_down_is_a_line_a_minute(capfd: pytest.CaptureFixture[str], clock: Clock) -> None:
    """From all exporters together; lines of other programs are not held back."""
    handler = logs.configure("info", "logfmt")
    spans = logging.getLogger("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    metrics = logging.getLogger("opentelemetry.exporter.otlp.proto.grpc.exporter")
    for minute in range(3):
        clock.seconds = 1000.0 + 61 * minute
        for attempt in range(4):
            spans.warning("refused, attempt %d", attempt)
            metrics.error("refused")
    logging.getLogger("savings_exporter").warning("another")
    said = messages(capfd, handler)
    assert said[0] == "refused, attempt 0"
    assert "another" in said
    assert len([line for line in said if line.startswith("refused")]) <= 4
    # Each line is one of its own, or counted in a summary.
    counted = [int(line.split("latest of ")[1].split()[0]) for line in said if "latest of" in line]
    assert 1 + sum(counted) == 24


def test_repeated_lines_are_summed_up(capfd: pytest.CaptureFixture[str], clock: Clock) -> None:
    """Ten lines of a kind in a minute, then one a minute, with the latest."""
    handler = logs.configure("info", "logfmt")
    logger = logging.getLogger("savings_exporter.watched")
    for number in range(100_000):
        logger.warning("entry %d is wrong", number)
    logger.warning("another kind")
    said = messages(capfd, handler)
    assert said[:11] == [*(f"entry {number} is wrong" for number in range(10)), "another kind"]
    assert said[11:] == ["entry 99999 is wrong (the latest of 99,990 lines like this)"]
    logger.warning("entry %d is wrong", 5)
    clock.seconds += 61
    logger.warning("entry %d is wrong", 6)
    assert messages(capfd, handler) == ["entry 6 is wrong (the latest of 2 lines like this)"]
    clock.seconds += 61
    logger.warning("entry %d is wrong", 7)
    assert messages(capfd, handler) == ["entry 7 is wrong"]


def test_summary_does_not_wait_for_another_line(capfd: pytest.CaptureFixture[str], clock: Clock) -> None:
    handler = logs.configure("info", "logfmt")
    logger = logging.getLogger("savings_exporter")
    for number in range(12):
        logger.warning("entry %d", number)
    clock.seconds += 61
    logger.warning("another kind")
    lines: list[str] = []

    def is_summed_up() -> bool:
        lines.extend(capfd.readouterr().err.splitlines())
        return any("entry 11 (the latest of 2 lines like this)" in line for line in lines)

    eventually(is_summed_up, "the summary")
    handler.close()


def test_messages_that_are_all_different(capfd: pytest.CaptureFixture[str], clock: Clock) -> None:
    """Another package may put its arguments into the message: the kinds stay bounded."""
    handler = logs.configure("info", "logfmt")
    logger = logging.getLogger("uvicorn")
    for number in range(5000):
        logger.warning(f"entry {number}")
    assert len(messages(capfd, handler)) < 600


def test_mistake_of_the_program_that_logs(capfd: pytest.CaptureFixture[str], clock: Clock) -> None:
    """It is told, does not end the caller, and leaves the log as it is."""
    handler = logs.configure("info", "logfmt")
    logger = logging.getLogger("package")
    for _ in range(20):
        logger.warning("%d records", "many")
    logger.warning({"not": "text"})
    clock.seconds += 61
    logger.warning("another")
    said = messages(capfd, handler)
    assert "test_logs.py" in said[0]
    assert "logged a line that cannot be formatted" in said[0]
    assert "{'not': 'text'}" in said
    assert "another" in said
    assert any("latest of 10 lines" in line for line in said)


def test_long_message_is_cut(capfd: pytest.CaptureFixture[str]) -> None:
    handler = logs.configure("info", "json")
    logging.getLogger("savings_exporter").warning("x" * 1_000_000)
    handler.flush()
    assert len(capfd.readouterr().err) < 10_000


def test_pipe_that_nobody_reads() -> None:
    """Lines are dropped and counted. When the pipe is read again, a line says how many."""
    reading, writing = os.pipe()
    handler = logs.LogHandler(writing)
    for number in range(4000):
        handler.handle(logging.makeLogRecord({"name": f"logger{number % 400}", "msg": f"line {'x' * 1000}"}))
    assert handler.dropped > 2000
    read = b""
    while b"were dropped, because nothing read them" not in read:
        read += os.read(reading, 1 << 16)
    assert f"{handler.dropped:,} log lines in all".encode() in read
    os.close(reading)
    os.close(writing)
