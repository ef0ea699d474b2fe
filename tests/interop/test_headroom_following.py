"""A service follows a real Headroom that writes its document and its ledger, while both are killed again and again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from savings_exporter import SavingsTracker
from savings_exporter.sources.headroom import Headroom
from tests.crash.lab import LONG
from tests.support.paths import HEADROOM_PYTHON
from tests.support.service import Service, running
from tests.support.sources import imported
from tests.support.wait import eventually

pytestmark = pytest.mark.needs("headroom")

RATE = 50
"""Requests a second."""

ROUNDS = 20 if LONG else 4

# Records as Headroom's proxy does: in the tracker, which saves after 25 requests, then in the ledger. It prints what it
# has recorded after each request. It kills itself between two requests when its standard input ends.
_PROXY = """
import os, select, signal, sys, time
from headroom import savings_ledger
from headroom.proxy.savings_tracker import SavingsTracker
rate, seed = int(sys.argv[1]), int(sys.argv[2])
tracker = SavingsTracker(save_flush_every=25)
prices = {"compression": 0.001, "compression_list": 0.002, "tool_schema": 0.0, "basis": "exact"}
number = 0
while True:
    number += 1
    saved, tools = number * 7919 % 900 * (number % 5 > 0), seed % 3 * (number % 4 == 0)
    model = ("claude-sonnet-4-5", "gpt-4o")[number % 2]
    tracker.record_request(
        model=model, input_tokens=1000, tokens_saved=saved, tool_search_saved=tools, provider="anthropic",
        project="billing", cache_read_tokens=10, estimated_savings_usd=prices,
    )
    if saved + tools:
        savings_ledger.record_savings_event(
            tokens_before=1000 + saved + tools, tokens_after=1000, model=model, client="claude-code", source="proxy",
            saved_compression=saved, saved_tool_schema=tools, cost_usd=0.002,
        )
    sys.stdout.write(f"{saved} {tools}\\n")
    sys.stdout.flush()
    if select.select([sys.stdin], [], [], 1 / rate)[0]:
        os.kill(os.getpid(), signal.SIGKILL)
"""


class Proxy:
    """A running Headroom proxy's tracker and ledger. ``saved`` and ``tools`` are what it has recorded."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.saved = self.tools = 0

    def go_on(self, requests: int) -> None:
        """Wait until it has recorded more requests."""
        assert self.process.stdout is not None
        for _ in range(requests):
            self._take(self.process.stdout.readline())

    def kill(self) -> None:
        """Kill it, with requests that are not in its document."""
        out, _ = self.process.communicate()
        assert self.process.returncode == -signal.SIGKILL
        for line in out.splitlines(keepends=True):
            self._take(line)

    def _take(self, line: str) -> None:
        assert line.endswith("\n"), line
        saved, tools = map(int, line.split())
        self.saved, self.tools = self.saved + saved, self.tools + tools


@contextmanager
def proxy(workspace: Path, seed: int) -> Iterator[Proxy]:
    environment = {"HEADROOM_WORKSPACE_DIR": str(workspace), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    process = subprocess.Popen(
        [str(HEADROOM_PYTHON), "-c", _PROXY, str(RATE), str(seed)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment, "HEADROOM_TELEMETRY": "off"},
    )
    try:
        yield Proxy(process)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def saved_in(service: Service) -> float:
    return sum(value for name, value in service.metrics().items() if name.startswith("savings_tokens_saved_total"))


def has_saved(service: Service, tokens: int) -> bool:
    return saved_in(service) >= tokens


def test_followed_while_both_are_killed(tmp_path: Path, store_path: Path) -> None:
    workspace = tmp_path / "headroom"
    workspace.mkdir()
    chance, expected, tools, highest = random.Random(1), 0, 0, 0.0
    environment = {"HEADROOM_WORKSPACE_DIR": str(workspace)}
    for number in range(ROUNDS):
        with proxy(workspace, number) as headroom:
            headroom.go_on(30)
            with running("serve", "--discover", "--store", str(store_path), env=environment) as service:
                headroom.go_on(RATE * 2)
                assert saved_in(service) >= highest
                if number % 2:
                    # The service is killed; the next one reads what comes in the meantime.
                    service.process.send_signal(signal.SIGKILL)
                    service.process.wait()
                    headroom.go_on(chance.randrange(60))
                else:
                    headroom.go_on(chance.randrange(60))
            with running("serve", "--discover", "--store", str(store_path), env=environment) as service:
                headroom.kill()
                expected, tools = expected + headroom.saved, tools + headroom.tools
                eventually(partial(has_saved, service, expected), "all savings")
                highest = saved_in(service)
                assert highest == expected
                assert service.stop()[0] == 0
        # Lines of the next Headroom have a later second than the last one of this.
        time.sleep(1)
    with SavingsTracker(store_path) as tracker:
        imported(tracker, Headroom(str(workspace / "proxy_savings.json")))
        snapshot = tracker.snapshot()
    assert (snapshot.lifetime.tokens_saved, snapshot.lifetime.tool_tokens_saved) == (expected, tools)
    document = json.loads((workspace / "proxy_savings.json").read_text())["lifetime"]
    # Headroom itself has lost what was not in its document when it was killed.
    assert document["tokens_saved"] < expected
    assert snapshot.lifetime.cache_read_tokens == document["cache_read_tokens"]
    assert snapshot.lifetime.total_input_tokens == document["total_input_tokens"]
    assert snapshot.sources["headroom"].tokens_saved == expected
