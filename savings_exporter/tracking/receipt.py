"""What a record call returns: whether the saving is durable, and where it stands."""

from __future__ import annotations

from typing import Protocol

from savings_exporter.model.keys import KeyEntry


class Carrier(Protocol):
    """What a receipt asks: the batch that carries the record, or the record of which it is a repeat."""

    @property
    def durable(self) -> bool:
        """Whether the record survives a power loss from now on."""

    @property
    def first(self) -> int | None:
        """The sequence number of its first record, None until it is durable."""

    @property
    def writer(self) -> str:
        """The writer that records it, empty until it is known."""

    def wait(self, timeout: float | None) -> bool:
        """Wait until it is durable or given up."""


class Counted:
    """A record that was counted before: what the receipt of a repeat asks."""

    durable = True

    def __init__(self, entry: KeyEntry) -> None:
        self.first = entry.sequence
        self.writer = entry.writer.hex()

    def wait(self, _timeout: float | None) -> bool:
        """It is durable already."""
        return True


class Receipt:
    """What a record call returns: whether the saving is durable, and where it stands in the store.

    A receipt is true when it is durable. One that is not durable yet may become so later: the record is pending, and
    the tracker goes on trying until it is saved or closed.
    """

    __slots__ = ("_carrier", "_duplicate", "_place")

    def __init__(self, carrier: Carrier, place: int, *, duplicate: bool = False) -> None:
        self._carrier = carrier
        self._place = place
        self._duplicate = duplicate

    @property
    def durable(self) -> bool:
        """Whether the record survives a power loss from now on."""
        return self._carrier.durable

    @property
    def sequence(self) -> int | None:
        """The record's number within ``writer``, from 1 (of several records, the last one's); None until durable."""
        first = self._carrier.first
        return None if first is None else first + self._place - 1

    @property
    def writer(self) -> str | None:
        """The writer that recorded it, 16 hexadecimal digits; None until durable. With ``sequence``, it names the
        record for good.
        """
        return self._carrier.writer if self._carrier.durable else None

    @property
    def duplicate(self) -> bool:
        """Whether its idempotency key was recorded before, with the same content: then it was not counted again."""
        return self._duplicate

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the record is durable, at most ``timeout`` seconds (None: as long as it takes).

        Returns:
            Whether it is durable now. False at once when the tracker was closed without saving it.
        """
        return self._carrier.wait(timeout)

    def __bool__(self) -> bool:
        return self.durable

    def __repr__(self) -> str:
        more = ", duplicate=True" if self.duplicate else ""
        return f"Receipt(durable={self.durable}, sequence={self.sequence}, writer={self.writer!r}{more})"
