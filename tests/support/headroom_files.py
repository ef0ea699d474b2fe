"""A program that writes Headroom's document and ledger as Headroom 0.42 does, with any fault at any moment."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

FLUSH_EVERY = 25
"""How many requests Headroom's proxy records before it saves the document."""


class HeadroomFiles:
    """Headroom's files in ``.headroom`` of a directory, and what was saved in truth.

    ``saved`` and ``tools`` are all tokens that were saved by requests whose line is in the ledger or whose request is
    in the document.
    """

    def __init__(self, directory: Path, begun: datetime = datetime(2026, 11, 1, tzinfo=timezone.utc)) -> None:
        self.directory = directory / ".headroom"
        self.directory.mkdir()
        self.document = self.directory / "proxy_savings.json"
        self.ledger = self.directory / "savings_events.jsonl"
        self.now = begun
        self.saved = self.tools = self.requests = 0
        self._delayed: list[str] = []
        self._state: dict[str, Any] = _empty()
        self._since_flush = 0

    def request(
        self,
        saved: int,
        *,
        tools: int = 0,
        model: str = "claude-sonnet-4-5",
        project: str | None = None,
        seconds: float = 0.3,
        is_delayed: bool = False,
    ) -> None:
        """A request of the proxy. Its line may come after the next flush of the document."""
        self.now += timedelta(seconds=seconds)
        self.saved, self.tools, self.requests = self.saved + saved, self.tools + tools, self.requests + 1
        lifetime = self._state["lifetime"]
        _grow(lifetime, saved, tools)
        lifetime["tool_tokens_saved"] += tools
        _grow(self._state["by_model"].setdefault(model, {**_totals(), "tool_tokens_saved": 0}), saved, tools)
        self._state["by_model"][model]["tool_tokens_saved"] += tools
        if project is not None:
            of_project = self._state["projects"].setdefault(project, _totals())
            _grow(of_project, saved, tools)
            of_project["last_activity_at"] = _second(self.now)
        if saved or tools:
            point = {name: lifetime[name] for name in ("tool_tokens_saved", "compression_savings_usd")}
            point |= {"total_tokens_saved": lifetime["tokens_saved"], "timestamp": _second(self.now)}
            point |= {"total_input_tokens": lifetime["total_input_tokens"], "provider": "anthropic", "model": model}
            self._state["history"].append(point)
        self._since_flush += 1
        if self._since_flush >= FLUSH_EVERY:
            self.flush()
        if saved or tools:
            self.now += timedelta(milliseconds=7)
            line = _line(self.now, saved + tools, tools, model, "proxy")
            self._delayed.append(line)
        if not is_delayed:
            self.write_lines()

    def mcp_call(self, saved: int) -> None:
        """A call of the MCP server, which is only in the ledger."""
        self.now += timedelta(seconds=0.1)
        self.saved += saved
        self._append(_line(self.now, saved, 0, "unknown", "mcp"))

    def write_lines(self) -> None:
        """Write the lines that were delayed."""
        for line in self._delayed:
            self._append(line)
        self._delayed = []

    def flush(self) -> None:
        """Save the document."""
        temporary = self.document.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._state, indent=2))
        temporary.replace(self.document)
        self._since_flush = 0

    def crash(self) -> None:
        """Headroom is killed and started again: the requests since the last flush are only in the ledger."""
        self.write_lines()
        self.restart()

    def restart(self) -> None:
        """Headroom reads its document."""
        self._state = json.loads(self.document.read_text()) if self.document.exists() else _empty()
        self._since_flush = 0

    def compact(self, before: datetime) -> None:
        """Remove old lines from the ledger, in place."""
        if self.ledger.exists():
            kept = [line for line in self.ledger.read_text().splitlines(True) if json.loads(line)["ts"] >= str(before)]
            with self.ledger.open("r+") as file:
                file.truncate(0)
                file.write("".join(kept))

    def _append(self, line: str) -> None:
        with self.ledger.open("a") as file:
            file.write(line)


def _empty() -> dict[str, Any]:
    return {
        "schema_version": 6,
        "lifetime": {**_totals(), "tool_tokens_saved": 0, "compression_savings_list_usd": 0.0, "cache_read_tokens": 0},
        "history": [],
        "projects": {},
        "by_model": {},
    }


def _totals() -> dict[str, Any]:
    names = ("requests", "tokens_saved", "total_input_tokens")
    return {**dict.fromkeys(names, 0), "compression_savings_usd": 0.0, "total_input_cost_usd": 0.0}


def _grow(entry: dict[str, Any], saved: int, tools: int) -> None:
    entry["requests"] += 1
    entry["tokens_saved"] += saved
    entry["total_input_tokens"] += 1000
    usd = (saved + tools) * 3
    entry["compression_savings_usd"] = (round(entry["compression_savings_usd"] * 1e6) + usd) / 1e6
    if "compression_savings_list_usd" in entry:
        entry["compression_savings_list_usd"] = entry["compression_savings_usd"]


def _second(moment: datetime) -> str:
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}"


def _line(moment: datetime, saved: int, tools: int, model: str, source: str) -> str:
    event = {"v": 2, "ts": moment.isoformat(), "before": 1000 + saved, "after": 1000, "saved": saved}
    event |= {"cost_usd": saved * 3 / 1e6, "model": model, "client": "unknown", "source": source, "pid": 1}
    if source == "proxy":
        event["saved_tool_schema"] = tools
    return json.dumps(event, separators=(",", ":")) + "\n"
