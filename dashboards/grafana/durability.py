"""The dashboard for the on-call engineer: whether records are at risk, why, and how the disk performs."""

from __future__ import annotations

from typing import Any

from panels import (
    BLUE,
    GREEN,
    ORANGE,
    RED,
    Query,
    Row,
    bars,
    dashboard_of,
    from_value_on,
    graph,
    heat,
    listing,
    stat_panel,
    state,
    timeline,
    with_states,
)
from queries import buckets, happened, mean, of_exporters, of_instances, per_second, quantile

UID, TITLE = "savings-exporter-durability", "Savings durability"

_QUANTILES = ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))

# A store without a save has the timestamp 0, so the age is more than this.
_NEVER_SECONDS = 1e9

_STEPS = (
    ("write", "writing the new document to a temporary file", "If it is slow, the disk is full or busy."),
    ("fsync_file", "syncing that file", "If it is slow, the disk is slow or has other load."),
    ("replace", "renaming that file over the old document", "If it is slow, the journal of the file system is busy."),
    ("fsync_dir", "making that rename durable", "Until it returns, a power loss can bring back the old document."),
)


def build(other: tuple[str, str]) -> Any:
    """The dashboard, with a link to the other one."""
    description = "Whether records become durable, failures and their causes, and latencies. Start at the top."
    rows = (_is_anything_lost(), _why(), _how_slow(), _how_much(), _what_runs())
    return dashboard_of(TITLE, UID, description, rows, other=other)


def _is_anything_lost() -> Row:
    wrong_at_zero = ((None, RED), (1, GREEN))
    waiting = ((None, GREEN), (1, ORANGE))
    healthy = stat_panel(
        "Store healthy",
        "Whether commits and saves succeed, or a watched file can be read. If it is degraded, new records may be only "
        "in memory and are lost if the process ends. Do not restart the process.",
        "none",
        Query(f"{of_instances('savings_store_healthy')} or {of_instances('savings_watched_file_readable')}"),
        width=4,
        steps=wrong_at_zero,
    )
    last_fsync = stat_panel(
        "Last directory fsync",
        "If it failed, a power loss can bring back the document from before the latest save. The journals still "
        "contain all acknowledged records.",
        "none",
        Query(of_instances("savings_last_dir_fsync_success")),
        width=4,
        steps=wrong_at_zero,
    )
    last_save = stat_panel(
        "Since the last save",
        "The age of the document. It grows while no records arrive. Records that were committed after the last save "
        "are durable in the journals.",
        "s",
        Query(f"time() - ({of_instances('savings_last_save_success_timestamp_seconds')} > 0)"),
        width=4,
    )
    drill = stat_panel(
        "Fire drill",
        "If it is active, a drill simulates failures. Failures on this dashboard may come from the drill.",
        "none",
        Query(f"max without (drill) ({of_instances('savings_drill_active')})"),
        width=4,
        steps=((None, GREEN), (1, ORANGE)),
    )
    alerts = listing(
        "Firing alerts",
        "Firing alerts of all exporters, including those not selected above. The runbook says what is at risk.",
        (("Firing", "none", Query('ALERTS{alertstate="firing", alertname=~"Savings.*"}')),),
        width=24,
        height=5,
        names={"alertname": "Alert", "severity": "Severity", "instance": "Instance"},
        hidden=("alertstate", "Value"),
    )
    return Row(
        "Is anything being lost?",
        (
            healthy.mappings([state(zero=("degraded", RED), one=("healthy", GREEN))]),
            last_fsync.mappings([state(zero=("FAILED", RED), one=("ok", GREEN))]),
            stat_panel(
                "Records pending",
                "Records that are accepted but not yet durable. They are lost if the process ends now. A few records "
                "are normal for a short time.",
                "short",
                Query(of_instances("savings_records_pending")),
                width=4,
                steps=waiting,
            ),
            stat_panel(
                "Tokens pending",
                "Tokens saved in the pending records. If the process ends now, they are missing from the lifetime "
                "total.",
                "short",
                Query(of_instances("savings_tokens_pending")),
                width=4,
                steps=waiting,
            ),
            last_save.mappings([from_value_on(_NEVER_SECONDS, "never", ORANGE)]),
            drill.mappings([state(zero=("none", GREEN), one=("ACTIVE", ORANGE))]),
            alerts.no_value("none"),
        ),
    )


