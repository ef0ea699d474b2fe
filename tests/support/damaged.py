"""A store whose process was killed, and ways to damage it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from savings_exporter import SavingsTracker, StoreError
from savings_exporter.telemetry.metrics import SavingsCollector
from tests.support.paths import DATA
from tests.support.scrape import samples

DOCUMENT = "proxy_savings.json"

SAVED = (1, 10, 100)
"""The records in the document, and in the previous document."""

COMMITTED = (1_000, 10_000, 100_000)
"""The records that are only in the journal."""

TOTAL = sum(SAVED) + sum(COMMITTED)

FOREIGN = (DATA / "headroom" / "v6-latest" / DOCUMENT).read_bytes()
FOREIGN_TOTAL = 2_672_322

KILLED = f"""
import os, sys
from savings_exporter import SavingsTracker
tracker = SavingsTracker(sys.argv[1], save_interval=3600)
for tokens in {SAVED}:
    assert tracker.record_request(model="m", tokens_saved=tokens, provider="p").durable
assert tracker.save() and tracker.save()
for tokens in {COMMITTED}:
    assert tracker.record_request(model="m", tokens_saved=tokens, provider="p").durable
os._exit(0)
"""


class Kept:
    """A store whose process was killed, as the bytes of its files. Each use writes them to a new directory.

    ``names`` are those of its files, ``journal`` is the segment's content without the zeros after it.
    """

    def __init__(self, directory: Path) -> None:
        subprocess.run([sys.executable, "-c", KILLED, directory / DOCUMENT], check=True)
        (segment,) = (path.name for path in directory.glob("*.journal.*"))
        (writer,) = (path.name for path in directory.glob("*.writer.*"))
        self.names = {
            "document": DOCUMENT,
            "previous": f"{DOCUMENT}.previous",
            "segment": segment,
            "writer": writer,
            "lock": f"{DOCUMENT}.lock",
        }
        files = {path.name: path.read_bytes() for path in directory.iterdir()}
        assert files.keys() == set(self.names.values())
        self.files = {key: files[name] for key, name in self.names.items()}
        self.journal = self.files["segment"].rstrip(b"\0")
        # Padding is omitted: it costs time when a segment is written a thousand times, and it tests nothing.
        self.files["segment"] = self.journal + bytes(8192)
        self._directory = directory / "damaged"

    @property
    def frames(self) -> list[int]:
        """The offset of each frame in the journal."""
        return [at for at in range(len(self.journal)) if self.journal.startswith(b"SXJ2", at)]

    def put(self, **changed: bytes | None) -> Path:
        """The store with other bytes for some of its files; None omits a file."""
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir()
        for key, data in {**self.files, **changed}.items():
            if data is not None:
                (self._directory / self.names[key]).write_bytes(data)
        return self._directory / DOCUMENT


def opened(path: Path) -> tuple[int, dict[str, float]]:
    """The total of the store after it is opened, and its metrics."""
    with SavingsTracker(path) as tracker:
        snapshot = tracker.snapshot()
        assert (
            sum(totals.tokens_saved for totals in snapshot.by_provider_model.values()) == snapshot.lifetime.tokens_saved
        )
        return snapshot.lifetime.tokens_saved, samples(SavingsCollector(tracker))


def contents(path: Path) -> dict[str, bytes]:
    """The store's files, except the lock file, which may be created again."""
    return {file.name: file.read_bytes() for file in path.parent.iterdir() if not file.name.endswith(".lock")}


def total_or_refused(path: Path) -> int | None:
    """The total after opening; None if the store is refused, with a one-line error and remedy, and is unchanged."""
    before = contents(path)
    try:
        return opened(path)[0]
    except StoreError as error:
        assert contents(path) == before
        refusal = str(error)
    assert refusal.startswith(f"{path}: ")
    assert "\n" not in refusal
    assert f"savings-exporter verify --repair --store {path}" in refusal
    return None


# Each damaged byte means that a store is opened. The long form of the crash lab tests every byte, others every fifth.
STRIDE = 1 if os.environ.get("CRASH_LAB") == "long" else 5


def cuts(data: bytes) -> Iterator[bytes]:
    """The data, truncated at each position."""
    yield from (data[:length] for length in range(0, len(data), STRIDE))


def flips(data: bytes) -> Iterator[bytes]:
    """The data with one bit of each byte flipped."""
    yield from (flipped(data, position) for position in range(0, len(data), STRIDE))


def flipped(data: bytes, position: int) -> bytes:
    """The data with one bit of one byte flipped."""
    return data[:position] + bytes([data[position] ^ (1 << position % 8)]) + data[position + 1 :]
