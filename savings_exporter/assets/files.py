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
# What all queries of the dashboards select by.
_SELECTED = 'instance=~"$instance"'


def asset_files(settings: RuleSettings) -> dict[str, str]:
    """The contents of all files, by path: the rules for Prometheus and the dashboards for Grafana."""
    rules = {f"prometheus/{path}": text for path, text in rule_files(settings).items()}
    dashboards = {f"grafana/{name}": _dashboard(name, settings.selector) for name in _DASHBOARDS}
    return rules | dashboards


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
