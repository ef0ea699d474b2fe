"""Made-up traffic for a first look. It is seeded, so every run records the same savings."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

from savings_exporter.model.record import SavingsRecord
from savings_exporter.tracker import SavingsTracker

_SEED = 20260601

# Model, provider, US dollars for a million input tokens, share of the traffic.
_MODELS = (
    ("claude-sonnet-4-5", "anthropic", 3.0, 40),
    ("claude-haiku-4-5", "anthropic", 1.0, 20),
    ("gpt-5", "openai", 1.25, 20),
    ("gpt-4o-mini", "openai", 0.15, 10),
    ("gemini-2.5-pro", "google", 1.25, 10),
)
_PROJECTS = (("billing-api", 30), ("web", 25), ("infra/terraform", 15), ("ml notebooks", 10), (None, 20))
_MEAN_PAUSE_SECONDS = 0.3


class DemoTraffic:
    """Records made-up savings in the background until it is stopped."""

    def __init__(self, tracker: SavingsTracker) -> None:
        self._tracker = tracker
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._record, name="savings-demo", daemon=True)

    def __enter__(self) -> DemoTraffic:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _record(self) -> None:
        for pause, record in made_up_savings():
            if self._stopped.wait(pause):
                return
            self._tracker.record_many([record], wait=False)


def made_up_savings() -> Iterator[tuple[float, SavingsRecord]]:
    """Pauses in seconds, each with the saving that follows it, without an end."""
    dice = random.Random(_SEED)
    models, projects = [model[-1] for model in _MODELS], [project[-1] for project in _PROJECTS]
    while True:
        model, provider, usd_per_million, _ = dice.choices(_MODELS, models)[0]
        before = int(dice.lognormvariate(9.5, 0.9))
        saved = int(before * dice.betavariate(2, 5))
        deferred = int(dice.lognormvariate(7, 0.6)) if dice.random() < 0.3 else 0
        cached = int((before - saved) * dice.betavariate(5, 2)) if dice.random() < 0.6 else 0
        saved_usd = (saved + deferred) * usd_per_million / 1e6
        if cached and dice.random() < 0.05:
            # A rewrite that broke the prompt cache costs more than it saved.
            saved_usd -= cached * usd_per_million / 1e6
        record = SavingsRecord(
            model=model,
            provider=provider,
            project=dice.choices(_PROJECTS, projects)[0][0],
            agent=dice.choice(["claude-code", "codex", "opencode"]),
            input_tokens=before - saved,
            tokens_saved=saved,
            tool_search_saved=deferred,
            output_tokens=int(dice.lognormvariate(6, 0.8)),
            output_tokens_saved=int(dice.lognormvariate(4, 0.7)) if dice.random() < 0.2 else 0,
            cache_read_tokens=cached,
            uncached_input_tokens=before - saved - cached,
            savings_usd=round(saved_usd, 6),
            input_cost_usd=round((before - saved - 0.9 * cached) * usd_per_million / 1e6, 6),
        )
        yield dice.expovariate(1 / _MEAN_PAUSE_SECONDS), record