def _why() -> Row:
    steps_and_errors = "{{instance}} {{step}} {{error}}"
    directory = timeline(
        "Directory fsync",
        "Red: the last directory fsync failed, and a power loss can undo the latest save. Orange: the file system has "
        "no directory fsync. The renamed file is synced instead, and a power loss can undo the rename.",
        Query(of_instances("savings_last_dir_fsync_success"), "{{instance}} last one"),
        Query(of_instances("savings_dir_fsync_supported"), "{{instance}} supported"),
        width=12,
        states=[state(zero=("failed", RED), one=("ok", GREEN))],
    )
    unsupported = [state(zero=("unsupported", ORANGE), one=("supported", GREEN))]
    return Row(
        "Why?",
        (
            with_states(directory, "B", unsupported),
            timeline(
                "Fire drills",
                "The times and kinds of simulated failures. Failures at these times may not come from the disk.",
                Query(of_instances("savings_drill_active"), "{{instance}} {{drill}}"),
                width=12,
                states=[state(zero=("none", BLUE), one=("active", ORANGE))],
            ),
            bars(
                "Failed syncs by target",
                "directory: a power loss can undo a save. file: a new document was discarded, and the old document "
                "remains. journal: a commit or a new segment failed; the records of a failed commit are pending.",
                Query(happened("savings_fsync_failures_total"), "{{instance}} {{target}}"),
                width=8,
            ),
            bars(
                "Failed commits by step and error",
                "The records of a failed commit are pending in memory until a retry succeeds. EIO: disk error. ENOSPC, "
                "EDQUOT: no space. EROFS: the file system became read-only.",
                Query(happened("savings_commit_failures_total"), steps_and_errors),
                width=8,
            ),
            bars(
                "Failed saves by step and error",
                "The document was not replaced, or the replacement is not durable. Acknowledged records stay in the "
                "journals, which grow until a save succeeds.",
                Query(happened("savings_save_failures_total"), steps_and_errors),
                width=8,
            ),
            bars(
                "Refused requests by status",
                "Requests to record savings that were refused. 4xx: the sender is wrong. 5xx: the exporter is "
                "overloaded, stopping or failing. Its log has the reason.",
                Query(
                    happened("savings_http_requests_total", 'method="POST", code=~"4..|5.."'), "{{instance}} {{code}}"
                ),
                width=12,
            ),
            graph(
                "Since the last failed sync",
                "The time since the last failed sync, by the exporter's clock. There is no line if none has failed.",
                "s",
                Query(of_instances("savings_last_fsync_failure_age_seconds"), "{{instance}} {{target}}"),
                width=12,
            ),
            graph(
                "Records pending over time",
                "Short spikes are commits in progress. If the value stays high or grows, commits fail or hang. Pending "
                "records are lost if the process ends.",
                "short",
                Query(of_instances("savings_records_pending")),
                width=12,
            ),
            graph(
                "Repairs at opening, by kind",
                "Repairs when the store was opened, over its lifetime. torn_tail: an incomplete commit that was never "
                "acknowledged. corrupt_document, previous_document: the document was rebuilt from the previous one and "
                "the journals.",
                "short",
                Query(of_instances("savings_recoveries_total"), "{{instance}} {{kind}}"),
                width=12,
            ),
            bars(
                "Dropped log lines",
                "Log lines that nothing read, or that could not be written. The service went on without them.",
                Query(happened("savings_log_lines_dropped_total")),
                width=24,
            ),
        ),
    )


