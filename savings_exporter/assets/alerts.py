"""The alerting rules. docs/runbook.md has a section for each alert."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from savings_exporter.assets.promql import Metrics, indented
from savings_exporter.assets.settings import RuleSettings

CRITICAL, WARNING, INFO, NONE = "critical", "warning", "info", "none"

# Factor over the rate that uses up the error budget of 30 days in 30 days, long and short window, severity: the values
# of the Site Reliability Workbook, chapter 5.
_BURNS = ((14.4, "1h", "5m", WARNING), (6.0, "6h", "30m", WARNING), (1.0, "3d", "6h", INFO))
# So many slow commits or saves in the long window at least: two slow ones are not a trend.
_LEAST_SLOW = 5


class Alert(NamedTuple):
    """One alerting rule."""

    name: str
    expr: str
    severity: str
    summary: str
    description: str
    hold: str = ""
    """How long the expression must hold, as Prometheus's ``for``."""
    drills: tuple[str, ...] = ()
    """The fire drills that make it fire."""
    labels: tuple[tuple[str, str], ...] = ()

    def rule(self, settings: RuleSettings) -> dict[str, Any]:
        """The rule as a group of a rules file holds it."""
        rule: dict[str, Any] = {"alert": self.name, "expr": self.expr}
        if self.hold:
            rule["for"] = self.hold
        rule["labels"] = {"severity": self.severity, **dict(self.labels)}
        rule["annotations"] = {
            "summary": self.summary,
            "description": self.description + _drill_sentence(self.drills),
            "runbook_url": f"{settings.runbook_url}#{self.name.lower()}",
            "dashboard_url": settings.dashboard_url,
        }
        return rule


def groups(settings: RuleSettings) -> list[dict[str, Any]]:
    """The groups of the alerts that are on by default."""
    metrics = Metrics(settings)
    drills = metrics.with_store(f"max_over_time({metrics.of('savings_drill_active', window='10m')})", "drill")
    # In the group of the alerts, because the rules of one group are evaluated in order.
    recorded = {
        "record": "store_drill:savings_drill_active:max10m",
        "expr": f"max by (store, drill) (\n{indented(drills)}\n)",
    }
    alerts = (*_syncs(metrics), *_store(metrics, settings), *_latency(metrics, settings), *_totals(metrics))
    files = (*_watched(metrics, settings), *_sources(metrics))
    exporters = (*_exporters(metrics, settings), *_space(metrics, settings), *files)
    return [
        {"name": "savings-alerts", "rules": [recorded, *(alert.rule(settings) for alert in alerts)]},
        {"name": "savings-exporters", "rules": [alert.rule(settings) for alert in exporters]},
        {"name": "savings-monitoring", "rules": [alert.rule(settings) for alert in _monitoring(settings)]},
    ]


def optional_groups(settings: RuleSettings) -> list[dict[str, Any]]:
    """The group of the alert that is off by default: a store that is idle at night or at weekends would fire it."""
    metrics, hours = Metrics(settings), settings.idle_hours
    requests, newest = "savings_requests_total", metrics.of("savings_last_record_timestamp_seconds")
    arrived = f"sum without (provider, model) (increase({metrics.of(requests, window=f'{hours}h')}))"
    before = f"sum without (provider, model) (increase({metrics.of(requests, window=f'2d offset {hours}h')}))"
    alert = Alert(
        "SavingsStoppedArriving",
        # The newest record is old by its own time, none has arrived either, and some arrived in the two days before.
        f"(\n  (time() - {newest}) > {hours} * 3600\n  unless {arrived} > 0\n)\nand {before} > 0",
        INFO,
        "No savings have arrived at {{ $labels.instance }} for {{ $value | humanizeDuration }}.",
        "Savings arrived here in the two days before. The programs that send them may have stopped, or may send them "
        "elsewhere. What was recorded is safe.",
        hold="5m",
    )
    return [{"name": "savings-arrival", "rules": [alert.rule(settings)]}]


