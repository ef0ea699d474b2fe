"""The command line as users run it: its output and exit status."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from savings_exporter import SavingsTracker, cli, tracker
from savings_exporter.service.drill import KINDS
from tests.support.faults import FaultyFileSystem
from tests.support.paths import DATA, ROOT
from tests.support.service import run_cli, running
from tests.support.wait import WAIT_SECONDS

HEADROOM = DATA / "headroom" / "v6-latest" / "proxy_savings.json"
# What differs between two answers about the same totals.
NO_TIMES = {"saved_at": None, "read_at": None}


@pytest.fixture
def filled(store_path: Path) -> Path:
    """A store with two models and a project."""
    with SavingsTracker(store_path) as tracker:
        tracker.record_request(
            model="claude", provider="anthropic", tokens_saved=3000, input_tokens=1000, project="web"
        )
        tracker.record_request(model="gpt [bold]x", provider="openai", tokens_saved=1000, savings_usd=-0.5)
    return store_path


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["serve", "--nope"], 2, "--nope"),
        (["nonsense"], 2, "nonsense"),
        (["watch"], 2, "PATH"),
        (["record", "--model", "m"], 2, "--tokens-saved"),
        (["record", "--model", "m", "--tokens-saved", "many"], 2, "'--tokens-saved': 'many' is not a valid integer."),
        (["serve", "--log.level", "loud"], 2, "'loud' is not one of"),
        (["serve", "--web.listen-address", "192.0.2.1:9478"], 1, "Choose another with --web.listen-address"),
        (["record", "--model", "m", "--tokens-saved", "-1"], 2, ": --tokens-saved must not be negative"),
        (
            ["record", "--model", "m", "--tokens-saved", "1", "--savings-usd", "nan"],
            2,
            "--savings-usd must be finite",
        ),
        (
            ["record", "--model", "m", "--tokens-saved", "1", "--timestamp", "x"],
            2,
            "timestamp such as 2026-01-31T23:59",
        ),
        (["drill", "nonsense"], 2, "'KIND': 'nonsense' is not one of 'dir-fsync'"),
        (["serve", "--web.listen-address", "nowhere"], 2, "HOST:PORT"),
        (["serve", "--web.listen-address", "127.0.0.1:70000"], 2, "HOST:PORT"),
        (["serve", "--web.telemetry-path", "/v1/savings"], 2, "/v1/savings"),
        (["serve", "--web.telemetry-path", "/openapi.json"], 2, "must not be the path of another page"),
        (["serve", "--web.telemetry-path", "/favicon.ico"], 2, "must not be the path of another page"),
        (["serve", "--web.allowed-host", "https://savings.example"], 2, "is not a name such as savings.example.org"),
        (["watch", "none.json", "--web.allowed-host", "savings.example:443"], 2, "without https:// and port"),
        (["assets", "--output", ""], 2, "'--output': the path is empty; name one"),
        (["assets", "--output", "out", "--settings", ""], 2, "'--settings': the path is empty"),
        (["backfill", "--output", ""], 2, "'--output': the path is empty"),
        (["export", "--headroom", ""], 2, "'--headroom': the path is empty"),
        (["import", ""], 2, "the path is empty"),
        (["serve", "--web.config.file", ""], 2, "the path is empty"),
        (["serve", "--store", "."], 1, "is a directory"),
        (["serve", "--store", "missing/savings.json"], 1, "mkdir -p"),
        (["record", "--store", "missing/s.json", "--model", "m", "--tokens-saved", "1"], 1, "mkdir -p"),
        (["show", "--store", "none.json"], 1, "savings-exporter record"),
        (["show", "--store", "."], 1, "is a directory; name the document in it: --store ./proxy_savings.json"),
        (["watch", ""], 2, "an empty PATH; name the document\n"),
        (["watch", "none.json"], 1, "there is no such file"),
        (["verify", "--store", "none.json"], 1, "there is no store yet"),
        (["verify", "--repair", "--store", "none.json"], 1, "nothing to repair"),
        (["serve", "--web.config.file", "none.yml"], 1, "none.yml"),
    ],
)
def test_mistake_gets_one_line(tmp_path: Path, arguments: list[str], status: int, said: str) -> None:
    env = {"SAVINGS_EXPORTER_WEB_LISTEN_ADDRESS": "127.0.0.1:0", "XDG_STATE_HOME": str(tmp_path / "state")}
    done = run_cli(*arguments, cwd=tmp_path, env=env)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (status, "", 1), done.stderr
    assert done.stderr.startswith("savings-exporter: ")
    assert said in done.stderr


def test_port_in_use_gets_one_line(store_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = run_cli("serve", "--store", str(store_path), "--web.listen-address", address)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert address in done.stderr
    assert "in use" in done.stderr
    assert not store_path.exists()


def test_port_of_another_service(store_path: Path) -> None:
    with running("serve", "--store", str(store_path)) as service:
        address = service.url.removeprefix("http://")
        for command in (["serve", "--store", f"{store_path}.2"], ["watch", str(HEADROOM)]):
            done = run_cli(*command, "--web.listen-address", address)
            assert (done.returncode, done.stderr.count("\n")) == (1, 1)
            assert f"port {address.rpartition(':')[2]} is taken by the savings-exporter that shows {store_path}. " in (
                done.stderr
            )
            assert "for example with --web.listen-address 127.0.0.1:" in done.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("tls_server_config: {cert_file: a}", "tls_server_config lacks the field key_file"),
        ("unknown: 1", "an unknown field unknown; the fields are tls_server_config, authorization"),
        ("authorization: {file: a}", "authorization has an unknown field file; the fields are credentials_file"),
        ("[", "is not YAML"),
        ("authorization: 5", "authorization must be an object or null, not an integer"),
        ("5", "the content must be an object, not an integer"),
        ("", "is empty"),
        ("authorization:", "authorization is empty"),
        ("tls_server_config: {cert_file: /none.crt, key_file: b}", "tls_server_config.cert_file: /none.crt cannot be"),
    ],
)
def test_wrong_web_config(tmp_path: Path, store_path: Path, content: str, said: str) -> None:
    config = tmp_path / "web.yml"
    config.write_text(content)
    done = run_cli("serve", "--store", str(store_path), "--web.config.file", str(config))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"{config}: " in done.stderr
    assert said in done.stderr


def test_version_and_help() -> None:
    assert re.fullmatch(r"savings-exporter \d+\.\d+\.\d+\n", run_cli("--version").stdout)
    for command in ([], *([name] for name in cli.COMMANDS)):
        done = run_cli(*command, "--help")
        assert (done.returncode, done.stderr) == (0, "")
        assert "Usage" in done.stdout
        assert run_cli(*command, "-h").stdout == done.stdout
    assert [kind for kind in KINDS if kind not in run_cli("drill", "--help").stdout] == []
    bare = run_cli()
    assert (bare.returncode, bare.stdout) == (0, run_cli("--help").stdout)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_options_are_documented(command: str) -> None:
    """docs/cli.md has each option of a command, and says so for this command."""
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(--[\w.-]+)[^|]*\| ([^|]*) \|", page, re.MULTILINE)
    documented = {
        option for option, commands in rows if (f"`{command}`" in commands) != commands.startswith("all but ")
    }
    if command == "record":
        documented |= set(re.findall(r"`(--[\w-]+)", page.split("`record` takes")[1].split("## ")[0]))
    shown = set(re.findall(r"^  (?:-h, )?(--[\w.-]+)", run_cli(command, "--help").stdout, re.MULTILINE))
    assert documented == shown - {"--help"}


@pytest.mark.parametrize("total", [5, 0])
def test_document_without_requests(tmp_path: Path, total: int) -> None:
    """As early releases of Headroom wrote it: what it holds is counted all the same."""
    path = tmp_path / "proxy_savings.json"
    path.write_text(json.dumps({"schema_version": 2, "lifetime": {"tokens_saved": total}}))
    for command, said in (("show", "5 tokens saved in 0 requests"), ("verify", "5 tokens saved in 0 records")):
        printed = run_cli(command, "--store", str(path)).stdout
        assert (said in printed, "the store is empty" in printed) == (bool(total), not total)


@pytest.mark.parametrize("content", ['{"name": "web", "version": "1.0.0"}', '{"schema_version": 3, "name": "x"}', "[]"])
@pytest.mark.parametrize("command", ["serve", "record", "show", "verify", "verify --repair", "watch"])
def test_file_of_something_else(tmp_path: Path, content: str, command: str) -> None:
    """The file is refused, and neither the file nor its directory is changed."""
    path = tmp_path / "package.json"
    path.write_text(content)
    arguments = {"record": ["--model", "m", "--tokens-saved", "1"], "serve": ["--web.listen-address", "127.0.0.1:0"]}
    named = [str(path)] if command == "watch" else ["--store", str(path)]
    done = run_cli(*command.split(), *arguments.get(command, []), *named)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert f"{path}: is not a savings document" in done.stderr
    assert "damaged" not in done.stderr
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("package.json", content)]


@pytest.mark.parametrize(
    "content", ['{"schema_version": 20, "name": "x"}', "no JSON", '{"schema_version": 3, "history": ["ls"]}']
)
@pytest.mark.parametrize("has_previous", [False, True])
def test_nothing_is_left_beside_a_file(tmp_path: Path, content: str, has_previous: bool) -> None:
    path, names = tmp_path / "settings.json", ["settings.json"]
    path.write_text(content)
    if has_previous:
        names.append("settings.json.previous")
        (tmp_path / names[1]).write_text(content)
    for command in (["record", "--model", "m", "--tokens-saved", "1"], ["verify", "--repair"], ["show"], ["verify"]):
        done = run_cli(*command, "--store", str(path))
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert sorted(entry.name for entry in tmp_path.iterdir()) == names
        assert {entry.read_text() for entry in tmp_path.iterdir()} == {content}


def test_something_else_in_a_stores_place(store_path: Path) -> None:
    """The store is damaged. The error says what is lost, and suggests no other path, where totals would be zero."""
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_request(model="m", tokens_saved=100).durable
    store_path.write_text("{}")
    store_path.with_name(store_path.name + ".previous").unlink()
    for command in (["show"], ["verify"], ["record", "--model", "m", "--tokens-saved", "1"]):
        done = run_cli(*command, "--store", str(store_path))
        assert done.returncode == 1
        assert "its totals are lost. If this is not the store, correct the path" in done.stderr
        assert "choose another path" not in done.stderr


def test_port_of_a_hostile_server(store_path: Path) -> None:
    """One that never ends its answer, and one whose path would write to the terminal."""

    def answering(content: bytes) -> Callable[[socket.socket], None]:
        def answer(client: socket.socket) -> None:
            client.recv(4096)
            client.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + content)

        return answer

    def dripping(client: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

    for answer in (
        dripping,
        answering(b"[" * 200_000),
        answering(b'{"storage_path":"/x\\u001b[2J\\nsavings-exporter: all is well"}'),
        answering(b'{"storage_path":"' + b"/x" * 1_000_000 + b'"}'),
    ):
        with socket.create_server(("127.0.0.1", 0)) as server:
            thread = threading.Thread(
                target=lambda answer=answer, server=server: answer_one(server, answer), daemon=True
            )
            thread.start()
            address = f"127.0.0.1:{server.getsockname()[1]}"
            done = run_cli("serve", "--store", str(store_path), "--web.listen-address", address)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "is taken by another program" in done.stderr
        assert len(done.stderr) < 1000
        assert done.stderr.strip().isprintable()


def answer_one(server: socket.socket, answer: Callable[[socket.socket], None]) -> None:
    with server.accept()[0] as client, suppress(OSError):
        answer(client)


def test_empty_store(store_path: Path) -> None:
    """A service has it open, and nothing is recorded yet."""
    with running("serve", "--store", str(store_path)):
        for command in ("show", "verify"):
            done = run_cli(command, "--store", str(store_path))
            assert (done.returncode, done.stderr) == (0, "")
            assert "the store is empty" in done.stdout
        shown = json.loads(run_cli("show", "--json", "--store", str(store_path)).stdout)
        assert (shown["sequence"], shown["last_record_at"]) == (0, None)


def test_no_home_directory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As for a user that is in no list of users."""
    for name in ("HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    for command in (["show"], ["serve", "--web.listen-address", "127.0.0.1:0"], ["verify"], ["doctor"]):
        monkeypatch.setattr(sys, "argv", ["savings-exporter", *command])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 1
        error = capsys.readouterr().err
        assert error.startswith("savings-exporter: this user has no home directory")
        assert "--store PATH" in error
        assert error.count("\n") == 1


def test_record_with_a_key(store_path: Path) -> None:
    command = ["record", "--store", str(store_path), "--model", "m", "--idempotency-key", "build 7", "--tokens-saved"]
    assert run_cli(*command, "5").stdout == "recorded: 5 tokens saved in total\n"
    assert run_cli(*command, "5").stdout == "counted before: 5 tokens saved in total\n"
    other = run_cli(*command, "6")
    assert (other.returncode, other.stderr.count("\n")) == (1, 1)
    assert "--idempotency-key was used before with other content" in other.stderr
    wrong = run_cli(
        "record", "--store", str(store_path), "--model", "m", "--tokens-saved", "5", "--idempotency-key", ""
    )
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)


