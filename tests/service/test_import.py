"""``import`` and ``discover`` as a user runs them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from savings_exporter import SavingsTracker
from savings_exporter.storage.repair import is_begun
from savings_exporter.watched import WatchedFile
from tests.support.headroom_files import HeadroomFiles
from tests.support.paths import DATA
from tests.support.rtk_files import Rtk
from tests.support.service import run_cli, running
from tests.support.wait import WAIT_SECONDS, eventually

DOCUMENT = DATA / "headroom" / "v6-latest" / "proxy_savings.json"
SAVED = json.loads(DOCUMENT.with_name("expected.json").read_text())["lifetime"]["tokens_saved"]

CSV = "when;llm;sent;saved\n2026-11-01T10:00:00Z;gpt-4o;1000;300\n2026-11-02T11:00:00Z;gpt-4o;500;oops\n"
MAPPING = ("--map", "tokens_saved=saved", "--map", "model=llm", "--map", "timestamp=when", "--map", "input_tokens=sent")


def saved(store: Path) -> int:
    return WatchedFile(store).snapshot().lifetime.tokens_saved


def test_dry_run_changes_nothing(store_path: Path) -> None:
    store = ("--store", str(store_path))
    ran = run_cli("import", str(DOCUMENT), "--dry-run", *store)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert f"{SAVED:,}" in ran.stdout
    assert not is_begun(str(store_path))
    assert run_cli("import", str(DOCUMENT), *store).returncode == 0
    assert saved(store_path) == SAVED
    again = run_cli("import", str(DOCUMENT), "--dry-run", *store)
    assert f"{SAVED:,}" not in again.stdout
    assert saved(store_path) == SAVED


def test_table_with_prices(store_path: Path, tmp_path: Path) -> None:
    table, prices = tmp_path / "gate\x1bway.csv", tmp_path / "prices.yml"
    table.write_text(CSV)
    prices.write_text("models: {gpt-4o: {input: 1000}}")
    arguments = (*MAPPING, "--set", "provider=openai", "--source", "gateway", "--store", str(store_path))
    ran = run_cli("import", str(table), *arguments, "--prices", str(prices))
    assert ran.returncode == 0
    assert "line 3: tokens_saved: 'oops' is not a whole number" in ran.stderr
    assert "\x1b" not in ran.stdout + ran.stderr
    snapshot = WatchedFile(store_path).snapshot()
    assert snapshot.sources["gateway"].tokens_saved == 300
    assert snapshot.lifetime.savings_usd == 0.3
    assert "prices.yml" in snapshot.price_bases[0].prices
    with table.open("a") as file:
        file.write("2026-11-03T11:00:00Z;gpt-4o;500;9")
    assert run_cli("import", str(table), *arguments).returncode == 0
    assert saved(store_path) == 309


def test_mistakes_are_told_in_one_line(store_path: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text(CSV)
    for arguments, status, problem in (
        ((str(table),), 1, "--map"),
        ((str(tmp_path / "nothing"),), 1, "No such file"),
        ((str(tmp_path),), 1, "cannot be read"),
        ((str(table), "--map", "tokens=saved"), 2, "'tokens' is not a field"),
        ((str(table), "--map", "tokens_saved=nowhere"), 1, "nowhere"),
        ((str(DOCUMENT), "--let-in", "line 5"), 1, "no record named line 5"),
    ):
        ran = run_cli("import", *arguments, "--store", str(store_path))
        assert (ran.returncode, ran.stdout) == (status, ""), ran.stdout
        assert problem in ran.stderr
        assert len(ran.stderr.splitlines()) == 1


def test_kept_out_rows_are_let_in(store_path: Path, tmp_path: Path) -> None:
    history = Rtk(tmp_path / "history.db")
    history.command(1000, 100)
    history.command(9000, 100)
    store = ("--store", str(store_path))
    ran = run_cli("import", str(history.path), *store)
    assert "row 2: 8,900 tokens saved are kept out: oversized" in ran.stderr
    assert saved(store_path) == 900
    with running("serve", *store) as service:
        metrics = service.metrics()
        assert metrics['savings_rejected_records_total{reason="oversized",source="rtk"}'] == 1
        assert metrics['savings_rejected_records_total{reason="damaged",source="rtk"}'] == 0
    assert run_cli("import", str(history.path), *store, "--let-in", "oversized").returncode == 0
    assert saved(store_path) == 9800


def test_discover(store_path: Path, tmp_path: Path) -> None:
    environment = {"HEADROOM_WORKSPACE_DIR": str(tmp_path / ".headroom"), "RTK_DB_PATH": str(tmp_path / "history.db")}
    store = ("--store", str(store_path))
    nothing = run_cli("discover", *store, env=environment)
    assert (nothing.returncode, nothing.stdout) == (1, "")
    files, history = HeadroomFiles(tmp_path), Rtk(tmp_path / "history.db")
    for _ in range(25):
        files.request(100)
    history.command(1000, 100)
    ran = run_cli("discover", *store, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert "2,500" in ran.stdout
    assert "900" in ran.stdout
    assert not is_begun(str(store_path))
    files.document.write_text("{")
    damaged = run_cli("discover", *store, env=environment)
    assert damaged.returncode == 0
    assert "is not JSON" in damaged.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_watch_follows_and_refuses_another_importer(store_path: Path, tmp_path: Path, number: int) -> None:
    files = HeadroomFiles(tmp_path)
    files.flush()
    store = ("--store", str(store_path))
    process = subprocess.Popen(
        [sys.executable, "-m", "savings_exporter", "discover", "--watch", *store],
        env={"HEADROOM_WORKSPACE_DIR": str(files.directory), "RTK_DB_PATH": "/nowhere", "HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert "follows other programs' savings" in process.stdout.readline()
        for _ in range(30):
            files.request(100)
        eventually(lambda: is_begun(str(store_path)) and saved(store_path) == 3000, "the savings")
        refused = run_cli("import", str(DOCUMENT), *store)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "another process imports into this store" in refused.stderr
        process.send_signal(number)
        assert process.wait(WAIT_SECONDS) == 0
    finally:
        process.kill()
        process.communicate()
    assert run_cli("import", str(DOCUMENT), *store).returncode == 0
    assert saved(store_path) == 3000 + SAVED


def test_source_that_cannot_be_imported_is_shown(store_path: Path, tmp_path: Path) -> None:
    files = HeadroomFiles(tmp_path)
    for _ in range(25):
        files.request(100)
    environment = {"HEADROOM_WORKSPACE_DIR": str(files.directory), "RTK_DB_PATH": "/nowhere"}
    readable = 'savings_source_readable{source="headroom"}'
    arguments = ("serve", "--discover", "--store", str(store_path))
    with (
        SavingsTracker(store_path) as tracker,
        tracker.importing(),
        running(*arguments, env=environment) as service,
    ):
        eventually(lambda: service.metrics().get(readable) == 0, "the problem")
        assert saved(store_path) == 0
    with running(*arguments, env=environment) as service:
        eventually(lambda: service.metrics().get(readable) == 1 and saved(store_path) == 2500, "the savings")
        files.document.write_text("{")
        eventually(lambda: service.metrics()[readable] == 0, "the damage")
        files.flush()
        eventually(lambda: service.metrics()[readable] == 1, "the end of the damage")
        status, _, err = service.stop()
        assert status == 0
        assert err.count("is not JSON") == 1
