"""The figures of the crash lab, at the end of a run."""

from __future__ import annotations

import json
from dataclasses import asdict, fields

import pytest

from tests.crash.lab import LONG, RESULTS, Figures
from tests.support.paths import ROOT

RESULTS_FILE = ROOT / "build" / "crash-lab.json"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not RESULTS:
        return
    names = [field.name for field in fields(Figures)]
    width = max(map(len, RESULTS))
    terminalreporter.section("crash lab")
    terminalreporter.line(" " * width + "".join(f"  {name.replace('_', ' ')}" for name in names))
    for experiment, figures in RESULTS.items():
        cells = (f"  {value:>{len(name)},}" for name, value in asdict(figures).items())
        terminalreporter.line(f"{experiment:<{width}}{''.join(cells)}")
    if LONG:
        RESULTS_FILE.parent.mkdir(exist_ok=True)
        RESULTS_FILE.write_text(json.dumps({name: asdict(figures) for name, figures in RESULTS.items()}, indent=2))
        terminalreporter.line(f"written to {RESULTS_FILE.relative_to(ROOT)}")