def test_start_line_has_a_command(store_path: Path) -> None:
    with running("serve", "--store", str(store_path)) as service:
        assert str(store_path) in service.announcement
        command = service.announcement.partition("record one: ")[2].splitlines()[0]
        done = subprocess.run(command, shell=True, capture_output=True, check=True)
        answered = json.loads(done.stdout)
        assert (answered["sequence"], answered["accepted"], answered["durable"]) == (1, 1, True)
        status, out, err = service.stop()
    assert (status, out) == (0, "")
    (goodbye,) = err.splitlines()
    assert "closed: 1 records of this process, all durable" in goodbye


def test_default_store(tmp_path: Path) -> None:
    env = {"XDG_STATE_HOME": str(tmp_path / "new" / "state")}
    done = run_cli("record", "--model", "m", "--tokens-saved", "7", env=env)
    assert done.stdout == "recorded: 7 tokens saved in total\n"
    assert (tmp_path / "new" / "state" / "savings-exporter" / "proxy_savings.json").exists()
    assert run_cli("show", env=env).stdout.startswith("7 tokens saved in 1 request, ")


def test_show_draws_a_table_with_bars(filled: Path) -> None:
    lines = run_cli("show", "--store", str(filled)).stdout.splitlines()
    assert lines[0].startswith("4,000 tokens saved in 2 requests")
    (last,) = [line for line in lines if line.startswith("Last saving: ")]
    assert last.endswith(" UTC (just now)")
    (claude,) = [line for line in lines if "claude" in line]
    (gpt,) = [line for line in lines if line.startswith("openai/gpt [bold]x")]
    assert claude.startswith("anthropic/claude")
    assert "3,000" in claude
    assert "75.0 %" in claude
    assert claude.count("█") > 2 * gpt.count("█") > 0
    assert "-0.50" in gpt
    assert any(line.startswith("web") for line in lines)


