"""The dashboard of what is saved: how much, whether it goes on, and by which models, projects and agents."""

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
_CACHE_COST = "savings_cache_cost_saved_usd"

_PAIR = ("provider", "model")
_NO_PRICE = "not known"
_ABOUT = (
    "From the first scrape in that time to the last, of exporters that answer now; a model's first scrape is not in it."
)


def build(other: tuple[str, str]) -> Any:
    """The dashboard, with a link to the other."""
    description = "What was saved, by which models, projects and agents. Durable records only, across restarts."
    rows = (_how_much(), _is_it_going_on(), _models(), _named("project"), _named("agent"), _what_else())
    return dashboard_of(TITLE, UID, description, rows, other=other)


def _how_much() -> Row:
    lifetime = "since each store was made, across restarts and crashes; each store counts once."
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
            ).no_value(_NO_PRICE),
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
                "Input tokens that compression saves now. Zero while requests arrive: compression saves nothing.",
                "short",
                Query(total(_TOKENS, function="rate"), "tokens saved"),
                width=8,
            ),
            graph(
                "Requests per second",
                "Requests that proxies record now. Zero: there is no traffic, or none reaches the exporter.",
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
                "Which models save now. Models beyond the limit of 200 count as other.",
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


def _named(label: str) -> Row:
    """The row of projects or of agents."""
    tokens, requests = f"savings_{label}_tokens_saved_total", f"savings_{label}_requests_total"
    unnamed = f"Records without {'an' if label == 'agent' else 'a'} {label} are not included."
    columns = (
        ("Tokens saved", "short", Query(total(tokens, label))),
        ("Requests", "short", Query(total(requests, label))),
    )
    panels = (
        largest(
            f"Tokens saved by {label}",
            f"Input tokens that compression saved, lifetime: the twenty {label}s with most. {unnamed}",
            "short",
            Query(f"topk(20, {total(tokens, label)})", f"{{{{{label}}}}}"),
            width=8,
        ),
        graph(
            f"Tokens saved per second by {label}",
            f"Which {label}s save now. {unnamed}",
            "short",
            Query(total(tokens, label, function="rate"), f"{{{{{label}}}}}"),
            width=8,
            height=9,
        ),
        listing(
            f"{label.capitalize()}s",
            f"What each {label} saved and how many requests it made, lifetime. {unnamed}",
            columns,
            width=8,
            height=9,
            names={label: label.capitalize()},
        ),
    )
    return Row(f"Which {label}s?", [panel.no_value(f"no {label} recorded") for panel in panels])


def _what_else() -> Row:
    stats = (
        ("Deferred tool tokens saved", "Input tokens that deferred tool schemas saved, lifetime.", "short", _TOOLS),
        ("Output tokens saved", "Output tokens that were not generated, lifetime.", "short", _OUTPUT),
        ("Cache reads", "Input tokens that providers read from prompt caches, lifetime.", "short", _CACHE),
        ("Input tokens sent", "Input tokens that were sent, after saving, lifetime.", "short", _INPUT),
        ("Input cost", "US dollars paid for input, lifetime, as proxies recorded them.", "currencyUSD", _INPUT_COST),
        ("Cache cost saved", "US dollars that prompt caches saved, lifetime.", "currencyUSD", _CACHE_COST),
    )
    kinds = (
        *((_TOKENS, "compression"), (_TOOLS, "deferred tools"), (_OUTPUT, "output not generated")),
        *((_CACHE, "cache reads"), (_INPUT, "input sent")),
    )
    return Row(
        "What else is saved, and what does the input cost?",
        (
            *(
                stat_panel(title, text, unit, Query(total(metric), ""), width=4).no_value(_NO_PRICE)
                for title, text, unit, metric in stats
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
                "US dollars, lifetime: what compression and prompt caches saved, next to what was paid for input.",
                "currencyUSD",
                Query(total(_COST_SAVED), "saved"),
                Query(total(_CACHE_COST), "saved by caches"),
                Query(total(_INPUT_COST), "paid for input"),
                width=12,
            ),
        ),
    )
