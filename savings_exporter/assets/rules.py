"""The rules as files for Prometheus."""

from __future__ import annotations

from typing import Any

import yaml

from savings_exporter.assets import alerts, recording
from savings_exporter.assets.settings import RuleSettings

_GENERATED = "# Made by savings-exporter assets. Change its settings, not this file.\n"


def rule_files(settings: RuleSettings) -> dict[str, str]:
    """The rule files, by their paths below the directory of Prometheus's configuration."""
    contents = {
        "rules/recording.yml": recording.groups(settings),
        "rules/alerts.yml": alerts.groups(settings),
        "optional/stopped_arriving.yml": alerts.optional_groups(settings),
    }
    return {
        path: _GENERATED + yaml.dump({"groups": groups}, Dumper=_Dumper, sort_keys=False, width=1000)
        for path, groups in contents.items()
    }


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as a block, as people write rules."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> Any:  # noqa: ARG002
        return super().increase_indent(flow, indentless=False)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
