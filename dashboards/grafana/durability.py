"""The dashboard for the on-call engineer: is anything lost, why, and what the disk does."""

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
from queries import SELECTOR, buckets, happened, of_instances, per_second, quantile

UID, TITLE = "savings-exporter-durability", "Savings durability"

_QUANTILES = ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))

# A save that was never made has the timestamp 0, so this long ago.
_NEVER_SECONDS = 1e9

_STEPS = (
    ("write", "writing the new document to a temporary file", "Slow: a full or busy disk."),
    ("fsync_file", "writing that file to stable storage", "Slow: the disk itself, or other load on it."),
    ("replace", "renaming it over the old document", "Slow: a busy journal of the file system."),
    ("fsync_dir", "making that rename durable", "Until it returns, a power loss can bring back the old document."),
)


def build(other: tuple[str, str]) -> Any:
    """The dashboard, with a link to the other."""
    description = "Whether records become durable, why not, and how long each step takes. Start at the top."
    rows = (_is_anything_lost(), _why(), _how_slow(), _how_much(), _what_runs())
    return dashboard_of(TITLE, UID, description, rows, other=other)


def _is_anything_lost() -> Row:
    wrong_at_zero = ((None, RED), (1, GREEN))
    waiting = ((None, GREEN), (1, ORANGE))
    healthy = stat_panel(
        "Store healthy",
        "Whether commits and saves succeed, or a watched file can be read. Degraded: new records may be in memory only "
        "and are lost if the process ends, so do not restart it.",
        "none",
        Query(of_instances("savings_store_healthy")),
        width=4,
        steps=wrong_at_zero,
    )
    last_fsync = stat_panel(
        "Last directory fsync",
        "Failed: a power loss can bring back the document before the latest save. The journals still hold all "
        "acknowledged records.",
        "none",
        Query(of_instances("savings_last_dir_fsync_success")),
        width=4,
        steps=wrong_at_zero,
    )
    last_save = stat_panel(
        "Since the last save",
        "The age of the document. It grows while nothing is recorded. Records that were committed since are durable in "
        "the journals.",
        "s",
        Query(f"time() - ({of_instances('savings_last_save_success_timestamp_seconds')} > 0)"),
        width=4,
    )
    drill = stat_panel(
        "Fire drill",
        "Active: failures are simulated on purpose. What is red may come from the drill, not from the disk.",
        "none",
        Query(f"max by (job, instance) ({of_instances('savings_drill_active')})"),
        width=4,
        steps=((None, GREEN), (1, ORANGE)),
    )
    alerts = listing(
        "Firing alerts",
        "Firing alerts of all exporters, also of those that are not selected above. The runbook says what is at risk.",
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
                "Records accepted and not yet durable: lost if the process ends now. A few for a moment are normal.",
                "short",
                Query(of_instances("savings_records_pending")),
                width=4,
                steps=waiting,
            ),
            stat_panel(
                "Tokens pending",
                "Tokens saved in those records: what the lifetime figure would miss if the process ended now.",
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
        "Red: it failed, and a power loss can undo the latest save. Orange: the file system has none, so the renamed "
        "file is synced instead, and a power loss can undo the rename.",
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
                "When failures were simulated, and which. Failures in these times say nothing about the disk.",
                Query(of_instances("savings_drill_active"), "{{instance}} {{drill}}"),
                width=12,
                states=[state(zero=("none", BLUE), one=("active", ORANGE))],
            ),
            bars(
                "Failed syncs by target",
                "directory: a power loss can undo a save. file: a new document was discarded, the old "
                "document stays. journal: a commit or a new segment; the records of a commit are pending.",
                Query(happened("savings_fsync_failures_total", "target"), "{{instance}} {{target}}"),
                width=8,
            ),
            bars(
                "Failed commits by step and error",
                "Commits whose records are pending, in memory, until a retry succeeds. EIO: the disk. ENOSPC, EDQUOT: "
                "no space. EROFS: the file system has aborted.",
                Query(happened("savings_commit_failures_total", "step", "error"), steps_and_errors),
                width=8,
            ),
            bars(
                "Failed saves by step and error",
                "The document was not replaced, or not durably. Acknowledged records stay in the journals, which grow "
                "until a save succeeds.",
                Query(happened("savings_save_failures_total", "step", "error"), steps_and_errors),
                width=8,
            ),
            graph(
                "Records pending over time",
                "Spikes are commits in progress. A plateau or a slope is a disk that accepts nothing: these records "
                "are lost if the process ends.",
                "short",
                Query(of_instances("savings_records_pending")),
                width=12,
            ),
            graph(
                "Repairs at opening, by kind",
                "What was repaired when the store was opened, over its lifetime. torn_tail: a commit that was never "
                "acknowledged. corrupt_document, previous_document: rebuilt from the previous save and the journals.",
                "short",
                Query(of_instances("savings_recoveries_total"), "{{instance}} {{kind}}"),
                width=12,
            ),
        ),
    )


