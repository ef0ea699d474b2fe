"""Situations in which no alert may fire: the series that Prometheus would have stored in each of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from savings_exporter.storage.operation import FSYNC_TARGETS

SECONDS = 30
"""Between two scrapes. Two missed ones leave two samples in the shortest window of the rules, of two minutes."""

# A drill leaves them in another state for a while, and a record that was just sent.
_AT_REST = {
    "savings_drill_active": 0,
    "savings_last_dir_fsync_success": 1,
    "savings_records_pending": 0,
    "savings_tokens_pending": 0,
}
_SAMPLE = r"^(\w+)(?:\{(.*)\})? (\S+)$"
_WEEKS = 2_000_000
_OLD_FAILURES = 7


class Target(NamedTuple):
    """One target of Prometheus, and what becomes of it."""

    spells: tuple[tuple[str, int], ...]
    """In order: ``up``, ``down`` (the scrape fails) or ``gone`` (there is no target), and for how many scrapes."""
    pod: str = "a"
    restarts: bool = False
    """Whether it is a new process after it was down."""
    clock_ahead: int = 0
    """By how many seconds its clock is ahead."""
    traffic: int = 1
    """Records for each scrape."""

    @property
    def scrapes(self) -> int:
        return sum(scrapes for _state, scrapes in self.spells)

    def series(self, page: str) -> Iterator[dict[str, str]]:
        """promtool's series of everything on a page of metrics, and of the target itself."""
        found = {(name, labels): float(value) for name, labels, value in re.findall(_SAMPLE, page, re.M)}
        ages = {("savings_last_fsync_failure_age_seconds", f'target="{target}"'): 0.0 for target in FSYNC_TARGETS}
        for (name, labels), value in {**found, **ages, ("up", ""): 1.0}.items():
            yield self._series(name, labels, value)

    def _series(self, name: str, labels: str, value: float) -> dict[str, str]:
        parts: list[str] = []
        begin = now = 0
        for state, scrapes in self.spells:
            if state == "up":
                first, growth = self._line(name, labels, value, now, begin)
                parts.append(f"{first:.6f}+{growth}x{scrapes - 1}")
            elif state == "down" and name == "up":
                parts.append(f"0x{scrapes - 1}")
            else:
                parts.append(f"stale _x{scrapes - 1}")
            now += scrapes
            if state != "up" and self.restarts:
                begin = now
        own = f'{labels}{"," if labels else ""}job="savings-exporter",instance="{self.pod}:9478",pod="{self.pod}"'
        return {"series": f"{name}{{{own}}}", "values": " ".join(parts)}

    def _line(self, name: str, labels: str, value: float, now: int, begin: int) -> tuple[float, int]:
        """A series' value at the scrape ``now`` of a process that began at the scrape ``begin``, and its growth."""
        if name == "savings_last_fsync_failure_age_seconds":
            return _WEEKS + now * SECONDS, SECONDS
        if name == "process_start_time_seconds":
            return begin * SECONDS - 1 + self.clock_ahead, 0
        if name.endswith("_timestamp_seconds"):
            return 1 + now * SECONDS * self.traffic + self.clock_ahead, SECONDS * self.traffic
        of_process = name.startswith(("savings_http_", "process_"))
        if re.search(r"_(failures|recoveries)_total$", name) or re.search(r'code="[45]', labels):
            return (0 if of_process and begin else value + _OLD_FAILURES), 0
        if re.search(r"_(total|bucket|count|sum)$", name):
            # Every bucket grows alike: all commits, saves and requests are fast.
            return (0 if of_process and begin else value) + (now - begin * of_process) * self.traffic, self.traffic
        return _AT_REST.get(name, value), 0


# Longer than an hour, the longest time that an alert looks back at something healthy.
_HOUR = ("up", 3700 // SECONDS)

# By what happens in them.
SITUATIONS = {
    "no-traffic": (Target((_HOUR,), traffic=0),),
    "exporter-restarts": (Target((_HOUR, ("down", 2), _HOUR), restarts=True),),
    "rollout": (
        Target((_HOUR, ("up", 4), ("down", 4), ("gone", _HOUR[1]))),
        Target((("gone", _HOUR[1]), ("down", 2), ("up", 6 + _HOUR[1])), pod="b"),
    ),
    "two-scrapes-missed": (Target((_HOUR, ("down", 2), _HOUR)),),
    "new-prometheus": (Target((_HOUR,)),),
    "clock-two-hours-ahead": (Target((_HOUR,), clock_ahead=7200),),
    "clock-two-hours-behind": (Target((_HOUR,), clock_ahead=-7200),),
}
# What else Prometheus stores: it has failed long ago, and is well.
MONITORING = [
    {"series": f'{name}{{job="prometheus", instance="p:9090"{labels}}}', "values": f"{value}x{3 * _HOUR[1]}"}
    for name, labels, value in (
        ("up", "", 1),
        ("prometheus_rule_evaluation_failures_total", ', rule_group="/rules/alerts.yml;savings-alerts"', 7),
        ("prometheus_notifications_errors_total", "", 7),
        ("prometheus_notifications_dropped_total", "", 7),
        ("alertmanager_notifications_failed_total", "", 7),
    )
]
