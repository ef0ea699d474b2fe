"""The dashboard of what is saved: how much, whether it goes on, and by which models and projects."""

from __future__ import annotations

from typing import Any

from panels import Query, Row, dashboard_of, graph, largest, listing, stat_panel
from queries import share, total

UID, TITLE = "savings-exporter-savings", "Savings"

_TOKENS = "savings_tokens_saved_total"
_REQUESTS = "savings_requests_total"
_INPUT = "savings_input_tokens_total"
_TOOLS = "savings_tool_tokens_saved_total"
_OUTPUT = "savings_output_tokens_saved_total"
_CACHE = "savings_cache_read_tokens_total"
_COST_SAVED = "savings_cost_saved_usd"
_INPUT_COST = "savings_input_cost_usd"
_PROJECT_TOKENS = "savings_project_tokens_saved_total"
_PROJECT_REQUESTS = "savings_project_requests_total"

_PAIR = ("provider", "model")
_ABOUT = (
    "From the first scrape in that time to the last, of exporters that answer now; a model's first scrape is not in it."
)


def build(other: tuple[str, str]) -> Any:
    """The dashboard, with a link to the other."""
    description = "What was saved, by which models and projects. Only what is durable counts, across restarts."
    return dashboard_of(
        TITLE, UID, description, (_how_much(), _is_it_going_on(), _models(), _projects(), _what_else()), other=other
    )


def _how_much() -> Row:
    lifetime = "since each store was made, across restarts and crashes; each store counts once, however many show it."
    today = stat_panel(
        "Tokens saved today",
        f"Input tokens that compression saved since midnight. {_ABOUT}",
        "short",
        Query(total(_TOKENS, function="gain"), ""),
        width=4,
    ).time_from("now/d")
    week = stat_panel(
        "Tokens saved this week",
        f"Input tokens that compression saved since the week began. {_ABOUT}",
        "short",
        Query(total(_TOKENS, function="gain"), ""),
        width=4,
    ).time_from("now/w")
    of_input = stat_panel(
        "Saved share of input",
        "Of all input tokens there would have been, lifetime: what compression and deferred tool schemas saved.",
        "percent",
        Query(share(), ""),
        width=4,
    )
    return Row(
        "How much has been saved?",
        (
            stat_panel(
                "Tokens saved",
                f"Input tokens that compression saved, {lifetime}",
                "short",
                Query(total(_TOKENS), ""),
                width=4,
            ),
            stat_panel(
                "Cost saved",
                f"US dollars that compression saved, {lifetime} Negative where it cost more than it saved.",
                "currencyUSD",
                Query(total(_COST_SAVED), ""),
                width=4,
            ),
            today,
            week,
            of_input.decimals(2).no_value("no input yet"),
            stat_panel("Requests", f"Requests recorded, {lifetime}", "short", Query(total(_REQUESTS), ""), width=4),
        ),
    )


def _is_it_going_on() -> Row:
    return Row(
        "Is it still saving?",
        (
            graph(
                "Tokens saved per second",
                "Input tokens that compression saves now. At zero with requests coming in, it has stopped saving.",
                "short",
                Query(total(_TOKENS, function="rate"), "tokens saved"),
                width=8,
            ),
            graph(
                "Requests per second",
                "Requests that proxies record now. At zero nothing reaches the exporter, or there is no traffic.",
                "reqps",
                Query(total(_REQUESTS, function="rate"), "requests"),
                width=8,
            ),
            graph(
                "Saved share of input, now",
                "Of all input tokens there would be now: what compression and deferred tool schemas save.",
                "percent",
                Query(share(function="rate"), "saved share"),
                width=8,
            ).max(100),
        ),
    )