@pytest.mark.parametrize(
    ("providers", "names"),
    [
        ([None], {"m"}),
        (["openai"], {"openai/m"}),
        (["openai", "azure"], {"m", "openai/m", "azure/m"}),
    ],
)
def test_show_lists_each_model_once(store_path: Path, providers: list[str | None], names: set[str]) -> None:
    """Two tables of models are printed only where they differ."""
    with SavingsTracker(store_path) as tracker:
        for provider in providers:
            tracker.record_request(model="m", provider=provider, tokens_saved=7)
    shown = run_cli("show", "--store", str(store_path)).stdout
    assert set(re.findall(r"^((?:\w+/)?m)\b", shown, re.MULTILINE)) == names


def test_unknown_figures_are_no_zeros(store_path: Path) -> None:
    with SavingsTracker(store_path) as tracker:
        tracker.record_request(model="without-input", tokens_saved=1_000_000)
        tracker.record_request(model="priced", tokens_saved=1, input_tokens=3, savings_usd=-0.001, input_cost_usd=0)
    shown = run_cli("show", "--store", str(store_path)).stdout
    (unknown,) = [line for line in shown.splitlines() if line.startswith("without-input")]
    (known,) = [line for line in shown.splitlines() if line.startswith("priced")]
    assert unknown.split()[:5] == ["without-input", "1,000,000", "1", "–", "–"]
    assert known.split()[:7] == ["priced", "1", "1", ">", "-0.01", "25.0", "%"]
    # The share covers only records with both figures, not the million other tokens.
    assert "Share of the input: 25.0 %. US" in shown
    with running("serve", "--store", str(store_path)) as service:
        totals = json.loads(service.get("/v1/savings")[1])
        page, metrics = service.get("/")[1], service.get("/metrics")[1]
    unknown_model = totals["by_model"]["without-input"]
    for name in ("savings_percent", "compression_savings_usd", "compression_savings_list_usd", "total_input_cost_usd"):
        assert unknown_model[name] is None
    assert totals["by_model"]["priced"]["compression_savings_usd"] == -0.001
    assert totals["by_model"]["priced"]["total_input_cost_usd"] == 0
    assert totals["lifetime"]["savings_percent"] == 25.0
    (row,) = re.findall(r'<th scope="row">without-input<.*?</tr>', page)
    assert row.endswith("<td class=rare>1</td><td>–</td></tr>")
    assert "-0.00" not in page
    assert 'savings_cost_saved_usd{model="priced"' in metrics
    assert 'savings_cost_saved_usd{model="without-input"' not in metrics


