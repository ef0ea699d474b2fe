"""A real Prometheus that scrapes one address."""

from __future__ import annotations

import json
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.service import free_port
from tests.support.wait import eventually

CONFIG = """
global: {{scrape_interval: 200ms, scrape_timeout: 200ms}}
scrape_configs:
  - job_name: savings-exporter
    static_configs: [{{targets: ["{target}"]}}]
"""


class Prometheus:
    """A running Prometheus."""

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, query: str, **parameters: float) -> tuple[float, float] | None:
        """An instant query's time and value, None for no data."""
        result = self.series(query, **parameters)
        return (float(result[0]["value"][0]), float(result[0]["value"][1])) if result else None

    def series(self, query: str, **parameters: float) -> list[dict[str, Any]]:
        """All series of an instant query's result."""
        result: list[dict[str, Any]] = self._get("query", query=query, **parameters)["result"]
        return result

    def over(self, query: str, start: float, end: float, step: float) -> dict[float, float]:
        """The values of a range query with one series, by time."""
        (series,) = self._get("query_range", query=query, start=start, end=end, step=step)["result"]
        return {float(time): float(value) for time, value in series["values"]}

    @property
    def version(self) -> tuple[int, ...]:
        """The major and the minor version."""
        return tuple(map(int, self._get("status/buildinfo")["version"].split(".")[:2]))

    def becomes(self, query: str, expected: float) -> float:
        """Wait until a query gives a value; when it did, by Prometheus's clock."""
        return float(eventually(lambda: self._when(query, expected), f"{query} to be {expected}: {self.query(query)}"))

    def _get(self, path: str, **parameters: str | float) -> Any:
        arguments = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{arguments}", timeout=30) as response:
            return json.load(response)["data"]

    def _when(self, query: str, expected: float) -> float | None:
        answer = self.query(query)
        return answer[0] if answer and answer[1] == expected else None


@contextmanager
def prometheus(
    directory: Path, target: str, *flags: str, scrape: Mapping[str, object] | None = None
) -> Iterator[Prometheus]:
    """Prometheus on a free port, scraping one address, with these further settings. Its data is in
    ``directory / "tsdb"``.
    """
    config, port = directory / "prometheus.yml", free_port()
    further = [f"    {name}: {json.dumps(value)}\n" for name, value in (scrape or {}).items()]
    config.write_text(CONFIG.format(target=target) + "".join(further))
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={directory / 'tsdb'}"]
    command += [*flags, f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
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
