"""What one success event of LiteLLM says about savings. LiteLLM itself is not needed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from typing import Any

from savings_exporter.model.keys import MAX_KEY_LENGTH
from savings_exporter.model.record import MAX_TOKENS, MAX_USD, SavingsRecord

SOURCE = "litellm"
"""The source of all records from LiteLLM."""

# LiteLLM adds the client's user agent to the tags of a request.
_AGENT_TAG = "User-Agent:"


def record_of(event: Mapping[str, Any]) -> tuple[SavingsRecord, str | None] | None:
    """The record of one success event and its idempotency key, LiteLLM's ``litellm_call_id``. None when the event has
    no ``standard_logging_object``, as the parts of a stream have none.

    If the response came from LiteLLM's response cache, the provider was not called. The whole request was saved then:
    its prompt tokens are ``tokens_saved``, its completion tokens are ``output_tokens_saved``, and LiteLLM's
    ``saved_cache_cost``, which is for both, is ``savings_usd``.

    Args:
        event: the ``kwargs`` that LiteLLM passes to a ``CustomLogger``. Figures that are missing or make no sense are
            treated as not given.
    """
    payload = _mapping(event.get("standard_logging_object"))
    if not payload:
        return None
    metadata = _mapping(payload.get("metadata"))
    usage = _mapping(metadata.get("usage_object"))
    prompt = _tokens(usage.get("prompt_tokens")) or _tokens(payload.get("prompt_tokens"))
    completion = _tokens(usage.get("completion_tokens")) or _tokens(payload.get("completion_tokens"))
    compressed = _compressed(event, payload)
    record: dict[str, Any] = {
        "model": _text(payload.get("model")) or "",
        "provider": _text(payload.get("custom_llm_provider")),
        "project": _project(payload, metadata),
        "agent": _agent(payload, metadata),
        "source": SOURCE,
        "timestamp": _time(payload.get("startTime")),
    }
    if payload.get("cache_hit") is True:
        record |= {
            "tokens_saved": min(prompt + compressed, MAX_TOKENS),
            "output_tokens_saved": completion,
            "savings_usd": _usd(payload.get("saved_cache_cost")),
            "input_cost_usd": 0.0,
        }
    else:
        read, written = _cached(usage)
        record |= {
            "tokens_saved": compressed,
            "input_tokens": prompt,
            "output_tokens": completion,
            "cache_read_tokens": read,
            "cache_write_tokens": written,
            "uncached_input_tokens": max(prompt - read - written, 0),
            "input_cost_usd": _input_cost(payload, completion),
        }
    return SavingsRecord(**record), _key(payload.get("litellm_call_id"))


def _compressed(event: Mapping[str, Any], payload: Mapping[str, Any]) -> int:
    """Tokens that compression removed. LiteLLM's own compression and Headroom's guardrail run one after the other, so
    their figures add up.
    """
    params = _mapping(event.get("litellm_params"))
    metadata = (_mapping(params.get(name)) for name in ("metadata", "litellm_metadata"))
    own = max(_tokens(_mapping(part.get("compression_savings")).get("tokens_saved")) for part in metadata)
    guardrails = payload.get("guardrail_information")
    entries = map(_mapping, guardrails if isinstance(guardrails, list) else [guardrails])
    by_guardrail = (
        _tokens(_mapping(entry.get("guardrail_response")).get("tokens_saved"))
        for entry in entries
        if entry.get("guardrail_provider") == "headroom"
    )
    return min(own + sum(by_guardrail), MAX_TOKENS)


def _cached(usage: Mapping[str, Any]) -> tuple[int, int]:
    """Tokens read from the provider's prompt cache, and written to it. Providers use different names for them."""
    details = _mapping(usage.get("prompt_tokens_details"))
    read = _first(_tokens(usage.get("cache_read_input_tokens")), _tokens(details.get("cached_tokens")))
    written = _first(
        _tokens(usage.get("cache_creation_input_tokens")),
        _tokens(details.get("cache_creation_tokens")),
        _tokens(details.get("cache_write_tokens")),
    )
    return read, written


def _input_cost(payload: Mapping[str, Any], completion: int) -> float | None:
    """What the input cost. LiteLLM reports 0 for a model without a price, so 0 is unknown."""
    cost = _usd(_mapping(payload.get("cost_breakdown")).get("input_cost"))
    return cost if cost is not None or completion else _usd(payload.get("response_cost"))


def _project(payload: Mapping[str, Any], metadata: Mapping[str, Any]) -> str | None:
    """The first name that is given: of LiteLLM's project, of the team, of the key, or the request's first tag."""
    aliases = (f"user_api_key_{owner}alias" for owner in ("project_", "team_", ""))
    names = (*(_text(metadata.get(alias)) for alias in aliases), *_tags(payload.get("request_tags")))
    return next(filter(None, names), None)


def _tags(tags: Any) -> Iterator[str | None]:
    for tag in tags if isinstance(tags, list) else ():
        if isinstance(tag, str) and not tag.startswith(_AGENT_TAG):
            yield _text(tag)


def _agent(payload: Mapping[str, Any], metadata: Mapping[str, Any]) -> str | None:
    """The product in the client's user agent: ``claude-cli`` of ``claude-cli/2.0.1 (external, cli)``."""
    agent = _text(payload.get("user_agent")) or _text(metadata.get("user_agent")) or ""
    return agent.partition("/")[0].strip() or None


def _key(call: Any) -> str | None:
    """The call's id as an idempotency key. A client can choose it, so it may be too long."""
    if not isinstance(call, str) or not call:
        return None
    encoded = call.encode("utf-8", "surrogatepass")
    return call if len(encoded) <= MAX_KEY_LENGTH and call.isprintable() else hashlib.sha256(encoded).hexdigest()


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _tokens(value: Any) -> int:
    return value if type(value) is int and 0 <= value <= MAX_TOKENS else 0


def _usd(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and 0 < value <= MAX_USD else None


def _time(value: Any) -> datetime | None:
    try:
        return datetime.fromtimestamp(value, timezone.utc)
    except (TypeError, ValueError, OverflowError, OSError):
        return None


def _first(*counts: int) -> int:
    return next(filter(None, counts), 0)