def test_tool_tokens_of_headrooms_projects(tmp_path: Path) -> None:
    """Headroom counts tokens of deferred tool schemas, and not by project."""
    copy = tmp_path / "proxy_savings.json"
    copy.write_bytes((DATA / "headroom" / "v6" / "proxy_savings.json").read_bytes())
    totals = json.loads(run_cli("show", "--json", "--store", str(copy)).stdout)
    assert totals["lifetime"]["tool_tokens_saved"] > 0
    assert totals["projects"]
    assert all(entry["tool_tokens_saved"] is None for entry in totals["projects"].values())
    assert all(entry["tool_tokens_saved"] is not None for entry in totals["by_model"].values())


def test_show_as_json(filled: Path) -> None:
    shown = json.loads(run_cli("show", "--json", "--store", str(filled)).stdout)
    assert shown["lifetime"]["tokens_saved"] == 4000
    assert shown["by_model"]["claude"]["savings_percent"] == 75.0
    assert shown["projects"]["web"]["requests"] == 1
    assert {(each["provider"], each["model"]) for each in shown["by_provider_model"]} == {
        ("anthropic", "claude"),
        ("openai", "gpt [bold]x"),
    }
    with running("serve", "--store", str(filled)) as service:
        served = json.loads(service.get("/v1/savings")[1])
    assert {**served, **NO_TIMES} == {**shown, **NO_TIMES}


