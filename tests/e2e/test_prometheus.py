"""A real Prometheus scrapes the running service."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.prometheus import prometheus
from tests.support.service import Service, free_port, running

pytestmark = pytest.mark.needs("prometheus")

LIFETIME = 'savings_tokens_saved_total{model="claude-sonnet-4-5"}'


def post(service: Service, tokens: int, model: str = "claude-sonnet-4-5") -> None:
    saving = {"model": model, "provider": "anthropic", "tokens_saved": tokens, "input_tokens": 10}
    assert service.post(saving)[0] == 200


def test_a_query_gives_the_exact_total_and_a_restart_is_no_increase(tmp_path: Path, store_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    savings = (4096, 1, 900_719_925_474)
    with prometheus(tmp_path, address) as server:
        with running("serve", "--store", str(store_path), address=address) as service:
            for tokens in savings:
                post(service, tokens)
            quiet_since = server.becomes("sum(savings_tokens_saved_total)", sum(savings))
            server.becomes(f"timestamp({LIFETIME}) > bool {quiet_since}", 1)
            assert service.stop()[0] == 0
        server.becomes("up", 0)
        with running("serve", "--store", str(store_path), address=address) as service:
            restarted = server.becomes("up", 1)
            later = server.becomes(f"timestamp({LIFETIME}) > bool {restarted}", 1)
            quiet = f"[{later - quiet_since:.3f}s]".replace(".", "").replace("s]", "ms]")
            assert server.query(f"increase({LIFETIME}{quiet})", time=later) == (later, 0)
            # The process did restart, and its operation counters went on.
            assert server.query(f"changes(process_start_time_seconds{quiet})", time=later) == (later, 1)
            assert server.query(f"resets(savings_saves_total{quiet})", time=later) == (later, 0)
            post(service, 1000)
            server.becomes("sum(savings_tokens_saved_total)", sum(savings) + 1000)
            total = server.query(f"resets({LIFETIME}[5m])")
            assert total is not None
            assert total[1] == 0


def test_promtool_finds_nothing_to_say(store_path: Path) -> None:
    with running("serve", "--store", str(store_path)) as service:
        assert_clean(service)
        post(service, 1, model='a "quoted" \\ name')
        assert_clean(service)


def assert_clean(service: Service) -> None:
    status, text = service.get("/metrics")
    assert status == 200
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