def _how_slow() -> Row:
    return Row(
        "How slow is the disk?",
        (
            *(
                _latencies(f"Step {step}", f"One step of a save: {what}. {slow}", "save_step", width=6, step=step)
                for step, what, slow in _STEPS
            ),
            _latencies(
                "Save duration",
                "A whole save of the document. Requests that arrive during it can wait for its end.",
                "save",
                width=12,
            ),
            _latencies(
                "Commit duration",
                "One commit to a journal. Callers wait for it until their records are durable.",
                "commit",
                width=12,
            ),
            heat(
                "Saves by duration",
                "How many saves took how long, of all stores. Points are exemplars: each links to its trace.",
                Query(buckets("savings_save_duration_seconds"), "{{le}}"),
                width=12,
            ),
            heat(
                "Commits by duration",
                "How many commits took how long, of all stores. Points are exemplars: each links to its trace.",
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
                "Attempts, failed ones included. No commits while requests arrive: nothing becomes durable.",
                "ops",
                Query(per_second("savings_commits_total"), "{{instance}} commits"),
                Query(per_second("savings_saves_total"), "{{instance}} saves"),
                width=6,
            ),
            graph(
                "Records per commit",
                "Records in one commit. Many: many callers wait at once, or the disk is slow.",
                "short",
                Query(quantile(0.5, "savings_commit_records"), "{{instance}} p50"),
                Query(quantile(0.99, "savings_commit_records"), "{{instance}} p99"),
                width=6,
            ),
            graph(
                "Document and journal size",
                "Journals that only grow mean that saves fail. Nothing is lost by that until the disk is full.",
                "bytes",
                Query(of_instances("savings_document_size_bytes"), "{{instance}} document"),
                Query(of_instances("savings_journal_size_bytes"), "{{instance}} journal"),
                width=6,
            ),
            graph(
                "Since the newest record",
                "The age of the newest durable record, by its own timestamp. It grows while nothing is recorded.",
                "s",
                Query(f"time() - ({of_instances('savings_last_record_timestamp_seconds')} > 0)"),
                width=6,
            ),
        ),
    )


def _what_runs() -> Row:
    named = (
        f"{of_instances('savings_build_info')} * on (job, instance) group_left (store) savings_store_info{{{SELECTOR}}}"
    )
    return Row(
        "What is running?",
        (
            listing(
                "Exporters",
                "Which exporter shows which store. Exporters of one store show the same totals and counters. An "
                "exporter that is missing here is not scraped, and no alert covers its store.",
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
                "Grows with the pending records. If the kernel kills the process for it, they are lost.",
                "bytes",
                Query(of_instances("process_resident_memory_bytes")),
                width=6,
            ),
            graph(
                "Uptime",
                "How long each process has run. A drop to zero is a restart; a kill loses pending records.",
                "s",
                Query(f"time() - {of_instances('process_start_time_seconds')}"),
                width=6,
            ),
        ),
    )


def _latencies(title: str, description: str, what: str, *, width: int, step: str = "") -> Any:
    queries = (
        Query(quantile(share, f"savings_{what}_duration_seconds", step=step), f"{{{{instance}}}} {name}")
        for share, name in _QUANTILES
    )
    return graph(title, description, "s", *queries, width=width, exemplars=True)
