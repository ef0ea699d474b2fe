"""Names and paths of others on a terminal and in a log: they set no title, no colours, and no direction of text."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from savings_exporter import SavingsRecord, SavingsTracker, cli
from tests.support.service import run_cli, running
from tests.support.wait import WAIT_SECONDS

# A title, a colour, C1 controls, the direction of text, separators of lines, no width, and a tag beyond U+FFFF.
HOSTILE = "\x1b]0;owned\x07\x1b[35m\x9b35m\x85\u202e\u2066\u2028\u200b\x7f\U000e0041"
ESCAPED = r"\u001b]0;owned\u0007\u001b[35m\u009b35m\u0085\u202e\u2066\u2028\u200b\u007f\udb40\udc41"
# What rich prints itself: styles, and the line that it draws again.
OWN_SEQUENCES = re.compile(r"\x1b\[(?!35m)[\d;]*[mAK]|\x1b\[\?25[lh]|\r")
RECORD = ["record", "--model", HOSTILE, "--tokens-saved", "1"]
COMMANDS = (
    ["show"],
    ["show", "--csv"],
    ["show", "--json"],
    ["names"],
    ["names", "--json"],
    ["names", "fold", "model", f"mm{HOSTILE}"],
    ["names", "let-in", "model", f"none{HOSTILE}"],
    ["export"],
    ["export", "--csv", "--by", "day,provider,model,project,agent,source"],
    ["export", "--json", "--by", "day,provider,model,project,agent,source"],
    ["backfill", "--output", "-"],
    ["verify"],
    ["verify", "--repair"],
    RECORD,
    ["record", "--model", "m", "--tokens-saved", HOSTILE],
    ["import", "TABLE", "--map", "model=m", "--map", "tokens_saved=t", "--dry-run"],
    ["import", "TABLE", "--map", "model=m", "--map", "tokens_saved=t"],
    ["import", HOSTILE],
    ["discover"],
    ["drill", "dir-fsync"],
    ["doctor"],
    ["ready"],
    ["serve", "--web.listen-address", HOSTILE],
    ["serve", "--prices", HOSTILE],
    ["watch", HOSTILE],
    ["assets", "--output", HOSTILE],
    ["assets", "--output", "assets", "--settings", HOSTILE],
    [HOSTILE],
)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with an intact checksum whose path and names are hostile."""
    path = tmp_path / f"{HOSTILE}.json"
    fields = {"model": "mm", "provider": "pp", "project": "jj", "agent": "aa", "source": "ss"}
    with SavingsTracker(path) as tracker:
        tracker.record_many([SavingsRecord(tokens_saved=5, input_tokens=9, **fields)])  # type: ignore[arg-type]
        tracker.let_in("model", "ll")
    text = path.read_text()
    for name in (*fields.values(), "ll"):
        text = text.replace(f'"{name}"', json.dumps(name + HOSTILE))
    blank = re.sub(r"sha256:[0-9a-f]{64}", "sha256:" + "0" * 64, text, count=1)
    digest = hashlib.sha256(blank.encode()).hexdigest()
    path.write_text(blank.replace("0" * 64, digest, 1))
    return path


def arguments_of(command: list[str], store: Path) -> list[str]:
    """The command for the store, with a table of hostile names."""
    table = store.parent / f"{HOSTILE}.csv"
    table.write_text(f"m,t\n{HOSTILE},5\n{HOSTILE},{HOSTILE}\n")
    filled = [str(table) if argument == "TABLE" else argument for argument in command]
    return filled if command[0] in ("watch", "assets", "ready", HOSTILE) else [*filled, "--store", str(store)]


def on_terminal(arguments: list[str], directory: Path) -> str:
    """What a command prints on a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "savings_exporter", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=directory,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "400", "HOME": str(directory)},
    )
    os.close(theirs)
    printed = b""
    try:
        while piece := os.read(ours, 1 << 16):
            printed += piece
    except OSError:
        pass  # Linux has it so when the last process has closed the terminal
    finally:
        os.close(ours)
        process.wait(WAIT_SECONDS)
    return printed.decode()


def assert_plain(text: str) -> None:
    assert [character for character in text if not character.isprintable() and character != "\n"] == []


def test_each_command_is_there() -> None:
    assert {command[0] for command in COMMANDS} >= set(cli.COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command).replace(HOSTILE, "HOSTILE"))
def test_terminal(store: Path, command: list[str]) -> None:
    printed = on_terminal(arguments_of(command, store), store.parent)
    assert "Traceback" not in printed
    assert_plain(OWN_SEQUENCES.sub("", printed))
    if command != RECORD and command[0] not in ("discover", "assets", "doctor", "ready"):
        assert "u202e" in printed


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command).replace(HOSTILE, "HOSTILE"))
def test_pipe(store: Path, command: list[str]) -> None:
    """A pipe may lead to a terminal. Only what is for a program, backfill, is passed on with each byte."""
    done = run_cli(*arguments_of(command, store), cwd=store.parent, env={"HOME": str(store.parent)})
    assert_plain(done.stderr)
    if command[0] == "backfill":
        assert HOSTILE in done.stdout
    else:
        assert_plain(done.stdout)


def _json(text: str) -> set[str]:
    return set(json.loads(text)["by_model"])


def _csv(text: str) -> set[str]:
    return {row["name"] for row in csv.DictReader(io.StringIO(text)) if row["kind"] == "model"}


@pytest.mark.parametrize(
    ("option", "names", "expected"),
    [("--json", _json, f"mm{HOSTILE}"), ("--csv", _csv, f"mm{ESCAPED}")],
)
def test_format_is_kept(store: Path, option: str, names: Callable[[str], set[str]], expected: str) -> None:
    assert names(run_cli("show", option, "--store", str(store)).stdout) == {expected}


@pytest.mark.parametrize("log_format", ["logfmt", "json"])
def test_log_and_announcement(store: Path, log_format: str) -> None:
    with running("serve", "--store", str(store), "--log.format", log_format) as service:
        service.post({"model": "m", "tokens_saved": HOSTILE})
        service.post({"model": "m", HOSTILE: 5})
        _, out, err = service.stop()
        assert_plain(service.announcement + out + err)
        assert ESCAPED in service.announcement
        assert "\\u202e" in err
        if log_format == "json":
            assert any(HOSTILE in json.loads(line)["msg"] for line in err.splitlines())


@pytest.mark.parametrize("start", ["=", "+", "-", "@"])
def test_name_like_a_formula(store_path: Path, start: str) -> None:
    """A spreadsheet does not calculate it. Programs read JSON, in which it is as it was recorded."""
    name = f'{start}HYPERLINK("http://192.0.2.1")'
    with running("serve", "--store", str(store_path)) as service:
        assert service.post({"model": name, "tokens_saved": 5, "savings_usd": -1})[0] == 200
        row = next(csv.DictReader(io.StringIO(service.get("/v1/history?format=csv")[1])))
        assert (row["model"], row["compression_savings_usd"]) == (f"'{name}", "-1.0")
        assert json.loads(service.get("/v1/history")[1])["rows"][0]["model"] == name
    assert name in json.loads(run_cli("show", "--json", "--store", str(store_path)).stdout)["by_model"]
    for command in ("show", "export"):
        rows = list(csv.reader(io.StringIO(run_cli(command, "--csv", "--store", str(store_path)).stdout)))
        assert any(f"'{name}" in row for row in rows)
