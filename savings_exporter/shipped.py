"""Files of the project that the package ships: documents and dashboards."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def shipped(path: str) -> Path:
    """A file by its path in the project. An installed package has it inside, a checkout beside the package."""
    inside = _PACKAGE / path
    return inside if inside.exists() else _PACKAGE.parent / path
