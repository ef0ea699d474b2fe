"""The service over HTTP, measured with wrk on the same machine: both cores do the work of the server and the client."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks.measuring import Bound, LeftOutError, Result, Setup
from benchmarks.ours import NAME
from benchmarks.workload import REQUESTS, many

_CONNECTIONS = 64
_BATCH = 500
_BATCH_CONNECTIONS = 16
_SCRAPE_SECONDS = 1.0
_MILLISECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3}

_RECORD = {name: REQUESTS[0][name] for name in ("model", "provider", "input_tokens", "tokens_saved")}


class _Load(NamedTuple):
    """What wrk measured: answers a second, and the 99th percentile of their latency in milliseconds."""

    rate: float
    p99: float


def service_rate(setup: Setup) -> Result:
    """Records of one, each answered when it is durable."""
    return _against_plain(setup, "POST of one record, 64 connections", "rate", Bound(0.75, at_least=True))


def service_latency(setup: Setup) -> Result:
    """The same."""
    return _against_plain(setup, "p99 of a POST of one record, 64 connections", "p99", Bound(3, at_least=False))


def service_starlette(setup: Setup) -> Result:
    """Against what a proxy's own route costs at least."""
    with setup.fresh() as directory, _ours(directory) as ours, _peer("starlette") as peer:
        return Result(
            work="POST of one record, 64 connections",
            peer="an empty Starlette route on uvicorn with h11",
            unit="/s",
            **setup.taking_turns(
                lambda: _measured(setup, directory, ours).rate, lambda: _measured(setup, directory, peer).rate
            ),
            bound=Bound(1.5, at_least=True),
        )


def service_batches(setup: Setup) -> Result:
    """Records of batches. The peer gets the same bytes, and looks at none of them."""
    with setup.fresh() as directory, _ours(directory) as ours, _peer("plain") as peer:
        body = json.dumps({"records": many(_BATCH)})

        def records(url: str) -> Callable[[], float]:
            return lambda: _BATCH * _measured(setup, directory, url, body, _BATCH_CONNECTIONS).rate

        figures = setup.taking_turns(records(ours), records(peer))
        return Result(
            work=f"records in batches of {_BATCH}, {_BATCH_CONNECTIONS} connections",
            peer="150,000 records per second, a fixed figure",
            unit="/s",
            ours=figures["ours"],
            theirs=[150_000.0],
            bound=Bound(1, at_least=True),
            notes=[f"an empty ASGI application got {sorted(figures['theirs'])[len(figures['theirs']) // 2]:,.0f}/s"],
        )


def service_scraped(setup: Setup) -> Result:
    """The latency of a POST while Prometheus scrapes the service every second."""
    with setup.fresh() as directory, _ours(directory) as ours:

        def scraped() -> float:
            ended = threading.Event()

            def scrape() -> None:
                while not ended.wait(_SCRAPE_SECONDS):
                    urllib.request.urlopen(f"{ours}/metrics").read()

            scraping = threading.Thread(target=scrape)
            scraping.start()
            try:
                return _measured(setup, directory, ours).p99
            finally:
                ended.set()
                scraping.join()

        return Result(
            work="p99 of a POST, scraped every second",
            peer="the same without scrapes",
            unit="ms",
            **setup.taking_turns(scraped, lambda: _measured(setup, directory, ours).p99),
            bound=Bound(1.5, at_least=False),
        )


def _against_plain(setup: Setup, work: str, figure: str, bound: Bound) -> Result:
    with setup.fresh() as directory, _ours(directory) as ours, _peer("plain") as peer:

        def measured(url: str) -> Callable[[], float]:
            return lambda: float(getattr(_measured(setup, directory, url), figure))

        return Result(
            work=work,
            peer="an empty ASGI application on uvicorn with httptools and uvloop",
            unit="/s" if figure == "rate" else "ms",
            **setup.taking_turns(measured(ours), measured(peer)),
            bound=bound,
        )


def _measured(
    setup: Setup, directory: Path, url: str, body: str = json.dumps(_RECORD), connections: int = _CONNECTIONS
) -> _Load:
    if shutil.which("wrk") is None:
        raise LeftOutError("wrk is not installed: apt-get install wrk")
    script = directory / "post.lua"
    script.write_text(
        f"wrk.method = 'POST'\nwrk.headers['Content-Type'] = 'application/json'\nwrk.body = [==[{body}]==]"
    )
    seconds = max(round(setup.seconds), 1)
    said = subprocess.run(
        ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", script, f"{url}/v1/savings"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    if "Non-2xx" in said or "Socket errors" in said:
        raise RuntimeError(f"not everything was answered with success: {said}")
    rate, latency = re.search(r"Requests/sec:\s+([\d.]+)", said), re.search(r"99%\s+([\d.]+)(us|ms|s)\n", said)
    assert rate is not None
    assert latency is not None
    return _Load(float(rate[1]), float(latency[1]) * _MILLISECONDS[latency[2]])


@contextmanager
def _ours(directory: Path) -> Iterator[str]:
    """The service as it is installed without extras: with prices, each record also gets amounts."""
    store = ["--store", str(directory / NAME), "--web.listen-address", "127.0.0.1:0"]
    blocked = "import sys; sys.modules['genai_prices'] = None; from savings_exporter.cli import main; main()"
    with _running([sys.executable, "-c", blocked, "serve", *store]) as url:
        yield url


@contextmanager
def _peer(kind: str) -> Iterator[str]:
    with _running([sys.executable, "-m", "benchmarks.peers.empty_asgi", kind]) as url:
        yield url


@contextmanager
def _running(command: list[str]) -> Iterator[str]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            found = re.search(r"http://\S+", process.stdout.readline())
            if found is None:
                raise RuntimeError(f"{command} did not start")
            yield found[0]
        finally:
            process.terminate()
