"""What ``savings-exporter assets`` writes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
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
    assert (done.returncode, done.stderr) == (0, "")
    assert [Path(line).is_file() for line in done.stdout.splitlines()] == [True] * 5
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


def test_installed_package_has_the_documents_and_dashboards(tmp_path: Path) -> None:
    """A wheel, unpacked where no checkout is."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(tmp_path / "site")
    done = run_cli("assets", "--output", "out", cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "site")})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/grafana/savings.json").read_text() == (ROOT / "dashboards/grafana/savings.json").read_text()
    assert (tmp_path / "site/savings_exporter/docs/runbook.md").read_text() == (ROOT / "docs/runbook.md").read_text()
