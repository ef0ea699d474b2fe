"""The receipt that a record call returns: whether the saving is durable, and its sequence number."""

from __future__ import annotations

from typing import Protocol

from savings_exporter.model.keys import KeyEntry


class Carrier(Protocol):
    """The source of a receipt's data: the batch that holds the record, or the earlier record that it repeats."""

    @property
    def durable(self) -> bool:
        """Whether the record survives a power loss from now on."""

    @property
    def first(self) -> int | None:
        """The sequence number of the first record; None until it is durable."""

    @property
    def writer(self) -> str:
        """The writer of the record; empty until it is known."""

    @property
    def is_over(self) -> bool:
        """Whether nothing changes any more: the record is durable, or will never be."""

    def wait(self, timeout: float | None) -> bool:
        """Wait until the record is durable or abandoned."""


class Counted:
    """A record that was counted before. It is the source of data for the receipt of a repeat."""

    durable = True
    is_over = True

    def __init__(self, entry: KeyEntry) -> None:
        self.first = entry.sequence
        self.writer = entry.writer.hex()

    def wait(self, _timeout: float | None) -> bool:
        """Return at once: the record is durable already."""
        return True


class Refused:
    """Records that were not accepted."""

    durable = False
    is_over = True
    first = None
    writer = ""

    def wait(self, _timeout: float | None) -> bool:
        """Return at once: the records never become durable."""
        return False


class Receipt:
    """The result of a record call: whether the saving is durable, and its sequence number in the store.

    A receipt is true when its record is durable. A receipt that is not durable yet may become durable later: the record
    is pending, and the tracker keeps trying until the record is durable or the tracker is closed. A record that is
    neither durable nor pending is lost, unless it is recorded again.
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
    def pending(self) -> bool:
        """Whether the record is accepted and not durable yet."""
        return not self._carrier.durable and not self._carrier.is_over

    @property
    def sequence(self) -> int | None:
        """The record's number within ``writer``, from 1; for several records, the last one's. None until durable."""
        first = self._carrier.first
        return None if first is None else first + self._place - 1

    @property
    def writer(self) -> str | None:
        """The writer of the record, 16 hexadecimal digits; None until durable. Together with ``sequence``, it
        identifies the record permanently.
        """
        return self._carrier.writer if self._carrier.durable else None

    @property
    def duplicate(self) -> bool:
        """Whether the key was recorded before with the same content. If so, the record was not counted again."""
        return self._duplicate

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the record is durable, for at most ``timeout`` seconds (None: no limit).

        Returns:
            Whether the record is durable now. False at once when the tracker was closed before the record was durable.
        """
        return self._carrier.wait(timeout)

    def __bool__(self) -> bool:
        return self.durable

    def __repr__(self) -> str:
        more = ", duplicate=True" if self.duplicate else ""
        return f"Receipt(durable={self.durable}, sequence={self.sequence}, writer={self.writer!r}{more})"
