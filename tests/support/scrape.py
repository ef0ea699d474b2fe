"""Parse metrics as Prometheus parses them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector


def samples(collector: Collector) -> dict[str, float]:
    """Every sample of a collector, as Prometheus would read them: ``name{label="value",...}`` to value."""
    registry = CollectorRegistry()
    registry.register(collector)
    return parsed(generate_latest(registry).decode())


def parsed(text: str) -> dict[str, float]:
    """Samples of an exposition, labels in alphabetical order."""
    return {
        sample.name
        + ("{" + ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items())) + "}")
        * bool(sample.labels): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
