"""Prices in the commands and in the service."""

from __future__ import annotations

import csv
import io
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from savings_exporter import SavingsTracker
from tests.support.service import run_cli, running

LIBRARY = f"genai-prices {version('genai-prices')}"
# GPT-5 costs 1.25 US dollars per million input tokens.
PRICED: dict[str, Any] = {"model": "gpt-5", "provider": "openai", "tokens_saved": 1_000_000, "input_tokens": 400_000}
PRIVATE: dict[str, Any] = {"model": "private", "provider": "openai", "tokens_saved": 1000}


@pytest.fixture
def no_library(tmp_path: Path) -> dict[str, str]:
    """The environment of a command that does not find the library."""
    hiding = tmp_path / "hiding"
    hiding.mkdir()
    (hiding / "sitecustomize.py").write_text('import sys\nsys.modules["genai_prices"] = None\n')
    return {"PYTHONPATH": str(hiding)}


def own_prices(directory: Path, rate: float = 2) -> str:
    path = directory / "prices.yml"
    path.write_text(f"models: {{private: {{input: {rate}}}}}")
    return str(path)


def record(store: Path, *arguments: str, env: dict[str, str] | None = None, **fields: Any) -> None:
    options = [text for name, value in fields.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    done = run_cli("record", "--store", str(store), *options, *arguments, env=env)
    assert done.returncode == 0, done.stderr


def shown(store: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run_cli("show", "--json", "--store", str(store)).stdout)
    return found


def test_service(store_path: Path) -> None:
    with running("serve", "--store", str(store_path)) as service:
        assert f"\nprices: {LIBRARY}\n" in service.announcement
        assert service.post(PRICED)[0] == 200
        assert service.post({"records": [PRIVATE, {**PRIVATE, "savings_usd": -0.25}]})[0] == 200
        metrics, page = service.metrics(), service.get("/")[1]
        totals = json.loads(service.get("/v1/savings")[1])
        status, _, errors = service.stop()
    assert status == 0
    said = [line.partition("closed: ")[2] for line in errors.splitlines()]
    assert said == ['3 records of this process, all durable"']
    assert metrics['savings_cost_saved_usd{model="gpt-5",provider="openai"}'] == 1.25
    assert metrics['savings_input_cost_usd{model="gpt-5",provider="openai"}'] == 0.5
    assert metrics['savings_unpriced_requests_total{model="private"}'] == 1
    assert metrics['savings_unpriced_requests_total{model="gpt-5"}'] == 0
    assert [basis["prices"] for basis in totals["prices"]] == [LIBRARY]
    assert totals["prices"][0]["since"].endswith("Z")
    assert (totals["lifetime"]["compression_savings_usd"], totals["lifetime"]["unpriced_requests"]) == (1.0, 1)
    assert "<dt>US dollars saved</dt><dd>1.00 + ?<small>1 request without a price</small></dd>" in page
    assert "<td>-0.25 + ?</td>" in page
    assert "<td>1.25</td>" in page
    assert shown(store_path)["prices"] == totals["prices"]


def test_model_without_any_price(store_path: Path) -> None:
    """Its dollars are unknown, wherever they are shown."""
    record(store_path, **PRIVATE)
    record(store_path, **PRICED)
    totals = shown(store_path)
    assert totals["by_model"]["private"]["compression_savings_usd"] is None
    text = run_cli("show", "--store", str(store_path)).stdout
    assert "US dollars saved: 1.25 + ? " in " ".join(text.split())
    assert "\nRequests without a price: 1\n" in text
    (line,) = [line for line in text.splitlines() if line.startswith("openai/private")]
    assert line.split()[:4] == ["openai/private", "1,000", "1", "–"]
    rows = list(csv.DictReader(io.StringIO(run_cli("show", "--csv", "--store", str(store_path)).stdout)))
    found = {row["name"]: (row["compression_savings_usd"], row["unpriced_requests"]) for row in rows}
    assert (found[""], found["private"], found["gpt-5"]) == (("1.25", "1"), ("", "1"), ("1.25", "0"))
    exported = run_cli("export", "--by", "provider", "--store", str(store_path)).stdout
    assert "1.25 + ?" in exported
    rows = list(csv.DictReader(io.StringIO(run_cli("export", "--csv", "--store", str(store_path)).stdout)))
    assert {row["model"]: row["compression_savings_usd"] for row in rows} == {"private": "", "gpt-5": "1.25"}


@pytest.mark.parametrize("by_variable", [False, True])
def test_own_prices(store_path: Path, tmp_path: Path, by_variable: bool) -> None:
    path = own_prices(tmp_path)
    if by_variable:
        record(store_path, env={"SAVINGS_EXPORTER_PRICES": path}, **PRIVATE)
    else:
        record(store_path, "--prices", path, **PRIVATE)
    totals = shown(store_path)
    assert totals["lifetime"]["compression_savings_usd"] == 0.002
    assert [basis["prices"].partition(" of ")[0] for basis in totals["prices"]] == ["prices.yml"]


def test_amount_that_is_given(store_path: Path) -> None:
    """The prices are not even read."""
    record(store_path, "--prices", "none.yml", **PRICED, savings_usd=0.125)
    totals = shown(store_path)
    assert (totals["lifetime"]["compression_savings_usd"], totals["prices"]) == (0.125, [])


@pytest.mark.parametrize("command", [["serve", "--web.listen-address", "127.0.0.1:0"], ["record"]])
def test_wrong_file(store_path: Path, tmp_path: Path, command: list[str]) -> None:
    path = own_prices(tmp_path, rate=-1)
    more = ["--model", "m", "--tokens-saved", "1"] if command == ["record"] else []
    done = run_cli(*command, *more, "--prices", path, "--store", str(store_path))
    rule = "must be 0 to 1,000,000 US dollars per million tokens"
    assert (done.returncode, done.stderr) == (
        1,
        f"savings-exporter: {path}: models: 'private': input {rule}, not -1.0\n",
    )
    assert not store_path.exists()


def test_without_the_library(store_path: Path, tmp_path: Path, no_library: dict[str, str]) -> None:
    record(store_path, env=no_library, **PRICED)
    assert shown(store_path)["prices"] == []
    record(store_path, "--prices", own_prices(tmp_path), env=no_library, **PRIVATE)
    totals = shown(store_path)
    found = {name: figures["compression_savings_usd"] for name, figures in totals["by_model"].items()}
    assert found == {"gpt-5": None, "private": 0.002}


def test_service_without_prices(store_path: Path, no_library: dict[str, str]) -> None:
    """It says so once, and counts as before."""
    with running("serve", "--store", str(store_path), env=no_library) as service:
        assert service.announcement.count("\nprices: none; pip install genai-prices, or give --prices FILE") == 1
        assert service.post(PRICED)[0] == 200
        assert service.metrics()['savings_unpriced_requests_total{model="gpt-5"}'] == 1
        assert "<dt>US dollars saved</dt><dd>–<small>no request has a price</small></dd>" in service.get("/")[1]
        status, out, log = service.stop()
        assert (status, out) == (0, "")
        said = [line.partition("closed: ")[2] for line in log.splitlines()]
        assert said == ['1 records of this process, all durable"']


def test_embedded_tracker(store_path: Path) -> None:
    """It calculates nothing, unless its program asks for it."""
    with SavingsTracker(store_path) as tracker:
        tracker.record_request(model="gpt-5", provider="openai", tokens_saved=1000)
        assert tracker.snapshot().lifetime.savings_usd is None
