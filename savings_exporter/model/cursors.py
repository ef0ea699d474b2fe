"""How far each source has been imported.

A cursor becomes durable together with the records that were read up to it. After a crash, reading continues at the
cursor, so that no record is lost or counted twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

MOST_CURSORS = 1000
"""How many sources a store can import. A cursor is never dropped: its records would be counted again."""


DAMAGED = "damaged"
"""The reason of a record that cannot be read. It cannot be let in."""

SAVED_MORE_THAN_INPUT = "saved_more_than_input"
"""The reason of a record that saved more than its request had."""

JUMP = "jump"
"""The reason of a record that saved far more than all others of its source together."""

OVERSIZED = "oversized"
"""The reason of a record whose input is larger than the program itself counts."""

REASONS = (DAMAGED, JUMP, OVERSIZED, SAVED_MORE_THAN_INPUT)
"""Why records are kept out of the totals."""


class Cursor(msgspec.Struct, frozen=True, omit_defaults=True):
    """The position in one source.

    Attributes:
        name: the permanent name of the source, such as ``rtk:/home/ana/.local/share/rtk/history.db``.
        source: the layer that saved, as in a record, such as ``rtk``.
        number: 1 for the first cursor of a source, then one more for each. The greatest number is the current one, in
            whatever order the journals are read.
        state: what the source needs to continue, as JSON.
        rejected: how many records were kept out of the totals so far, by reason.
    """

    name: str
    source: str
    number: int
    state: Mapping[str, Any] = {}
    rejected: Mapping[str, int] = {}


Cursors = Mapping[str, Cursor]
"""The current cursors by the names of their sources."""


def with_cursors(cursors: Cursors, newer: Iterable[Cursor]) -> Cursors:
    """The cursors with others added. Of each source, the newest one remains."""
    merged = dict(cursors)
    for cursor in newer:
        known = merged.get(cursor.name)
        if known is None or known.number < cursor.number:
            merged[cursor.name] = cursor
    return merged
