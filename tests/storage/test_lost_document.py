"""The document is removed or damaged while a process runs that has read an older one, and others have saved since."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from savings_exporter import SavingsTracker


def remove(document: Path) -> None:
    document.unlink()


def damage(document: Path) -> None:
    data = bytearray(document.read_bytes())
    data[100:104] = bytes(4)
    document.write_bytes(data)


def record_and_end(store_path: Path, tokens: int) -> None:
    """Another tracker records, saves and ends. Its files are removed when both documents contain its records."""
    with SavingsTracker(store_path, save_interval=3600) as tracker:
        assert tracker.record_request(model="m", tokens_saved=tokens)


@pytest.mark.parametrize("fault", [remove, damage])
@pytest.mark.parametrize("others", [1, 2, 3, 5])
@pytest.mark.parametrize("is_saved", [False, True], ids=["new-store", "saved-store"])
@pytest.mark.parametrize("is_recording", [False, True], ids=["idle", "recording"])
def test_newest_document_is_the_base(
    store_path: Path, fault: Callable[[Path], None], others: int, is_saved: bool, is_recording: bool
) -> None:
    with SavingsTracker(store_path, save_interval=3600) as tracker:
        expected = 1
        assert tracker.record_request(model="m", tokens_saved=1)
        if is_saved:
            assert tracker.save()
        for number in range(others):
            record_and_end(store_path, 10 ** (number + 1))
            expected += 10 ** (number + 1)
            if is_recording:
                assert tracker.record_request(model="m", tokens_saved=1)
                expected += 1
        fault(store_path)
        assert tracker.record_request(model="m", tokens_saved=1)
        assert tracker.save()
        assert tracker.snapshot().lifetime.tokens_saved == expected + 1
    with SavingsTracker(store_path) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == expected + 1
