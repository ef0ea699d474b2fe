"""Logging to standard error, one line for each event."""

from __future__ import annotations

import json
import logging
import sys
import time
from datetime import datetime, timezone

_OPENTELEMETRY = "opentelemetry"
_INTERVAL_SECONDS = 60.0


def configure(level: str, log_format: str) -> None:
    """Log to standard error, one line an event, as ``logfmt`` or ``json``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LineFormatter(as_json=log_format == "json"))
    handler.addFilter(_OneOfOpenTelemetry())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    if level != "debug":
        logging.getLogger("uvicorn").setLevel(logging.WARNING)


def be_quiet() -> None:
    """Log nothing: the command itself says in one line what went wrong."""
    logging.basicConfig(handlers=[logging.NullHandler()], force=True)


class _OneOfOpenTelemetry(logging.Filter):
    """Passes one line a minute from OpenTelemetry, which logs each attempt to reach a collector that is down."""

    def __init__(self) -> None:
        super().__init__()
        self._logged_at = float("-inf")
        self._left_out = 0

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.partition(".")[0] != _OPENTELEMETRY:
            return True
        now = time.monotonic()
        if now < self._logged_at + _INTERVAL_SECONDS:
            self._left_out += 1
            return False
        if self._left_out:
            record.msg, record.args = f"{record.getMessage()} ({self._left_out} lines since the last one left out)", ()
        self._logged_at, self._left_out = now, 0
        return True


class _LineFormatter(logging.Formatter):
    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "ts": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": record.getMessage(),
        }
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            fields["error"] = f"{type(error).__name__}: {error}"
        fields |= _trace_of_caller()
        if hasattr(record, "drill"):
            fields["drill"] = record.drill
        if self._as_json:
            return json.dumps(fields)
        return " ".join(f"{key}={_logfmt(value)}" for key, value in fields.items())


def _trace_of_caller() -> dict[str, str]:
    """The trace and the span within which something is logged, when there is one."""
    # A program that traces has loaded it.
    trace = sys.modules.get("opentelemetry.trace")
    context = trace.get_current_span().get_span_context() if trace is not None else None
    if context is None or not context.is_valid:
        return {}
    return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}


def _logfmt(value: str) -> str:
    plain = value.isascii() and value.isprintable() and not set(value) & set(' "=\\')
    return value if plain and value else json.dumps(value)
