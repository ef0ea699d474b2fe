"""What users change in the rules: which exporters they select, thresholds, objectives and addresses."""

from __future__ import annotations

import re

import msgspec

from savings_exporter.errors import SettingsError
from savings_exporter.telemetry.counters import LATENCY_BOUNDS

_MATCHERS = re.compile(r'\s*(\w+\s*(=|!=|=~|!~)\s*"(\\.|[^"\\])*"\s*(,\s*|$))*')


class RuleSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings of the rules. The file that ``savings-exporter assets --settings`` reads has the same fields.

    Attributes:
        job: the job under which Prometheus scrapes the exporters.
        selector: further label matchers for every metric of an exporter, such as ``namespace="llm"``.
        monitoring_jobs: the jobs of the monitoring itself, whose targets should be up.
        runbook_url: the address of the runbook. The exporters serve it at ``/docs/runbook``.
        dashboard_url: the address of the dashboard *Savings durability* in Grafana.
        objective: the share of commits, and of saves, that should be faster than the two following times.
        commit_seconds: the objective for a commit; a bucket's bound of ``savings_commit_duration_seconds``.
        save_seconds: the objective for a save; a bucket's bound of ``savings_save_duration_seconds``.
        latency_events: the least number of commits or saves that make a latency alert.
        pending_records: so many pending records are a backlog.
        free_bytes: less free space of a store's file system is an alert.
        free_inodes: fewer free inodes of it are an alert.
        refused_requests: so many refused requests to record savings within 10 minutes are no alert.
        stale_hours: a watched file whose newest record is older is an alert.
        idle_hours: SavingsStoppedArriving fires when no saving arrives for longer.
    """

    job: str = "savings-exporter"
    selector: str = ""
    monitoring_jobs: tuple[str, ...] = ("prometheus", "alertmanager", "grafana", "tempo")
    runbook_url: str = "http://localhost:9478/docs/runbook"
    dashboard_url: str = "http://localhost:3000/d/savings-exporter-durability"
    objective: float = 0.99
    commit_seconds: float = 0.1
    save_seconds: float = 1.0
    latency_events: int = 20
    pending_records: int = 1000
    free_bytes: int = 100 * 1024 * 1024
    free_inodes: int = 1000
    refused_requests: int = 0
    stale_hours: int = 72
    idle_hours: int = 6

    def checked(self) -> RuleSettings:
        """These settings.

        Raises:
            SettingsError: a value makes no rule.
        """
        if not 0 < self.objective < 1:
            raise SettingsError(f"objective must be more than 0 and less than 1, not {self.objective:g}")
        if not _MATCHERS.fullmatch(self.selector):
            raise SettingsError(f'selector must be label matchers such as namespace="llm", not {self.selector}')
        if not self.job:
            raise SettingsError("job must not be empty: it selects the exporters")
        for name in ("runbook_url", "dashboard_url"):
            if not getattr(self, name).startswith(("http://", "https://")):
                raise SettingsError(f"{name} must begin with http:// or https://, unlike {getattr(self, name)!r}")
        if re.search(r"[#\s]", self.runbook_url):
            raise SettingsError(f"runbook_url must not contain # or spaces, unlike {self.runbook_url!r}")
        for name in ("commit_seconds", "save_seconds"):
            if getattr(self, name) not in LATENCY_BOUNDS[:-1]:
                bounds = ", ".join(f"{bound:g}" for bound in LATENCY_BOUNDS[:-1])
                raise SettingsError(f"{name} must be a bucket's bound ({bounds}), not {getattr(self, name):g}")
        for name in ("stale_hours", "idle_hours", "latency_events"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1, not {getattr(self, name)}")
        return self
