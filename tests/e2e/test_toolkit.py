"""The web configuration file is that of Prometheus's exporter-toolkit: promtool takes the same file, and a real
Prometheus scrapes through all of it.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import bcrypt
import pytest

from tests.service.test_client_certificates import make
from tests.support.prometheus import prometheus
from tests.support.service import free_port, running

pytestmark = pytest.mark.needs("prometheus", "openssl")

FILE = """
tls_server_config:
  cert_file: server.crt
  key_file: server.key
  client_auth_type: RequireAndVerifyClientCert
  client_ca_file: ca.crt
  min_version: TLS12
  max_version: TLS13
  cipher_suites: [TLS_AES_128_GCM_SHA256, TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256]
  prefer_server_cipher_suites: true
http_server_config:
  http2: true
  headers:
    Content-Security-Policy: default-src 'self'
    Strict-Transport-Security: max-age=31536000
    X-Content-Type-Options: nosniff
    X-Frame-Options: sameorigin
    X-XSS-Protection: "0"
basic_auth_users:
  prometheus: %s
"""

SCRAPES = {
    "user": {"basic_auth": {"username": "prometheus", "password": "secret"}},
    "token": {"authorization": {"credentials_file": "token"}},
}


@pytest.mark.parametrize("credentials", SCRAPES.values(), ids=SCRAPES.keys())
def test_scrape_with_all_of_it(tmp_path: Path, store_path: Path, credentials: dict[str, object]) -> None:
    for name, ca in (("server", ""), ("ca", ""), ("client", "ca")):
        make(tmp_path, name, ca=ca)
    config = tmp_path / "web.yml"
    config.write_text(FILE % bcrypt.hashpw(b"secret", bcrypt.gensalt(4)).decode())
    checked = subprocess.run(["promtool", "check", "web-config", str(config)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    # The block of our own, which promtool does not know.
    (tmp_path / "token").write_text("read-only")
    config.write_text(f"{config.read_text()}authorization: {{read_credentials_file: token}}")
    address = f"127.0.0.1:{free_port()}"
    tls = {"ca_file": "server.crt", "cert_file": "client.crt", "key_file": "client.key"}
    scrape = {"scheme": "https", "tls_config": tls, **credentials}
    with (
        running("serve", "--store", str(store_path), "--web.config.file", str(config), address=address),
        prometheus(tmp_path, address, scrape=scrape) as server,
    ):
        server.becomes("up", 1)