def test_show_as_csv(filled: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(run_cli("show", "--csv", "--store", str(filled)).stdout)))
    assert [(row["kind"], row["name"], row["tokens_saved"]) for row in rows] == [
        ("lifetime", "", "4000"),
        ("model", "claude", "3000"),
        ("model", "gpt [bold]x", "1000"),
        ("provider/model", "anthropic/claude", "3000"),
        ("provider/model", "openai/gpt [bold]x", "1000"),
        ("project", "web", "3000"),
    ]


def test_show_of_headrooms_document(tmp_path: Path) -> None:
    copy = tmp_path / "proxy_savings.json"
    copy.write_bytes(HEADROOM.read_bytes())
    assert run_cli("show", "--store", str(copy)).stdout.startswith("2,672,322 tokens saved in 300 requests")
    assert copy.read_bytes() == HEADROOM.read_bytes()
    assert [entry.name for entry in tmp_path.iterdir()] == ["proxy_savings.json"]


@pytest.mark.parametrize(
    "arguments", [["show"], ["verify"], ["record", "--model", "m", "--tokens-saved", "1"], ["--help"]]
)
def test_closed_standard_output(filled: Path, arguments: list[str]) -> None:
    before = filled.read_bytes()
    command = [sys.executable, "-m", "savings_exporter", *arguments]
    env = {**os.environ, "SAVINGS_EXPORTER_STORE": str(filled)}
    closed = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    done = subprocess.run(closed, stderr=subprocess.PIPE, text=True, env=env)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "standard output is closed" in done.stderr
    assert filled.read_bytes() == before


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_names_beyond_the_encoding(store_path: Path, encoding: str) -> None:
    with SavingsTracker(store_path) as tracker:
        tracker.record_request(model="日本", provider="é", tokens_saved=3)
    env = {"PYTHONIOENCODING": encoding}
    shown = [
        subprocess.run(
            [sys.executable, "-m", "savings_exporter", "show", "--store", store_path, *how],
            capture_output=True,
            env={**os.environ, **env},
        )
        for how in ([], ["--csv"], ["--json"])
    ]
    assert [(done.returncode, done.stderr) for done in shown] == [(0, b"")] * 3
    model = "日本".encode(encoding, "backslashreplace")
    assert all(model in done.stdout for done in shown[:2])
    assert ("█" * 16 if encoding == "utf-8" else "#" * 16) in shown[0].stdout.decode(encoding)
    # JSON is UTF-8 everywhere.
    assert json.loads(shown[2].stdout.decode("utf-8"))["by_model"].keys() == {"日本"}


