"""Sums of what a store's operations did: commits, saves, failures, latencies."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class OperationCounts(msgspec.Struct, frozen=True):
    """Operation counters, as sums that can be added in any order.

    Attributes:
        counts: the sum of each counter, by a flat name; counters at zero are left out.
        latest: values of which the newest counts, by name, with the Unix time in seconds at which each was true.
    """

    counts: Mapping[str, float] = {}
    latest: Mapping[str, tuple[float, float]] = {}

    def plus(self, other: OperationCounts) -> OperationCounts:
        """Add the other's sums, and of each latest value take the newer one."""
        counts = dict(self.counts)
        for name, number in other.counts.items():
            counts[name] = counts.get(name, 0.0) + number
        latest = dict(self.latest)
        for name, timed in other.latest.items():
            latest[name] = max(latest.get(name, timed), timed)
        return OperationCounts(counts={name: number for name, number in counts.items() if number}, latest=latest)


def encode(operations: OperationCounts) -> bytes:
    """Write operation counters as JSON."""
    return _ENCODER.encode(operations)


def decode(data: bytes) -> OperationCounts:
    """Read what ``encode`` wrote.

    Raises:
        ValueError: the bytes are something else.
    """
    try:
        return _DECODER.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(f"operation counters: {error}") from None


_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(OperationCounts)
