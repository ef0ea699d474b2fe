"""The extension of Headroom's pipeline, with outcomes of a real Headroom."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from enum import Enum
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from savings_exporter.sources.headroom_extension import SavingsExtension, key_of, record_of
from savings_exporter.watched import WatchedFile
from tests.support.paths import DATA
from tests.support.wait import WAIT_SECONDS

LINES = (DATA / "sources" / "headroom" / "outcome_observed.jsonl").read_text().splitlines()
OUTCOMES = [SimpleNamespace(**json.loads(line)["outcome"]) for line in LINES]


class Stage(str, Enum):
    OUTCOME_OBSERVED = "outcome_observed"
    PRE_SEND = "pre_send"


def event(outcome: Any, stage: Stage = Stage.OUTCOME_OBSERVED) -> SimpleNamespace:
    return SimpleNamespace(stage=stage, outcome=outcome)


@pytest.fixture
def extension(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> SavingsExtension:
    monkeypatch.setenv("SAVINGS_EXPORTER_STORE", str(store_path))
    return SavingsExtension()


def test_entry_point() -> None:
    (found,) = entry_points(group="headroom.pipeline_extension", name="savings_exporter")
    assert found.load() is SavingsExtension


def test_real_outcomes(extension: SavingsExtension, store_path: Path) -> None:
    for outcome in OUTCOMES:
        extension.on_pipeline_event(event(outcome))
    assert extension.queue.close()
    snapshot = WatchedFile(store_path).snapshot()
    totals = snapshot.lifetime
    assert (totals.requests, totals.tokens_saved) == (7, 10_436)
    assert (totals.total_input_tokens, totals.total_output_tokens) == (2 * 9_250 + 2 * 10_000 + 10_376, 4 * 7)
    assert (totals.cache_read_tokens, totals.cache_write_tokens) == (4 * 9_000, 2 * 200 + 1_000)
    assert snapshot.by_provider_model["compress", "gpt-4o"].tokens_saved == 10_436
    assert snapshot.sources["headroom"].requests == 7


def test_outcome_without_tokens() -> None:
    record = record_of(OUTCOMES[1], "billing-api")
    assert (record.tokens_saved, record.input_tokens, record.output_tokens) == (0, 0, 0)
    assert (record.model, record.provider, record.project) == ("claude-sonnet-4-5", "anthropic", "billing-api")


def test_only_new_tokens_count() -> None:
    outcome = SimpleNamespace(**{**vars(OUTCOMES[-1]), "tokens_saved": 10_436, "novel_tokens_saved": 400})
    assert record_of(outcome, None).tokens_saved == 400


def test_outcome_observed_twice(extension: SavingsExtension, store_path: Path) -> None:
    second = SavingsExtension()
    for listener in (extension, extension, second):
        listener.on_pipeline_event(event(OUTCOMES[0]))
    assert extension.queue.close()
    assert second.queue.close()
    assert WatchedFile(store_path).snapshot().lifetime.requests == 1


def test_other_events_are_ignored(extension: SavingsExtension, store_path: Path) -> None:
    extension.on_pipeline_event(event(OUTCOMES[0], Stage.PRE_SEND))
    extension.on_pipeline_event(event(None))
    assert extension.queue.close()
    assert not store_path.exists()


def test_outcome_of_another_version(extension: SavingsExtension, caplog: pytest.LogCaptureFixture) -> None:
    extension.on_pipeline_event(event(SimpleNamespace(request_id="hr_1_1")))
    extension.on_pipeline_event(event(SimpleNamespace(**{**vars(OUTCOMES[0]), "input_tokens": "many"})))
    assert [message[:35] for message in caplog.messages] == 2 * ["savings: a request is not recorded:"]


def test_key_is_unique_in_processes() -> None:
    assert key_of("hr_1_1") == key_of("hr_1_1") != key_of("hr_1_2")
    assert key_of("") is None
    program = "from savings_exporter.sources.headroom_extension import key_of; print(key_of('hr_1_1'))"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=WAIT_SECONDS)
    assert other.stdout.strip() not in ("", key_of("hr_1_1"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_key_of_a_forked_child() -> None:
    program = """
import os
from savings_exporter.sources.headroom_extension import key_of
print(key_of("hr_1_1"), flush=True)
if os.fork() == 0:
    print(key_of("hr_1_1"), flush=True)
else:
    os.wait()
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=WAIT_SECONDS)
    assert len(set(ran.stdout.split())) == 2


def test_import_is_small() -> None:
    """Headroom imports the extension before it serves."""
    program = """
import sys
import savings_exporter.sources.headroom_extension
heavy = ("opentelemetry", "prometheus_client", "asyncio", "savings_exporter.tracker", "savings_exporter.storage")
print([name for name in sys.modules if name.startswith(heavy)])
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=WAIT_SECONDS)
    assert ran.stdout.strip() == "[]", ran.stderr
