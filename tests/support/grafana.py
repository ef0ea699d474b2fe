"""Read Grafana's dashboards for the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.paths import ROOT

DASHBOARDS = tuple(ROOT / "dashboards" / "grafana" / f"{name}.json" for name in ("savings", "durability"))


class PanelQuery(NamedTuple):
    """A query with its variables replaced, and its panel."""

    dashboard: str
    panel: str
    query: str


def panels(path: Path) -> list[dict[str, Any]]:
    """All panels of a dashboard, including rows."""
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["panels"]
    return found


def panel_queries(path: Path) -> list[PanelQuery]:
    """Every query of a dashboard."""
    return [
        PanelQuery(path.stem, panel["title"], target["expr"])
        for panel in panels(path)
        for target in panel.get("targets", ())
    ]
