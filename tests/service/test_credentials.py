"""Who may use the service: tokens, users, certificates of clients, and addresses that other hosts can reach."""

from __future__ import annotations

import base64
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import bcrypt
import pytest

from tests.support.paths import DATA
from tests.support.raw_http import sent
from tests.support.service import Service, run_cli, running
from tests.support.wait import WAIT_SECONDS, eventually

SAVING = json.dumps({"model": "m", "tokens_saved": 1}).encode()
IS_RIGHT = "savings_web_config_last_reload_successful"
HOST = ("Host", "localhost")
JSON = ("Content-Type", "application/json")


@contextmanager
def configured(store: Path, folder: Path, text: str) -> Iterator[Service]:
    """A service with this web configuration file."""
    (folder / "web.yml").write_text(text)
    with running("serve", "--store", str(store), "--web.config.file", str(folder / "web.yml")) as service:
        yield service


def hashed(password: str, cost: int = 4) -> str:
    return bcrypt.hashpw(password.encode(), bcrypt.gensalt(cost)).decode()


def basic(user: str, password: str) -> tuple[str, str]:
    return "Authorization", "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def bearer(token: str) -> tuple[str, str]:
    return "Authorization", f"Bearer {token}"


def statuses(service: Service, *headers: tuple[str, str | bytes]) -> tuple[int, int]:
    """What a GET and a POST are answered with these headers."""
    return (
        sent(service, "GET", "/metrics", [HOST, *headers]).status,
        sent(service, "POST", "/v1/savings", [HOST, JSON, *headers], SAVING).status,
    )


# Tokens


def test_a_token_for_reading_and_one_for_writing(tmp_path: Path, store_path: Path) -> None:
    for name in ("all", "read", "write"):
        (tmp_path / name).write_text(f"{name}-token\n")
    text = "authorization: {credentials_file: all, read_credentials_file: read, write_credentials_file: write}"
    with configured(store_path, tmp_path, text) as service:
        assert statuses(service, bearer("all-token")) == (200, 200)
        assert statuses(service, bearer("read-token")) == (200, 403)
        assert statuses(service, bearer("write-token")) == (403, 200)
        for token, status in (("read-token", 403), ("other-token", 401), ("write-token", 200)):
            answer = sent(service, "POST", "/v1/metrics", [HOST, JSON, bearer(token)], b'{"resourceMetrics": []}')
            assert (answer.status, token) == (status, token)
        assert statuses(service, bearer("other-token")) == (401, 401)
        assert statuses(service) == (401, 401)
        (tmp_path / "read").write_text("new-token")
        eventually(lambda: statuses(service, bearer("new-token")) == (200, 403), "the new token")
        assert statuses(service, bearer("read-token")) == (401, 401)


@pytest.mark.parametrize("cut", [0, 1, 8], ids=["whole", "all but the end", "in two parts"])
def test_credentials_after_the_body_are_no_credentials(tmp_path: Path, store_path: Path, cut: int) -> None:
    """It does not matter whether trailers arrive with the headers or later: they are ignored."""
    (tmp_path / "token").write_text("secret")
    chunks = b"%x\r\n%b\r\n0\r\n" % (len(SAVING), SAVING)
    head = b"POST /v1/savings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n%b"
    head += b"Transfer-Encoding: chunked\r\n\r\n"
    token, other = b"Authorization: Bearer secret\r\n", b"Content-Encoding: gzip\r\nIdempotency-Key: k\r\n"

    def status(service: Service, request: bytes) -> int:
        port = urlsplit(service.url).port
        assert port is not None
        with socket.create_connection(("127.0.0.1", port), WAIT_SECONDS) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(request[: len(request) - cut])
            time.sleep(0.05 if cut else 0)  # so that the rest is read on its own
            connection.sendall(request[len(request) - cut :])
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            return answer.status

    with configured(store_path, tmp_path, "authorization: {credentials_file: token}") as service:
        assert status(service, head % b"" + chunks + token + b"\r\n") == 401
        for _ in range(2):
            assert status(service, head % token + chunks + other + b"\r\n") == 200
        _, text = service.get("/v1/savings", dict([bearer("secret")]))
        assert json.loads(text)["lifetime"]["requests"] == 2


def test_only_a_token_for_reading(tmp_path: Path, store_path: Path) -> None:
    """Then nobody can write: the service does not become open to what no token permits."""
    (tmp_path / "token").write_text("secret")
    with configured(store_path, tmp_path, "authorization: {read_credentials_file: token}") as service:
        assert statuses(service) == (401, 401)
        assert statuses(service, bearer("secret")) == (200, 403)


WRONG_CREDENTIALS: tuple[bytes, ...] = (
    b"",
    b"Bearer",
    b"Bearer ",
    b"secret",
    b"Basic c2VjcmV0",
    b"Basic =",
    b"Basic \xff",
    b"Digest secret",
    b"Bearer secret secret",
    b"Bearer secre",
    b"Bearer secret\xff",
    b"Bearer " + b"x" * 10_000,
    "Bearer sécret".encode("latin-1"),
)


