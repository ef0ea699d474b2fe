"""Tests of the rules by Prometheus's own promtool: what a scenario in tests/rules/ says becomes a promtool test."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.support.paths import ROOT


def _scenarios() -> dict[str, list[dict[str, Any]]]:
    """The scenarios of each alert. One may have those of an alert ``like`` it, with other names of series."""
    content: dict[str, Any] = yaml.safe_load((ROOT / "tests/rules/alerts.yml").read_text("utf-8"))

    def renamed(name: str, instead: Mapping[str, str]) -> str:
        for old, new in instead.items():
            name = name.replace(old, new)
        return name

    for alert, listed in content.items():
        if "like" in listed:
            content[alert] = [
                {**one, "series": {renamed(name, listed["instead"]): text for name, text in one["series"].items()}}
                for one in content[listed["like"]]
            ]
    return content


SCENARIOS = _scenarios()
RECORDING: list[dict[str, Any]] = yaml.safe_load((ROOT / "tests/rules/recording_test.yml").read_text("utf-8"))["tests"]
"""promtool's tests of the recording rules."""

FOLDER = ROOT / "dashboards" / "prometheus"
RULES = [*sorted(FOLDER.glob("rules/*.yml")), *sorted(FOLDER.glob("optional/*.yml"))]

_TARGET = 'instance="a:9478", job="savings-exporter"'


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run promtool. Its output is in stdout and stderr."""
    return subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)


def groups_of(files: Iterable[Path]) -> list[dict[str, Any]]:
    """The groups of rule files."""
    return [group for path in files for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]]


def only(alert: str, groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The groups with an alert and the rules that it reads, and nothing else, because others only take time."""
    rules = [rule for group in groups for rule in group["rules"]]
    kept = [rule for rule in rules if rule.get("alert") == alert]
    for rule in kept:  # grows meanwhile: a rule that is read may read another one
        kept += [other for other in rules if other.get("record", "no name") in str(rule) and other not in kept]
    left = [{**group, "rules": [rule for rule in group["rules"] if rule in kept]} for group in groups]
    return [group for group in left if group["rules"]]


def series_of(scenario: Mapping[str, Any]) -> list[dict[str, str]]:
    """The input of a scenario. A series without a job is one of job savings-exporter and instance a:9478."""
    return [{"series": _with_target(name), "values": values} for name, values in scenario["series"].items()]


def firing(alert: str, labels: str = "") -> str:
    """How many alerts of a name fire, of those with the ``labels``."""
    return f'count(ALERTS{{alertname="{alert}", alertstate="firing", {labels}}})'


def promtool_tests(alert: str, scenarios: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """promtool's tests for the scenarios of an alert."""
    return [
        {
            "name": f"{alert}: {scenario['case']}",
            "interval": scenario.get("interval", "15s"),
            "input_series": series_of(scenario),
            "promql_expr_test": [
                *(_expected(alert, scenario, time, scenario.get("alerts", 1)) for time in scenario.get("fires", ())),
                *(_expected(alert, scenario, time, 0) for time in scenario.get("quiet", ())),
            ],
        }
        for scenario in scenarios
    ]


def promtool_files(
    directory: Path, tests: list[dict[str, Any]], groups: Iterable[Mapping[str, Any]], order: int = 1
) -> list[Path]:
    """Files for ``promtool test rules``: one for each interval of the tests, at which rules are also evaluated.

    Prometheus evaluates its groups side by side, and promtool in a random order unless the file names one: with
    ``order`` 1 in that of ``groups``, with -1 in reverse.
    """
    rules = directory / "rules.yml"
    rules.write_text(yaml.safe_dump({"groups": list(groups)}), encoding="utf-8")
    written = []
    for interval in sorted({test["interval"] for test in tests}):
        content = {
            "rule_files": [str(rules)],
            "evaluation_interval": interval,
            "group_eval_order": [group["name"] for group in groups][::order],
            "tests": [test for test in tests if test["interval"] == interval],
        }
        path = directory / f"test-{interval}.yml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        written.append(path)
    return written


def _expected(alert: str, scenario: Mapping[str, Any], time: str, number: int) -> dict[str, Any]:
    samples = [{"labels": "{}", "value": number}] if number else []
    return {"expr": firing(alert, scenario.get("labels", "")), "eval_time": time, "exp_samples": samples}


def _with_target(name: str) -> str:
    if re.search(r'\bjob="', name):
        return name
    metric, _, labels = name.rstrip("}").partition("{")
    return f"{metric}{{{labels + ', ' if labels else ''}{_TARGET}}}"