def _syncs(metrics: Metrics) -> Iterator[Alert]:
    yield Alert(
        "SavingsDirectoryFsyncFailing",
        f"{_failed_sync(metrics, 'directory')}\nor {metrics.of('savings_last_dir_fsync_success')} == 0",
        CRITICAL,
        "A directory fsync failed on {{ $labels.instance }}.",
        "A power loss can undo the latest save of the document. Acknowledged records are in the journals and are not "
        "at risk. savings_records_pending counts the records that are not acknowledged. If it is above 0, the exporter "
        "could not create a journal segment, and these records are lost if their process ends.",
        drills=("dir-fsync",),
    )
    yield Alert(
        "SavingsFileFsyncFailing",
        _failed_sync(metrics, "file"),
        CRITICAL,
        "A file fsync failed on {{ $labels.instance }}.",
        "The disk did not accept a new document. Acknowledged records are in the journals and are not at risk. If "
        "savings_records_pending is above 0, commits fail as well, and these records are lost if the process ends.",
        drills=("file-fsync",),
    )
    yield Alert(
        "SavingsJournalFsyncFailing",
        _failed_sync(metrics, "journal"),
        CRITICAL,
        "A journal fsync failed on {{ $labels.instance }}.",
        "The disk did not accept a commit or a new journal segment. No acknowledged record is lost. The records of the "
        "commit are pending (savings_records_pending) until a retry in another segment succeeds.",
        drills=("journal-fsync",),
    )


def _failed_sync(metrics: Metrics, target: str) -> str:
    """A sync failed within five minutes: by the counters or, for a failure before the first scrape, by its age."""
    label = f'target="{target}"'
    counted = f"instance_target:savings_fsync_failures:increase5m{{{label}}}"
    age = metrics.of("savings_last_fsync_failure_age_seconds", label)
    return f"max without (target) ({counted} > 0 or {age} < 300)"


def _store(metrics: Metrics, settings: RuleSettings) -> Iterator[Alert]:
    pending = f"min_over_time({metrics.of('savings_records_pending', window='2m')})"
    saved = metrics.of("savings_last_save_success_timestamp_seconds", window="2m")
    yield Alert(
        "SavingsStoreUnhealthy",
        # A missed scrape must not hide it.
        f"max_over_time({metrics.of('savings_store_healthy', window='2m')}) == 0",
        CRITICAL,
        "The store of {{ $labels.instance }} has not been able to commit or to save for two minutes.",
        "If savings_records_pending is above 0, commits fail: these records are in memory only and are lost if the "
        "process ends. If it is 0, only saves of the document fail: all acknowledged records are in the journals.",
        hold="1m",
    )
    for name, what, consequence, drills in (
        (
            "commit",
            "Commits",
            "The records of a failed commit are pending (savings_records_pending) until a retry succeeds.",
            ("journal-fsync",),
        ),
        (
            "save",
            "Saves",
            "Committed records are durable in the journals, which grow until a save succeeds.",
            ("dir-fsync", "file-fsync"),
        ),
    ):
        failures = f"savings_{name}_failures_total"
        yield Alert(
            f"Savings{what}Failing",
            # The window is short, so that the alert ends two minutes after the last failure.
            f"increase({metrics.of(failures, window='2m')}) > 0",
            WARNING,
            what + " fail on {{ $labels.instance }} at the step {{ $labels.step }} with {{ $labels.error }}.",
            f"{what} have failed repeatedly at this step for five minutes. {consequence}",
            hold="5m",
            drills=drills,
        )
    yield Alert(
        "SavingsSavesStale",
        # Whether the time changes, not how old it is: the clock of the exporter may be wrong.
        f"{pending} > 0\nand changes({saved}) == 0",
        CRITICAL,
        "{{ $value }} records of {{ $labels.instance }} are pending and no save succeeds.",
        "For more than two minutes records have been pending and no save of the document has succeeded: the disk may "
        "hang. Pending records are in memory only and are lost if the process ends.",
        hold="2m",
    )
    yield Alert(
        "SavingsPendingBacklog",
        f"{pending} > {settings.pending_records}",
        WARNING,
        "{{ $value }} records are pending on {{ $labels.instance }}.",
        f"For five minutes more than {settings.pending_records:,} records have been pending: the disk is slower than "
        "the traffic, or it is failing. Pending records are in memory only and are lost if the process ends.",
        hold="3m",
    )
    yield Alert(
        "SavingsDirectoryFsyncUnsupported",
        f"{metrics.of('savings_dir_fsync_supported')} == 0",
        INFO,
        "The file system under {{ $labels.instance }} has no directory fsync.",
        "A power loss can undo a save of the document here without any error. Records that are in the journals are not "
        "affected.",
    )
    yield Alert(
        "SavingsRecovered",
        "instance_kind:savings_recoveries:increase1h > 0",
        WARNING,
        "{{ $labels.instance }} repaired its store: {{ $labels.kind }}.",
        "The store was damaged, or a write was interrupted, and it was repaired when it was opened. No acknowledged "
        "record is lost. Damaged files are kept beside the store.",
    )


