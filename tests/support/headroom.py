"""A running Headroom proxy, in the environment of ``make headroom``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.paths import HEADROOM_PYTHON
from tests.support.service import free_port
from tests.support.wait import WAIT_SECONDS, eventually

SETTINGS = {
    "HEADROOM_TELEMETRY": "off",
    "HF_HUB_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}
"""Variables with which Headroom uses no network but loopback."""


ROWS = [{"id": number, "status": "ok", "service": f"s{number % 3}", "region": "eu-west-1"} for number in range(300)]
MESSAGES = [
    {"role": "user", "content": "Which one failed?"},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {}}]},
    {"role": "tool", "tool_call_id": "1", "content": json.dumps(ROWS)},
    {"role": "user", "content": "So which one?"},
]
"""A conversation that Headroom's ``/v1/compress`` makes shorter."""


def run_with_headroom(program: str, *arguments: str, **env: str) -> str:
    """Run a program with Headroom's Python: what it prints."""
    ran = subprocess.run(
        [str(HEADROOM_PYTHON), "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS * 4,
        env={**os.environ, **SETTINGS, **env},
    )
    assert ran.returncode == 0, ran.stderr
    assert "savings: " not in ran.stderr
    return ran.stdout


class Proxy:
    """A Headroom proxy at ``url``, which keeps its own totals in the file ``savings``."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, savings: Path) -> None:
        self.process = process
        self.url = url
        self.savings = savings

    def post(self, path: str, body: Any, headers: dict[str, str]) -> Any:
        """POST an object as JSON. Returns the decoded answer."""
        headers = {"Content-Type": "application/json", "Authorization": "Bearer key", **headers}
        request = urllib.request.Request(self.url + path, data=json.dumps(body).encode(), headers=headers)
        with urllib.request.urlopen(request, timeout=WAIT_SECONDS) as response:
            return json.load(response)

    def is_up(self) -> bool:
        """Whether it answers."""
        assert self.process.poll() is None, "Headroom ended"
        try:
            with urllib.request.urlopen(self.url + "/livez", timeout=WAIT_SECONDS):
                return True
        except urllib.error.URLError:
            return False

    def stop(self) -> dict[str, Any]:
        """Stop it. Returns what it has saved in its own file."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(WAIT_SECONDS)
        saved: dict[str, Any] = json.loads(self.savings.read_text())
        return saved


@contextmanager
def headroom_proxy(directory: Path, provider: str, **env: str) -> Iterator[Proxy]:
    """Run ``headroom proxy`` in front of a provider, with its files and its log in ``directory``."""
    port = free_port()
    savings = directory / "headroom" / "proxy_savings.json"
    command = [str(HEADROOM_PYTHON), "-m", "headroom.cli", "proxy", "--port", str(port), "--openai-api-url", provider]
    with (directory / "headroom.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--no-telemetry"],
            stdout=log,
            stderr=log,
            env={
                **os.environ,
                **SETTINGS,
                "HOME": str(directory),
                "HEADROOM_SAVINGS_PATH": str(savings),
                **env,
            },
        )
    try:
        proxy = Proxy(process, f"http://127.0.0.1:{port}", savings)
        eventually(proxy.is_up, "Headroom")
        yield proxy
    finally:
        process.kill()
        process.wait()