def _how_slow() -> Row:
    return Row(
        "How slow is the disk?",
        (
            *(
                _latencies(
                    f"Step {step}", f"One step of a save: {what}. {slow}", "save_step", f'step="{step}"', width=6
                )
                for step, what, slow in _STEPS
            ),
            _latencies(
                "Save duration",
                "The duration of a whole save of the document. Records are still committed during a save.",
                "save",
                width=12,
            ),
            _latencies(
                "Commit duration",
                "The duration of one commit to a journal. Callers wait for the commit that makes their records "
                "durable.",
                "commit",
                width=12,
            ),
            _latencies(
                "Duration of requests to record savings",
                "From the headers of a request to the end of its answer. It includes the commit.",
                "http_request",
                'method="POST"',
                width=24,
            ),
            heat(
                "Saves by duration",
                "The distribution of save durations over all stores. Points are exemplars: each links to its trace.",
                Query(buckets("savings_save_duration_seconds"), "{{le}}"),
                width=12,
            ),
            heat(
                "Commits by duration",
                "The distribution of commit durations over all stores. Points are exemplars: each links to its trace.",
                Query(buckets("savings_commit_duration_seconds"), "{{le}}"),
                width=12,
            ),
        ),
    )


def _how_much() -> Row:
    return Row(
        "How much is written?",
        (
            graph(
                "Commits and saves per second",
                "Attempts, including failed ones. If there are no commits while requests arrive, no record becomes "
                "durable.",
                "ops",
                Query(per_second("savings_commits_total"), "{{instance}} commits"),
                Query(per_second("savings_saves_total"), "{{instance}} saves"),
                width=8,
            ),
            graph(
                "Records per commit",
                "Records in one commit. A high value means that many callers wait at once, or that the disk is slow.",
                "short",
                Query(mean("savings_commit_records"), "{{instance}} mean"),
                Query(quantile(0.99, "savings_commit_records"), "{{instance}} p99"),
                width=8,
            ),
            graph(
                "Document and journal size",
                "If the journals only grow, saves fail. This loses no record until the disk is full.",
                "bytes",
                Query(of_instances("savings_document_size_bytes"), "{{instance}} document"),
                Query(of_instances("savings_journal_size_bytes"), "{{instance}} journal"),
                width=8,
            ),
            graph(
                "Free space of the store's file system",
                "Free bytes. On a full file system commits fail, and new records stay pending.",
                "bytes",
                Query(of_instances("savings_store_free_bytes")),
                width=8,
            ),
            graph(
                "Free inodes of the store's file system",
                "Free inodes, where the file system has a fixed number of them. Without one no file can be created.",
                "short",
                Query(of_instances("savings_store_free_inodes")),
                width=8,
            ),
            graph(
                "Since the newest record",
                "The age of the newest durable record, by its own timestamp. It grows while no records arrive.",
                "s",
                Query(f"time() - ({of_instances('savings_last_record_timestamp_seconds')} > 0)"),
                width=8,
            ),
        ),
    )


def _what_runs() -> Row:
    named = (
        f"{of_instances('savings_build_info')} * ignoring (version, python_version, store) group_left (store) "
        f"{of_instances('savings_store_info')}"
    )
    return Row(
        "What is running?",
        (
            listing(
                "Exporters",
                "The exporters and their stores. Exporters of one store show the same totals and counters. If an "
                "exporter is missing here, it is not scraped, and no alert covers its store.",
                (("Up", "none", Query(named)),),
                width=12,
                height=8,
                names={
                    **{"job": "Job", "instance": "Instance", "store": "Store"},
                    **{"version": "Version", "python_version": "Python"},
                },
                hidden=("Value",),
            ),
            graph(
                "Resident memory",
                "It grows with the number of pending records. If the kernel kills the process for its memory use, "
                "these records are lost.",
                "bytes",
                Query(of_exporters("process_resident_memory_bytes")),
                width=6,
            ),
            graph(
                "Uptime",
                "The time since each process started. A drop to zero is a restart. A kill loses pending records.",
                "s",
                Query(f"time() - ({of_exporters('process_start_time_seconds')})"),
                width=6,
            ),
        ),
    )


def _latencies(title: str, description: str, what: str, *matchers: str, width: int) -> Any:
    queries = (
        Query(quantile(share, f"savings_{what}_duration_seconds", *matchers), f"{{{{instance}}}} {name}")
        for share, name in _QUANTILES
    )
    return graph(title, description, "s", *queries, width=width, exemplars=True)
