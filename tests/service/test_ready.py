"""``savings-exporter ready``, against services with and without TLS and credentials."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.service.test_client_certificates import REQUIRED, TLS, configured, make
from tests.support.service import free_port, run_cli, running

WELL = (0, "", "")


def checked(address: str, web_config_file: Path | None = None) -> tuple[int, str, str]:
    """The status of the check and what it prints, for ``HOST:PORT``. Variables say both, as in the image."""
    variables = {"SAVINGS_EXPORTER_WEB_LISTEN_ADDRESS": address}
    if web_config_file is not None:
        variables["SAVINGS_EXPORTER_WEB_CONFIG_FILE"] = str(web_config_file)
    done = run_cli("ready", env=variables)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("server", "ca"):
        make(folder, name)
    return folder


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", ""])
def test_a_service_that_runs_and_one_that_has_ended(store_path: Path, host: str) -> None:
    """One that listens on all addresses is asked on this host."""
    with running("serve", "--store", str(store_path)) as service:
        port = service.url.rpartition(":")[2]
        assert checked(f"{host}:{port}") == WELL
    status, _, said = checked(f"{host}:{port}")
    assert status == 1
    assert said.startswith(f"savings-exporter: 127.0.0.1:{port}: no service answers: ")


def test_a_service_that_stops() -> None:
    """It answers 503."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(503)
            self.end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as stopping, ThreadPoolExecutor() as pool:
        pool.submit(stopping.serve_forever)
        status, _, said = checked(f"127.0.0.1:{stopping.server_port}")
        stopping.shutdown()
    assert (status, "the service answers 503 at /-/ready" in said) == (1, True)


def test_credentials(store_path: Path, tmp_path: Path) -> None:
    """The check has none, and readiness needs none."""
    (tmp_path / "token").write_text("a-token-for-everything\n")
    (tmp_path / "web.yml").write_text("authorization: {credentials_file: token}\n")
    with running("serve", "--store", str(store_path), "--web.config.file", str(tmp_path / "web.yml")) as service:
        assert service.get("/metrics")[0] == 401
        assert checked(service.url.rpartition("/")[2], tmp_path / "web.yml") == WELL


@pytest.mark.needs("openssl")
@pytest.mark.parametrize(
    "text",
    [
        TLS % "min_version: TLS12",
        TLS % "client_auth_type: VerifyClientCertIfGiven, client_ca_file: ca.crt",
        REQUIRED,
        REQUIRED.replace("}", ", max_version: TLS12}"),
    ],
    ids=["TLS", "certificates if given", "certificates", "certificates with TLS 1.2"],
)
def test_tls(store_path: Path, tmp_path: Path, certificates: Path, text: str) -> None:
    """The certificate has other names, and the check none of its own. Plain HTTP does not reach the service."""
    with configured(store_path, tmp_path, certificates, text) as service:
        address = service.url.rpartition("/")[2]
        assert checked(address, tmp_path / "web.yml") == WELL
        assert checked(address)[0] == 1
        _, _, logged = service.stop()
    assert checked(address, tmp_path / "web.yml")[0] == 1
    assert "was refused: it showed" not in logged  # a check is no client that is refused


def test_a_broken_web_config_file(tmp_path: Path) -> None:
    (tmp_path / "web.yml").write_text("tls_server_config: {")
    status, _, said = checked(f"127.0.0.1:{free_port()}", tmp_path / "web.yml")
    assert (status, "web.yml: is not YAML" in said) == (1, True)
