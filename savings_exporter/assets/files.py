"""Everything that ``savings-exporter assets`` writes."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from savings_exporter import configfile
from savings_exporter.assets.rules import rule_files
from savings_exporter.assets.settings import RuleSettings
from savings_exporter.shipped import shipped

_DASHBOARDS = ("savings.json", "durability.json")
# What is copied as it is, by its place in the project.
_COPIED = {
    "alertmanager": "dashboards/alertmanager",
    "deploy": "deploy",
    "docs": "docs",
    "grafana/provisioning": "dashboards/grafana/provisioning",
    "prometheus/prometheus.yml": "dashboards/prometheus/prometheus.yml",
}
# What all queries of the dashboards select by.
_SELECTED = 'instance=~"$instance"'


def asset_files(settings: RuleSettings) -> dict[str, bytes]:
    """The contents of all files, by path: rules and configuration of Prometheus and Alertmanager, the dashboards for
    Grafana, the documents, and the files for deployment.
    """
    rules = {f"prometheus/{path}": text.encode() for path, text in rule_files(settings).items()}
    dashboards = {f"grafana/{name}": _dashboard(name, settings.selector).encode() for name in _DASHBOARDS}
    copied = {path: content for target, source in _COPIED.items() for path, content in _copied(target, source).items()}
    return rules | dashboards | copied


def read_settings(path: str | None, **changes: str | None) -> RuleSettings:
    """The settings of a YAML file, or the defaults, with those ``changes`` that are not None.

    Raises:
        SettingsError: the file cannot be read, or a value is wrong.
    """
    content = configfile.read_yaml(path) if path is not None else None
    settings = configfile.converted(path or "", content or {}, RuleSettings)
    given: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
    return msgspec.structs.replace(settings, **given).checked()


def _dashboard(name: str, selector: str) -> str:
    text = shipped(f"dashboards/grafana/{name}").read_text(encoding="utf-8")
    if not selector:
        return text
    return text.replace(json.dumps(_SELECTED)[1:-1], json.dumps(f"{_SELECTED}, {selector}")[1:-1])


def _copied(target: str, source: str) -> dict[str, bytes]:
    """A file, or all files of a directory, by their new paths."""
    path = shipped(source)
    if path.is_file():
        return {target: path.read_bytes()}
    files = (file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return {f"{target}/{file.relative_to(path).as_posix()}": file.read_bytes() for file in sorted(files)}
