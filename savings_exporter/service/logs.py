"""Logging to standard error, one line for each event.

A thread writes the lines, so that a reader of standard error that has stopped reading keeps nothing else waiting. The
lines that wait are bounded. Repeated lines of one kind are counted and summed up.
"""

from __future__ import annotations

import json
import logging
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterator
from datetime import datetime, timezone

from savings_exporter.escaping import plain

_STANDARD_ERROR = 2
_OPENTELEMETRY = "opentelemetry"
_INTERVAL_SECONDS = 60.0
_LINES_OF_A_KIND = 10
_MOST_KINDS = 500
_MOST_WAITING = 1000
_LONGEST_MESSAGE = 4096
_LONGEST_FLUSH_SECONDS = 1.0


def configure(level: str, log_format: str) -> LogHandler:
    """Log to standard error, one line an event, as ``logfmt`` or ``json``."""
    handler = LogHandler(_STANDARD_ERROR)
    handler.setFormatter(_LineFormatter(as_json=log_format == "json"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    if level != "debug":
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
    return handler


def be_quiet() -> None:
    """Log nothing: the command itself says in one line what went wrong."""
    logging.basicConfig(handlers=[logging.NullHandler()], force=True)


class LogHandler(logging.Handler):
    """Writes lines to a descriptor, in a thread that sleeps while there are none.

    ``dropped`` is how many it did not write, because nothing read them or because they could not be written.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._limits = _Limits()
        self._waiting: deque[str] = deque()
        self._is_writing = False
        self.dropped = 0
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="savings-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Let the thread write a line, unless too many lines wait already."""
        _make_sound(record)
        with self._changed:
            if self._limits.lets_pass(record, time.monotonic()):
                self._put(record)
            # Otherwise the thread has to learn when to sum up.
            self._changed.notify_all()

    def flush(self) -> None:
        """Sum up, and wait until the lines are written, for at most a second."""
        with self._changed:
            self._sum_up(float("inf"))
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._waiting and not self._is_writing, _LONGEST_FLUSH_SECONDS)

    def _put(self, record: logging.LogRecord) -> None:
        if len(self._waiting) < _MOST_WAITING:
            self._waiting.append(self.format(record))
        else:
            self.dropped += 1

    def _sum_up(self, now: float) -> None:
        for record in self._limits.summaries(now):
            self._put(record)

    def _run(self) -> None:
        reported = 0
        while True:
            is_written = self._write(self._next())
            with self._changed:
                self.dropped += not is_written
                if is_written and self.dropped > reported and not self._waiting:
                    # All lines that waited are written: it flows again.
                    reported = self.dropped
                    self._put(_dropped_record(reported))
                self._is_writing = False
                self._changed.notify_all()

    def _next(self) -> str:
        """Wait for a line."""
        with self._changed:
            while not self._waiting:
                due = self._limits.due()
                self._changed.wait(None if due is None else max(due - time.monotonic(), 0))
                self._sum_up(time.monotonic())
            self._is_writing = True
            return self._waiting.popleft()

    def _write(self, line: str) -> bool:
        data = f"{plain(line)}\n".encode("utf-8", "backslashreplace")
        while data:
            try:
                # Not sys.stderr: at the end, Python waits for a thread that writes to it.
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:
                # Another process has made the pipe or terminal that both share non-blocking.
                select.select([], [self._descriptor], [])
            except OSError:
                return False
        return True


class _Limits:
    """Lets ten lines of a kind pass in a minute, and one of OpenTelemetry, which logs each attempt to reach a collector
    that is down. Further ones are counted, and summed up in one line a minute with the latest of them.

    A kind is the message without its arguments.
    """

    def __init__(self) -> None:
        self._kinds: dict[Hashable, _Kind] = {}

    def lets_pass(self, record: logging.LogRecord, now: float) -> bool:
        """Account for a record. Returns whether it is logged now."""
        name, most = self._kind_of(record)
        kind = self._kinds.get(name)
        if kind is None or (now >= kind.ends and not kind.left_out):
            kind = self._kinds[name] = _Kind(most, now + _INTERVAL_SECONDS)
        if kind.left > 0:
            kind.left -= 1
            return True
        kind.left_out += 1
        kind.latest = record
        return False

    def due(self) -> float | None:
        """When to ask for summaries; None while there are none."""
        return min((kind.ends for kind in self._kinds.values() if kind.left_out), default=None)

    def summaries(self, now: float) -> Iterator[logging.LogRecord]:
        """A record for each kind of which lines were left out in the minute that has ended."""
        for kind in list(self._kinds.values()):
            record = kind.latest
            if record is not None and kind.left_out and now >= kind.ends:
                if kind.left_out > 1:
                    said = f"{record.getMessage()} (the latest of {kind.left_out:,} lines like this)"
                    record.msg, record.args = said, ()
                # While it goes on, there is only this line a minute.
                kind.left, kind.left_out, kind.latest = 0, 0, None
                kind.ends = max(time.monotonic(), kind.ends) + _INTERVAL_SECONDS
                yield record

    def _kind_of(self, record: logging.LogRecord) -> tuple[Hashable, int]:
        """The kind of a record, and how many of it are logged in a minute."""
        if record.name.partition(".")[0] == _OPENTELEMETRY:
            return _OPENTELEMETRY, 1
        name = record.name, record.levelno, record.msg
        if name not in self._kinds and len(self._kinds) >= _MOST_KINDS:
            now = time.monotonic()
            self._kinds = {key: kind for key, kind in self._kinds.items() if now < kind.ends or kind.left_out}
            if len(self._kinds) >= _MOST_KINDS:
                # Another package puts the arguments into its messages.
                return "others", _LINES_OF_A_KIND
        return name, _LINES_OF_A_KIND


class _Kind:
    """What was logged of a kind. The minute ends at ``ends``, and until then ``left`` more lines are logged."""

    def __init__(self, left: int, ends: float) -> None:
        self.left = left
        self.ends = ends
        self.left_out = 0
        self.latest: logging.LogRecord | None = None


def _make_sound(record: logging.LogRecord) -> None:
    """Give a record a text as its message, also one that a mistake in another package made impossible to format."""
    try:
        text = record.getMessage()
    except Exception as error:
        place = f"{record.pathname}:{record.lineno}"
        record.msg, record.args = f"{place} logged a line that cannot be formatted: {error}", ()
    else:
        if not isinstance(record.msg, str):
            record.msg, record.args = text, ()


def _dropped_record(number: int) -> logging.LogRecord:
    said = f"{number:,} log lines in all were dropped, because nothing read them"
    return logging.LogRecord(__name__, logging.WARNING, __file__, 0, said, (), None)


class _LineFormatter(logging.Formatter):
    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "ts": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": _cut(record.getMessage()),
        }
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            fields["error"] = _cut(f"{type(error).__name__}: {error}")
        fields |= _trace_of_caller()
        if hasattr(record, "drill"):
            fields["drill"] = record.drill
        if self._as_json:
            return json.dumps(fields)
        return " ".join(f"{key}={_logfmt(value)}" for key, value in fields.items())


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}..."


def _trace_of_caller() -> dict[str, str]:
    """The trace and the span within which something is logged, when there is one."""
    # A program that traces has loaded it.
    trace = sys.modules.get("opentelemetry.trace")
    context = trace.get_current_span().get_span_context() if trace is not None else None
    if context is None or not context.is_valid:
        return {}
    return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}


def _logfmt(value: str) -> str:
    is_bare = value.isascii() and value.isprintable() and not set(value) & set(' "=\\')
    return value if is_bare and value else json.dumps(value)
