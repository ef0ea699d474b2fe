"""What ``savings-exporter assets`` writes."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.paths import ROOT
from tests.support.rules import SCENARIOS, groups_of, only, promtool, promtool_files, promtool_tests, series_of
from tests.support.service import run_cli

SETTINGS = """
job: llm-savings
selector: namespace="llm"
runbook_url: https://runbooks.example/savings
dashboard_url: https://grafana.example/d/x
save_seconds: 2.5
pending_records: 50
"""


def written(directory: Path, *arguments: str) -> Path:
    done = run_cli("assets", "--output", str(directory), *arguments)
    assert (done.returncode, done.stderr) == (0, f"{directory}/docs/deploy.md says how to use these files\n")
    files = {str(path) for path in directory.rglob("*") if path.is_file()}
    assert set(done.stdout.splitlines()) == files
    return directory


@pytest.mark.needs("prometheus")
def test_rules_follow_the_settings(tmp_path: Path) -> None:
    settings = tmp_path / "settings.yml"
    settings.write_text(SETTINGS)
    rules = written(tmp_path / "out", "--settings", str(settings), "--job", "other") / "prometheus/rules"
    text = (rules / "alerts.yml").read_text()
    assert 'up{job="other",namespace="llm"}' in text
    assert "llm-savings" not in text
    assert "https://runbooks.example/savings#savingsexporterdown" in text
    assert "dashboard_url: https://grafana.example/d/x" in text
    assert "> 2.5" in text
    assert 'savings_records_pending{namespace="llm"}[2m]) > 50' in text
    assert 'le="2.5",namespace="llm"' in (rules / "recording.yml").read_text()
    for path in rules.glob("*.yml"):
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                selected = re.findall(r"(?<![:\w])((?:savings|process)_\w+)(?![\w:])({[^}]*})?", rule["expr"])
                assert [name for name, matchers in selected if 'namespace="llm"' not in matchers] == []
    done = promtool("check", "rules", *rules.glob("*.yml"))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.needs("prometheus")
@pytest.mark.parametrize(
    "alert", ["SavingsDirectoryFsyncFailing", "SavingsStoreGone", "SavingsLifetimeTotalWentBackwards"]
)
def test_rules_with_a_selector_fire_for_its_exporters_only(tmp_path: Path, alert: str) -> None:
    rules = written(tmp_path, "--selector", 'namespace="llm"') / "prometheus/rules"

    def selected(scenario: dict[str, Any], namespace: str, **changes: Any) -> dict[str, Any]:
        series = {f'{one["series"][:-1]}, namespace="{namespace}"}}': one["values"] for one in series_of(scenario)}
        return {**scenario, "series": series, **changes}

    scenarios = [scenario for scenario in SCENARIOS[alert] if "drill" not in scenario]
    ours = [selected(scenario, "llm") for scenario in scenarios]
    others = [
        selected(scenario, "other", fires=[], quiet=[*scenario.get("quiet", ()), *scenario.get("fires", ())])
        for scenario in scenarios
    ]
    for tests in (promtool_tests(alert, ours), promtool_tests(alert, others)):
        done = promtool("test", "rules", *promtool_files(tmp_path, tests, only(alert, groups_of(rules.glob("*.yml")))))
        assert done.returncode == 0, done.stdout + done.stderr


def test_dashboards_follow_the_selector(tmp_path: Path) -> None:
    plain, selected = written(tmp_path / "a"), written(tmp_path / "b", "--selector", 'namespace="llm"')
    for name in ("savings.json", "durability.json"):
        shipped = (ROOT / "dashboards/grafana" / name).read_text()
        assert (plain / "grafana" / name).read_text() == shipped
        dashboard = json.loads((selected / "grafana" / name).read_text())
        queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
        assert [query for query in queries if 'namespace="llm"' not in query and "ALERTS" not in query] == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("objective: 1.5", "objective must be more than 0 and less than 1"),
        ('job: ""', "job must not be empty"),
        ("runbook_url: wiki/runbook", "runbook_url must begin with http:// or https://, unlike 'wiki/runbook'"),
        ("runbook_url: https://wiki.example/#top", "runbook_url must not contain # or spaces"),
        ("save_seconds: 3", "save_seconds must be a bucket's bound"),
        ("selector: namespace=llm", 'selector must be label matchers such as namespace="llm", not namespace=llm'),
        ("idle_hours: 0", "idle_hours must be at least 1"),
        ("colour: red", "an unknown field colour; the fields are job, selector"),
        ("job: 5", "job must be text, not an integer"),
        ("[", "is not YAML"),
    ],
)
def test_wrong_setting_gets_one_line(tmp_path: Path, content: str, said: str) -> None:
    settings = tmp_path / "settings.yml"
    settings.write_text(content)
    done = run_cli("assets", "--output", str(tmp_path / "out"), "--settings", str(settings))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert said in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_the_project_ships_is_written(tmp_path: Path) -> None:
    """The documents with their pictures, the files for deployment, the configuration around rules and dashboards."""
    out = written(tmp_path / "out")
    files = [path for folder in ("docs", "deploy") for path in (ROOT / folder).rglob("*.*") if path.is_file()]
    copied = {path.relative_to(ROOT).as_posix(): path for path in files if path.suffix != ".pyc"}
    copied |= {
        "alertmanager/alertmanager.yml": ROOT / "dashboards/alertmanager/alertmanager.yml",
        "prometheus/prometheus.yml": ROOT / "dashboards/prometheus/prometheus.yml",
        "grafana/provisioning/dashboards/dashboards.yml": ROOT
        / "dashboards/grafana/provisioning/dashboards/dashboards.yml",
    }
    assert {"docs/runbook.md", "deploy/systemd/savings-exporter.service"} <= copied.keys()
    for target, source in copied.items():
        assert (out / target).read_bytes() == source.read_bytes()


def test_address_of_the_runbook_from_the_environment(tmp_path: Path) -> None:
    settings = tmp_path / "settings.yml"
    settings.write_text(SETTINGS)
    variable = {"SAVINGS_EXPORTER_RUNBOOK_URL": "https://savings.example/docs/runbook"}
    done = run_cli("assets", "--output", str(tmp_path / "out"), "--settings", str(settings), env=variable)
    assert done.returncode == 0, done.stderr
    links = re.findall(r"runbook_url: (.*)", (tmp_path / "out/prometheus/rules/alerts.yml").read_text())
    assert links
    assert [link for link in links if not link.startswith("https://savings.example/docs/runbook#")] == []


def test_what_somebody_has_edited_is_kept(tmp_path: Path) -> None:
    out = written(tmp_path / "out")
    edited, removed = out / "alertmanager/alertmanager.yml", out / "prometheus/rules/alerts.yml"
    edited.write_text("receivers: [mine]")
    removed.unlink()
    done = run_cli("assets", "--output", str(out))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert f"{edited}: has other contents, so nothing was written" in done.stderr
    assert edited.read_text() == "receivers: [mine]"
    assert not removed.exists()
    written(out, "--force")
    assert edited.read_bytes() == (ROOT / "dashboards/alertmanager/alertmanager.yml").read_bytes()
    written(out)  # nothing differs


@pytest.mark.parametrize("obstacle", ["file", "directory", "pipe"])
def test_what_is_in_the_way_gets_one_line(tmp_path: Path, obstacle: str) -> None:
    out = tmp_path / "out"
    target = out / "prometheus/prometheus.yml"
    if obstacle == "file":
        out.write_text("a file")
    elif obstacle == "directory":
        target.mkdir(parents=True)
    else:
        target.parent.mkdir(parents=True)
        os.mkfifo(target)
    done = run_cli("assets", "--output", str(out))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert str(out) in done.stderr
