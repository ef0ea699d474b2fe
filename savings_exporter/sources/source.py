"""What a source is: something that other programs write, and that is read from a cursor on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from savings_exporter.errors import SavingsError
from savings_exporter.model.pricing import PriceBasis
from savings_exporter.model.totals import Row

MOST_KEPT_OUT = 100
"""How many rejected records a source remembers, so that they can be let in later: the newest ones."""

MOST_PROBLEMS = 20
"""How many problems of one step are described. Further ones are counted."""


class SourceError(SavingsError):
    """A source cannot be read. The message names the file, the reason and the remedy."""


class Progress(NamedTuple):
    """How much of a source has been read, in its own unit (bytes or rows)."""

    done: int
    total: int


Note = Callable[[Progress], None]
"""Called when more of a source has been read."""


class Step(NamedTuple):
    """A part of a source, read as a whole.

    Attributes:
        state: the state of the cursor that follows, as JSON. It is at most some ten kilobytes.
        rows: sums of the records that count.
        projects: sums that count only in the totals by project.
        rejected: how many records were kept out of the totals, by reason. Reasons are few and fixed.
        problems: descriptions of rejected records, for people, such as ``line 17: is not JSON``.
        progress: how much has been read after this step.
        prices: the prices that were used for records without an amount; None without prices.
    """

    state: Mapping[str, Any]
    rows: Sequence[Row] = ()
    projects: Sequence[Row] = ()
    rejected: Mapping[str, int] = {}
    problems: Sequence[str] = ()
    progress: Progress = Progress(0, 0)
    prices: PriceBasis | None = None


class Source(Protocol):
    """A file, a database or a pair of files of another program. Reading never changes anything in it.

    Attributes:
        kind: the layer that saved, as in a record, such as ``rtk``.
        path: the file, for people.
        name: the permanent name of the source in a store, such as ``rtk:/home/ana/.local/share/rtk/history.db``.
    """

    @property
    def kind(self) -> str:
        """The layer that saved."""

    @property
    def path(self) -> str:
        """The file."""

    @property
    def name(self) -> str:
        """The permanent name in a store."""

    def steps(self, state: Mapping[str, Any] | None, *, is_complete: bool) -> Iterator[Step]:
        """Read what is new since a state, in steps. Without anything new, there is no step.

        Args:
            state: that of the last step that is durable; None to read from the beginning.
            is_complete: whether the file is complete, and its last line counts without a line break. While a file is
                followed, this is False.

        Raises:
            SourceError: the source cannot be read now.
        """
