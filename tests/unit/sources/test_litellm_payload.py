"""What is recorded of LiteLLM's success events, by payloads of a real LiteLLM."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any

import pytest

from savings_exporter import SavingsRecord
from savings_exporter.sources.litellm_payload import record_of
from tests.support.paths import DATA


def payload(name: str) -> dict[str, Any]:
    """A file of tests/data/sources/litellm."""
    read: dict[str, Any] = json.loads((DATA / "sources" / "litellm" / f"{name}.json").read_text())
    return read


def event(name: str = "openai", **changes: Any) -> dict[str, Any]:
    """The event with this payload. Changes to ``metadata`` are merged."""
    read = payload(name)
    metadata = {**read["metadata"], **changes.pop("metadata", {})}
    return {"standard_logging_object": {**read, **changes, "metadata": metadata}}


def record(found: dict[str, Any]) -> SavingsRecord:
    recorded = record_of(found)
    assert recorded is not None
    return recorded[0]


def test_plain_request() -> None:
    assert record_of(event()) == (
        SavingsRecord(
            model="gpt-4o",
            provider="openai",
            source="litellm",
            tokens_saved=0,
            input_tokens=10_000,
            output_tokens=7,
            cache_read_tokens=9_000,
            uncached_input_tokens=1_000,
            input_cost_usd=0.013750000000000002,
            timestamp=datetime.fromtimestamp(1795642973.108709, timezone.utc),
        ),
        "ec300164-caa7-4b42-8814-f044f93c25e4",
    )


def test_prompt_cache_of_anthropic() -> None:
    found = record(event("anthropic"))
    assert (found.provider, found.model) == ("anthropic", "claude-sonnet-4-5")
    assert (found.cache_read_tokens, found.cache_write_tokens, found.uncached_input_tokens) == (9_000, 200, 50)
    assert (found.input_tokens, found.input_cost_usd) == (9_250, 0.0036)


def test_response_cache_saves_everything() -> None:
    found = record(event("cache_hit"))
    assert (found.tokens_saved, found.output_tokens_saved) == (10_000, 7)
    assert (found.input_tokens, found.output_tokens, found.cache_read_tokens) == (0, 0, 0)
    assert (found.savings_usd, found.input_cost_usd) == (0.013820000000000002, 0.0)


def test_response_cache_without_a_price() -> None:
    assert record(event("cache_hit", saved_cache_cost=0.0)).savings_usd is None


def test_own_compression() -> None:
    for name in ("metadata", "litellm_metadata"):
        params = {name: payload("compression_savings")["litellm_params"]["metadata"]}
        found = record({**event("anthropic"), "litellm_params": params})
        assert (found.tokens_saved, found.input_tokens, found.savings_usd) == (3_555, 9_250, None)


def test_guardrail_of_headroom() -> None:
    found = record(event("headroom_guardrail"))
    assert (found.tokens_saved, found.input_tokens, found.project) == (10_436, 10, "billing-api")
    assert record({**event("headroom_guardrail"), **payload("compression_savings")}).tokens_saved == 10_436 + 3_555


def test_other_guardrails_save_nothing() -> None:
    entry = {**payload("headroom_guardrail")["guardrail_information"][0], "guardrail_provider": "presidio"}
    assert record(event(guardrail_information=[entry, None, "text"])).tokens_saved == 0


@pytest.mark.parametrize(
    ("aliases", "project"),
    [
        ({"user_api_key_alias": "key", "user_api_key_team_alias": "team", "user_api_key_project_alias": "web"}, "web"),
        ({"user_api_key_alias": "key", "user_api_key_team_alias": "team"}, "team"),
        ({"user_api_key_alias": "key"}, "key"),
        ({}, "nightly"),
    ],
)
def test_project(aliases: dict[str, str], project: str) -> None:
    tags = ["User-Agent: claude-cli", "User-Agent: claude-cli/2.0.1", "nightly", "other"]
    assert record(event(metadata=aliases, request_tags=tags)).project == project


@pytest.mark.parametrize(
    ("user_agent", "agent"),
    [("claude-cli/2.0.1 (external, cli)", "claude-cli"), ("OpenAI/Python 2.1", "OpenAI"), ("curl", "curl")],
)
def test_agent(user_agent: str, agent: str) -> None:
    assert record(event(user_agent=user_agent)).agent == agent
    assert record(event(metadata={"user_agent": user_agent})).agent == agent


def test_request_without_output_tokens() -> None:
    """For embeddings, LiteLLM's total cost is the cost of the input."""
    usage = {"prompt_tokens": 50, "completion_tokens": 0}
    found = record(
        event(cost_breakdown=None, response_cost=0.001, completion_tokens=0, metadata={"usage_object": usage})
    )
    assert (found.input_tokens, found.input_cost_usd) == (50, 0.001)


def test_model_without_a_price() -> None:
    assert record(event(cost_breakdown={"input_cost": 0.0}, response_cost=0.0)).input_cost_usd is None


def test_usage_of_the_payload_itself() -> None:
    found = record(event(metadata={"usage_object": None}))
    assert (found.input_tokens, found.output_tokens) == (10_000, 7)


@pytest.mark.parametrize("found", [{}, {"standard_logging_object": None}, {"standard_logging_object": "text"}])
def test_event_without_a_payload(found: dict[str, Any]) -> None:
    assert record_of(found) is None


def test_values_that_make_no_sense() -> None:
    usage = {
        "prompt_tokens": -5,
        "completion_tokens": "7",
        "prompt_tokens_details": [],
        "cache_read_input_tokens": 1e30,
    }
    found = record(
        event(
            metadata={"usage_object": usage, "user_api_key_alias": 3},
            prompt_tokens=None,
            completion_tokens=10**30,
            response_cost=float("nan"),
            cost_breakdown={"input_cost": "much"},
            request_tags="tag",
            model=None,
            custom_llm_provider=7,
            startTime="yesterday",
            guardrail_information="text",
            user_agent=5,
            litellm_call_id=5,
        )
    )
    assert found == SavingsRecord(model="unknown", source="litellm", tokens_saved=0, timestamp=found.timestamp)


def test_model_name_is_bounded() -> None:
    assert record(event(model="m" * 10**6)).model == "m" * 128


def test_key_that_a_client_chose() -> None:
    keys = []
    for call in ("call-1", "x" * 500, "x" * 501, "a\nb", "\ud800", ""):
        recorded = record_of(event(litellm_call_id=call))
        assert recorded is not None
        keys.append(recorded[1])
    assert keys[0] == "call-1"
    assert keys[-1] is None
    assert all(key is not None and len(key) == 64 and key.isalnum() for key in keys[1:-1])
    assert len(set(keys)) == len(keys)
