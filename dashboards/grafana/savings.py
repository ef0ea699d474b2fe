"""The dashboard of the savings: how much was and is saved, and by which models, projects, agents and sources."""

from __future__ import annotations

from typing import Any

from panels import Query, Row, dashboard_of, graph, largest, listing, stat_panel
from queries import down_since, share, total

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
_REJECTED = "savings_rejected_records_total"
_UNPRICED = "savings_unpriced_requests_total"

_PAIR = ("provider", "model")
_NO_PRICE = "not known"
_ABOUT = (
    "The growth between the first and the last scrape in that period, for exporters that respond now. Tokens that a "
    "model had saved before its first scrape are not included."
)


def build(other: tuple[str, str]) -> Any:
    """The dashboard, with a link to the other one."""
    description = (
        "Savings in total and by model, project, agent and source. Only durable records count, across restarts."
    )
    named = (_named("project"), _named("agent"), _named("source"))
    rows = (_how_much(), _is_it_going_on(), _models(), *named, _what_else())
    return dashboard_of(TITLE, UID, description, rows, other=other)


def _how_much() -> Row:
    lifetime = "since each store was created, across restarts and crashes; each store counts once."
    today = stat_panel(
        "Tokens saved today",
        f"Input tokens that compression saved since midnight. {_ABOUT}",
        "short",
        Query(total(_TOKENS, function="gain"), ""),
        width=4,
    ).time_from("now/d")
    week = stat_panel(
        "Tokens saved this week",
        f"Input tokens that compression saved since the start of the week. {_ABOUT}",
        "short",
        Query(total(_TOKENS, function="gain"), ""),
        width=4,
    ).time_from("now/w")
    of_input = stat_panel(
        "Saved share of input",
        "The share of the input tokens that compression and deferred tool schemas saved, over the lifetime. The whole "
        "is the sum of the tokens saved and the tokens sent.",
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
                f"US dollars that compression saved, {lifetime} Negative if compression cost more than it saved.",
                "currencyUSD",
                Query(total(_COST_SAVED), ""),
                width=4,
            ).no_value(_NO_PRICE),
            today,
            week,
            of_input.decimals(2).no_value("no input yet"),
            stat_panel("Requests", f"Requests recorded, {lifetime}", "short", Query(total(_REQUESTS), ""), width=4),
            listing(
                "Exporters that are down",
                "Exporters that cannot be scraped, and when they were last scraped. The lifetime figures keep their "
                "last values for a day; afterwards these savings are missing from them.",
                (("Last scraped", "dateTimeFromNow", Query(f"1000 * ({down_since()})")),),
                width=24,
                height=4,
                names={"job": "Job", "instance": "Instance"},
            ).no_value("none"),
        ),
    )


def _is_it_going_on() -> Row:
    return Row(
        "Is it still saving?",
        (
            graph(
                "Tokens saved per second",
                "Input tokens that compression saves now. If it is zero while requests arrive, compression saves "
                "nothing.",
                "short",
                Query(total(_TOKENS, function="rate"), "tokens saved"),
                width=8,
            ),
            graph(
                "Requests per second",
                "Requests that proxies record now. Zero means that there is no traffic, or that none reaches the "
                "exporter.",
                "reqps",
                Query(total(_REQUESTS, function="rate"), "requests"),
                width=8,
            ),
            graph(
                "Saved share of input, now",
                "The share of the input tokens that compression and deferred tool schemas save now.",
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
                "Input tokens that compression saved over the lifetime, for the twenty models that saved most.",
                "short",
                Query(f"topk(20, {total(_TOKENS, 'model')})", "{{model}}"),
                width=8,
            ),
            graph(
                "Tokens saved per second by model",
                "Input tokens that compression saves now, by model. Models beyond the limit of 200 count as other.",
                "short",
                Query(total(_TOKENS, *_PAIR, function="rate"), "{{provider}} {{model}}"),
                width=16,
                height=9,
            ),
            listing(
                "Models",
                "Savings and cost of each model over the lifetime. The share is empty if no input was recorded.",
                columns,
                width=24,
                height=9,
                names={"provider": "Provider", "model": "Model"},
            ),
        ),
    )


def _named(label: str) -> Row:
    """The row of projects, of agents or of sources."""
    tokens, requests = f"savings_{label}_tokens_saved_total", f"savings_{label}_requests_total"
    unnamed = f"Records without {'an' if label == 'agent' else 'a'} {label} are not included."
    if label == "source":
        unnamed += " Sources can overlap: what one saved can be the input of another."
    columns = (
        ("Tokens saved", "short", Query(total(tokens, label))),
        ("Requests", "short", Query(total(requests, label))),
    )
    panels = (
        largest(
            f"Tokens saved by {label}",
            f"Input tokens that compression saved over the lifetime, for the twenty {label}s that saved most. "
            f"{unnamed}",
            "short",
            Query(f"topk(20, {total(tokens, label)})", f"{{{{{label}}}}}"),
            width=8,
        ),
        graph(
            f"Tokens saved per second by {label}",
            f"Input tokens that compression saves now, by {label}. {unnamed}",
            "short",
            Query(total(tokens, label, function="rate"), f"{{{{{label}}}}}"),
            width=8,
            height=9,
        ),
        listing(
            f"{label.capitalize()}s",
            f"Tokens saved and requests of each {label} over the lifetime. {unnamed}",
            columns,
            width=8,
            height=9,
            names={label: label.capitalize()},
        ),
    )
    shown = [panel.no_value(f"no {label} recorded") for panel in panels]
    if label == "source":
        shown.append(_kept_out())
    return Row(f"Which {label}s?", shown)


def _kept_out() -> Any:
    return listing(
        "Records kept out",
        "Records of imported sources that are damaged or not plausible. They are not included in any total.",
        (("Records", "short", Query(f"{total(_REJECTED, 'source', 'reason')} > 0")),),
        width=24,
        height=5,
        names={"source": "Source", "reason": "Reason"},
    ).no_value("none")


def _what_else() -> Row:
    stats = (
        ("Deferred tool tokens saved", "Lifetime input tokens that deferred tool schemas saved.", "short", _TOOLS),
        ("Output tokens saved", "Lifetime output tokens that were not generated.", "short", _OUTPUT),
        ("Cache reads", "Lifetime input tokens that providers read from prompt caches.", "short", _CACHE),
        ("Input tokens sent", "Lifetime input tokens that were sent, after all savings.", "short", _INPUT),
        ("Input cost", "Lifetime US dollars paid for input, as proxies recorded them.", "currencyUSD", _INPUT_COST),
        ("Cache cost saved", "Lifetime US dollars that prompt caches saved.", "currencyUSD", _CACHE_COST),
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
                "Tokens saved now by each method, compared with the input that is sent.",
                "short",
                *(Query(total(metric, function="rate"), name) for metric, name in kinds),
                width=8,
            ),
            graph(
                "Cost saved and input cost",
                "Lifetime US dollars that compression and prompt caches saved, compared with the cost of the input.",
                "currencyUSD",
                Query(total(_COST_SAVED), "saved"),
                Query(total(_CACHE_COST), "saved by caches"),
                Query(total(_INPUT_COST), "paid for input"),
                width=8,
            ),
            largest(
                "Requests without a price",
                "Lifetime requests that saved input tokens and have no price, by model. The US dollars of all panels "
                "do not include what they saved. Add these models to the file of --prices.",
                "short",
                Query(f"topk(20, {total(_UNPRICED, 'model')})", "{{model}}"),
                width=8,
            ),
        ),
    )
