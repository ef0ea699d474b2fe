"""Wait for expected events."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

WAIT_SECONDS = 30.0
"""How long a test waits for an expected event. It is a limit, not an expected duration."""


def eventually(condition: Callable[[], Any], what: str) -> Any:
    """Poll until the condition holds, and return its value. On failure, name what was waited for."""
    pause = threading.Event()
    for _ in range(int(WAIT_SECONDS / 0.02)):
        if value := condition():
            return value
        pause.wait(0.02)
    raise AssertionError(f"waited {WAIT_SECONDS:.0f} s in vain for {what}")
