"""A real Prometheus scrapes the running service."""

from __future__ import annotations

import json
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.service import Service, free_port, running
from tests.support.wait import eventually

pytestmark = pytest.mark.needs("prometheus")

CONFIG = """
global: {{scrape_interval: 200ms, scrape_timeout: 200ms}}
scrape_configs:
  - job_name: savings-exporter
    static_configs: [{{targets: ["{target}"]}}]
"""
LIFETIME = 'savings_tokens_saved_total{model="claude-sonnet-4-5"}'


class Prometheus:
    """A running Prometheus."""

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, query: str, **parameters: float) -> tuple[float, float] | None:
        """An instant query's time and value, None for no data."""
        arguments = urllib.parse.urlencode({"query": query, **parameters})
        with urllib.request.urlopen(f"{self.url}/api/v1/query?{arguments}", timeout=30) as response:
            result: list[dict[str, Any]] = json.load(response)["data"]["result"]
        return (float(result[0]["value"][0]), float(result[0]["value"][1])) if result else None

    def becomes(self, query: str, expected: float) -> float:
        """Wait until a query gives a value; when it did, by Prometheus's clock."""
        return float(eventually(lambda: self._when(query, expected), f"{query} to be {expected}: {self.query(query)}"))

    def _when(self, query: str, expected: float) -> float | None:
        answer = self.query(query)
        return answer[0] if answer and answer[1] == expected else None


@contextmanager
def prometheus(directory: Path, target: str) -> Iterator[Prometheus]:
    """Prometheus on a free port, scraping one address."""
    config, port = directory / "prometheus.yml", free_port()
    config.write_text(CONFIG.format(target=target))
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={directory / 'tsdb'}"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
    with (directory / "prometheus.log").open("wb") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            server = Prometheus(f"http://127.0.0.1:{port}")
            eventually(lambda: _answers(f"{server.url}/-/ready"), "Prometheus to be ready")
            yield server
        finally:
            process.terminate()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return bool(response.status == 200)
    except OSError:
        return False


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
