"""The queries of the panels, in PromQL.

The ranges are Grafana's variables: ``$__rate_interval`` is long enough for a rate at the data source's scrape interval,
and ``$__range`` is the time range of the panel.

Several exporters can show the same store, such as two workers, or a service and a watcher. Each shows the whole store,
including its operation counters. A sum over exporters therefore uses only the largest value of each store.

Queries keep every label of a target, such as ``namespace`` or ``cluster``: two targets that differ in one label
alone are two. A total keeps the last value of a store whose exporter is down, for a day.
"""

from __future__ import annotations

SELECTOR = 'job=~"$job", instance=~"$instance"'


_KEPT = "1d"


def total(metric: str, *by: str, function: str = "") -> str:
    """The sum of a lifetime metric over all stores, or its ``rate``, or its ``gain`` within the panel's time range."""
    kind = metric.split("_")[1]
    names = kind if kind in ("project", "agent", "source") else "provider, model"
    series = of_instances(metric)
    if function == "rate":
        series = f"rate({series}[$__rate_interval])"
    elif function == "gain":
        # increase() is not used: it treats a total that decreased (a restored backup) as one that restarted from zero.
        series = f"(max_over_time({series}[$__range]) - min_over_time({series}[$__range]))"
    joined = _with_store(series, names)
    if not function:
        # The step of the subquery is longer than a scrape interval, so the current value comes first.
        joined = f"{joined} or last_over_time(({joined})[{_KEPT}:1m])"
    return f"sum{_by(by)} (max by (store, {names}) ({joined}))"


def share(*by: str, function: str = "") -> str:
    """The percentage of the input that was saved, as in ``Totals.savings_percent``; no data if there is no input."""
    saved, sent = (
        total(metric, *by, function=function)
        for metric in ("savings_compared_tokens_saved_total", "savings_input_tokens_total")
    )
    return f"100 * {saved} / ({saved} + {sent} > 0)"


def of_instances(metric: str, *matchers: str) -> str:
    """The value of a metric for each exporter."""
    return f"{metric}{{{', '.join((SELECTOR, *matchers))}}}"


def happened(metric: str, *matchers: str) -> str:
    """The number of events in the store of each exporter, within one interval of the graph."""
    return f"increase({of_instances(metric, *matchers)}[$__rate_interval])"


def per_second(metric: str, *matchers: str) -> str:
    """The number of events per second in the store of each exporter."""
    return f"rate({of_instances(metric, *matchers)}[$__rate_interval])"


def quantile(share_of_all: float, histogram: str, *matchers: str) -> str:
    """The quantile of the observations in the store of each exporter."""
    buckets = per_second(f"{histogram}_bucket", *matchers)
    return f"histogram_quantile({share_of_all}, {buckets})"


def mean(histogram: str) -> str:
    """The mean of the observations in the store of each exporter."""
    return f"{per_second(f'{histogram}_sum')} / ({per_second(f'{histogram}_count')} > 0)"


def of_exporters(metric: str) -> str:
    """The value of a metric that other programs export as well, for the exporters alone."""
    return f"{of_instances(metric)} and ignoring (version, python_version) {of_instances('savings_build_info')}"


def down_since() -> str:
    """When each exporter that cannot be scraped was last scraped, as a Unix time; at most a day ago."""
    seen = f"max_over_time(timestamp({of_instances('savings_build_info')})[{_KEPT}:1m])"
    return f"max without (version, python_version) ({seen}) and {of_instances('up')} == 0"


def buckets(histogram: str) -> str:
    """The number of observations per second in each bucket, over all stores."""
    rate = f"rate({of_instances(f'{histogram}_bucket')}[$__rate_interval])"
    return f"sum by (le) (max by (store, le) ({_with_store(rate, 'le')}))"


def _with_store(series: str, names: str) -> str:
    """A series with the store of its exporter. ``names`` are the labels that the series has of its own."""
    info = of_instances("savings_store_info")
    return f"{series} * ignoring ({names}, store) group_left (store) {info}"


def _by(labels: tuple[str, ...]) -> str:
    return f" by ({', '.join(labels)})" if labels else ""
