"""What a page of another site tries through a browser is refused: the Host, the Origin, and the headers of answers."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.raw_http import Answer, Lines, sent
from tests.support.service import Service, running

SAVING = json.dumps({"model": "m", "tokens_saved": 1}).encode()
JSON = ("Content-Type", "application/json")
RECORDED = "savings_requests_total{"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    store = tmp_path_factory.mktemp("store") / "proxy_savings.json"
    with running("serve", "--store", str(store), "--web.allowed-host", "Savings.Example.org") as service:
        yield service


def port(service: Service) -> str:
    return service.url.rpartition(":")[2]


def posted(service: Service, headers: Lines, path: str = "/v1/savings") -> Answer:
    own = ("Host", f"localhost:{port(service)}")
    return sent(service, "POST", path, [own, JSON, *headers], SAVING)


def recorded(service: Service) -> int:
    requests: int = json.loads(service.get("/v1/savings")[1])["lifetime"]["requests"]
    return requests


RIGHT_HOSTS = (
    "localhost",
    "LOCALHOST:1",
    "localhost.",
    "app.localhost",
    "127.0.0.1:9478",
    "127.0.0.1.",
    "192.0.2.1",
    "[::1]:9478",
    "exporter:9478",
    "savings.example.org",
    "SAVINGS.example.org.:80",
)


@pytest.mark.parametrize("host", RIGHT_HOSTS)
def test_a_known_host(service: Service, host: str) -> None:
    assert sent(service, "GET", "/v1/savings", [("Host", host)]).status == 200


REBOUND_HOSTS = (
    "evil.example",
    "evil.example:9478",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "evillocalhost.example",
    "sub.savings.example.org",
    "savings.example.org.evil.example",
    "1.2.3",
)


@pytest.mark.parametrize("path", ["/", "/metrics", "/v1/savings", "/v1/history", "/nowhere", "/docs"])
def test_dns_rebinding_reads_nothing(service: Service, path: str) -> None:
    answer = sent(service, "GET", path, [("Host", f"evil.example:{port(service)}")])
    assert (answer.status, json.loads(answer.body)["status"]) == (421, 421)
    assert "--web.allowed-host evil.example" in answer.body


def test_public_paths_have_any_name(service: Service) -> None:
    for path in ("/-/healthy", "/-/ready", "/docs/", "/docs/runbook"):
        assert sent(service, "GET", path, [("Host", "evil.example")]).status == 200
        assert sent(service, "POST", path, [("Host", "evil.example")]).status == 421
        assert sent(service, "GET", path, [("Host", "a b")]).status == 400


@pytest.mark.parametrize("host", REBOUND_HOSTS)
def test_an_unknown_host(service: Service, host: str) -> None:
    before = recorded(service)
    assert sent(service, "GET", "/v1/savings", [("Host", host)]).status == 421
    assert sent(service, "POST", "/v1/savings", [("Host", host), JSON], SAVING).status == 421
    assert recorded(service) == before


NO_HOSTS: tuple[bytes, ...] = (
    b"",
    b"a b",
    b"a/b",
    b"user@localhost",
    b"localhost:port",
    b"localhost:123456",
    b"\xff\xfe",
    b"xn--\xc3\xa9",
    b"[::1",
    b"," * 10,
    b"a" * 5000,
    b"localhost, evil.example",
)


@pytest.mark.parametrize("host", NO_HOSTS)
def test_a_malformed_host(service: Service, host: bytes) -> None:
    assert sent(service, "GET", "/v1/savings", [("Host", host)]).status == 400


def test_two_hosts(service: Service) -> None:
    for second in ("localhost", "evil.example"):
        hosts = [("Host", "localhost"), ("hOsT", second)]
        assert sent(service, "GET", "/v1/savings", hosts).status == 400
        assert sent(service, "POST", "/v1/savings", [*hosts, JSON], SAVING).status == 400


def test_no_host(service: Service) -> None:
    """HTTP/1.1 requires one. HTTP/1.0 does not, and no browser speaks it."""
    assert sent(service, "GET", "/v1/savings", []).status == 400
    assert sent(service, "GET", "/v1/savings", [], version="1.0").status == 200
    assert sent(service, "GET", "/v1/savings", [("Host", "evil.example")], version="1.0").status == 421


FOREIGN: dict[str, Lines] = {
    "another site": [("Origin", "https://evil.example")],
    "another port": [("Origin", "http://localhost:3000")],
    "no port": [("Origin", "http://localhost")],
    "a sandbox": [("Origin", "null")],
    "a file": [("Origin", "file://")],
    "empty": [("Origin", "")],
    "several": [("Origin", "http://localhost:1 https://evil.example")],
    "fetched across sites": [("Sec-Fetch-Site", "cross-site")],
    "fetched from a sibling": [("Sec-Fetch-Site", "same-site")],
    "not ASCII": [("Origin", b"http://\xff")],
}


@pytest.mark.parametrize("headers", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_page_of_another_site_cannot_post(service: Service, headers: Lines) -> None:
    before = recorded(service)
    for path in ("/v1/savings", "/v1/metrics"):
        answer = posted(service, headers, path)
        assert (answer.status, "other sites" in answer.body) == (403, True)
    assert recorded(service) == before


def test_two_origins(service: Service) -> None:
    own = ("Origin", f"http://localhost:{port(service)}")
    foreign = ("Origin", "https://evil.example")
    assert posted(service, [own, foreign]).status == 400
    assert posted(service, [foreign, own]).status == 400


def test_our_own_page_and_programs_can_post(service: Service) -> None:
    before = recorded(service)
    own = ("Origin", f"http://LOCALHOST:{port(service)}")
    for headers in ([], [own], [own, ("Sec-Fetch-Site", "same-origin")], [("Sec-Fetch-Site", "none")]):
        assert posted(service, headers).status == 200
    assert recorded(service) == before + 4


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_a_form_cannot_post(service: Service, kind: str) -> None:
    """What a browser sends to other sites without asking first is not JSON by its type."""
    host = ("Host", f"localhost:{port(service)}")
    assert sent(service, "POST", "/v1/savings", [host, ("Content-Type", kind)], SAVING).status == 415


def test_preflight_allows_nothing(service: Service) -> None:
    headers = [
        ("Host", f"localhost:{port(service)}"),
        ("Origin", "https://evil.example"),
        ("Access-Control-Request-Method", "POST"),
        ("Access-Control-Request-Headers", "content-type"),
    ]
    for path in ("/v1/savings", "/metrics", "/"):
        answer = sent(service, "OPTIONS", path, headers)
        assert answer.status == 405
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]


ANSWERS = {
    "page": ("GET", "/", b"", 200),
    "metrics": ("GET", "/metrics", b"", 200),
    "totals": ("GET", "/v1/savings", b"", 200),
    "document": ("GET", "/docs/runbook", b"", 200),
    "style": ("GET", "/docs/style.css", b"", 200),
    "saving": ("POST", "/v1/savings", SAVING, 200),
    "refused saving": ("POST", "/v1/savings", b"{", 400),
    "no such path": ("GET", "/nowhere", b"", 404),
    "wrong method": ("DELETE", "/", b"", 405),
}


@pytest.mark.parametrize(("method", "path", "body", "status"), ANSWERS.values(), ids=ANSWERS.keys())
def test_security_headers(service: Service, method: str, path: str, body: bytes, status: int) -> None:
    answer = sent(service, method, path, [("Host", "localhost"), JSON], body)
    assert answer.status == status
    headers = answer.headers
    assert headers.get_all("X-Content-Type-Options") == ["nosniff"]
    if status == 200 and method == "POST":
        # A browser neither shows nor embeds it.
        return
    assert headers.get_all("X-Frame-Options") == ["deny"]
    assert headers.get_all("Referrer-Policy") == ["no-referrer"]
    assert headers.get_all("Cross-Origin-Resource-Policy") == ["same-origin"]
    assert headers.get_all("Cross-Origin-Opener-Policy") == ["same-origin"]
    if headers["Content-Type"].startswith("text/html"):
        (policy,) = headers.get_all("Content-Security-Policy", [])
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy


def test_configured_headers(tmp_path: Path, store_path: Path) -> None:
    """They replace ours, and an empty one is not sent."""
    (tmp_path / "web.yml").write_text(
        "http_server_config:\n"
        "  http2: true\n"
        "  headers:\n"
        "    X-Frame-Options: sameorigin\n"
        "    X-Content-Type-Options: ''\n"
        "    Content-Security-Policy: default-src 'self'\n"
        "    Strict-Transport-Security: max-age=5\n"
    )
    with running("serve", "--store", str(store_path), "--web.config.file", str(tmp_path / "web.yml")) as service:
        for method, path in (("GET", "/"), ("POST", "/v1/savings"), ("GET", "/nowhere")):
            headers = sent(service, method, path, [("Host", "localhost"), JSON], SAVING).headers
            assert headers.get_all("X-Frame-Options") == ["sameorigin"]
            assert headers.get_all("X-Content-Type-Options") is None
            assert headers.get_all("Content-Security-Policy") == ["default-src 'self'"]
            assert headers.get_all("Strict-Transport-Security") == ["max-age=5"]
            assert headers.get_all("Referrer-Policy") == (["no-referrer"] if method == "GET" else None)


def test_any_host_with_a_token(tmp_path: Path, store_path: Path) -> None:
    """A page that makes its name lead here has no token. A proxy may pass any name on."""
    (tmp_path / "token").write_text("secret")
    (tmp_path / "web.yml").write_text("authorization: {credentials_file: token}")
    with running("serve", "--store", str(store_path), "--web.config.file", str(tmp_path / "web.yml")) as service:
        host = ("Host", "evil.example")
        assert sent(service, "GET", "/metrics", [host]).status == 401
        assert sent(service, "GET", "/metrics", [host, ("Authorization", "Bearer secret")]).status == 200


def test_the_name_of_the_listen_address(store_path: Path) -> None:
    name = "localhost.localdomain"
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        name = "localhost"
    with running("serve", "--store", str(store_path), address=f"{name}:0") as service:
        assert sent(service, "GET", "/metrics", [("Host", f"{name}:9478")]).status == 200
        assert sent(service, "GET", "/metrics", [("Host", f"www.{name}.example")]).status == 421
