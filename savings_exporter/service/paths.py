"""The paths of the service that other modules and the command line name, too."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

SAVINGS_PATH = "/v1/savings"
HISTORY_PATH = "/v1/history"
OTLP_PATH = "/v1/metrics"
HEALTHY_PATH = "/-/healthy"
READY_PATH = "/-/ready"
DOCUMENTS_PATH = "/docs/"
OPENAPI_PATH = "/openapi.json"
ICON_PATH = "/favicon.ico"
"""Browsers ask for it also when they show an answer that is no page, such as the metrics. It is an SVG."""


def route_path(scope: MutableMapping[str, Any]) -> str:
    """The path of a request within the application, which may be mounted under a prefix."""
    path: str = scope["path"]
    prefix = scope.get("root_path")
    return path.removeprefix(prefix) if prefix else path