STRANGE = r"""{
  "schema_version": 6, "lifetime": {"requests": 7}, "\ud800": {"\udfff": 1},
  "by_model": {"gpt\ud800-4": {"requests": 7, "mo\udfffdel": "\ud800"}},
  "projects": {"web\udc00": {"requests": 7}},
  "history": [{
    "timestamp": "2026-06-07T12:23:34Z", "total_tokens_saved": 5, "provider": "a\ud800b", "\udfff": true,
    "nan": NaN, "infinite": 1e999, "huge": HUGE, "deep": DEEP
  }]
}""".replace("HUGE", "9" * 400).replace("DEEP", "[" * 300 + "]" * 300)


def test_what_is_no_text_is_shown(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"stra\xffnge.json")
    path.write_text(STRANGE)
    done = [run_cli("show", "--store", str(path), *how) for how in ([], ["--csv"], ["--json"])]
    assert [(each.returncode, each.stderr) for each in done] == [(0, "")] * 3
    assert r"stra\udcffnge.json" in done[0].stdout
    shown = json.loads(done[2].stdout)
    assert shown["storage_path"] == str(tmp_path / r"stra\udcffnge.json")
    assert shown["by_model"].keys() == {"gpt-4"}
    point = {"timestamp": "2026-06-07T12:23:34Z", "total_tokens_saved": 5, "provider": r"a\ud800b", r"\udfff": True}
    assert shown["history"] == [{**point, "nan": None, "infinite": None, "huge": None, "deep": None}]
    with running("watch", str(path)) as service:
        assert {**json.loads(service.get("/v1/savings")[1]), **NO_TIMES} == {**shown, **NO_TIMES}
        assert r"stra\udcffnge.json" in service.get("/")[1]
        path.unlink()
        status, problem = service.get("/-/healthy")
        assert (status, r"stra\udcffnge.json: there is no such file" in json.loads(problem)["detail"]) == (503, True)
        assert json.loads(service.get("/v1/savings")[1])["reason"] == json.loads(problem)["detail"]
        assert 'role="alert"' in service.get("/")[1]
        assert service.stop()[0] == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_BSP_MAX_QUEUE_SIZE", "x"),
        ("OTEL_BSP_SCHEDULE_DELAY", "-1"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "999999"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "tight"),
        ("OTEL_TRACES_SAMPLER", "sometimes"),
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "few"),
        ("OTEL_TRACES_EXPORTER", "smoke"),
    ],
)
@pytest.mark.parametrize(
    "command", [["serve", "--log.level", "error"], ["record", "--model", "m", "--tokens-saved", "1"]]
)
def test_wrong_tracing_variable(store_path: Path, command: list[str], name: str, value: str) -> None:
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", name: value}
    env |= {"SAVINGS_EXPORTER_STORE": str(store_path), "SAVINGS_EXPORTER_WEB_LISTEN_ADDRESS": "127.0.0.1:0"}
    done = run_cli(*command, env=env)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert name in done.stderr
    assert not store_path.exists()


def test_reader_that_has_seen_enough(filled: Path) -> None:
    shell = f"{sys.executable} -m savings_exporter show --store {filled} | head -n 1"
    done = subprocess.run(shell, shell=True, capture_output=True, text=True, check=True)
    assert done.stderr == ""


KILLED = """
import os, sys
from savings_exporter import SavingsRecord, SavingsTracker
tracker = SavingsTracker(sys.argv[1], save_interval=3600)
for _ in range(2):
    # Together they fill the first segment, so that it is removed and the documents alone hold what was in it.
    tracker.record_many([SavingsRecord(model="m", tokens_saved=10, project=f"{n:0128}") for n in range(270)])
    tracker.save()
    tracker.save()
tracker.record_request(model="m", tokens_saved=1000)
os._exit(0)
"""


@pytest.fixture
def killed(store_path: Path) -> Path:
    """A store whose only process was killed: its documents hold records that its journal does not, and vice versa."""
    subprocess.run([sys.executable, "-c", KILLED, str(store_path)], check=True)
    assert list(store_path.parent.glob("*.journal.*"))
    assert not list(store_path.parent.glob("*.journal.*.00000001"))
    return store_path


