"""Check the shipped rules with Prometheus's own tools: when each alert fires, and its text."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from savings_exporter.service.drill import KINDS
from tests.support.paths import DATA, ROOT
from tests.support.service import Service, running

pytestmark = pytest.mark.needs("prometheus")

FOLDER = ROOT / "dashboards" / "prometheus"
RULES = [*sorted(FOLDER.glob("rules/*.yml")), *sorted(FOLDER.glob("optional/*.yml"))]
RULE_TESTS = sorted(FOLDER.glob("tests/*.yml"))
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")


def all_rules() -> list[dict[str, Any]]:
    """Every rule that is shipped."""
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]]
    return [rule for group in groups for rule in group["rules"]]


ALERTS = [rule for rule in all_rules() if "alert" in rule]


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_finds_nothing_wrong_with_the_rules() -> None:
    promtool("check", "rules", *RULES)


@pytest.mark.parametrize("order", [1, -1], ids=["groups-in-order", "groups-in-reverse"])
@pytest.mark.parametrize("path", RULE_TESTS, ids=lambda path: path.name)
def test_the_rules_do_what_their_tests_say(path: Path, order: int, tmp_path: Path) -> None:
    # Prometheus evaluates its groups side by side, and promtool in a random order unless the test names one.
    test = yaml.safe_load(path.read_text(encoding="utf-8"))
    rules = [path.parent / name for name in test["rule_files"]]
    groups = [group["name"] for name in rules for group in yaml.safe_load(name.read_text(encoding="utf-8"))["groups"]]
    test |= {"rule_files": [str(name) for name in rules], "group_eval_order": groups[::order]}
    ordered = tmp_path / path.name
    ordered.write_text(yaml.safe_dump(test), encoding="utf-8")
    promtool("test", "rules", ordered)


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_every_alert_is_tested_when_it_fires_and_when_it_must_not(alert: dict[str, Any]) -> None:
    tests = [test for path in RULE_TESTS for test in yaml.safe_load(path.read_text(encoding="utf-8"))["tests"]]
    expected = [
        bool(case["exp_alerts"])
        for test in tests
        for case in test.get("alert_rule_test", ())
        if case["alertname"] == alert["alert"]
    ]
    assert set(expected) == {True, False}


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_every_alert_says_what_it_is_and_where_to_read_on(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    assert {"summary", "description", "runbook_url"} == set(alert["annotations"])
    page, _, anchor = alert["annotations"]["runbook_url"].partition("#")
    assert page.endswith("/docs/runbook.md")
    sections = {
        heading.lower(): text for heading, text in re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", RUNBOOK, re.M | re.S)
    }
    assert anchor == alert["alert"].lower()
    for part in ("Means", "At risk", "Look", "do"):
        assert part.lower() in sections[anchor].lower()


def test_the_runbook_has_no_section_of_an_alert_that_is_gone() -> None:
    assert sorted(re.findall(r"^## (\w+)$", RUNBOOK, re.M)) == sorted(alert["alert"] for alert in ALERTS)


@pytest.fixture
def exported(store_path: Path) -> str:
    """The metrics of a service with traffic, on a document of Headroom, because only Headroom records some amounts."""
    shutil.copy(DATA / "headroom" / "v6" / "proxy_savings.json", store_path)
    with running("serve", "--store", str(store_path)) as service:
        assert service.post({"model": "m", "provider": "p", "project": "x", "agent": "a", "tokens_saved": 7})[0] == 200
        status, text = service.get("/metrics")
    assert status == 200
    return text


def test_the_page_of_metrics_has_what_the_exporter_has_and_nothing_else(exported: str) -> None:
    families = re.findall(r"^# TYPE (\w+) (\w+)\n((?:(?!# ).*\n)*)", exported, re.M)
    there = {
        (name, kind, frozenset(re.findall(r'(\w+)="', lines)) - {"le"})
        for name, kind, lines in families
        if not name.endswith("_created")
    }
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) ?\| ", page, re.M)
    told = {(name, kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert told == {family for family in there if not family[0].startswith("process_")}
    assert set(re.findall(r"\bprocess_\w+", page)) == {name for name, *_ in there if name.startswith("process_")}


def test_docs_name_only_metrics_that_the_exporter_has(exported: str) -> None:
    there = set(re.findall(r"^# TYPE (\w+)", exported, re.M))
    recorded = {rule["record"] for rule in all_rules() if "record" in rule}
    # The package, a field of a record, and one of the totals.
    others = {"savings_exporter", "savings_usd", "savings_percent"}
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"[a-z_]+:savings_[a-z0-9_:]+", text)) <= recorded, path
        plain = re.sub(r"[a-z_]+:savings_[a-z0-9_:]+", "", text)
        assert set(re.findall(r"\bsavings_\w+", plain)) - others <= there, path


def test_every_drill_names_an_alert_that_there_is() -> None:
    assert {kind.alert for kind in KINDS.values()} <= {alert["alert"] for alert in ALERTS}


def test_rules_name_only_metrics_that_the_exporter_has(exported: str) -> None:
    there = {re.sub(r"_(bucket|count|sum)$", "", name) for name in re.findall(r"^(\w+)[ {]", exported, re.M)}
    recorded = {rule["record"] for rule in all_rules() if "record" in rule}
    for rule in all_rules():
        for name in re.findall(r"[a-z_]+:[a-z0-9_:]+", rule["expr"]):
            assert name in recorded, rule
        plain = re.sub(r"[a-z_]+:[a-z0-9_:]+|\"[^\"]*\"", "", rule["expr"])
        for name in re.findall(r"\b(?:savings|process)_\w+", plain):
            assert re.sub(r"_(bucket|count|sum)$", "", name) in there, rule


def test_nothing_fires_in_ten_quiet_minutes(store_path: Path, tmp_path: Path) -> None:
    with running("serve", "--store", str(store_path)) as service:
        for _ in range(3):
            assert service.post({"model": "m", "provider": "p", "project": "x", "tokens_saved": 7})[0] == 200
        series = [*quiet(service), {"series": 'up{job="savings-exporter", instance="a:9478"}', "values": "1x80"}]
    test = {
        "rule_files": [str(path) for path in RULES],
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "15s",
                "input_series": series,
                "alert_rule_test": [
                    {"eval_time": f"{minute}m", "alertname": alert["alert"], "exp_alerts": []}
                    for alert in ALERTS
                    for minute in range(11)
                ],
            }
        ],
    }
    path = tmp_path / "quiet.yml"
    path.write_text(yaml.safe_dump(test), encoding="utf-8")
    promtool("test", "rules", path)


def quiet(service: Service) -> list[dict[str, str]]:
    """The current metrics of the service, unchanged for twenty minutes without traffic."""
    _, text = service.get("/metrics")
    samples = re.findall(r"^(\w+)(?:\{(.*)\})? (\S+)$", text, re.M)
    assert len(samples) > 100
    # promtool's clock begins at the epoch.
    past = ("savings_last_save_success_timestamp_seconds", "process_start_time_seconds")
    return [
        {
            "series": f'{name}{{{labels + "," if labels else ""}job="savings-exporter",instance="a:9478"}}',
            "values": f"{-3600 if name in past else value}x80",
        }
        for name, labels, value in samples
    ]
