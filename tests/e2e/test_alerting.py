"""From a fault to a page: the shipped configuration of exporter, Prometheus and Alertmanager, and a test pager.

The tests replace the targets, and shorten the intervals from minutes to seconds.
"""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from savings_exporter.service.drill import KINDS
from tests.crash.lab import Disk, mounted
from tests.support.faults import failing_directory_fsync
from tests.support.grafana import DASHBOARDS, panel_queries
from tests.support.pack import alertmanager, fetched, listening, prometheus
from tests.support.service import free_port, run_cli, running
from tests.support.wait import eventually

pytestmark = pytest.mark.needs("prometheus", "alertmanager")

# What prompt caches saved is in Headroom's documents; no record says it.
ONLY_IN_DOCUMENTS_OF_OTHERS = "savings_cache_cost_saved_usd"

ONLY_WHILE_DOWN = "up{"

ONLY_WITH_SOURCES = "savings_rejected_records_total"

SOMETIMES_SILENT = (ONLY_IN_DOCUMENTS_OF_OTHERS, ONLY_WHILE_DOWN, ONLY_WITH_SOURCES)

SAVING: dict[str, Any] = {
    "model": "claude-sonnet-4-5",
    "provider": "anthropic",
    "project": "web",
    "agent": "claude-code",
    "source": "headroom",
    "tokens_saved": 4096,
    "input_tokens": 12000,
    "savings_usd": 0.0123,
    "input_cost_usd": 0.036,
}
RECEIVERS = ("pager", "team-chat", "dead-mans-switch")
SHORTER = (
    (r"\[5m\]", "[10s]"),
    (r"\[2m\]", "[2s]"),
    (r"offset 5m", "offset 10s"),
    (r"offset 3m", "offset 2s"),
    (r" < 300\b", " < 10"),
    (r" >= 20\b", " >= 1"),
    (r"for: \dm", "for: 1s"),
)


