"""Sums over a store's operations: commits, saves, failures and latencies."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class OperationCounts(msgspec.Struct, frozen=True):
    """Operation counters as sums, which can be added in any order.

    Attributes:
        counts: the sum of each counter, by a flat name. Counters with the value zero are left out.
        latest: values of which only the newest is kept, by name. Each is a Unix time in seconds and the value at that
            time.
    """

    counts: Mapping[str, float] = {}
    latest: Mapping[str, tuple[float, float]] = {}

    def plus(self, other: OperationCounts) -> OperationCounts:
        """Add the sums of both, and take the newer one of each latest value."""
        counts = dict(self.counts)
        for name, number in other.counts.items():
            counts[name] = counts.get(name, 0.0) + number
        latest = dict(self.latest)
        for name, timed in other.latest.items():
            latest[name] = max(latest.get(name, timed), timed)
        return OperationCounts(counts={name: number for name, number in counts.items() if number}, latest=latest)


def encode(operations: OperationCounts) -> bytes:
    """Encode operation counters as JSON."""
    return _ENCODER.encode(operations)


def decode(data: bytes) -> OperationCounts:
    """Decode the output of ``encode``.

    Raises:
        ValueError: the bytes are invalid.
    """
    try:
        return _DECODER.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(f"operation counters: {error}") from None


_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(OperationCounts)