def _latency(metrics: Metrics, settings: RuleSettings) -> Iterator[Alert]:
    budget = 1 - settings.objective
    for what, title, seconds, waiting, drills in (
        ("save", "Save", settings.save_seconds, "records are committed to the journals while a save runs", True),
        ("commit", "Commit", settings.commit_seconds, "callers that wait for a receipt wait that long", False),
    ):
        histogram = f"savings_{what}_duration_seconds"
        kinds = ("save-latency",) if drills else ()
        yield Alert(
            f"Savings{title}LatencyHigh",
            f"histogram_quantile(0.99, rate({metrics.of(f'{histogram}_bucket', window='2m')})) > {seconds:g}\n"
            f"and increase({metrics.of(f'{histogram}_count', window='5m')}) >= {settings.latency_events}",
            WARNING,
            f"1 % of the {what}s on {{{{ $labels.instance }}}} take {{{{ $value | humanizeDuration }}}} or longer.",
            f"For five minutes at least 1 % of the {what}s have taken longer than {seconds:g} s. Nothing is lost; "
            f"{waiting}.",
            hold="5m",
            drills=kinds,
        )
        for factor, long, short, severity in _BURNS:
            slow, count = f"instance:savings_{what}_slow:ratio_rate", metrics.of(f"{histogram}_count", window=long)
            limit = f"{factor:g} * {budget:g}"
            yield Alert(
                f"Savings{title}LatencyBudgetBurn",
                f"{slow}{long} > {limit}\nand {slow}{short} > {limit}\n"
                f"and increase({count}) >= {settings.latency_events}\n"
                f"and {slow}{long} * increase({count}) >= {_LEAST_SLOW}",
                severity,
                f"{{{{ $value | humanizePercentage }}}} of the {what}s of the last {long} on "
                f"{{{{ $labels.instance }}}} were slow.",
                f"The objective is that {100 * settings.objective:g} % of the {what}s take less than {seconds:g} s. At "
                f"this rate the error budget of 30 days is used up in {30 / factor:.0f} days. "
                f"Nothing is lost; {waiting}.",
                drills=kinds,
                labels=(("window", long),),
            )


def _totals(metrics: Metrics) -> Iterator[Alert]:
    up, info = metrics.of("up"), "savings_store_info"
    shown = f"group by (job, store) (last_over_time({metrics.of(info, window='10m')}))"
    # For an hour in all: not a store that was only tried.
    before = f"group by (job, store) (count_over_time({metrics.of(info, window='1d:5m')}) >= 12)"
    down = f"last_over_time({metrics.of(info, window='1d')}) * ignoring (store) group_left () ({up} == 0)"
    yield Alert(
        "SavingsLifetimeTotalWentBackwards",
        # By exporter, also when it was down for more than an hour; and by job, when no exporter of it is down.
        "resets(instance:savings_tokens_saved:sum[1h]) > 0\n"
        "or instance:savings_tokens_saved:sum < last_over_time(instance:savings_tokens_saved:sum[1d] offset 1h)\n"
        "or (\n"
        "  max_over_time(job:savings_tokens_saved:sum[10m]) < max_over_time(job:savings_tokens_saved:sum[1h])\n"
        f"  unless on (job) min_over_time({metrics.of('up', window='10m')}) == 0\n"
        ")",
        CRITICAL,
        "The lifetime total of {{ $labels.job }} {{ $labels.instance }} went backwards.",
        "The total is lower than it was within the last day. An exporter never lowers it: another store, an older "
        "backup, or an empty volume has taken the place of the store, or an exporter was removed.",
    )
    yield Alert(
        "SavingsStoreGone",
        # Not while an exporter that showed it cannot be scraped: that has its own alert.
        f"{before}\nunless on (job, store) {shown}\nunless on (job, store) group by (job, store) (\n  {down}\n)",
        CRITICAL,
        "The store {{ $labels.store }} of {{ $labels.job }} is shown by no exporter any more.",
        "An exporter showed this store for an hour or more within the last day, and none shows it now. Its "
        "volume may have been replaced by an empty one, or its exporter has vanished from Prometheus's targets.",
    )


