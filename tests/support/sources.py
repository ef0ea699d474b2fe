"""Imports a source into a store, as the commands do."""

from __future__ import annotations

from savings_exporter import SavingsTracker
from savings_exporter.sources.importing import Importing, Summary
from savings_exporter.sources.source import Source


def imported(tracker: SavingsTracker, *sources: Source, is_complete: bool = True) -> Summary:
    """Import what is new in these sources."""
    summary = Summary()
    with tracker.importing() as importer:
        for source in sources:
            for step in Importing(importer, source).steps(is_complete=is_complete):
                summary.add(step)
    return summary
