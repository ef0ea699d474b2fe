"""The documents that the service serves as pages, to which alerts link."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from operator import itemgetter
from pathlib import Path
from urllib.parse import urldefrag, urljoin

import pytest

from savings_exporter import SavingsTracker
from savings_exporter.assets.alerts import groups, optional_groups
from savings_exporter.assets.settings import RuleSettings
from savings_exporter.model.days import Dated
from savings_exporter.service.app import Service as App
from savings_exporter.telemetry.metrics import SavingsCollector
from tests.support.asgi import chunks, exchange
from tests.support.paths import ROOT
from tests.support.service import Service, run_cli, running
from tests.support.wait import WAIT_SECONDS, eventually

SAVING = {"model": "m", "tokens_saved": 1}
NAMES = sorted(path.stem for path in (ROOT / "docs").glob("*.md"))


class Page(HTMLParser):
    """The anchors of a page, and what it links to and loads."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.anchors: list[str] = []
        self.targets: list[str] = []
        self.attributes: set[str] = set()
        self.tags: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            self.attributes.add(name)
            if name == "id":
                self.anchors.append(value or "")
            elif name in ("href", "src"):
                self.targets.append(value or "")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One that asks for a token. The documents need none."""
    folder = tmp_path_factory.mktemp("service")
    (folder / "token").write_text("secret")
    (folder / "web.yml").write_text("authorization: {credentials_file: token}")
    with running("serve", "--store", str(folder / "s.json"), "--web.config.file", str(folder / "web.yml")) as service:
        yield service


def page(service: Service, path: str) -> Page:
    status, html = service.get(path)
    assert status == 200, path
    return Page(html)


@pytest.mark.parametrize("name", ["", *NAMES])
def test_links(service: Service, name: str) -> None:
    """Every link within the service leads to a page that is there, and to one place in it."""
    for target in page(service, f"/docs/{name}").targets:
        address, anchor = urldefrag(urljoin(f"{service.url}/docs/{name}", target))
        if not address.startswith(service.url):
            assert address.startswith(("https://", "http://localhost")), target
            continue
        path = address.removeprefix(service.url)
        if path == "/":  # the status page, which needs the token
            assert service.get(path)[0] == 401
        elif path.endswith((".css", ".svg", ".png", ".py")):
            assert service.get(path)[0] == 200, target
            assert not anchor
        else:
            anchors = page(service, path).anchors
            assert len(set(anchors)) == len(anchors)
            assert not anchor or anchor in anchors, target


@pytest.mark.parametrize("name", ["", *NAMES])
def test_policy(service: Service, name: str) -> None:
    """Nothing in a page is beyond its content security policy."""
    shown = page(service, f"/docs/{name}")
    assert not shown.attributes & {"style", "onclick", "onload"}
    assert not shown.tags & {"style", "script", "iframe"}


def test_index_links_to_each_document(service: Service) -> None:
    """By its title, in the order of the titles."""
    titles = {name: (ROOT / "docs" / f"{name}.md").read_text().partition("\n")[0].removeprefix("# ") for name in NAMES}
    listed = re.findall(r'<li><a href="([^"]*)">([^<]*)</a>', service.get("/docs/")[1])
    assert [(name, unescape(title)) for name, title in listed] == sorted(titles.items(), key=itemgetter(1))


@pytest.mark.parametrize("name", NAMES)
def test_links_are_named_by_what_they_lead_to(service: Service, name: str) -> None:
    """Pages have no file names."""
    assert re.findall(r"<a [^>]*>[^<]*\.md</a>", service.get(f"/docs/{name}")[1]) == []


def test_each_alert_has_its_section(service: Service) -> None:
    html = service.get("/docs/runbook")[1]
    rules = [rule for group in (*groups(RuleSettings()), *optional_groups(RuleSettings())) for rule in group["rules"]]
    alerts = [rule for rule in rules if "alert" in rule]
    assert len(alerts) > 20
    for alert in alerts:
        address, anchor = urldefrag(alert["annotations"]["runbook_url"])
        assert address == "http://localhost:9478/docs/runbook"
        assert f'<h2 id="{anchor}">{alert["alert"]}</h2>' in html


def test_pictures(service: Service) -> None:
    sources = re.findall(r'<img src="([^"]*)"', service.get("/docs/observability")[1])
    assert sources
    for source in sources:
        assert service.get(f"/docs/{source}")[1] == (ROOT / "docs" / source).read_text()


def test_what_is_no_document(service: Service) -> None:
    paths = ("nothing", "..%2fREADME", "../README.md", "%2e%2e/pyproject.toml", "examples", "runbook/", "runbook.md")
    assert [service.get(f"/docs/{path}")[0] for path in paths] == [404] * len(paths)


def test_served_under_any_name(store_path: Path) -> None:
    """Also under a name that the service does not know, such as that of a proxy: the links of alerts may have it."""
    with running("serve", "--store", str(store_path)) as service:
        assert service.get("/docs/runbook", {"Host": "savings.example"})[0] == 200
        assert service.get("/v1/savings", {"Host": "savings.example"})[0] == 421


def test_served_in_watch(store_path: Path) -> None:
    assert run_cli("record", "--store", str(store_path), "--model", "m", "--tokens-saved", "1").returncode == 0
    with running("watch", str(store_path)) as service:
        assert service.get("/docs/runbook")[0] == 200


@pytest.mark.needs("root")
def test_served_while_the_store_fails(store_path: Path) -> None:
    with running("serve", "--store", str(store_path), faulty=True) as service:
        service.tell("fail fsync_journal")
        assert service.post(SAVING)[0] == 202
        assert service.get("/docs/runbook")[0] == 200
        assert 'href="/docs/runbook"' in service.get("/")[1]


@pytest.mark.needs("root")
def test_served_while_the_disk_hangs(store_path: Path) -> None:
    with running("serve", "--store", str(store_path), faulty=True) as service:
        assert service.post(SAVING)[0] == 200
        service.tell("hang fsync_journal")
        sending = threading.Thread(target=service.post, args=(SAVING,), daemon=True)
        sending.start()
        eventually(lambda: service.metrics()["savings_records_pending"] == 1, "the record to be pending")
        assert service.get("/docs/runbook")[0] == 200
        assert service.get("/docs/")[0] == 200
        service.tell("mend")
        sending.join()


def test_served_while_all_threads_wait_for_the_disk(store_path: Path) -> None:
    """A read that hangs keeps the thread of its request."""
    mended = threading.Event()

    class HangingStore(SavingsTracker):
        def days(self, first: str = "", last: str = "") -> Dated:
            mended.wait()
            return super().days(first, last)

    async def runbook_while_reads_hang(service: App) -> int:
        reads = [asyncio.create_task(exchange(service, "GET", "/v1/history", chunks())) for _ in range(100)]
        try:
            asked = exchange(service, "GET", "/docs/runbook", chunks())
            return (await asyncio.wait_for(asked, WAIT_SECONDS))[0]
        finally:
            mended.set()
            await asyncio.gather(*reads)

    with HangingStore(store_path) as tracker:
        assert asyncio.run(runbook_while_reads_hang(App(tracker, SavingsCollector(tracker)))) == 200
