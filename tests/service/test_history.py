"""What was saved on each day, over HTTP and from the shell."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from savings_exporter import SavingsTracker
from tests.support.paths import DATA
from tests.support.service import Service, run_cli, running

SAVINGS = [
    ("2026-06-01T23:59:59Z", {"model": "a", "source": "rtk", "tokens_saved": 10, "savings_usd": 0.5}),
    ("2026-06-02T00:00:00Z", {"model": "a", "source": "headroom", "tokens_saved": 20, "input_tokens": 60}),
    ("2026-06-02T12:00:00Z", {"model": "b", "project": "x", "tokens_saved": 30}),
    ("2026-06-03T12:00:00+14:00", {"model": "b", "agent": "cli", "provider": "p", "tokens_saved": 40}),
]


@pytest.fixture
def stored(store_path: Path) -> Path:
    """A store with savings on three days: the last one is still the second of June in UTC."""
    with SavingsTracker(store_path) as tracker:
        for moment, fields in SAVINGS:
            assert tracker.record_request(timestamp=moment, **fields).durable  # type: ignore[arg-type]
    return store_path


@pytest.fixture
def service(stored: Path) -> Iterator[Service]:
    with running("serve", "--store", str(stored)) as service:
        yield service


def rows(service: Service, query: str = "") -> list[dict[str, Any]]:
    status, text = service.get(f"/v1/history{query}")
    assert status == 200, text
    found: list[dict[str, Any]] = json.loads(text)["rows"]
    return found


def tokens(found: list[dict[str, Any]], *by: str) -> dict[tuple[Any, ...], int]:
    return {tuple(row[name] for name in by): row["tokens_saved"] for row in found}


def test_rows(service: Service) -> None:
    assert tokens(rows(service), "day", "model") == {
        ("2026-06-01", "a"): 10,
        ("2026-06-02", "a"): 20,
        ("2026-06-02", "b"): 70,
    }
    assert tokens(rows(service, "?by=source"), "source") == {("rtk",): 10, ("headroom",): 20, (None,): 70}
    assert tokens(rows(service, "?by=provider,project,agent"), "provider", "project", "agent") == {
        ("unknown", None, None): 30,
        ("unknown", "x", None): 30,
        ("p", None, "cli"): 40,
    }
    assert tokens(rows(service, "?from=2026-06-02&to=2026-06-02&by=day"), "day") == {("2026-06-02",): 90}
    assert tokens(rows(service, "?from=2026-06-01&by=day"), "day") == {("2026-06-01",): 10, ("2026-06-02",): 90}
    assert rows(service, "?from=2026-06-04") == []
    first, second, third = rows(service)
    assert (first["compression_savings_usd"], first["savings_percent"]) == (0.5, None)
    assert (second["compression_savings_usd"], second["savings_percent"]) == (None, 25.0)
    assert third["requests"] == 2


def test_formats(service: Service, stored: Path) -> None:
    """The same rows as CSV, and from the shell."""
    status, text = service.get("/v1/history?format=csv&by=day,source")
    assert status == 200
    as_csv = list(csv.DictReader(io.StringIO(text)))
    as_json = rows(service, "?by=day,source")
    assert [row.keys() for row in as_csv] == [row.keys() for row in as_json]
    assert [{name: str(value) if value is not None else "" for name, value in row.items()} for row in as_json] == as_csv
    done = run_cli("export", "--store", str(stored), "--by", "day,source", "--csv")
    assert (done.returncode, done.stdout, done.stderr) == (0, text, "")
    done = run_cli("export", "--store", str(stored), "--by", "day,source", "--json", "--from", "2026-06-02")
    assert done.returncode == 0
    assert json.loads(done.stdout) == json.loads(service.get("/v1/history?by=day,source&from=2026-06-02")[1])
    shown = run_cli("export", "--store", str(stored)).stdout
    assert [line.split()[:3] for line in shown.splitlines()[1:]] == [
        ["2026-06-01", "a", "10"],
        ["2026-06-02", "a", "20"],
        ["2026-06-02", "b", "70"],
    ]


@pytest.mark.parametrize(
    ("query", "option", "field"),
    [
        ("from=yesterday", ["--from", "yesterday"], "from"),
        ("to=2026-02-30", ["--to", "2026-02-30"], "to"),
        ("from=2026-06-02&to=2026-06-01", ["--from", "2026-06-02", "--to", "2026-06-01"], "to"),
        ("by=week", ["--by", "week"], "by"),
        ("by=", ["--by", ""], "by"),
        ("by=day,day", ["--by", "day,day"], "by"),
        ("format=xml", ["--json", "--csv"], "format"),
        ("form=json", ["--form"], "form"),
    ],
)
def test_wrong_query(service: Service, stored: Path, query: str, option: list[str], field: str) -> None:
    status, text = service.get(f"/v1/history?{query}")
    problem = json.loads(text)
    assert (status, problem["field"]) == (422, field)
    assert problem["detail"].startswith(field)
    done = run_cli("export", "--store", str(stored), *option)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_what_has_no_day(tmp_path: Path) -> None:
    """What another program's document holds is a row of its own, only where no first day is asked for."""
    headroom = DATA / "headroom" / "v6" / "proxy_savings.json"
    total = json.loads(headroom.read_text())["lifetime"]["tokens_saved"]
    with running("watch", str(headroom)) as service:
        assert tokens(rows(service), "day", "model") == {(None, None): total}
        assert rows(service, "?from=2000-01-01") == []
    assert "before" in run_cli("export", "--store", str(headroom)).stdout
    done = run_cli("export", "--store", str(tmp_path / "none.json"))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "there are no savings yet" in done.stderr


def test_damaged_days(stored: Path) -> None:
    """The service says so, and goes on."""
    (file,) = stored.parent.glob("*.days.*")
    file.write_bytes(b"damaged")
    with running("serve", "--store", str(stored)) as service:
        status, text = service.get("/v1/history")
        assert (status, file.name in json.loads(text)["detail"]) == (503, True)
        assert service.post({"model": "m", "tokens_saved": 1})[0] == 200
    done = run_cli("export", "--store", str(stored))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "verify --repair" in done.stderr
