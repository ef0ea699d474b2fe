"""Generate the dashboards and the pictures of their layout, for ``make dashboards``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.cog.encoder import JSONEncoder

import durability
import savings
from pictures import picture

ROOT = Path(__file__).resolve().parents[2]


def built() -> dict[Path, str]:
    """The contents of every generated file, by its path in the repository."""
    dashboards = {
        "savings": savings.build(other=(durability.TITLE, durability.UID)),
        "durability": durability.build(other=(savings.TITLE, savings.UID)),
    }
    files = {}
    for name, dashboard in dashboards.items():
        text = _json(dashboard)
        files[Path("dashboards", "grafana", f"{name}.json")] = text
        files[Path("docs", "images", f"{name}-dashboard.svg")] = picture(json.loads(text))
    return files


def _json(dashboard: Any) -> str:
    return json.dumps(dashboard, cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    for path, text in built().items():
        target = ROOT / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
