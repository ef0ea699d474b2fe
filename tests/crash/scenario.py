"""One process that opens a store with something to recover, commits, saves, fills what can be filled, and opens again.

Each of its system calls on the store's directory is made to fail by ``test_every_call.py``. Arguments: the document's
path, a directory for the ledgers, how the journal is written. Status 0: it came to its end, whatever is pending; 3: the
store refused to open.
"""

from __future__ import annotations

import logging
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import cast

from savings_exporter import SavingsTracker, StoreError
from savings_exporter.storage.segment import SyncMethod
from tests.crash.ledger import Ledger
from tests.crash.writers import batch_of, key

REFUSED = 3

SINGLE, BATCHED, LATER, LAST = "single", "batched", "later", "last"

BATCH = 400
"""Records a batch, so that one of them is larger than a first segment."""

# One fault is over when the disk is tried again, some tenths of a second later.
PATIENCE_SECONDS = 5.0


def main(store: str, ledgers: Path, method: SyncMethod) -> int:
    make_names_predictable()
    logging.disable()
    try:
        with SavingsTracker(store, sync_method=method) as tracker:
            record(tracker, ledgers)
        with SavingsTracker(store, sync_method=method) as tracker:
            send(tracker, Ledger(ledgers / LAST), LAST, 1)
    except StoreError as error:
        print(error, file=sys.stderr)
        return REFUSED
    return 0


def make_names_predictable() -> None:
    """Give files and writers the same names in each run, because strace selects files by name."""
    # Each by its length: the names of files and of writers are numbered apart.
    numbers: dict[int, Iterator[int]] = defaultdict(lambda: count(1))

    def numbered(size: int) -> bytes:
        return next(numbers[size]).to_bytes(size, "big")

    os.urandom = numbered


def record(tracker: SavingsTracker, ledgers: Path) -> None:
    """Commit, fill what can be filled, save, commit in the background."""
    single, batched, later = (Ledger(ledgers / name) for name in (SINGLE, BATCHED, LATER))
    # The second one goes into the segment that the first one made.
    send(tracker, single, SINGLE, 1)
    send(tracker, single, SINGLE, 2)
    for number in (1, 2):
        batched.attempt(number)
        receipt = tracker.record_many(batch_of(BATCHED, BATCH), **key(BATCHED, number))
        batched.answer(number, receipt, PATIENCE_SECONDS)
    # Twice, so that there is a document to keep as the previous one.
    for _ in range(2):
        durable = tracker.snapshot().sequence
        if tracker.save():
            batched.saved(durable)
    later.attempt(1)
    receipt = tracker.record_request(model=LATER, tokens_saved=1, wait=False, **key(LATER, 1))
    tracker.flush(PATIENCE_SECONDS)
    later.answer(1, receipt, PATIENCE_SECONDS)
    send(tracker, single, SINGLE, 3)


def send(tracker: SavingsTracker, ledger: Ledger, model: str, number: int) -> None:
    ledger.attempt(number)
    receipt = tracker.record_request(model=model, tokens_saved=1, **key(model, number))
    ledger.answer(number, receipt, PATIENCE_SECONDS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), cast("SyncMethod", sys.argv[3])))
