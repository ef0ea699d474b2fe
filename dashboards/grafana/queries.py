"""The queries of the panels, in PromQL.

The ranges are Grafana's variables: ``$__rate_interval`` is long enough for a rate at the data source's scrape interval,
and ``$__range`` is the time range of the panel.

Several exporters can show the same store, such as two workers, or a service and a watcher. Each shows the whole store,
including its operation counters. A sum over exporters therefore uses only the largest value of each store.
"""

from __future__ import annotations

SELECTOR = 'job=~"$job", instance=~"$instance"'


def total(metric: str, *by: str, function: str = "") -> str:
    """The sum of a lifetime metric over all stores, or its ``rate``, or its ``gain`` within the panel's time range."""
    kind = metric.split("_")[1]
    names = kind if kind in ("project", "agent") else "provider, model"
    series = f"{metric}{{{SELECTOR}}}"
    if function == "rate":
        series = f"rate({series}[$__rate_interval])"
    elif function == "gain":
        # increase() is not used: it treats a total that decreased (a restored backup) as one that restarted from zero.
        series = f"(max_over_time({series}[$__range]) - min_over_time({series}[$__range]))"
    return f"sum{_by(by)} ({_once(series, names)})"


def share(*by: str, function: str = "") -> str:
    """The percentage of the input that was saved, as in ``Totals.savings_percent``; no data if there is no input."""
    saved, sent = (
        total(metric, *by, function=function)
        for metric in ("savings_compared_tokens_saved_total", "savings_input_tokens_total")
    )
    return f"100 * {saved} / ({saved} + {sent} > 0)"


def of_instances(metric: str) -> str:
    """The value of a metric for each exporter."""
    return f"{metric}{{{SELECTOR}}}"


def happened(metric: str, *by: str) -> str:
    """The number of events in the store of each exporter, within one interval of the graph."""
    return f"sum by ({', '.join(('job', 'instance', *by))}) (increase({of_instances(metric)}[$__rate_interval]))"


def per_second(metric: str) -> str:
    """The number of events per second in the store of each exporter."""
    return f"sum by (job, instance) (rate({of_instances(metric)}[$__rate_interval]))"


def quantile(share_of_all: float, histogram: str, *, step: str = "") -> str:
    """The quantile of the observations in the store of each exporter."""
    selector = f'{SELECTOR}, step="{step}"' if step else SELECTOR
    buckets = f"rate({histogram}_bucket{{{selector}}}[$__rate_interval])"
    return f"histogram_quantile({share_of_all}, sum by (job, instance, le) ({buckets}))"


def buckets(histogram: str) -> str:
    """The number of observations per second in each bucket, over all stores."""
    rate = f"rate({of_instances(f'{histogram}_bucket')}[$__rate_interval])"
    return f"sum by (le) ({_once(rate, 'le')})"


def _once(series: str, names: str) -> str:
    """The largest value of each store, by these labels."""
    named = f"{series} * on (job, instance) group_left (store) savings_store_info{{{SELECTOR}}}"
    return f"max by (store, {names}) ({named})"


def _by(labels: tuple[str, ...]) -> str:
    return f" by ({', '.join(labels)})" if labels else ""
