"""The status page in a real Chromium, on a phone and on a desk."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pytest

from savings_exporter.service.demo import made_up_savings
from tests.support.browser import Browser, browser
from tests.support.paths import DATA, ROOT
from tests.support.service import run_cli, running
from tests.support.wait import eventually

pytestmark = pytest.mark.needs("chromium")

WIDTHS = (390, 1280)
RECORD: dict[str, Any] = {"model": "gpt-5", "provider": "openai", "input_tokens": 900, "tokens_saved": 2100}
HOSTILE = (
    "<script>document.title='taken'</script>",
    "<img src=http://127.0.0.2/x onerror=alert(1)>",
    "\"><b class='total'>" + "W" * 100,
    "x" * 128,
    "\u202egnp.exe",
    "مرحبا بالعالم",
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture
def shown(chromium: Browser) -> Iterator[Browser]:
    chromium.complaints.clear()
    yield chromium
    chromium.call("Page.navigate", url="about:blank")
    # A service that is killed cannot be asked any more, also in the middle of a question.
    ended = ("ERR_CONNECTION_REFUSED", "ERR_CONNECTION_RESET", "ERR_EMPTY_RESPONSE")
    assert [complaint for complaint in chromium.complaints if not complaint.endswith(ended)] == []


def month_of_savings() -> list[dict[str, Any]]:
    """Made-up savings of the last 45 days, always the same but for the day."""
    dice, now = random.Random(7), datetime.now(timezone.utc)
    records = []
    for _, record in islice(made_up_savings(), 1500):
        fields = msgspec.to_builtins(record)
        fields["timestamp"] = (now - timedelta(days=min(dice.expovariate(1 / 15), 45))).isoformat()
        fields["source"] = dice.choice(["headroom", "headroom", "rtk", "litellm"])
        records.append(fields)
    return records


def scrolls_sideways(page: Browser) -> bool:
    return bool(page.value("document.documentElement.scrollWidth > document.documentElement.clientWidth"))


def fetches(page: Browser) -> int:
    """How often the page has fetched itself."""
    return int(page.value("performance.getEntriesByType('resource').filter(e => e.initiatorType === 'fetch').length"))


@pytest.mark.parametrize("width", WIDTHS)
def test_numbers_are_those_of_the_metrics(store_path: Path, shown: Browser, width: int) -> None:
    with running("serve", "--store", str(store_path)) as service:
        assert service.post({"records": month_of_savings()})[0] == 200
        shown.show(service.url, width)
        metrics = service.metrics()
        saved = sum(value for name, value in metrics.items() if name.startswith("savings_tokens_saved_total{"))
        assert shown.text(".total") == f"{saved:,.0f}"
        for name, value in metrics.items():
            if name.startswith("savings_project_tokens_saved_total{"):
                assert f"{value:,.0f}" in shown.text("main")
        content = shown.text("main")
        for part in ("Today", "7 days", "30 days", "By model", "By project", "By source", "By provider", "Durability"):
            assert part in content
        assert shown.value("document.querySelectorAll('.chart rect').length") > 30
        assert not scrolls_sideways(shown)
        days = json.loads(service.get("/v1/history?by=day")[1])["rows"]
        assert f"{days[-1]['tokens_saved']:,} tokens" in content


@pytest.mark.parametrize("width", WIDTHS)
def test_hostile_names_and_huge_numbers(store_path: Path, shown: Browser, width: int) -> None:
    with running("serve", "--store", str(store_path)) as service:
        records = [
            {
                "model": name,
                "project": name,
                "provider": name,
                "source": name,
                "tokens_saved": 10**12,
                "savings_usd": 1e9,
            }
            for name in HOSTILE
        ]
        assert service.post({"records": records * 1000})[0] == 200
        for by in ("model", "source", "project", "provider"):
            shown.show(f"{service.url}/?by={by}", width)
            assert shown.text(".total") == "6,000,000,000,000,000"
            assert shown.value("document.title") == "6,000,000,000,000,000 tokens saved"
            assert not scrolls_sideways(shown)
            assert HOSTILE[0] in shown.text("main")
            assert shown.value("document.querySelectorAll('img, b, main script').length") == 0


def test_failed_directory_fsync_shows_at_once(store_path: Path, shown: Browser) -> None:
    """Without a reload, and what a reader has opened stays open."""
    with running("serve", "--store", str(store_path), faulty=True) as service:
        assert service.post(RECORD)[0] == 200
        shown.show(service.url, 390)
        shown.value("document.querySelector('#days-table').open = true")
        shown.value("window.unchanged = true")
        service.tell("fail fsync_dir")
        assert service.post(RECORD)[0] == 200
        eventually(lambda: service.get("/-/healthy")[0] == 503, "the failed save")
        before = fetches(shown)
        eventually(lambda: "EIO" in shown.text("main"), "the failure on the page")
        # One a second, and one may have been on its way.
        assert fetches(shown) - before <= 2
        assert "degraded" in shown.text("header")
        assert "Degraded" in shown.text("main")
        assert "the directory" in shown.text("main").lower() or "fsync_dir" in shown.text("main")
        assert shown.value("document.querySelector('[role=alert].bad:not([hidden])') !== null")
        assert shown.value("window.unchanged && document.querySelector('#days-table').open")
        service.tell("mend")
        eventually(lambda: "healthy" in shown.text("header"), "the mended store on the page")


def test_pending_records_and_a_drill(store_path: Path, shown: Browser) -> None:
    with running("serve", "--store", str(store_path), faulty=True) as service:
        assert service.post(RECORD)[0] == 200
        service.tell("fail fsync_journal")
        assert service.post(RECORD)[0] == 202
        shown.show(service.url, 1280)
        eventually(lambda: "1 record" in shown.text("main"), "the pending record")
        assert "the oldest since" in shown.text("main")
        service.tell("mend")
        eventually(lambda: "0 records" in shown.text("main"), "the record that became durable")


def test_fire_drill(store_path: Path, shown: Browser) -> None:
    """It is told apart from a failure: the store stays healthy."""
    with running("serve", "--store", str(store_path), "--enable-drill") as service:
        assert service.post(RECORD)[0] == 200
        shown.show(service.url, 390)
        assert run_cli("drill", "dir-fsync", "--seconds", "5", "--store", str(store_path)).returncode == 0
        eventually(lambda: "A fire drill runs (dir-fsync)" in shown.text("main"), "the banner")
        eventually(lambda: "EIO, drill" in shown.text(".steps"), "the simulated failure")
        eventually(lambda: "A fire drill runs" not in shown.text("main"), "the end of the drill")


def test_service_that_ends(store_path: Path, shown: Browser) -> None:
    with running("serve", "--store", str(store_path)) as service:
        assert service.post(RECORD)[0] == 200
        shown.show(service.url, 390)
        assert not shown.value("document.getElementById('lost').checkVisibility()")
        service.stop()
        eventually(lambda: shown.value("document.getElementById('lost').checkVisibility()"), "the notice")
        assert "2,100" in shown.text(".total")


def test_without_scripts(store_path: Path, shown: Browser) -> None:
    with running("serve", "--store", str(store_path)) as service:
        assert service.post({"records": month_of_savings()})[0] == 200
        shown.show(service.url, 390, scripts=False)
        content = shown.text("main")
        assert "By model" in content
        assert "claude-sonnet-4-5" in content
        assert "does not answer" not in shown.text("body")
        assert not scrolls_sideways(shown)


def test_first_saving(store_path: Path, shown: Browser) -> None:
    with running("serve", "--store", str(store_path)) as service:
        shown.show(service.url, 390)
        assert "No savings yet" in shown.text("main")
        assert "curl" in shown.text("main pre")
        assert not scrolls_sideways(shown)
        assert service.post(RECORD)[0] == 200
        eventually(lambda: shown.text(".total") == "2,100", "the first saving")
        assert "No savings yet" not in shown.text("main")


def test_keyboard_and_screen_reader(store_path: Path, shown: Browser) -> None:
    """Each link is reached with Tab and shows that it has the focus; landmarks, headings and tables have names."""
    with running("serve", "--store", str(store_path)) as service:
        assert service.post(RECORD)[0] == 200
        shown.show(service.url, 1280)
        reached = []
        for _ in range(12):
            shown.press("Tab")
            reached.append(shown.value("document.activeElement.textContent"))
            if reached[-1] not in ("", None) and shown.value("document.activeElement !== document.body"):
                outline = shown.value("getComputedStyle(document.activeElement).outlineStyle")
                assert outline != "none"
        assert {"source", "runbook", "documents", "metrics", "JSON", "The same as a table"} <= set(reached)
        assert shown.value("document.querySelectorAll('header, main, footer nav[aria-label]').length") == 3
        assert shown.value("[...document.querySelectorAll('table')].every(t => t.caption || t.closest('details'))")
        assert shown.value("[...document.querySelectorAll('th')].every(cell => cell.scope)")
        assert shown.value("[...document.querySelectorAll('svg[role=img]')].every(s => s.getAttribute('aria-label'))")
        assert shown.value("document.documentElement.lang") == "en"


def test_dark(store_path: Path, shown: Browser) -> None:
    with running("serve", "--store", str(store_path)) as service:
        colors = []
        for dark in (False, True):
            shown.show(service.url, 390, dark=dark)
            style = "getComputedStyle(document.body)"
            colors.append(shown.value(f"[{style}.color, {style}.backgroundColor].join()"))
        assert colors[0] != colors[1]


def test_banners_of_a_demo_and_of_a_watched_file(shown: Browser) -> None:
    with running("serve", "--demo") as service:
        shown.show(service.url, 390)
        assert "These savings are made up" in shown.text("main")
    with running("watch", str(DATA / "headroom" / "v6-latest" / "proxy_savings.json")) as service:
        shown.show(service.url, 390)
        assert "Another program writes it. Whether its saves survive a power loss is not known here." in shown.text(
            "main"
        )
        assert not scrolls_sideways(shown)


def test_links_lead_somewhere(store_path: Path, shown: Browser) -> None:
    with running("serve", "--store", str(store_path)) as service:
        shown.show(service.url, 390)
        links = shown.value("[...document.querySelectorAll('a')].map(link => link.href)")
        assert len(links) > 4
        for link in links:
            assert service.get(link.removeprefix(service.url))[0] == 200


def test_pictures(store_path: Path, tmp_path: Path, shown: Browser) -> None:
    """``make pictures`` writes them into the documents."""
    folder = ROOT / "docs" / "images" if "PICTURES" in os.environ else tmp_path
    with running("serve", "--store", str(store_path)) as service:
        assert service.post({"records": month_of_savings()})[0] == 200
        eventually(lambda: service.metrics()["savings_saves_total"] >= 1, "a save")
        for name, width, height, dark in (("page", 1280, 900, False), ("page-phone", 390, 1100, True)):
            shown.show(service.url, width, dark=dark)
            shown.picture(folder / f"{name}.png", height)
            assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
