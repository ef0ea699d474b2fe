"""A real Headroom discovers the extension, and its proxy reports the outcome of each request to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from savings_exporter import StoreError
from savings_exporter.watched import WatchedFile
from tests.support.headroom import MESSAGES, headroom_proxy, run_with_headroom
from tests.support.paths import DATA
from tests.support.provider import provider
from tests.support.wait import eventually

pytestmark = pytest.mark.needs("headroom")

OUTCOMES = DATA / "sources" / "headroom" / "outcome_observed.jsonl"


def requests(path: Path) -> int:
    try:
        return WatchedFile(path).snapshot().lifetime.requests
    except StoreError:
        return 0


_EMIT = """
import json, sys
from headroom.pipeline import OutcomeSnapshot, PipelineExtensionManager, PipelineStage
from headroom.proxy.project_context import set_current_project
manager = PipelineExtensionManager()
assert manager.enabled
for line in open(sys.argv[1]):
    event = json.loads(line)
    set_current_project(event["project"])
    outcome = OutcomeSnapshot(**event["outcome"])
    for stage in (PipelineStage.RESPONSE_RECEIVED, PipelineStage.OUTCOME_OBSERVED):
        manager.emit(stage, operation="proxy.outcome", request_id=outcome.request_id, outcome=outcome)
"""


def test_extension_is_discovered(store_path: Path) -> None:
    """Two proxies number their requests alike, and all are counted."""
    env = {"SAVINGS_EXPORTER_STORE": str(store_path), "HEADROOM_PIPELINE_EXTENSIONS": "savings_exporter"}
    for proxies in (1, 2):
        run_with_headroom(_EMIT, str(OUTCOMES), **env)
        snapshot = WatchedFile(store_path).snapshot()
        assert snapshot.lifetime.requests == 7 * proxies
        assert snapshot.lifetime.tokens_saved == 10_436 * proxies
        assert snapshot.projects["billing-api"].requests == 7 * proxies
        assert snapshot.sources["headroom"].requests == 7 * proxies


@pytest.mark.slow
def test_extension_in_the_proxy(tmp_path: Path, store_path: Path) -> None:
    """Our totals of a proxy's requests are those of Headroom's own file."""
    env = {"SAVINGS_EXPORTER_STORE": str(store_path), "HEADROOM_PIPELINE_EXTENSIONS": "savings_exporter"}
    headers = {"X-Headroom-Project": "billing-api"}
    with provider() as url, headroom_proxy(tmp_path, url, **env) as proxy:
        request = {"model": "gpt-4o", "messages": MESSAGES}
        assert proxy.post("/v1/chat/completions", request, headers)["choices"][0]["message"]["content"] == "yes"
        proxy.post("/v1/chat/completions", {**request, "messages": MESSAGES[:1]}, headers)
        assert proxy.post("/v1/compress", request, headers)["tokens_saved"] > 0
        eventually(lambda: requests(store_path) == 3, "three requests")
        theirs = proxy.stop()
    ours = WatchedFile(store_path).snapshot()
    assert theirs["lifetime"]["tokens_saved"] > 0
    assert figures(ours.lifetime, theirs["lifetime"]) == theirs["lifetime"]
    assert ours.projects["billing-api"].requests == theirs["projects"]["billing-api"]["requests"] == 3
    assert ours.projects["billing-api"].tokens_saved == theirs["projects"]["billing-api"]["tokens_saved"]
    assert {provider for provider, _model in ours.by_provider_model} == {"openai", "compress"}


def figures(ours: Any, theirs: dict[str, Any]) -> dict[str, Any]:
    """Their figures, with the counts replaced by ours."""
    counts = ("requests", "tokens_saved", "cache_read_tokens", "total_input_tokens")
    return {**theirs, **{name: getattr(ours, name) for name in counts}}
