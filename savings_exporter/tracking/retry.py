"""The schedule of retries after failures. It is pure: it computes the next attempt from a state and the time."""

from __future__ import annotations

import math
from typing import NamedTuple

FIRST_SECONDS = 0.1
LONGEST_SECONDS = 30.0

_MOST_DOUBLINGS = 30


class Retry(NamedTuple):
    """A schedule of retries: after 0.1 s, then 0.2 s, and so on up to every 30 s.

    ``failures`` is the number of consecutive failures. ``at`` is when the next attempt is due, on the monotonic clock.
    """

    failures: int = 0
    at: float = math.inf

    @property
    def delay(self) -> float:
        """Seconds from the last failure to the next attempt."""
        return min(FIRST_SECONDS * 2.0 ** (self.failures - 1), LONGEST_SECONDS) if self.failures else 0.0

    def failed(self, now: float) -> Retry:
        """The schedule after another failure."""
        after = Retry(min(self.failures + 1, _MOST_DOUBLINGS))
        return after._replace(at=now + after.delay)
