"""The dashboard of the pager: is anything being lost, why, and what the disk does."""

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
    ("fsync_file", "the new document's way to stable storage", "Slow: the disk itself, or what shares it."),
    ("replace", "renaming it over the old document", "Slow: a busy filesystem journal."),
    ("fsync_dir", "making that rename durable", "Until it is done, a power loss brings back the old document."),
)


def build(other: tuple[str, str]) -> Any:
    """The dashboard, with a link to the other."""
    description = "Whether savings are kept, why not, and what each step of keeping them costs. Start at the top."
    rows = (_is_anything_lost(), _why(), _how_slow(), _how_much(), _what_runs())
    return dashboard_of(TITLE, UID, description, rows, other=other)


def _is_anything_lost() -> Row:
    wrong_at_zero = ((None, RED), (1, GREEN))
    waiting = ((None, GREEN), (1, ORANGE))
    healthy = stat_panel(
        "Store healthy",
        "Whether savings can be kept, or a watched file read. Degraded: new savings may be in memory only, and are "
        "lost if the process ends, so do not restart it.",
        "none",
        Query(of_instances("savings_store_healthy")),
        width=4,
        steps=wrong_at_zero,
    )
    last_fsync = stat_panel(
        "Last directory fsync",
        "Failed: the last save is visible, and a power loss may bring back the document before it. The journal still "
        "holds what was acknowledged.",
        "none",
        Query(of_instances("savings_last_dir_fsync_success")),
        width=4,
        steps=wrong_at_zero,
    )
    last_save = stat_panel(
        "Since the last save",
        "How old the document is. While nothing new is recorded it grows, and that is right; with records pending it "
        "means that saves fail. What was committed since is in the journal.",
        "s",
        Query(f"time() - {of_instances('savings_last_save_success_timestamp_seconds')}"),
        width=4,
    )
    drill = stat_panel(
        "Fire drill",
        "Active: failures are pretended, on purpose. What is red may be the drill and not the disk.",
        "none",
        Query(f"max by (job, instance) ({of_instances('savings_drill_active')})"),
        width=4,
        steps=((None, GREEN), (1, ORANGE)),
    )
    alerts = listing(
        "Firing alerts",
        "Alerts that fire, of all exporters whatever is chosen above. The runbook says of each what is at risk.",
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
            alerts.no_value("none fires"),
        ),
    )


def _why() -> Row:
    steps_and_errors = "{{instance}} {{step}} {{error}}"
    directory = timeline(
        "Directory fsync",
        "Red: it failed, and the last save may vanish in a power loss. Orange: the filesystem has none, so the renamed "
        "file is synced instead, and the rename may be lost.",
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
                "When failures were pretended, and which. Failures in these times say nothing of the disk.",
                Query(of_instances("savings_drill_active"), "{{instance}} {{drill}}"),
                width=12,
                states=[state(zero=("none", BLUE), one=("active", ORANGE))],
            ),
            bars(
                "Failed syncs by target",
                "directory: a save may vanish in a power loss. file: the new document was thrown away, the old one "
                "stays. journal: records were not acknowledged and wait in memory.",
                Query(happened("savings_fsync_failures_total", "target"), "{{instance}} {{target}}"),
                width=8,
            ),
            bars(
                "Failed commits by step and error",
                "Records that did not reach the journal: they wait in memory and are tried again. EIO: the disk. "
                "ENOSPC, EDQUOT: no room. EROFS: the filesystem has given up.",
                Query(happened("savings_commit_failures_total", "step", "error"), steps_and_errors),
                width=8,
            ),
            bars(
                "Failed saves by step and error",
                "The document that could not be replaced, or not durably. What was acknowledged stays in the journal, "
                "which grows until a save succeeds.",
                Query(happened("savings_save_failures_total", "step", "error"), steps_and_errors),
                width=8,
            ),
            graph(
                "Records pending over time",
                "Spikes are commits under way. A plateau or a slope is a disk that takes nothing: all of it is lost if "
                "the process ends.",
                "short",
                Query(of_instances("savings_records_pending")),
                width=12,
            ),
            graph(
                "Damage mended at opening, by kind",
                "What each running process found damaged when it opened the store. torn_tail: never acknowledged. "
                "corrupt_document, previous_document: rebuilt from the document before and the journal.",
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
                "A whole save of the document. What is recorded meanwhile waits for its end.",
                "save",
                width=12,
            ),
            _latencies(
                "Commit duration",
                "One commit to the journal, other processes' turns included. Requests wait for it to be durable.",
                "commit",
                width=12,
            ),
            heat(
                "Saves by duration",
                "How many saves took how long. Points are exemplars: each leads to the trace of that save.",
                Query(buckets("savings_save_duration_seconds"), "{{le}}"),
                width=12,
            ),
            heat(
                "Commits by duration",
                "How many commits took how long. Points are exemplars: each leads to the trace of that commit.",
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
                "Tries, failed ones included. Commits at zero with requests coming in: nothing becomes durable.",
                "ops",
                Query(per_second("savings_commits_total"), "{{instance}} commits"),
                Query(per_second("savings_saves_total"), "{{instance}} saves"),
                width=8,
            ),
            graph(
                "Records per commit",
                "How many records one commit carried. Large: many callers wait at once, or the disk is slow.",
                "short",
                Query(quantile(0.5, "savings_commit_records"), "{{instance}} p50"),
                Query(quantile(0.99, "savings_commit_records"), "{{instance}} p99"),
                width=8,
            ),
            graph(
                "Document and journal size",
                "A journal that only grows means that saves fail. Nothing is lost by that until the disk is full.",
                "bytes",
                Query(of_instances("savings_document_size_bytes"), "{{instance}} document"),
                Query(of_instances("savings_journal_size_bytes"), "{{instance}} journal"),
                width=8,
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
                "Which exporter shows which store. Two with the same store show the same savings, which count once; an "
                "exporter that is missing here is not scraped, and nobody watches its store.",
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
                "Grows with records that are pending. A process that the kernel kills for it loses them.",
                "bytes",
                Query(of_instances("process_resident_memory_bytes")),
                width=6,
            ),
            graph(
                "Uptime",
                "How long each process runs. A drop to zero is a restart: if it was killed, what was pending is lost.",
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