def _exporters(metrics: Metrics, settings: RuleSettings) -> Iterator[Alert]:
    job, up = f"job={json.dumps(settings.job)}", metrics.of("up")
    yield Alert(
        "SavingsExporterDown",
        # Also for an exporter that restarts again and again, but not for a target that is new or gone: a rollout.
        f"avg_over_time({metrics.of('up', job, '4m')}) < 0.5\nand {up}\nand {up} offset 3m",
        CRITICAL,
        "{{ $labels.instance }} cannot be scraped.",
        "In the last four minutes more than half of the scrapes failed. Savings that are sent to this exporter may be "
        "refused, and records that were pending are lost if the process has ended.",
        hold="1m",
    )
    yield Alert(
        "SavingsExporterAbsent",
        f"absent({metrics.of('up', job)})",
        CRITICAL,
        f"Prometheus has no target {settings.job}.",
        f"For five minutes Prometheus has had no target in the job {settings.job}, so no other alert of the exporters "
        "can fire.",
        hold="5m",
    )
    refused = metrics.of(
        "savings_http_requests_total", 'method="POST",route="/v1/savings",code=~"4..|5.."', window="10m"
    )
    yield Alert(
        "SavingsRequestsRefused",
        f'sum without (code) (\n  label_replace(increase({refused}), "class", "${{1}}xx", "code", "(.)..")\n'
        f") > {settings.refused_requests}",
        WARNING,
        "{{ $labels.instance }} refused {{ $value | printf `%.0f` }} requests to record savings, with a "
        "{{ $labels.class }} status.",
        "Within the last 10 minutes. Refused savings are lost unless the sender repeats them. 4xx: the sender is wrong "
        "(401 token, 413 size, 415 content type, 422 a field). 5xx: the exporter is overloaded, stopping or failing. "
        "Its log has the reason.",
    )
    yield Alert(
        "SavingsFileDescriptorsLow",
        f"{metrics.of('process_open_fds')} / {metrics.of('process_max_fds')} > 0.9\n"
        f"and ignoring (version, python_version) {metrics.of('savings_build_info')}",
        WARNING,
        "{{ $labels.instance }} uses {{ $value | humanizePercentage }} of its file descriptors.",
        "Without free descriptors the exporter accepts no connections, and commits and saves can fail.",
        hold="5m",
    )
    yield Alert(
        "SavingsWebConfigBroken",
        # A missed scrape must not hide it.
        f"max_over_time({metrics.of('savings_web_config_last_reload_successful', window='2m')}) == 0",
        WARNING,
        "{{ $labels.instance }} cannot use its new certificate, token or web configuration file.",
        "It goes on with the certificate and the token from before. After a restart it may not start. Its log names "
        "the file and the reason.",
        hold="1m",
    )


def _space(metrics: Metrics, settings: RuleSettings) -> Iterator[Alert]:
    free, inodes = "savings_store_free_bytes", "savings_store_free_inodes"
    yield Alert(
        "SavingsDiskFilling",
        f"predict_linear({metrics.of(free, window='6h')}, 86400) < 0\n"
        f"or predict_linear({metrics.of(inodes, window='6h')}, 86400) < 0",
        WARNING,
        "The file system of the store of {{ $labels.instance }} will be full within a day.",
        "This is the trend of the last six hours. On a full file system commits fail, and new records stay pending: "
        "they are lost if the process ends.",
        hold="1h",
    )
    yield Alert(
        "SavingsDiskAlmostFull",
        f"{metrics.of(free)} < {settings.free_bytes}\nor {metrics.of(inodes)} < {settings.free_inodes}",
        CRITICAL,
        "The file system of the store of {{ $labels.instance }} is almost full.",
        f"Less than {settings.free_bytes:,} bytes or {settings.free_inodes:,} inodes are free. Nothing is lost yet. On "
        "a full file system commits fail, and new records stay pending: they are lost if the process ends.",
        hold="2m",
    )


