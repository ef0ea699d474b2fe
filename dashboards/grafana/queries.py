"""The queries of the panels, in PromQL.

Windows are Grafana's own: ``$__rate_interval`` is long enough for a rate at the datasource's scrape interval, and
``$__range`` is the time that a panel shows.

Several exporters may show one store, such as two workers, or a service and a watcher. Each shows the whole store, its
operation counters included, so a sum over exporters takes only the largest of the views of each store.
"""

from __future__ import annotations

SELECTOR = 'job=~"$job", instance=~"$instance"'


def total(metric: str, *by: str, function: str = "") -> str:
    """What all stores hold of a lifetime metric, or its ``rate``, or its ``gain`` in the time that is shown."""
    kind = metric.split("_")[1]
    names = kind if kind in ("project", "agent") else "provider, model"
    series = f"{metric}{{{SELECTOR}}}"
    if function == "rate":
        series = f"rate({series}[$__rate_interval])"
    elif function == "gain":
        # Not increase(): it takes a total that went backwards (a restored backup) for one that began at zero.
        series = f"(max_over_time({series}[$__range]) - min_over_time({series}[$__range]))"
    return f"sum{_by(by)} ({_once(series, names)})"


def share(*by: str, function: str = "") -> str:
    """The percentage of the input that was saved, defined as in ``Totals.savings_percent``; no data without input."""
    saved, sent = (
        total(metric, *by, function=function)
        for metric in ("savings_compared_tokens_saved_total", "savings_input_tokens_total")
    )
    return f"100 * {saved} / ({saved} + {sent} > 0)"


def of_instances(metric: str) -> str:
    """What each exporter shows."""
    return f"{metric}{{{SELECTOR}}}"


def happened(metric: str, *by: str) -> str:
    """How often something happened to the store of each exporter, counted anew at each point of a graph."""
    return f"sum by ({', '.join(('job', 'instance', *by))}) (increase({of_instances(metric)}[$__rate_interval]))"


def per_second(metric: str) -> str:
    """How often something happens to the store of each exporter."""
    return f"sum by (job, instance) (rate({of_instances(metric)}[$__rate_interval]))"


def quantile(share_of_all: float, histogram: str, *, step: str = "") -> str:
    """The quantile of the observations of each exporter's store."""
    selector = f'{SELECTOR}, step="{step}"' if step else SELECTOR
    buckets = f"rate({histogram}_bucket{{{selector}}}[$__rate_interval])"
    return f"histogram_quantile({share_of_all}, sum by (job, instance, le) ({buckets}))"


def buckets(histogram: str) -> str:
    """How many observations a second fall into each bucket, of all stores together."""
    rate = f"rate({of_instances(f'{histogram}_bucket')}[$__rate_interval])"
    return f"sum by (le) ({_once(rate, 'le')})"


def _once(series: str, names: str) -> str:
    """Each store's view with the largest value, by these labels."""
    named = f"{series} * on (job, instance) group_left (store) savings_store_info{{{SELECTOR}}}"
    return f"max by (store, {names}) ({named})"


def _by(labels: tuple[str, ...]) -> str:
    return f" by ({', '.join(labels)})" if labels else ""
