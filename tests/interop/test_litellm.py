"""A real LiteLLM calls a provider, and its callback records each request once."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from savings_exporter import Snapshot
from savings_exporter.watched import WatchedFile
from tests.support.paths import LITELLM_PYTHON
from tests.support.provider import CACHED_TOKENS, COMPLETION_TOKENS, FAILING_MODEL, PROMPT_TOKENS, provider
from tests.support.wait import WAIT_SECONDS

pytestmark = pytest.mark.needs("litellm")

Run = Callable[[str], Snapshot]

_PROGRAM = """
import asyncio, sys, threading, time
import litellm
from savings_exporter.sources.litellm import SavingsLogger

class Watched(SavingsLogger):
    events = []
    def _record(self, event):
        super()._record(event)
        self.events.append(event)

logger = Watched()
litellm.callbacks = [logger]
litellm.drop_params = True

def arguments(text, **more):
    request = {"model": "openai/gpt-4o", "api_base": sys.argv[1] + "/v1", "api_key": "key", "max_retries": 0}
    return {**request, "messages": [{"role": "user", "content": text}], **more}

STREAM = {"stream": True, "stream_options": {"include_usage": True}}

def wait_for(number):
    for _ in range(1500):
        if len(logger.events) >= number:
            return
        time.sleep(0.02)
    raise SystemExit(f"only {len(logger.events)} events")

async def wait_for_async(number):
    await asyncio.to_thread(wait_for, number)
"""


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    with provider() as url:
        yield url


@pytest.fixture
def run(store_path: Path, base_url: str) -> Run:
    """Runs a program with LiteLLM to its end: the store after that."""

    def run(program: str) -> Snapshot:
        ran = subprocess.run(
            [str(LITELLM_PYTHON), "-c", _PROGRAM + program, base_url],
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS * 4,
            env={
                **os.environ,
                "SAVINGS_EXPORTER_STORE": str(store_path),
                "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            },
        )
        assert ran.returncode == 0, ran.stderr
        assert "lost" not in ran.stderr
        return WatchedFile(store_path).snapshot()

    return run


def assert_requests(snapshot: Snapshot, number: int) -> None:
    """The store has this number of requests to the provider, and nothing else."""
    totals = snapshot.lifetime
    assert totals.requests == totals.costed_requests == number
    assert totals.total_input_tokens == number * PROMPT_TOKENS
    assert totals.total_output_tokens == number * COMPLETION_TOKENS
    assert totals.cache_read_tokens == number * CACHED_TOKENS
    assert totals.uncached_input_tokens == number * (PROMPT_TOKENS - CACHED_TOKENS)
    assert totals.tokens_saved == 0
    assert list(snapshot.by_provider_model) == [("openai", "gpt-4o")]
    assert list(snapshot.sources) == ["litellm"]


def test_plain_and_streamed(run: Run) -> None:
    snapshot = run("""
litellm.completion(**arguments("one"))
list(litellm.completion(**arguments("two"), **STREAM))
async def main():
    await litellm.acompletion(**arguments("three"))
    async for part in await litellm.acompletion(**arguments("four"), **STREAM):
        pass
    await wait_for_async(4)
asyncio.run(main())
""")
    assert_requests(snapshot, 4)


def test_each_request_reported_twice(run: Run) -> None:
    """Some versions of LiteLLM report a request to a thread and to the event loop."""
    snapshot = run("""
async def main():
    await litellm.acompletion(**arguments("one"))
    await litellm.acompletion(**arguments("two"))
    await wait_for_async(2)
    for event in logger.events[:2]:
        await asyncio.to_thread(logger.log_success_event, event, None, None, None)
        await logger.async_log_success_event(event, None, None, None)
asyncio.run(main())
assert len(logger.events) >= 6
""")
    assert_requests(snapshot, 2)


def test_response_cache(run: Run) -> None:
    snapshot = run("""
async def main():
    litellm.cache = litellm.Cache(type="local")
    await litellm.acompletion(**arguments("one"), caching=True)
    await wait_for_async(1)
    await litellm.acompletion(**arguments("one"), caching=True)
    await wait_for_async(2)
asyncio.run(main())
assert logger.events[1]["standard_logging_object"]["cache_hit"] is True
""")
    totals = snapshot.lifetime
    assert totals.requests == totals.costed_requests == 2
    assert (totals.total_input_tokens, totals.tokens_saved) == (PROMPT_TOKENS, PROMPT_TOKENS)
    assert (totals.total_output_tokens, totals.output_tokens_saved) == (COMPLETION_TOKENS, COMPLETION_TOKENS)
    assert totals.cache_read_tokens == CACHED_TOKENS
    assert totals.priced_requests == 1
    assert totals.compression_savings_usd > totals.total_input_cost_usd > 0


def test_failed_request(run: Run) -> None:
    snapshot = run(f"""
async def main():
    try:
        await litellm.acompletion(**arguments("one", model="openai/{FAILING_MODEL}"))
        raise SystemExit("it did not fail")
    except litellm.BadRequestError:
        pass
    await litellm.acompletion(**arguments("two"))
    await wait_for_async(1)
asyncio.run(main())
""")
    assert_requests(snapshot, 1)


def test_instance_for_the_proxy(run: Run) -> None:
    """LiteLLM's proxy finds the callback by the name that its configuration has, and adds names to a request."""
    snapshot = run("""
from litellm.proxy.types_utils.utils import get_instance_fn
instance = get_instance_fn("savings_exporter.sources.litellm.savings_logger", config_file_path="config.yaml")
assert isinstance(instance, litellm.integrations.custom_logger.CustomLogger)
litellm.callbacks = [instance]
names = {"user_api_key_team_alias": "billing-api", "user_api_key_alias": "key", "tags": ["nightly"]}
litellm.completion(**arguments("one"), metadata=names)
""")
    assert_requests(snapshot, 1)
    assert list(snapshot.projects) == ["billing-api"]


def test_store_that_cannot_be_opened(run: Run) -> None:
    """Requests succeed without a store, and are recorded when it can be opened."""
    snapshot = run("""
import logging, os
messages = []
class Kept(logging.Handler):
    def emit(self, record):
        messages.append(record.getMessage())
logging.getLogger("savings_exporter").addHandler(Kept())
directory = os.path.dirname(os.environ["SAVINGS_EXPORTER_STORE"])
os.rename(directory, directory + ".away")
assert litellm.completion(**arguments("one")).choices[0].message.content == "yes"
for _ in range(1500):
    if messages:
        break
    time.sleep(0.02)
assert "savings are not recorded" in messages[0]
os.rename(directory + ".away", directory)
""")
    assert_requests(snapshot, 1)
