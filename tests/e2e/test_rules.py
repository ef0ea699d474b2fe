"""Check the shipped rules with Prometheus's own tools: when each alert fires, and its text."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from savings_exporter.service.drill import KINDS
from tests.support.headroom_files import HeadroomFiles
from tests.support.healthy import MONITORING, SECONDS, SITUATIONS
from tests.support.paths import DATA, ROOT
from tests.support.rules import (
    FOLDER,
    RECORDING,
    RULES,
    SCENARIOS,
    groups_of,
    only,
    promtool,
    promtool_files,
    promtool_tests,
    series_of,
)
from tests.support.service import run_cli, running
from tests.support.wait import eventually

uses_promtool = pytest.mark.needs("prometheus")

GROUPS = groups_of(RULES)
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
DRILL_SENTENCE = (
    " A fire drill ({}) ran on this store within the last 10 minutes. It may be the only cause of this alert."
)


def all_rules() -> list[dict[str, Any]]:
    """Every rule that is shipped."""
    return [rule for group in GROUPS for rule in group["rules"]]


ALERTS = [rule for rule in all_rules() if "alert" in rule]
NAMES = sorted({alert["alert"] for alert in ALERTS})
DRILLS = [
    pytest.param(alert, scenario, id=f"{alert}: {scenario['case']}")
    for alert, scenarios in SCENARIOS.items()
    for scenario in scenarios
    if "drill" in scenario
]
each_alert = pytest.mark.parametrize(
    "alert", ALERTS, ids=lambda alert: f"{alert['alert']}{alert['labels'].get('window', '')}"
)


def passes(*arguments: str | Path) -> None:
    done = promtool(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr


@uses_promtool
def test_promtool_finds_nothing_wrong_with_the_rules() -> None:
    passes("check", "rules", *RULES)


def test_rules_are_what_the_command_writes(tmp_path: Path) -> None:
    done = run_cli("assets", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for path in RULES:
        written = tmp_path / "prometheus" / path.relative_to(FOLDER)
        assert written.read_text() == path.read_text(), f"{path} is not what is written: run make rules"


@uses_promtool
@pytest.mark.parametrize("order", [1, -1], ids=["groups-in-order", "groups-in-reverse"])
@pytest.mark.parametrize("alert", NAMES)
def test_alert_fires_when_it_must_and_only_then(alert: str, order: int, tmp_path: Path) -> None:
    tests = promtool_tests(alert, SCENARIOS[alert])
    passes("test", "rules", *promtool_files(tmp_path, tests, only(alert, GROUPS), order))


@uses_promtool
def test_stores_are_added_up_once(tmp_path: Path) -> None:
    passes("test", "rules", *promtool_files(tmp_path, RECORDING, GROUPS))


@pytest.mark.parametrize("alert", NAMES)
def test_every_alert_is_tested_when_it_fires_and_when_it_must_not(alert: str) -> None:
    assert [scenario for scenario in SCENARIOS[alert] if "fires" in scenario]
    assert alert == "Watchdog" or [scenario for scenario in SCENARIOS[alert] if "quiet" in scenario]


@uses_promtool
@pytest.mark.parametrize(("alert", "scenario"), DRILLS)
def test_alert_names_the_drill_that_ran_on_its_store(alert: str, scenario: dict[str, Any], tmp_path: Path) -> None:
    (rule,) = [one for one in ALERTS if one["alert"] == alert]
    (time,) = scenario["fires"]
    text = rule["annotations"]["description"].partition("{{- with")[0]
    sentence = DRILL_SENTENCE.format(scenario["drill"]) if scenario["drill"] != "none" else ""
    job = "bob's proxy" if "whatever the job is called" in scenario["case"] else "savings-exporter"
    expected = {
        "exp_labels": {"severity": rule["labels"]["severity"], "job": job, "instance": "a:9478"},
        "exp_annotations": {
            **rule["annotations"],
            "summary": rule["annotations"]["summary"].replace("{{ $labels.instance }}", "a:9478"),
            "description": text + sentence,
        },
    }
    test = {
        "interval": "15s",
        "input_series": series_of(scenario),
        "alert_rule_test": [{"eval_time": time, "alertname": alert, "exp_alerts": [expected]}],
    }
    passes("test", "rules", *promtool_files(tmp_path, [test], only(alert, GROUPS)))


@uses_promtool
@pytest.mark.parametrize("alert", NAMES)
def test_text_of_a_firing_alert_is_whole(alert: str, tmp_path: Path) -> None:
    """promtool shows the text when it expects no alert: nothing in it is missing, and no template is left."""
    scenario = next(one for one in SCENARIOS[alert] if "fires" in one)
    test = {
        "interval": scenario.get("interval", "15s"),
        "input_series": series_of(scenario),
        "alert_rule_test": [{"eval_time": scenario["fires"][-1], "alertname": alert, "exp_alerts": []}],
    }
    done = promtool("test", "rules", *promtool_files(tmp_path, [test], only(alert, GROUPS)))
    text = (done.stdout + done.stderr).partition("got:")[2]
    assert 'summary="' in text
    assert not re.search(r"\{\{|<no value>|error expanding|\(\)|  on |NaN", text), text


@each_alert
def test_every_alert_says_what_it_is_and_where_to_read_on(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("critical", "warning", "info", "none")
    assert {"summary", "description", "runbook_url", "dashboard_url"} == set(alert["annotations"])
    page, _, anchor = alert["annotations"]["runbook_url"].partition("#")
    assert page.endswith("/docs/runbook")
    for text in ("summary", "description"):
        assert re.search(r"[.)}]$", alert["annotations"][text])
    sections = {
        heading.lower(): text for heading, text in re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", RUNBOOK, re.M | re.S)
    }
    assert anchor == alert["alert"].lower()
    for part in ("Means", "At risk", "Look", "do"):
        assert part.lower() in sections[anchor].lower()


def test_the_runbook_has_no_section_of_an_alert_that_is_gone() -> None:
    assert sorted(re.findall(r"^## (\w+)$", RUNBOOK, re.M)) == NAMES


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The metrics of a service with traffic, on a document of Headroom, because only Headroom records some amounts."""
    store_path = tmp_path_factory.mktemp("exported") / "proxy_savings.json"
    shutil.copy(DATA / "headroom" / "v6" / "proxy_savings.json", store_path)
    HeadroomFiles(store_path.parent).flush()
    headroom = {"HEADROOM_WORKSPACE_DIR": str(store_path.parent / ".headroom")}
    with running("serve", "--store", str(store_path), "--enable-drill", "--discover", env=headroom) as service:
        saving = {"model": "m", "provider": "p", "project": "x", "agent": "a", "source": "s", "tokens_saved": 7}
        assert service.post(saving)[0] == 200
        assert service.post({"tokens_saved": "x"})[0] == 422
        assert run_cli("drill", "dir-fsync", "--seconds", "1", "--store", str(store_path)).returncode == 0
        eventually(lambda: 'savings_source_readable{source="headroom"}' in service.metrics(), "the source")
        eventually(lambda: service.metrics()['savings_fsync_failures_total{target="directory"}'], "the drill")
        status, text = service.get("/metrics")
    assert status == 200
    (store_path.parent / "token").write_text("token")
    config = store_path.with_name("web.yml")
    config.write_text("authorization: {credentials_file: token}")
    with running("watch", str(store_path), "--web.config.file", str(config)) as service:
        watched = service.get("/metrics", {"Authorization": "Bearer token"})[1]
    further = [line for line in watched.splitlines() if "savings_watched_file" in line or "savings_web_config" in line]
    return text + "\n".join([*further, ""])


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
    # The package, a field of a record, one of the totals, names of Headroom, and the callback for LiteLLM.
    others = {"savings_exporter", "savings_usd", "savings_percent", "savings_events", "savings_tracker"}
    others |= {"savings_logger"}
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
        expr = re.sub(r"\[[^\]]*\]", "", rule["expr"])
        for name in re.findall(r"[a-z_]+:[a-z0-9_:]+", expr):
            assert name in recorded, rule
        plain = re.sub(r"[a-z_]+:[a-z0-9_:]+|\"[^\"]*\"", "", expr)
        for name in re.findall(r"\b(?:savings|process)_\w+", plain):
            assert re.sub(r"_(bucket|count|sum)$", "", name) in there, rule


@uses_promtool
@pytest.mark.parametrize("situation", SITUATIONS)
def test_no_alert_when_healthy(situation: str, exported: str, tmp_path: Path) -> None:
    targets = SITUATIONS[situation]
    test = {
        "interval": f"{SECONDS}s",
        "input_series": [*MONITORING, *(series for target in targets for series in target.series(exported))],
        "promql_expr_test": [
            {
                "expr": 'sum by (alertname) (count_over_time(ALERTS{alertstate="firing", alertname!="Watchdog"}[1d]))',
                "eval_time": f"{targets[0].scrapes * SECONDS}s",
                "exp_samples": [],
            }
        ],
    }
    passes("test", "rules", *promtool_files(tmp_path, [test], GROUPS))