def test_verify_and_repair(killed: Path) -> None:
    whole = run_cli("verify", "--store", str(killed))
    assert (whole.returncode, whole.stderr) == (0, "")
    assert "6400 tokens saved in 541 records" in whole.stdout
    damaged = killed.read_bytes()[:-100]
    killed.write_bytes(damaged)
    found = run_cli("verify", "--store", str(killed))
    assert (found.returncode, found.stderr.count("\n")) == (1, 1)
    assert "is damaged" in found.stderr
    assert "nothing is lost" in found.stderr
    previous = killed.with_name(killed.name + ".previous")
    previous.write_bytes(previous.read_bytes()[:-100])
    refused = run_cli("serve", "--store", str(killed), "--web.listen-address", "127.0.0.1:0")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "verify --repair" in refused.stderr
    assert killed.read_bytes() == damaged
    repaired = run_cli("verify", "--repair", "--store", str(killed))
    assert (repaired.returncode, repaired.stderr) == (0, "")
    assert re.search("acknowledged records are lost: number 1 to [0-9]+ of writer [0-9a-f]{16}", repaired.stdout)
    assert damaged in [file.read_bytes() for file in killed.parent.glob("*.corrupt-*")]
    assert run_cli("verify", "--store", str(killed)).returncode == 0


def test_show_and_verify_of_lost_documents(killed: Path) -> None:
    for suffix in ("", ".previous", ".lock"):
        killed.with_name(killed.name + suffix).unlink()
    shown, verified = run_cli("show", "--store", str(killed)), run_cli("verify", "--store", str(killed))
    assert (shown.returncode, verified.returncode) == (1, 1)
    # Both say what is lost, and what to do.
    assert "acknowledged records are lost" in shown.stderr
    for said in (shown.stderr, verified.stderr):
        assert f"verify --repair --store {killed}" in said
    assert shown.stderr.split(". ")[0] == verified.stderr.split(". ")[0]


def test_record_imports_no_web_server(store_path: Path) -> None:
    """A command imports its own module, not those of the others. The library of prices would import some of them."""
    code = """
import sys
from savings_exporter import cli
OTHERS = "asyncio", "opentelemetry.sdk", "prometheus_client", "rich", "ssl", "starlette", "uvicorn", "yaml"
try:
    cli.main()
finally:
    print(sorted(set(OTHERS) & sys.modules.keys()))
"""
    command = ["record", "--store", str(store_path), "--model", "m", "--tokens-saved", "1", "--savings-usd", "0"]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, timeout=WAIT_SECONDS)
    assert done.stdout.splitlines() == ["recorded: 1 token saved in total", "[]"], done.stderr


