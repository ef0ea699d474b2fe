"""Files that reappear after a writer has ended and was removed."""

from __future__ import annotations

from pathlib import Path

import pytest

from savings_exporter import SavingsTracker


@pytest.mark.parametrize("content", [b"", bytes(64 * 1024), b"\0" * 4096 + b"left of another file"])
def test_removed_segment_comes_back(store_path: Path, content: bytes) -> None:
    """The directory's change was lost with the power, and the blocks were given away before."""
    with SavingsTracker(store_path) as tracker:
        receipt = tracker.record_request(model="m", tokens_saved=5)
        [segment] = store_path.parent.glob("*.journal.*")
    assert not segment.exists()
    store_path.with_name(f"{store_path.name}.writer.{receipt.writer}").write_bytes(b"")
    segment.write_bytes(content)
    with SavingsTracker(store_path) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == 5
        assert tracker.record_request(model="m", tokens_saved=1)
    with SavingsTracker(store_path) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == 6
    assert not segment.exists()