def _models() -> Row:
    columns = (
        ("Tokens saved", "short", Query(total(_TOKENS, *_PAIR))),
        ("Cost saved", "currencyUSD", Query(total(_COST_SAVED, *_PAIR))),
        ("Saved share", "percent", Query(share(*_PAIR))),
        ("Requests", "short", Query(total(_REQUESTS, *_PAIR))),
        ("Input tokens", "short", Query(total(_INPUT, *_PAIR))),
        ("Input cost", "currencyUSD", Query(total(_INPUT_COST, *_PAIR))),
    )
    return Row(
        "Which models?",
        (
            largest(
                "Tokens saved by model",
                "Input tokens that compression saved, lifetime: the twenty models with most.",
                "short",
                Query(f"topk(20, {total(_TOKENS, 'model')})", "{{model}}"),
                width=8,
            ),
            graph(
                "Tokens saved per second by model",
                "Which models save now. What lies beyond the exporter's 200 models counts as other.",
                "short",
                Query(total(_TOKENS, *_PAIR, function="rate"), "{{provider}} {{model}}"),
                width=16,
                height=9,
            ),
            listing(
                "Models",
                "What each provider's model saved and cost, lifetime. A share is empty where no input was recorded.",
                columns,
                width=24,
                height=9,
                names={"provider": "Provider", "model": "Model"},
            ),
        ),
    )


def _projects() -> Row:
    unnamed = "Savings recorded without a project are not in it."
    columns = (
        ("Tokens saved", "short", Query(total(_PROJECT_TOKENS, "project"))),
        ("Requests", "short", Query(total(_PROJECT_REQUESTS, "project"))),
    )
    panels = (
        largest(
            "Tokens saved by project",
            f"Input tokens that compression saved, lifetime: the twenty projects with most. {unnamed}",
            "short",
            Query(f"topk(20, {total(_PROJECT_TOKENS, 'project')})", "{{project}}"),
            width=8,
        ),
        graph(
            "Tokens saved per second by project",
            f"Which projects save now. {unnamed}",
            "short",
            Query(total(_PROJECT_TOKENS, "project", function="rate"), "{{project}}"),
            width=8,
            height=9,
        ),
        listing(
            "Projects",
            f"What each project saved and how often it asked, lifetime. {unnamed}",
            columns,
            width=8,
            height=9,
            names={"project": "Project"},
        ),
    )
    return Row("Which projects?", [panel.no_value("no project recorded") for panel in panels])


def _what_else() -> Row:
    stats = (
        ("Deferred tool tokens saved", "Input tokens that deferred tool schemas saved, lifetime.", "short", _TOOLS),
        ("Output tokens saved", "Output tokens that were not generated, lifetime.", "short", _OUTPUT),
        ("Cache reads", "Input tokens that providers read from prompt caches, lifetime.", "short", _CACHE),
        ("Input tokens sent", "Input tokens that were sent, after saving, lifetime.", "short", _INPUT),
        ("Input cost", "US dollars paid for input, lifetime, as proxies recorded them.", "currencyUSD", _INPUT_COST),
    )
    # Five panels on 24 columns.
    widths = (5, 5, 5, 5, 4)
    kinds = (
        *((_TOKENS, "compression"), (_TOOLS, "deferred tools"), (_OUTPUT, "output not generated")),
        *((_CACHE, "cache reads"), (_INPUT, "input sent")),
    )
    return Row(
        "What else is saved, and what does the input cost?",
        (
            *(
                stat_panel(title, text, unit, Query(total(metric), ""), width=width)
                for (title, text, unit, metric), width in zip(stats, widths, strict=True)
            ),
            graph(
                "Tokens per second by kind",
                "What is saved now, by how, next to the input that is still sent.",
                "short",
                *(Query(total(metric, function="rate"), name) for metric, name in kinds),
                width=12,
            ),
            graph(
                "Cost saved and input cost",
                "US dollars, lifetime: how what was saved grows next to what was paid for input.",
                "currencyUSD",
                Query(total(_COST_SAVED), "saved"),
                Query(total(_INPUT_COST), "paid for input"),
                width=12,
            ),
        ),
    )