@pytest.mark.parametrize("shown", WRONG_CREDENTIALS, ids=range(len(WRONG_CREDENTIALS)))
def test_wrong_credentials(tmp_path: Path, store_path: Path, shown: bytes) -> None:
    (tmp_path / "token").write_text("sécret")
    with configured(store_path, tmp_path, "authorization: {credentials_file: token}") as service:
        assert statuses(service, ("Authorization", shown)) == (401, 401)
        assert statuses(service, ("Authorization", "bearer  sécret")) == (200, 200)


def test_several_authorizations(tmp_path: Path, store_path: Path) -> None:
    """A proxy may have checked another of them than the service would."""
    (tmp_path / "token").write_text("secret")
    with configured(store_path, tmp_path, "authorization: {credentials_file: token}") as service:
        for one, other in (("secret", "wrong"), ("wrong", "secret"), ("secret", "secret")):
            assert statuses(service, bearer(one), bearer(other)) == (400, 400)


def test_what_needs_no_credentials(tmp_path: Path, store_path: Path) -> None:
    text = f"basic_auth_users: {{alice: {hashed('right')}}}"
    with configured(store_path, tmp_path, text) as service:
        for path in ("/-/healthy", "/-/ready", "/docs/runbook"):
            assert sent(service, "GET", path, [HOST]).status == 200
        for path in ("/", "/metrics", "/v1/savings", "/v1/history", "/nowhere", "/-/healthy/", "/docs", "//docs/x"):
            answer = sent(service, "GET", path, [HOST])
            assert (answer.status, path) == (401, path)
            assert answer.headers["WWW-Authenticate"].startswith("Basic ")


# Users


@pytest.mark.needs("curl")
def test_users(tmp_path: Path, store_path: Path) -> None:
    """With the hashes of other tools, and names that are not ASCII."""
    users = {
        "alice": hashed("right").replace("$2b$", "$2y$"),
        "bob": hashed("x" * 72),
        "zoë": hashed("pässwörd: \u2713"),
    }
    with configured(store_path, tmp_path, f"basic_auth_users: {json.dumps(users)}") as service:
        for user, password in (("alice", "right"), ("bob", "x" * 72), ("bob", "x" * 80), ("zoë", "pässwörd: \u2713")):
            assert statuses(service, basic(user, password)) == (200, 200)
            assert statuses(service, basic(user, password)) == (200, 200)
        for user, password in (("alice", "wrong"), ("alice", ""), ("alice", "x" * 72), ("carol", "right"), ("", "")):
            assert statuses(service, basic(user, password)) == (401, 401)
        assert statuses(service, basic("alice", "ri\0ght")) == (401, 401)
        assert statuses(service, ("Authorization", "Basic " + base64.b64encode(b"alice").decode())) == (401, 401)
        command = ["curl", "--silent", "--user", "alice:right", f"{service.url}/v1/savings"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=WAIT_SECONDS)
        assert json.loads(done.stdout)["lifetime"]["requests"] == 8


def test_a_password_that_was_right(tmp_path: Path, store_path: Path) -> None:
    """It is not right any more when the file has another hash, or no such user."""
    text = "basic_auth_users: {alice: %s, bob: %s}"
    with configured(store_path, tmp_path, text % (hashed("old"), hashed("bob"))) as service:
        assert statuses(service, basic("alice", "old")) == (200, 200)
        assert statuses(service, basic("alice", "bob")) == (401, 401)
        (tmp_path / "web.yml").write_text(text % (hashed("new"), hashed("bob")))
        eventually(lambda: statuses(service, basic("alice", "new")) == (200, 200), "the new password")
        assert statuses(service, basic("alice", "old")) == (401, 401)
        (tmp_path / "web.yml").write_text(f"basic_auth_users: {{bob: {hashed('bob')}}}")
        eventually(lambda: statuses(service, basic("alice", "new")) == (401, 401), "the removal of a user")
        assert statuses(service, basic("bob", "bob")) == (200, 200)