def test_record_that_cannot_be_saved(
    store_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    faults = FaultyFileSystem()
    faults.fail("fsync_journal", errno.EIO)
    monkeypatch.setattr(tracker, "LOCAL", faults)
    command = ["savings-exporter", "record", "--store", str(store_path), "--model", "m", "--tokens-saved", "1"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert "fsync_journal failed: Input/output error (EIO)" in said.err


@pytest.mark.skipif(sys.platform != "linux", reason="it needs /dev/full")
@pytest.mark.parametrize("command", ["{} >/dev/full", "{} | true"])
def test_recorded_saving_is_no_failure_when_the_result_cannot_be_printed(store_path: Path, command: str) -> None:
    """A hook that is told of a failure records the saving again."""
    record = f"{sys.executable} -m savings_exporter record --model m --tokens-saved 7 --store '{store_path}'"
    shell = ["bash", "-o", "pipefail", "-c", command.format(record)]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=WAIT_SECONDS)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    with SavingsTracker(store_path) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == 7


@pytest.mark.skipif(sys.platform != "linux", reason="it needs /dev/full")
def test_full_standard_output_is_named(filled: Path) -> None:
    command = f"{sys.executable} -m savings_exporter show --store '{filled}' >/dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=WAIT_SECONDS)
    assert (done.returncode, done.stderr) == (1, "savings-exporter: standard output: No space left on device\n")


def test_arguments_reach_the_terminal_without_control_characters(tmp_path: Path) -> None:
    for arguments in (["verify", "\x1b]0;owned\x07"], ["show", "--\x1b[31m"], ["watch", str(tmp_path / "\x1b[1m")]):
        done = run_cli(*arguments)
        assert done.returncode in (1, 2)
        assert done.stderr.rstrip("\n").isprintable()
        assert re.search(r"\\(x1b|u001b)", done.stderr)
    assert len(run_cli("record", "--model", "m", "--tokens-saved", "x" * 100_000).stderr) < 3000


@pytest.mark.parametrize(("value", "is_on"), [("false", False), ("0", False), ("no", False), ("true", True)])
def test_variable_turns_drills_on_and_off(store_path: Path, value: str, is_on: bool) -> None:
    with running("serve", "--store", str(store_path), env={"SAVINGS_EXPORTER_ENABLE_DRILL": value}):
        asked = run_cli("drill", "dir-fsync", "--seconds", "1", "--store", str(store_path))
    assert asked.returncode == (0 if is_on else 1)
    assert is_on or f"serve --enable-drill --store {store_path}" in asked.stderr


def test_wrong_variable_is_wrong_usage(store_path: Path) -> None:
    done = run_cli("serve", "--store", str(store_path), env={"SAVINGS_EXPORTER_ENABLE_DRILL": "maybe"})
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_printed_command_works_with_a_path_of_several_words(tmp_path: Path) -> None:
    path = tmp_path / "two words" / "proxy_savings.json"
    missing = run_cli("record", "--model", "m", "--tokens-saved", "1", "--store", str(path))
    command = missing.stderr.partition("make it first: ")[2]
    subprocess.run(["bash", "-c", command], check=True)
    assert path.parent.is_dir()
    assert f"--store '{path}'" in run_cli("show", "--store", str(path)).stderr


def test_service_survives_a_reader_that_leaves(store_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "savings_exporter", "serve", "--store", str(store_path)]
    with subprocess.Popen(
        [*command, "--web.listen-address", "127.0.0.1:0"], stdout=write, stderr=subprocess.PIPE, text=True
    ) as process:
        os.close(write)
        try:
            assert process.stderr is not None
            assert "the address could not be printed: Broken pipe" in process.stderr.readline()
            process.terminate()
            assert process.wait(WAIT_SECONDS) == 0
        finally:
            process.kill()


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_show_keeps_names_on_a_narrow_terminal(filled: Path, columns: int) -> None:
    program = f"{sys.executable} -m savings_exporter show --store {filled}"
    done = subprocess.run(
        ["script", "-qec", program, "/dev/null"],
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        env={**os.environ, "COLUMNS": str(columns), "TERM": "xterm"},
    )
    (claude,) = [line for line in done.stdout.splitlines() if "anthropic/claude" in line]
    assert "3,000" in claude
    assert ("█" in claude) == (columns >= 100)


def test_small_amount_is_not_shown_as_zero(store_path: Path) -> None:
    with SavingsTracker(store_path) as tracker:
        tracker.record_request(model="m", tokens_saved=1, savings_usd=0.0001)
    assert "US dollars saved: < 0.01" in run_cli("show", "--store", str(store_path)).stdout


def test_failed_read_is_not_blamed_on_standard_output(filled: Path) -> None:
    """An error of a disk may name no file."""
    program = (
        "import errno, sys\n"
        "from savings_exporter import cli\n"
        "from savings_exporter.cli import verify\n"
        "def fail(*_): raise OSError(errno.EIO, 'Input/output error')\n"
        "verify.inspect = fail\n"
        f"sys.argv = ['savings-exporter', 'verify', '--store', {str(filled)!r}]\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=WAIT_SECONDS)
    assert (done.returncode, done.stderr) == (1, "savings-exporter: Input/output error\n")


def test_advice_of_a_long_error_is_whole(tmp_path: Path) -> None:
    directory = tmp_path.joinpath(*["d" * 200] * 8)
    done = run_cli("record", "--model", "m", "--tokens-saved", "1", "--store", str(directory / "p.json"))
    assert done.stderr.endswith(f"make it first: mkdir -p {directory}\n")


@pytest.mark.needs("linux")
def test_directory_that_takes_no_files(tmp_path: Path) -> None:
    """It exists, so making it is no remedy."""
    done = run_cli("record", "--model", "m", "--tokens-saved", "1", "--store", "/proc/p.json", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "/proc/p.json: no file can be made in /proc; name another store with --store PATH" in done.stderr


@pytest.mark.parametrize("name", ["PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"])
@pytest.mark.parametrize("exists", [True, False])
def test_values_are_not_kept_in_files(tmp_path: Path, store_path: Path, name: str, exists: bool) -> None:
    """prometheus_client would continue the values of an earlier process with the same number, and hide failures."""
    directory = tmp_path / "values"
    if exists:
        directory.mkdir()
    with running("serve", "--store", str(store_path), env={name: os.fspath(directory)}) as service:
        assert service.post({"model": "m"})[0] == 422
        refused = 'savings_http_requests_total{code="422",method="POST",route="/v1/savings"}'
        assert service.metrics()[refused] == 1
    assert not exists or list(directory.iterdir()) == []
