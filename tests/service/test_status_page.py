"""The status page while the store does not answer, and how often it reads the days. tests/e2e/test_page.py shows it."""

from __future__ import annotations

import asyncio
import re
import threading
from html import unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from google.protobuf.json_format import Parse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from starlette.applications import Starlette
from starlette.types import ASGIApp

from savings_exporter import SavingsTracker
from savings_exporter.embedding import mount
from savings_exporter.model.days import LAST_DAY, Dated
from savings_exporter.model.snapshot import Snapshot
from savings_exporter.service.app import Service
from savings_exporter.sources.otlp import METRICS, Outcome, points_of
from savings_exporter.sources.otlp_import import OtlpImport
from savings_exporter.telemetry.metrics import SavingsCollector
from tests.support.asgi import chunks, exchange
from tests.support.paths import DATA
from tests.support.service import run_cli, running
from tests.support.wait import WAIT_SECONDS


class HangingTracker(SavingsTracker):
    """Its snapshots hang while ``hangs`` is set. ``read`` counts how often the days were read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.hangs = False
        self.mended = threading.Event()
        self.read = 0

    def snapshot(self) -> Snapshot:
        if self.hangs:
            assert self.mended.wait(WAIT_SECONDS)
        return super().snapshot()

    def days(self, first: str = "", last: str = LAST_DAY) -> Dated:
        self.read += 1
        return super().days(first, last)


async def page(app: ASGIApp, path: str = "/") -> str:
    status, _, body = await exchange(app, "GET", path, chunks())
    assert status == 200
    return body.decode()


def test_store_that_hangs(store_path: Path) -> None:
    """The page answers with what was read last, and says so."""

    async def run(tracker: HangingTracker) -> list[str]:
        service = Service(tracker, SavingsCollector(tracker))
        tracker.hangs = True
        pages = [await page(service.app)]
        tracker.hangs = False
        tracker.mended.set()
        pages.append(await page(service.app))
        tracker.hangs = True
        tracker.mended.clear()
        pages.append(await page(service.app))
        tracker.mended.set()
        return pages

    tracker = HangingTracker(store_path)
    with tracker:
        tracker.record_request(model="m", tokens_saved=2100)
        never, good, late = asyncio.run(run(tracker))
    assert "Nothing has been read of it" in never
    assert '<p class="total">2,100</p>' in good
    assert "The store does not answer" not in good
    assert "The store does not answer. The figures below are those of" in late
    assert '<p class="total">2,100</p>' in late


def test_days_are_read_when_they_change(store_path: Path) -> None:
    async def run(tracker: HangingTracker) -> Any:
        service = Service(tracker, SavingsCollector(tracker))
        for _ in range(5):
            await page(service.app)
        once = tracker.read
        tracker.record_request(model="m", tokens_saved=1)
        assert "3 tokens" in await page(service.app)
        return once, tracker.read

    tracker = HangingTracker(store_path)
    with tracker:
        tracker.record_request(model="m", tokens_saved=2)
        assert asyncio.run(run(tracker)) == (1, 2)


def test_periods_without_savings_before(store_path: Path) -> None:
    with SavingsTracker(store_path) as tracker:
        tracker.record_request(model="m", tokens_saved=2)
        content = asyncio.run(page(Service(tracker, SavingsCollector(tracker)).app))
    assert re.findall(r"US dollars; ([^<]*)", content) == [
        "none yesterday",
        "none in the 7 days before",
        "none in the 30 days before",
    ]


def test_page_of_an_application(store_path: Path) -> None:
    """Its addresses are below the path of the routes, and it does not say how to send savings there."""
    tracker = SavingsTracker(store_path)
    application = Starlette()
    mount(application, tracker, "/llm/savings")
    with tracker:
        empty = asyncio.run(page(application, "/llm/savings/"))
        tracker.record_request(model="m", tokens_saved=2100)
        content = asyncio.run(page(application, "/llm/savings/"))
        for address in re.findall(r'(?:href|src)="(/[^"?]*)"', content):
            assert address.startswith("/llm/savings/")
            asyncio.run(page(application, address))
    assert "No savings yet" in empty
    assert "curl" not in empty


def test_day_is_not_larger_than_the_lifetime(store_path: Path) -> None:
    """Also when savings are recorded while the page is built."""

    class Busy(HangingTracker):
        def snapshot(self) -> Snapshot:
            found = super().snapshot()
            self.record_request(model="m", tokens_saved=1000)
            return found

    async def run(tracker: Busy) -> str:
        return await page(Service(tracker, SavingsCollector(tracker)).app)

    tracker = Busy(store_path)
    with tracker:
        tracker.record_request(model="m", tokens_saved=1000)
        content = asyncio.run(run(tracker))
    (lifetime,) = re.findall(r'<p class="total">([0-9,]+)</p>', content)
    (today,) = re.findall(r"<dt>Today</dt><dd>([0-9,]+) tokens", content)
    assert int(today.replace(",", "")) <= int(lifetime.replace(",", ""))


def test_sender_that_only_reports_usage(store_path: Path) -> None:
    """It has no row among those that saved, and no table of its own."""
    with SavingsTracker(store_path) as tracker, OtlpImport(tracker) as otlp:
        tracker.record_request(model="saver", tokens_saved=1000)
        text = (DATA / "sources" / "otlp" / "claude_code_token_usage_delta.json").read_text()
        request, outcome = Parse(text, ExportMetricsServiceRequest()), Outcome()
        assert otlp.add(list(points_of(request, METRICS, outcome)), outcome)
        content = asyncio.run(page(Service(tracker, SavingsCollector(tracker)).app))
    assert ">saver<" in content
    assert ">claude-sonnet-5<" not in content
    assert "By model" in content
    assert "By source" not in content


def test_usage_alone_lowers_no_share(store_path: Path) -> None:
    with SavingsTracker(store_path) as tracker, OtlpImport(tracker) as otlp:
        text = (DATA / "sources" / "otlp" / "claude_code_token_usage_delta.json").read_text()
        request, outcome = Parse(text, ExportMetricsServiceRequest()), Outcome()
        assert otlp.add(list(points_of(request, METRICS, outcome)), outcome)
        content = asyncio.run(page(Service(tracker, SavingsCollector(tracker)).app))
        usage = tracker.snapshot().lifetime.total_input_tokens
    assert f"<dd>0.0 %<small>of {usage:,} tokens of input that were reported as usage<" in content


def test_usage_that_lowers_the_share(store_path: Path) -> None:
    """The page and the command say so, with the same figure, and only then."""

    def page_and_command() -> tuple[str, str]:
        return asyncio.run(page(Service(tracker, SavingsCollector(tracker)).app)), run_cli(
            "show", "--store", str(store_path)
        ).stdout

    with SavingsTracker(store_path) as tracker, OtlpImport(tracker) as otlp:
        tracker.record_request(model="saver", input_tokens=2000, tokens_saved=1000, source="rtk")
        without = page_and_command()
        text = (DATA / "sources" / "otlp" / "claude_code_token_usage_delta.json").read_text()
        request, outcome = Parse(text, ExportMetricsServiceRequest()), Outcome()
        assert otlp.add(list(points_of(request, METRICS, outcome)), outcome)
        usage = tracker.snapshot().lifetime.total_input_tokens - 2000
        shown = page_and_command()
    assert usage > 0
    for before, after in zip(without, shown, strict=True):
        assert "33.3 %" in before
        assert "lowered by" not in before
        assert f"lowered by {usage:,} tokens of input that were reported as usage" in after


@pytest.mark.parametrize(
    ("tokens_saved", "share"), [(20, "&lt; 0.1 %"), (60, "0.1 %"), (33_333, "25.0 %"), (50_001, "33.3 %")]
)
def test_share_is_that_of_the_command(store_path: Path, tokens_saved: int, share: str) -> None:
    """In the same digits; a share that is not zero is not shown as zero."""
    with SavingsTracker(store_path) as tracker:
        tracker.record_request(model="m", input_tokens=100_000, tokens_saved=tokens_saved)
        content = asyncio.run(page(Service(tracker, SavingsCollector(tracker)).app))
    assert f"<dt>Share of the input saved</dt><dd>{share}<" in content
    shown = run_cli("show", "--store", str(store_path)).stdout
    assert f"Share of the input: {unescape(share)}." in shown


def test_icon(tmp_path: Path, store_path: Path) -> None:
    """Browsers ask for it under this name whatever they show, without a token, and that is no refused request."""
    (tmp_path / "token").write_text("secret")
    (tmp_path / "web.yml").write_text("authorization: {credentials_file: token}")
    with running("serve", "--store", str(store_path), "--web.config.file", str(tmp_path / "web.yml")) as service:
        status, icon = service.get("/favicon.ico")
        links = re.findall(r'<link rel="icon" href="([^"]*)">', service.get("/docs/runbook")[1])
        with_token = {"Authorization": "Bearer secret"}
        links += re.findall(r'<link rel="icon" href="([^"]*)">', service.get("/", with_token)[1])
        _, _, logged = service.stop()
    assert status == 200
    assert ElementTree.fromstring(icon).tag == "{http://www.w3.org/2000/svg}svg"
    assert links == ["../favicon.ico", "/favicon.ico"]
    assert "refused" not in logged


@pytest.mark.parametrize(
    ("tokens_saved", "labels"), [(0, ["0", "1", "2"]), (1, ["0", "1", "2"]), (604, ["0", "400", "800"])]
)
def test_chart_has_no_half_tokens(store_path: Path, tokens_saved: int, labels: list[str]) -> None:
    with SavingsTracker(store_path) as tracker:
        tracker.record_request(model="m", tokens_saved=tokens_saved)
        content = asyncio.run(page(Service(tracker, SavingsCollector(tracker)).app))
    assert re.findall(r'text-anchor="end">([^<-]*)</text>', content) == labels