def _watched(metrics: Metrics, settings: RuleSettings) -> Iterator[Alert]:
    readable, newest = "savings_watched_file_readable", metrics.of("savings_last_record_timestamp_seconds")
    yield Alert(
        "SavingsWatchedFileUnreadable",
        f"max_over_time({metrics.of(readable, window='2m')}) == 0",
        WARNING,
        "The file that {{ $labels.instance }} watches cannot be read.",
        "The file has vanished, is damaged, or may not be read. The exporter still shows the totals that it read last. "
        "The program that writes the file has to fix it.",
        hold="1m",
    )
    yield Alert(
        "SavingsWatchedFileStale",
        f"(time() - ({newest} > 0)) > {settings.stale_hours} * 3600\nand {metrics.of(readable)} == 1",
        WARNING,
        "The file that {{ $labels.instance }} watches has no new savings for {{ $value | humanizeDuration }}.",
        "The file can be read, and its newest record is old. The program that writes it may have stopped, or may write "
        "another file.",
    )


def _sources(metrics: Metrics) -> Iterator[Alert]:
    yield Alert(
        "SavingsSourceUnreadable",
        f"max_over_time({metrics.of('savings_source_readable', window='2m')}) == 0",
        WARNING,
        "{{ $labels.instance }} cannot read the savings of {{ $labels.source }}.",
        "A file of the other program is damaged or may not be read, or another process imports into the store. What "
        "was imported before stays counted, and what the other program saves is missing from the totals.",
        hold="10m",
    )


def _monitoring(settings: RuleSettings) -> Iterator[Alert]:
    own = 'rule_group=~".*;savings-.*"'
    yield Alert(
        "Watchdog",
        "vector(1)",
        NONE,
        "Alerting works.",
        "This alert always fires. Send it to a service that alerts when it stops arriving.",
    )
    yield Alert(
        "SavingsRuleEvaluationFailing",
        f"increase(prometheus_rule_evaluation_failures_total{{{own}}}[5m]) > 0",
        CRITICAL,
        "Prometheus {{ $labels.instance }} cannot evaluate the rules of {{ $labels.rule_group }}.",
        "While a rule fails, the alerts that depend on it do not fire.",
    )
    yield Alert(
        "SavingsNotificationsFailing",
        "increase(prometheus_notifications_errors_total[5m]) > 0\n"
        "or increase(prometheus_notifications_dropped_total[5m]) > 0\n"
        "or increase(alertmanager_notifications_failed_total[5m]) > 0",
        CRITICAL,
        "{{ $labels.instance }} cannot send notifications.",
        "Prometheus does not reach Alertmanager, or Alertmanager does not reach a receiver "
        "({{ with $labels.integration }}{{ . }}{{ else }}see its log{{ end }}). Alerts may not reach a person.",
    )
    jobs = "|".join(settings.monitoring_jobs)
    yield Alert(
        "SavingsMonitoringDown",
        f"up{{job=~{json.dumps(jobs)}}} == 0",
        WARNING,
        "{{ $labels.job }} {{ $labels.instance }} cannot be scraped.",
        "Without it alerts, dashboards or traces are missing. Savings are recorded all the same.",
        hold="5m",
    )


def _drill_sentence(drills: tuple[str, ...]) -> str:
    """A sentence in the alert's text when a fire drill ran on its store."""
    if not drills:
        return ""
    query = (
        f'store_drill:savings_drill_active:max10m{{drill=~"{"|".join(drills)}"}} == 1 '
        "and on (store) savings_store_info{job=%q,instance=%q}"
    )
    return (
        f"{{{{- with printf `{query}` $labels.job $labels.instance | query }}}}"
        ' A fire drill ({{ . | first | label "drill" }}) ran on this store within the last 10 minutes. It may be '
        "the only cause of this alert.{{ end }}"
    )
