"""``savings-exporter backfill``: its files, options and errors."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from savings_exporter import SavingsTracker
from tests.support.paths import DATA
from tests.support.service import run_cli


@pytest.fixture
def stored(store_path: Path) -> Path:
    """A store with savings on two days."""
    with SavingsTracker(store_path) as tracker:
        for day in ("2026-06-01", "2026-06-03"):
            assert tracker.record_request(model="m", tokens_saved=10, timestamp=f"{day}T12:00:00Z").durable
    return store_path


def test_output_and_labels(stored: Path, tmp_path: Path) -> None:
    options = ["--until", "2026-06-04T00:00:00Z", "--step", "1d", "--job", "llm", "--instance", "h:1"]
    options += ["--label", "namespace=a", "--label", 'cluster=b "c"=d']
    file = tmp_path / "past.om"
    done = run_cli("backfill", "--store", str(stored), "--output", str(file), *options)
    assert (done.returncode, done.stderr) == (0, "")
    text = file.read_text(encoding="utf-8")
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    span = "from 2026-06-01 00:00:00 UTC to 2026-06-04 00:00:00 UTC"
    assert done.stdout == f"{file}: {len(samples)} samples, {span}\n"
    target = 'instance="h:1",job="llm",namespace="a",cluster="b \\"c\\"=d"'
    assert all(target in sample for sample in samples)
    series = f'savings_tokens_saved_total{{{target},provider="unknown",model="m"}}'
    values = [sample.removeprefix(series) for sample in samples if sample.startswith(series)]
    assert values == [" 0.0 1780272000", " 10.0 1780358400", " 10.0 1780444800", " 20.0 1780531200"]
    printed = run_cli("backfill", "--store", str(stored), "--output", "-", *options)
    assert (printed.returncode, printed.stdout, printed.stderr) == (0, text, "")


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--step", "7m"], 2, "--step must be a part of a day"),
        (["--step", "5"], 2, "such as 30s, 5m or 1h"),
        (["--step", "2d"], 2, "--step"),
        (["--until", "yesterday"], 2, "--until must be a time such as 2026-01-31T12:00:00Z"),
        (["--until", "2199-01-01T00:00:00Z"], 2, "is in the future"),
        (["--until", "2026-05-31T23:59:59Z"], 2, "before the first day with savings, 2026-06-01"),
        (["--label", "model=x"], 2, "--label"),
        (["--label", "__name__=x"], 2, "--label"),
        (["--label", "cluster"], 2, "cluster must not be empty"),
        (["--label", "job=x"], 2, "an option of its own"),
        (["--instance", ""], 2, "instance must not be empty"),
        (["--store", "none.json"], 1, "there are no savings yet"),
        (["--store", str(DATA / "headroom" / "v6" / "proxy_savings.json")], 1, "no saving of which the day is known"),
        (["--output", "there.om"], 1, "there.om: exists already"),
        (["--output", "missing/past.om"], 1, "missing/past.om: cannot be written: No such file or directory"),
        (["--output", "."], 1, ".: exists already"),
    ],
)
def test_mistakes(stored: Path, tmp_path: Path, options: list[str], status: int, said: str) -> None:
    there = tmp_path / "there.om"
    there.write_text("kept")
    done = run_cli("backfill", "--store", str(stored), "--output", "past.om", *options, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (status, "", 1), done.stderr
    assert said in done.stderr
    assert there.read_text() == "kept"
    assert not (tmp_path / "past.om").exists()


def test_incomplete_file_is_removed(stored: Path, tmp_path: Path) -> None:
    file = tmp_path / "past.om"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = run_cli("backfill", "--store", str(stored), "--output", str(file), preexec_fn=limit)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"savings-exporter: {file}: cannot be written: File too large\n"
    assert not file.exists()


def test_damaged_days(stored: Path, tmp_path: Path) -> None:
    (days,) = stored.parent.glob("*.days.*")
    days.write_bytes(b"damaged")
    done = run_cli("backfill", "--store", str(stored), "--output", str(tmp_path / "past.om"))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "verify --repair" in done.stderr
