"""Watching a file that another program owns."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from savings_exporter import StoreError
from savings_exporter.headroom import WatchedFile
from tests.support.paths import DATA
from tests.support.scrape import parsed
from tests.support.service import running

OLDER = DATA / "headroom" / "v5" / "proxy_savings.json"
NEWER = DATA / "headroom" / "v6-latest" / "proxy_savings.json"


@pytest.fixture
def watched(tmp_path: Path) -> Path:
    """A copy of a file of Headroom's, alone in its directory."""
    path = tmp_path / "headroom" / "proxy_savings.json"
    path.parent.mkdir()
    path.write_bytes(OLDER.read_bytes())
    return path


def replace(path: Path, data: bytes) -> None:
    """Replace a file as Headroom does."""
    temporary = path.with_name(".proxy_savings_new.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def test_a_scrape_finds_what_changed_and_nothing_is_ever_written(watched: Path) -> None:
    with running("watch", str(watched)) as service:
        assert total(service.get("/metrics")[1]) == 2_835_043
        replace(watched, NEWER.read_bytes())
        assert total(service.get("/metrics")[1]) == 2_672_322
        assert json.loads(service.get("/v1/savings")[1])["lifetime"]["tokens_saved"] == 2_672_322
        assert service.get("/")[0] == 200
        assert service.get("/-/healthy")[0] == service.get("/-/ready")[0] == 200
        status, problem = service.post({"model": "m", "tokens_saved": 1})
        assert (status, problem["status"]) == (405, 405)
        assert "savings-exporter serve" in problem["detail"]
        assert service.stop()[0] == 0
    assert watched.read_bytes() == NEWER.read_bytes()
    assert [entry.name for entry in watched.parent.iterdir()] == ["proxy_savings.json"]


def test_a_file_that_cannot_be_read_keeps_the_last_totals_and_says_so(watched: Path) -> None:
    with running("watch", str(watched)) as service:
        for breaking in (watched.unlink, lambda: watched.write_bytes(b'{"schema_version": 6, "lifeti')):
            breaking()
            text = service.get("/metrics")[1]
            assert total(text) == 2_835_043
            assert parsed(text)["savings_store_healthy"] == 0
            status, body = service.get("/-/healthy")
            assert status == 503
            assert str(watched) in json.loads(body)["detail"]
        replace(watched, OLDER.read_bytes())
        assert parsed(service.get("/metrics")[1])["savings_store_healthy"] == 1
        assert service.get("/-/healthy")[0] == 200


def test_a_file_that_is_not_there_at_the_start_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no such file"):
        WatchedFile(tmp_path / "none.json")
    assert list(tmp_path.iterdir()) == []


def test_names_are_bounded(tmp_path: Path) -> None:
    models = {f"m{number}": {"requests": 1, "tokens_saved": number} for number in range(1000)}
    document = {"schema_version": 6, "lifetime": {"requests": 1000, "tokens_saved": sum(range(1000))}}
    (tmp_path / "p.json").write_text(json.dumps({**document, "by_model": models}))
    snapshot = WatchedFile(tmp_path / "p.json").snapshot()
    assert len(snapshot.by_model) == len(snapshot.by_provider_model) == 201
    assert snapshot.by_model["other"].tokens_saved == sum(range(800))


def total(text: str) -> float:
    """The sum over models."""
    return sum(value for name, value in parsed(text).items() if name.startswith("savings_tokens_saved_total{"))
