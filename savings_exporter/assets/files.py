"""Everything that ``savings-exporter assets`` writes."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import yaml

from savings_exporter.assets.rules import rule_files
from savings_exporter.assets.settings import RuleSettings
from savings_exporter.errors import SettingsError
from savings_exporter.shipped import shipped
from savings_exporter.wording import WrongValue

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
    settings = RuleSettings()
    if path is not None:
        try:
            with open(path, encoding="utf-8") as file:
                settings = msgspec.convert(yaml.safe_load(file) or {}, RuleSettings)
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        except yaml.YAMLError as error:
            raise SettingsError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
        except msgspec.ValidationError as error:
            raise SettingsError(f"{path}: {WrongValue(error, RuleSettings).text}") from None
    given: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
    return msgspec.structs.replace(settings, **given).checked()


def _dashboard(name: str, selector: str) -> str:
    text = shipped(f"dashboards/grafana/{name}").read_text(encoding="utf-8")
    if not selector:
        return text
    return text.replace(json.dumps(_SELECTED)[1:-1], json.dumps(f"{_SELECTED}, {selector}")[1:-1])
