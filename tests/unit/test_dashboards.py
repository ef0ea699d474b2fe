"""Grafana's dashboards are up to date with build.py, readable, and query only existing metrics."""

from __future__ import annotations

import json
import re
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from savings_exporter import SavingsTracker
from savings_exporter.service.requests import RequestLog
from savings_exporter.sources.discovery import source_of
from savings_exporter.telemetry.metrics import SavingsCollector
from tests.support.grafana import DASHBOARDS, panel_queries, panels
from tests.support.paths import DATA, ROOT
from tests.support.scrape import samples
from tests.support.sources import imported

FRAMED = [
    pytest.param(panel, id=f"{path.stem}: {panel['title']}")
    for path in DASHBOARDS
    for panel in panels(path)
    if panel["type"] != "row"
]
ASKED = [found for path in DASHBOARDS for found in panel_queries(path)]
QUERIES = [pytest.param(found.query, id=f"{found.dashboard}: {found.panel}") for found in ASKED]
# How much a total grew in a time, whatever it began with.
GAIN = re.compile(r"\(max_over_time\((\w+{[^}]*}\[[^]]*\])\) - min_over_time\(\1\)\)")
each_dashboard = pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
each_panel = pytest.mark.parametrize("panel", FRAMED)
each_query = pytest.mark.parametrize("query", QUERIES)


@pytest.fixture
def exported(tracker: SavingsTracker) -> list[str]:
    """All samples of an exporter that has had traffic, and the families that only another program's document fills."""
    tracker.record_request(
        model="m",
        provider="p",
        project="j",
        agent="a",
        source="s",
        tokens_saved=1,
        input_tokens=1,
        savings_usd=1,
        input_cost_usd=1,
    )
    imported(tracker, source_of(str(DATA / "headroom" / "savings_events.jsonl")))
    collector = SavingsCollector(tracker)
    requests = CollectorRegistry()
    RequestLog(requests, []).note("POST", "/", 422, 0.1, "")
    families = (*collector.collect(), *requests.collect())
    others = "savings_watched_file_readable", "savings_log_lines_dropped_total"
    return [*samples(collector), *samples(requests), *others, *(one.name for one in families if not one.samples)]


# The newer kind of dashboard is for Grafana 12 and later only.
@pytest.mark.filterwarnings("ignore:Prefer using dashboardv2:DeprecationWarning")
@pytest.mark.skipif(sys.version_info < (3, 11), reason="grafana-foundation-sdk needs Python 3.11")
def test_the_files_are_what_build_py_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "dashboards" / "grafana")
    from build import built

    for path, text in built().items():
        assert (ROOT / path).read_text(encoding="utf-8") == text, f"{path} is not what is built: run make dashboards"


@each_panel
def test_every_panel_says_what_it_shows(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]


@each_dashboard
def test_titles_and_ids_are_each_used_once(path: Path) -> None:
    for key in ("id", "title"):
        used = [panel[key] for panel in panels(path)]
        assert len(used) == len(set(used)), used


@each_dashboard
def test_panels_lie_side_by_side_on_24_columns(path: Path) -> None:
    places = [(panel["title"], panel["gridPos"]) for panel in panels(path)]
    for title, place in places:
        assert place["w"] > 0, title
        assert place["h"] > 0, title
        assert 0 <= place["x"] <= 24 - place["w"], title
    for (one, a), (other, b) in combinations(places, 2):
        is_beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        is_above_or_below = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert is_beside or is_above_or_below, f"{one} lies on {other}"


@each_panel
def test_all_that_is_asked_is_asked_of_the_chosen_datasource(panel: dict[str, Any]) -> None:
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    assert panel["datasource"] == chosen
    assert panel["targets"]
    assert all(target["datasource"] == chosen for target in panel["targets"])


@each_query
def test_windows_are_those_that_grafana_knows(query: str) -> None:
    assert set(re.findall(r"\[(.*?)\]", query)) <= {"$__rate_interval", "$__range", "1d", "1d:1m"}
    functions = len(re.findall(r"\b(?:rate|increase|max_over_time|min_over_time|last_over_time)\(", query))
    assert query.count("[") == functions
    assert query.count("_bucket{") <= functions


@each_query
def test_every_series_is_one_that_was_chosen(query: str) -> None:
    if "ALERTS" not in query:
        selectors = re.findall(r"\b(?:savings|process)_\w+(?:{(.*?)})?", query)
        assert selectors
        assert all('job=~"$job", instance=~"$instance"' in selector for selector in selectors), query


def test_views_of_one_store_are_not_added_up(exported: list[str]) -> None:
    for sample in exported:
        name, _, labels = sample.partition("{")
        together = next(
            (names for names in ("provider, model", "project", "agent") if f"{names[-5:]}=" in labels), None
        )
        if together is not None:
            joined = rf" \* ignoring \({together}, store\) group_left \(store\) savings_store_info{{"
            series = rf"(rate\(|gain\()?{name}{{[^}}]*}}(\[[^]]*\]\))?"
            once = rf"(max by \(store, {together}\) \(|}} or last_over_time\(\(){series}{joined}"
            for found in ASKED:
                query = GAIN.sub(r"gain(\1)", found.query)
                assert len(re.findall(rf"\b{name}{{", query)) == len(re.findall(once, query)), found


def test_sums_over_exporters_take_each_store_once() -> None:
    # Each exporter of a store shows the store's operation counters: what is not by instance has to be by store.
    for found in ASKED:
        assert not re.findall(r"\bsum(?: by \([^)]*\))? \((?!max by \(store, )", found.query), found


@each_query
def test_targets_are_told_apart_by_all_their_labels(query: str) -> None:
    """Two hosts may both scrape 127.0.0.1:9478, with another label that tells them apart."""
    assert not re.search(r"\b(on|by) \([^)]*\b(job|instance)\b", query)


@each_dashboard
def test_rules_of_dashboard_linter(path: Path) -> None:
    """Those that Grafana's dashboard-linter has and that no other test here checks.

    Its rule that counters need rate() is not taken: the lifetime total is the figure that this program exists for.
    """
    dashboard = json.loads(path.read_text(encoding="utf-8"))
    assert dashboard["editable"] is False
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["label"] == "Data source"
    for name in ("job", "instance"):
        variable = variables[name]
        assert (variable["type"], variable["label"]) == ("query", name.capitalize())
        assert variable["datasource"]["uid"] == "${datasource}"
        assert (variable["multi"], variable["includeAll"], variable["allValue"]) == (True, True, ".+")
        assert variable["refresh"] == 2  # when the time range changes


@each_dashboard
def test_restarts_drills_and_recoveries_are_marked(path: Path) -> None:
    marks = json.loads(path.read_text(encoding="utf-8"))["annotations"]["list"]
    assert [mark["name"] for mark in marks] == ["Restarts", "Fire drills", "Recoveries"]
    for mark in marks:
        assert mark["enable"]
        assert mark["datasource"]["uid"] == "${datasource}"
        assert set(re.findall(r"{(.*?)[},]", mark["expr"])) == {'job=~"$job"'}


def test_every_family_is_on_a_panel_and_every_panel_asks_for_families_that_there_are(exported: list[str]) -> None:
    asked = {name for found in ASKED for name in re.findall(r"\bsavings_\w+", found.query)}
    there = {name.partition("{")[0] for name in exported}
    assert asked <= there
    assert {family_of(name) for name in there} == {family_of(name) for name in asked}


def family_of(sample: str) -> str:
    """The family that a sample belongs to, as OpenMetrics calls it."""
    return re.sub(r"_(total|bucket|count|sum|created)$", "", sample)
