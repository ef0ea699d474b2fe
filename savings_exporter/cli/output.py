"""What several commands print alike."""

from __future__ import annotations

import logging
import sys
from datetime import datetime
from typing import Any

import msgspec

from savings_exporter.cli import standard_streams
from savings_exporter.escaping import plain
from savings_exporter.service.views import utc
from savings_exporter.version import VERSION

logger = logging.getLogger(__name__)


def print_json(content: Any) -> None:
    """Print anything that msgspec encodes, indented."""
    standard_streams.write_text([msgspec.json.format(msgspec.json.encode(content)) + b"\n"])


def saved(moment: datetime | None) -> str:
    """When a document was saved, to be put after what it holds; nothing when it never was."""
    return f", saved {utc(moment)}" if moment else ""


def announce(lines: str) -> None:
    """Print what a service says when it answers requests. A closed pipe does not end the service, and one that nobody
    reads does not stop it.
    """
    if not standard_streams.takes_more(sys.stdout):
        logger.warning("the address could not be printed: nothing reads standard output")
        return
    try:
        print(lines, flush=True)
    except OSError as error:
        logger.warning("the address could not be printed: %s", error.strerror)
        standard_streams.discard()


def announcement(what: str, path: str, url: str, *more: str) -> str:
    """What a service prints when it answers requests."""
    return "\n".join(map(plain, (f"savings-exporter {VERSION} {what} {path}, on {url}", *more)))