class Stack:
    """The running programs, and the pages that were sent, in order."""

    def __init__(self, url: str, calls: list[dict[str, Any]]) -> None:
        self.url = url
        self.calls = calls

    def call(self, name: str, status: str) -> dict[str, Any]:
        """Wait for a page about an alert."""

        def found() -> dict[str, Any] | None:
            same = [one for one in self.calls if one["labels"]["alertname"] == name and one["status"] == status]
            return same[-1] if same else None

        alert: dict[str, Any] = eventually(found, f"{name} to be {status}; called: {self.calls}")
        return alert

    def query(self, query: str) -> list[dict[str, Any]]:
        """An instant query's series."""
        answer = json.loads(fetched(f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': query})}"))
        series: list[dict[str, Any]] = answer["data"]["result"]
        return series

    def value(self, query: str) -> float | None:
        """The only series' value."""
        series = self.query(query)
        return float(series[0]["value"][1]) if len(series) == 1 else None


@contextmanager
def stack(directory: Path, *targets: str) -> Iterator[Stack]:
    calls: list[dict[str, Any]] = []

    def take(handler: BaseHTTPRequestHandler, body: bytes) -> int:
        calls.extend({**alert, "called": handler.path} for alert in json.loads(body)["alerts"])
        return 200

    alerts, port = free_port(), free_port()
    with listening(take) as webhooks:
        changes = [(rf"http://replace-with-your-{who}.invalid/", f"{webhooks}/{who}") for who in RECEIVERS]
        changes += [(r"group_(wait|interval): \w+", r"group_\1: 100ms")]
        runbook = f"http://{targets[0]}/docs/runbook"
        with (
            alertmanager(directory / "alertmanager", alerts, *changes),
            prometheus(directory / "prometheus", port, list(targets), alerts, runbook, *SHORTER) as url,
        ):
            yield Stack(url, calls)


def assert_it_says_what_to_do(alert: dict[str, Any], address: str, severity: str = "critical") -> None:
    name = alert["labels"]["alertname"]
    assert {"severity": severity, "job": "savings-exporter", "instance": address}.items() <= alert["labels"].items()
    assert alert["called"] == ("/pager" if severity == "critical" else "/team-chat")
    assert address in alert["annotations"]["summary"]
    assert_link_leads_to_section(alert["annotations"]["runbook_url"], name)


def assert_link_leads_to_section(link: str, alert: str) -> None:
    page, _, section = link.partition("#")
    assert section == alert.lower()
    assert f'<h2 id="{section}">{alert}</h2>' in fetched(page).decode()


def test_the_link_of_each_alert_leads_to_its_section(tmp_path: Path, store_path: Path) -> None:
    """In the rules as Prometheus has read them, on a service whose address is the one setting that was changed."""
    address = f"127.0.0.1:{free_port()}"
    with running("serve", "--store", str(store_path), address=address), stack(tmp_path, address) as seen:
        groups = json.loads(fetched(f"{seen.url}/api/v1/rules?type=alert"))["data"]["groups"]
        alerts = [rule for group in groups for rule in group["rules"]]
        assert {"SavingsDirectoryFsyncFailing", "SavingsExporterDown", "Watchdog"} <= {rule["name"] for rule in alerts}
        for rule in alerts:
            assert rule["annotations"]["runbook_url"].startswith(f"http://{address}/docs/")
            assert_link_leads_to_section(rule["annotations"]["runbook_url"], rule["name"])


@pytest.mark.needs("strace")
def test_a_directory_fsync_that_fails_calls_somebody_until_it_works_again(tmp_path: Path, store_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    with running("serve", "--store", str(store_path), address=address) as service, stack(tmp_path, address) as seen:
        eventually(lambda: seen.value("savings_store_healthy") == 1, "the first scrape")
        with failing_directory_fsync(service, store_path.parent):
            status, answer = service.post(SAVING)
            assert (status, answer["durable"]) == (202, False)
            assert_it_says_what_to_do(seen.call("SavingsDirectoryFsyncFailing", "firing"), address)
        # A retry succeeds within seconds, because the fault was short.
        eventually(lambda: seen.value("sum(savings_tokens_saved_total)") == 4096, "the saving to be durable")
        assert service.post(SAVING)[0] == 200
        assert unanswered(seen) == []
        seen.call("SavingsDirectoryFsyncFailing", "resolved")


def unanswered(seen: Stack) -> list[str]:
    """The panels without data after two scrapes."""
    variables = {"$job": ".+", "$instance": ".+", "$__rate_interval": "10s", "$__range": "1m"}

    def silent() -> list[str]:
        found = []
        for path in DASHBOARDS:
            for panel in panel_queries(path):
                query = panel.query
                if any(part in query for part in SOMETIMES_SILENT):
                    continue
                for name, value in variables.items():
                    query = query.replace(name, value)
                if not seen.query(query):
                    found.append(f"{panel.dashboard}: {panel.panel}: {query}")
        return found

    with suppress(AssertionError):  # the caller says which
        eventually(lambda: not silent(), "every panel to show something")
    return silent()


@pytest.mark.needs("linux", "root", "mount", "e2fsprogs")
def test_a_disk_that_goes_away_calls_somebody_until_it_is_back(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    with mounted(Disk("ext4", tmp_path)) as disk, stack(tmp_path, address) as seen:
        store = disk.mountpoint / "proxy_savings.json"
        with running("serve", "--store", str(store), address=address) as service:
            for _ in range(2):
                assert service.post(SAVING)[0] == 200
            eventually(lambda: seen.value("sum(savings_tokens_saved_total)") == 8192, "what was saved")
            disk.lose_power()
            assert service.post(SAVING)[0] == 202
            # Neither a commit nor a save reaches a sync there, because no file can be written or created any more.
            assert_it_says_what_to_do(seen.call("SavingsStoreUnhealthy", "firing"), address)
        disk.unmount()
        disk.mount()
        with running("serve", "--store", str(store), address=address) as service:
            seen.call("SavingsStoreUnhealthy", "resolved")
            assert service.post(SAVING)[0] == 200
            eventually(lambda: seen.value("sum(savings_tokens_saved_total)") == 3 * 4096, "the total to go on")


@pytest.mark.parametrize(
    ("drill", "severity"),
    [("dir-fsync", "critical"), ("file-fsync", "critical"), ("journal-fsync", "critical"), ("save-latency", "warning")],
)
def test_a_fire_drill_calls_somebody_and_says_that_it_is_one(
    drill: str, severity: str, tmp_path: Path, store_path: Path
) -> None:
    address = f"127.0.0.1:{free_port()}"
    arguments = ("serve", "--store", str(store_path), "--enable-drill")
    with running(*arguments, address=address) as service, stack(tmp_path, address) as seen:
        assert service.post(SAVING)[0] == 200
        eventually(lambda: seen.value("savings_store_healthy") == 1, "the first scrape")
        assert run_cli("drill", drill, "--seconds", "8", "--store", str(store_path)).returncode == 0
        call = seen.call(KINDS[drill].alert, "firing")
        assert_it_says_what_to_do(call, address, severity)
        assert f"A fire drill ({drill}) ran" in call["annotations"]["description"]
        assert service.post(SAVING)[1]["durable"]
        seen.call(KINDS[drill].alert, "resolved")


def test_two_views_of_one_store_are_one_and_two_stores_are_two(tmp_path: Path) -> None:
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(3)]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    stores = [str(tmp_path / name / "proxy_savings.json") for name in ("one", "one", "two")]
    with (
        running("serve", "--store", stores[0], address=addresses[0]) as first,
        running("serve", "--store", stores[1], address=addresses[1]) as second,
        running("serve", "--store", stores[2], address=addresses[2]) as third,
        stack(tmp_path, *addresses) as seen,
    ):
        for service, tokens in ((first, 100), (second, 20), (third, 3000)):
            assert service.post({**SAVING, "tokens_saved": tokens})[0] == 200
        eventually(lambda: seen.value("savings:tokens_saved:sum") == 3120, "the recorded total")
        eventually(lambda: seen.value("sum(savings_tokens_saved_total)") == 3240, "what adding up would give")
        # Rates depend on the moment; test_dashboards.py shows that they are joined in the same way.
        lifetime = [asked for asked in panel_queries(DASHBOARDS[0]) if not left_out(asked.query)]
        assert "Tokens saved" in {asked.panel for asked in lifetime}
        for asked in lifetime:
            query = asked.query.replace("$job", ".+")
            once = shown(seen, query.replace("$instance", f"{addresses[0]}|{addresses[2]}"))
            assert once
            assert shown(seen, query.replace("$instance", ".+")) == once, asked
            if asked.panel == "Tokens saved":
                assert once == {"{}": "3120"}


def left_out(query: str) -> bool:
    """Whether a query's answer depends on the moment, on another program's document, or on an exporter that is down."""
    return any(part in query for part in ("$__", *SOMETIMES_SILENT))


def shown(seen: Stack, query: str) -> dict[str, str]:
    """The result of a query, by labels."""
    return {json.dumps(one["metric"], sort_keys=True): one["value"][1] for one in seen.query(query)}


def test_an_exporter_that_is_down_keeps_its_part_of_the_total(tmp_path: Path) -> None:
    """Also when its store was not saved yet at the first scrape, and when it comes back with an empty store."""
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    stores = [tmp_path / name for name in ("one", "two", "empty")]
    for store in stores:
        store.mkdir()
    path = [str(store / "proxy_savings.json") for store in stores]
    down = next(found.query for found in panel_queries(DASHBOARDS[0]) if ONLY_WHILE_DOWN in found.query)
    total = next(found.query for found in panel_queries(DASHBOARDS[0]) if found.panel == "Tokens saved")
    down, total = (
        query.replace("$job", ".+").replace("$instance", ".+").replace("[1d:1m]", "[1h:500ms]")
        for query in (down, total)
    )

    def is_everywhere(value: float) -> bool:
        return seen.value("savings:tokens_saved:sum") == value == seen.value(total)

    with running("serve", "--store", path[0], address=addresses[0]) as kept, stack(tmp_path, *addresses) as seen:
        with running("serve", "--store", path[1], address=addresses[1]) as lost:
            for service in (kept, lost):
                assert service.post({**SAVING, "tokens_saved": 100})[0] == 200
            eventually(lambda: is_everywhere(200), "both totals")
            eventually(lambda: seen.query("last_over_time(store:savings_tokens_saved:sum[1d])"), "the stores")
            assert seen.query(down) == []
            lost.process.kill()
            lost.process.wait()
            eventually(lambda: len(seen.query(down)) == 1, "the exporter to be down")
            assert is_everywhere(200)
            seen.call("SavingsExporterDown", "firing")
        with running("serve", "--store", path[2], address=addresses[1]) as empty:
            assert empty.post({**SAVING, "tokens_saved": 1})[0] == 200
            eventually(lambda: is_everywhere(201), "the total of three stores")
            seen.call("SavingsLifetimeTotalWentBackwards", "firing")
        assert len(seen.query("count by (store) (last_over_time(store:savings_tokens_saved:sum[1d]))")) == 3
