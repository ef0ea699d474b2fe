"""``SavingsLogger``: a callback of LiteLLM that records what its requests saved. It needs the extra ``litellm``."""

from __future__ import annotations

import logging
import os
from typing import Any

from litellm.integrations.custom_logger import CustomLogger

from savings_exporter.sources.litellm_payload import record_of
from savings_exporter.sources.record_queue import RecordQueue

logger = logging.getLogger(__name__)


class SavingsLogger(CustomLogger):  # type: ignore[misc]  # the type of its base is unknown without the extra
    """Records each successful request of LiteLLM, with the source ``litellm``. It never blocks or fails a request.

    LiteLLM reports some requests twice: to a thread and to the event loop. The id of the call is the idempotency key,
    so each request counts once. Failed requests are not recorded: nothing was saved, and LiteLLM may try again.

    Args:
        store: the document; see ``RecordQueue``. It is opened with the first request.
    """

    def __init__(self, store: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        self.queue = RecordQueue(store)

    def log_success_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:  # noqa: ARG002
        """Record a request. LiteLLM calls this in a thread."""
        self._record(kwargs)

    async def async_log_success_event(
        self,
        kwargs: Any,
        response_obj: Any,  # noqa: ARG002
        start_time: Any,  # noqa: ARG002
        end_time: Any,  # noqa: ARG002
    ) -> None:
        """Record a request. LiteLLM calls this on the event loop."""
        self._record(kwargs)

    def _record(self, event: Any) -> None:
        try:
            if (recorded := record_of(event)) is not None:
                self.queue.put(*recorded)
        except (TypeError, ValueError) as error:
            logger.error("savings: a request is not recorded: %s", error)


savings_logger = SavingsLogger()
"""For ``callbacks`` in the configuration of LiteLLM's proxy. It opens the store with the first request."""
