"""The requests that every work records, with our store and with the peer."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

Fields = Mapping[str, Any]

_MODELS = (
    ("anthropic", "claude-sonnet-4-5"),
    ("bedrock", "claude-sonnet-4-5"),
    ("anthropic", "claude-opus-4-1"),
    ("openai", "gpt-4o"),
    ("openai", "gpt-4o-mini"),
)
_PROJECTS = ("billing-api", "search", "données", "batch-summaries")


def request(number: int, provider: str, model: str, project: str) -> Fields:
    """One request, in the arguments of ``record_request``."""
    return {
        "model": model,
        "provider": provider,
        "agent": "claude-code",
        "project": project,
        "input_tokens": 12_000 + number,
        "tokens_saved": 4_096 + number,
        "tool_search_saved": 310,
        "output_tokens_saved": 25,
        "output_tokens": 840,
        "cache_read_tokens": 7_000,
        "cache_write_tokens": 512,
        "uncached_input_tokens": 4_488,
        "savings_usd": 0.012288,
        "input_cost_usd": 0.036,
    }


REQUESTS = tuple(
    request(number, provider, model, project)
    for number, ((provider, model), project) in enumerate(itertools.product(_MODELS, _PROJECTS))
)
"""The works record these requests repeatedly, in this order."""


def many(count: int) -> list[Fields]:
    """A number of requests."""
    return list(itertools.islice(itertools.cycle(REQUESTS), count))
