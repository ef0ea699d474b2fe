"""PromQL expressions that the rules share."""

from __future__ import annotations

from savings_exporter.assets.settings import RuleSettings


class Metrics:
    """Builds selectors of the exporters' metrics with the matchers of the settings.

    Rules keep every label of a target, such as ``namespace``, ``pod`` or ``cluster``: they aggregate with ``without``
    and join with ``ignoring``. So the labels reach the page, and two targets that differ in one label alone are two.
    """

    def __init__(self, settings: RuleSettings) -> None:
        self._selector = settings.selector.strip().strip(",")

    def of(self, name: str, matchers: str = "", window: str = "") -> str:
        """A metric's selector; with a ``window``, such as ``5m`` or ``1d offset 1h``, a range of it."""
        inner = ",".join(filter(None, (matchers, self._selector)))
        selected = f"{name}{{{inner}}}" if inner else name
        if not window:
            return selected
        duration, _, offset = window.partition(" offset ")
        return f"{selected}[{duration}]{f' offset {offset}' if offset else ''}"

    def with_store(self, metric: str, *labels: str) -> str:
        """A metric with the label ``store`` of its exporter. ``labels`` are those that the metric has of its own."""
        ignored = ", ".join((*labels, "store"))
        return f"{metric} * ignoring ({ignored}) group_left (store) {self.of('savings_store_info')}"

    def by_store(self, name: str) -> str:
        """A total by store, provider and model. Several exporters may show one store: it counts once."""
        joined = self.with_store(self.of(name), "provider", "model")
        return f"max by (store, provider, model) (\n  {joined}\n)"


def indented(text: str, by: int = 2) -> str:
    """Every line of a text, further to the right."""
    return "\n".join(" " * by + line if line else line for line in text.splitlines())
