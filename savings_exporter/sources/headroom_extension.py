"""The extension ``savings_exporter`` of Headroom's pipeline: it records the outcome of each request of the proxy.

Headroom loads it by its entry point when the environment variable HEADROOM_PIPELINE_EXTENSIONS names it.
"""

from __future__ import annotations

import logging
import os
import sys
import uuid
from typing import Any

from savings_exporter.model.record import MAX_TOKENS, SavingsRecord
from savings_exporter.sources.record_queue import RecordQueue

logger = logging.getLogger(__name__)

SOURCE = "headroom"
"""The source of all records from Headroom's proxy."""

_OUTCOME_STAGE = "outcome_observed"

# Headroom numbers the requests of each process from 1, so two proxies can use the same ids.
_PROCESS = uuid.uuid4().hex


class SavingsExtension:
    """Records what each request of Headroom's proxy saved. It changes no event, and never blocks or fails a request.

    The environment variable SAVINGS_EXPORTER_STORE names the store; by default it is the default store. It is opened
    with the first request.
    """

    def __init__(self) -> None:
        self.queue = RecordQueue()

    def on_pipeline_event(self, event: Any) -> None:
        """Record the outcome of a request, which is the last event of the request. Other events are ignored."""
        if event.stage != _OUTCOME_STAGE or (outcome := event.outcome) is None:
            return
        try:
            self.queue.put(record_of(outcome, current_project()), key_of(outcome.request_id))
        except (AttributeError, TypeError, ValueError) as error:
            logger.error("savings: a request is not recorded: %s", error)


def record_of(outcome: Any, project: str | None) -> SavingsRecord:
    """The record of one ``OutcomeSnapshot`` of Headroom.

    ``tokens_saved`` are the tokens that are new to the conversation, which Headroom's own totals count as well.
    Tokens of earlier turns that were removed again are not part of it. A response from Headroom's cache has no tokens
    and counts as a request.
    """
    return SavingsRecord(
        model=outcome.model or "",
        provider=outcome.provider or None,
        project=project,
        source=SOURCE,
        tokens_saved=_tokens(outcome.novel_tokens_saved),
        input_tokens=_tokens(outcome.input_tokens),
        output_tokens=_tokens(outcome.output_tokens),
        cache_read_tokens=_tokens(outcome.cache_read_tokens),
        cache_write_tokens=_tokens(outcome.cache_write_tokens),
    )


def key_of(request: str) -> str | None:
    """An idempotency key for a request's id, which is unique in one process only."""
    return f"headroom-{_PROCESS}-{os.getpid()}-{request[:128]}" if request else None


def current_project() -> str | None:
    """The project of the request that Headroom is handling. Only the proxy, which loads this module, has projects."""
    context = sys.modules.get("headroom.proxy.project_context")
    project: str | None = context.get_current_project() if context is not None else None
    return project


def _tokens(count: int | None) -> int:
    return min(max(count or 0, 0), MAX_TOKENS)