def test_a_user_or_a_token(tmp_path: Path, store_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    text = f"basic_auth_users: {{alice: {hashed('right')}}}\nauthorization: {{read_credentials_file: token}}"
    with configured(store_path, tmp_path, text) as service:
        assert statuses(service, basic("alice", "right")) == (200, 200)
        assert statuses(service, bearer("secret")) == (200, 403)
        assert statuses(service, bearer("right")) == (401, 401)
        assert "the token is wrong" in sent(service, "GET", "/metrics", [HOST, bearer("right")]).body
        assert statuses(service, basic("carol", "right")) == (401, 401)
        assert "the user or the password" in sent(service, "GET", "/metrics", [HOST, basic("carol", "right")]).body
        (tmp_path / "web.yml").write_text("authorization: {read_credentials_file: token}")
        eventually(lambda: statuses(service, basic("alice", "right")) == (401, 401), "the removal of the users")
        (tmp_path / "web.yml").write_text("http_server_config: {http2: false}")
        eventually(
            lambda: f"{IS_RIGHT} 0.0" in sent(service, "GET", "/metrics", [HOST, bearer("secret")]).body, "the refusal"
        )
        assert statuses(service) == (401, 401)


def test_guesses_keep_nobody_waiting(tmp_path: Path, store_path: Path) -> None:
    """More guesses than are checked at once are refused. A user whose password was right before is served."""
    with configured(store_path, tmp_path, f"basic_auth_users: {{alice: {hashed('right', 13)}}}") as service:
        assert statuses(service, basic("alice", "right")) == (200, 200)
        answered: list[int] = []

        def guess(number: int) -> None:
            answered.append(sent(service, "GET", "/metrics", [HOST, basic("alice", f"guess {number}")]).status)

        guesses = [threading.Thread(target=guess, args=(number,)) for number in range(40)]
        for each in guesses:
            each.start()
        eventually(lambda: 503 in answered, "the guesses beyond the bound to be refused")
        # Those within it are still being checked.
        assert statuses(service, basic("alice", "right")) == (200, 200)
        assert sent(service, "GET", "/-/ready", [HOST]).status == 200
        for each in guesses:
            each.join()
        assert sorted(set(answered)) == [401, 503]


WRONG_USERS = {
    "a password in place of a hash": ("basic_auth_users: {alice: my-password}", "alice is not a bcrypt hash"),
    "another hash": ("basic_auth_users: {alice: $6$salt$hash}", "htpasswd -nBC 10 alice"),
    "a slow hash": (f"basic_auth_users: {{alice: {hashed('x').replace('$04$', '$20$')}}}", "has the cost 20"),
    "a colon": (f"basic_auth_users: {{'a:b': {hashed('x')}}}", "'a:b' cannot be the name of a user"),
    "no users": ("basic_auth_users:", "basic_auth_users is empty"),
    "an empty list": ("basic_auth_users: {}", "basic_auth_users names no user"),
    "no token": ("authorization: {}", "authorization lacks the field credentials_file"),
    "a rate": ("rate_limit: {burst: 1}", "rate_limit is not supported"),
    "a header": ("http_server_config: {headers: {Server: x}}", "headers.Server cannot be set"),
    "a wrong header": ("http_server_config: {headers: {X-Frame-Options: maybe}}", "must be deny or sameorigin"),
    "a line break": ('http_server_config: {headers: {X-XSS-Protection: "0\\r\\nA: b"}}', "a header cannot have"),
    "an unknown field": ("tokens: {}", "unknown field tokens"),
}


@pytest.mark.parametrize(("text", "said"), WRONG_USERS.values(), ids=WRONG_USERS.keys())
def test_wrong_fields(tmp_path: Path, store_path: Path, text: str, said: str) -> None:
    (tmp_path / "web.yml").write_text(text)
    done = run_cli("serve", "--store", str(store_path), "--web.config.file", str(tmp_path / "web.yml"))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert said in done.stderr
    assert "my-password" not in done.stderr


# Addresses


OPEN = ["0.0.0.0", "[::]", ""]


@pytest.mark.parametrize("host", OPEN)
@pytest.mark.parametrize("command", ["serve", "watch"])
def test_an_address_for_other_hosts(tmp_path: Path, host: str, command: str) -> None:
    store = tmp_path / "proxy_savings.json"
    where = ["--store", str(store)] if command == "serve" else [str(DATA / "headroom/v6/proxy_savings.json")]
    done = run_cli(command, *where, "--web.listen-address", f"{host}:0")
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (1, 1, "")
    for remedy in ("127.0.0.1", "--web.config.file", "--web.allow-insecure"):
        assert remedy in done.stderr
    assert not store.exists()


@contextmanager
def on_all_addresses(*arguments: str, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """A service that other hosts can reach, when it answers."""
    command = ["-m", "savings_exporter", "serve", "--web.listen-address", "0.0.0.0:0", *arguments]
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
    )
    try:
        assert process.stdout is not None
        assert any(line.startswith("metrics: ") for line in process.stdout)
        yield process
    finally:
        process.kill()
        process.communicate()


def logged_by(process: subprocess.Popen[str]) -> str:
    process.terminate()
    return process.communicate(timeout=WAIT_SECONDS)[1]


@pytest.mark.parametrize("given", ["option", "variable"])
def test_an_address_for_other_hosts_that_is_allowed(store_path: Path, given: str) -> None:
    arguments = ["--web.allow-insecure"] if given == "option" else []
    env = {"SAVINGS_EXPORTER_WEB_ALLOW_INSECURE": "true"} if given == "variable" else {}
    with on_all_addresses("--store", str(store_path), *arguments, env=env) as process:
        logged = logged_by(process)
    (warning,) = [line for line in logged.splitlines() if "level=warning" in line]
    assert "other hosts can reach 0.0.0.0" in warning


def test_an_address_for_other_hosts_with_a_token(tmp_path: Path, store_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    (tmp_path / "web.yml").write_text("authorization: {read_credentials_file: token}")
    arguments = ["--store", str(store_path), "--web.config.file", str(tmp_path / "web.yml")]
    with on_all_addresses(*arguments) as process:
        assert "level=warning" not in logged_by(process)
