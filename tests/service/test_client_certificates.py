"""TLS asks clients for certificates, also after a change of the CA, with the versions and ciphers that are allowed."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.service import Service, run_cli, running
from tests.support.wait import WAIT_SECONDS, eventually

pytestmark = pytest.mark.needs("openssl")

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
TLS = "tls_server_config: {cert_file: server.crt, key_file: server.key, %s}"
REQUIRED = TLS % "client_auth_type: RequireAndVerifyClientCert, client_ca_file: ca.crt"
REFUSED = (ssl.SSLError, ConnectionError)


def make(folder: Path, name: str, *, ca: str = "") -> None:
    """Write a certificate and its key, signed by a CA, or by itself as a CA would be."""
    made = ["openssl", "req", "-x509", *_KEY, "-days", "2", "-subj", f"/CN={name}"]
    made += ["-keyout", f"{name}.key", "-out", f"{name}.crt"]
    if ca:
        made += ["-CA", f"{ca}.crt", "-CAkey", f"{ca}.key", "-addext", "basicConstraints=critical,CA:FALSE"]
    made += ["-addext", "subjectAltName=IP:127.0.0.1"] if name == "server" else []
    subprocess.run(made, check=True, capture_output=True, cwd=folder)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    for name, ca in (("server", ""), ("ca", ""), ("other-ca", ""), ("client", "ca"), ("other-client", "other-ca")):
        make(folder, name, ca=ca)
    return folder


@contextmanager
def configured(store: Path, folder: Path, certificates: Path, text: str) -> Iterator[Service]:
    """A service with this web configuration file, beside copies of all certificates."""
    for file in certificates.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "web.yml").write_text(text)
    with running("serve", "--store", str(store), "--web.config.file", str(folder / "web.yml")) as service:
        show(service, folder, None)
        yield service


def show(service: Service, folder: Path, name: str | None) -> ssl.SSLContext:
    """Let requests show a certificate, or none."""
    context = service.context = ssl.create_default_context(cafile=folder / "server.crt")
    if name is not None:
        context.load_cert_chain(folder / f"{name}.crt", folder / f"{name}.key")
    return context


def is_served(service: Service, path: str = "/metrics") -> bool:
    try:
        return service.get(path)[0] == 200
    except REFUSED:
        return False
    except urllib.error.URLError as error:
        if isinstance(error.reason, REFUSED):
            return False
        raise


def connected(service: Service, context: ssl.SSLContext, session: ssl.SSLSession | None = None) -> ssl.SSLSocket:
    """A connection whose handshake has ended on both sides."""
    host, _, port = service.url.partition("://")[2].partition(":")
    plain = socket.create_connection((host, int(port)), WAIT_SECONDS)
    connection = context.wrap_socket(plain, server_hostname=host, session=session)
    connection.sendall(b"GET /-/ready HTTP/1.1\r\nHost: localhost\r\n\r\n")
    answer = connection.recv(12)
    if not answer:
        raise ConnectionResetError("closed without an answer")
    assert answer == b"HTTP/1.1 200"
    return connection


def test_required(tmp_path: Path, store_path: Path, certificates: Path) -> None:
    """For every path. A certificate that signs itself, or is signed by another CA, is none."""
    with configured(store_path, tmp_path, certificates, REQUIRED) as service:
        assert " --cert client.crt --key client.key " in service.announcement
        for name, is_right in ((None, False), ("client", True), ("other-client", False), ("server", False)):
            show(service, tmp_path, name)
            assert is_served(service) == is_right
        show(service, tmp_path, None)
        assert not is_served(service, "/-/healthy")


@pytest.mark.parametrize(
    ("shows", "said"),
    [
        (None, "it showed no certificate, which client_auth_type demands"),
        ("other-client", "its certificate is not one of client_ca_file, or has expired"),
    ],
)
def test_log_says_why_a_client_is_refused(
    tmp_path: Path, store_path: Path, certificates: Path, shows: str | None, said: str
) -> None:
    """The client may see only that the connection ends."""
    with configured(store_path, tmp_path, certificates, REQUIRED) as service:
        show(service, tmp_path, shows)
        assert not is_served(service)
        _, _, logged = service.stop()
    assert f"a connection from 127.0.0.1 was refused: {said}" in logged


def test_log_says_that_a_client_speaks_no_tls(tmp_path: Path, store_path: Path, certificates: Path) -> None:
    with configured(store_path, tmp_path, certificates, TLS % "min_version: TLS12") as service:
        host, _, port = service.url.partition("://")[2].partition(":")
        with socket.create_connection((host, int(port)), WAIT_SECONDS) as plain:
            plain.sendall(b"GET /-/ready HTTP/1.1\r\nHost: localhost\r\n\r\n")
            while plain.recv(1000):
                pass
        _, _, logged = service.stop()
    assert "a connection from 127.0.0.1 was refused: it spoke HTTP without TLS" in logged


def test_only_if_given(tmp_path: Path, store_path: Path, certificates: Path) -> None:
    text = TLS % "client_auth_type: VerifyClientCertIfGiven, client_ca_file: ca.crt"
    with configured(store_path, tmp_path, certificates, text) as service:
        for name, is_right in ((None, True), ("client", True), ("other-client", False)):
            show(service, tmp_path, name)
            assert is_served(service) == is_right


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_new_ca(tmp_path: Path, store_path: Path, certificates: Path, version: ssl.TLSVersion) -> None:
    """Clients of the old CA get no new connection, and cannot go on with a session of an old one."""
    with configured(store_path, tmp_path, certificates, REQUIRED) as service:
        context = show(service, tmp_path, "client")
        context.minimum_version = context.maximum_version = version
        with connected(service, context) as before:
            session = before.session
            assert session is not None
            with connected(service, context, session) as resumed:
                assert resumed.session_reused
            os.replace(tmp_path / "other-ca.crt", tmp_path / "ca.crt")
            eventually(lambda: not is_served(service), "the client of the old CA to be refused")
            with pytest.raises(REFUSED):
                connected(service, context, session)
            show(service, tmp_path, "other-client")
            assert is_served(service)
            # A connection that was open goes on.
            before.settimeout(WAIT_SECONDS)
            before.sendall(b"GET /-/ready HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert before.recv(10_000)


def test_certificates_cannot_be_turned_off(tmp_path: Path, store_path: Path, certificates: Path) -> None:
    with configured(store_path, tmp_path, certificates, REQUIRED) as service:
        (tmp_path / "web.yml").write_text(TLS % "min_version: TLS13")
        show(service, tmp_path, "client")
        is_right = "savings_web_config_last_reload_successful"
        eventually(lambda: service.metrics()[is_right] == 0, "the change to be refused")
        show(service, tmp_path, None)
        assert not is_served(service)
        _, _, logged = service.stop()
    assert "client_auth_type asks for less than before; restart to change it" in logged


def test_certificates_can_be_turned_on(tmp_path: Path, store_path: Path, certificates: Path) -> None:
    with configured(store_path, tmp_path, certificates, TLS % "min_version: TLS12") as service:
        assert is_served(service)
        (tmp_path / "web.yml").write_text(REQUIRED)
        eventually(lambda: not is_served(service), "a client without a certificate to be refused")
        show(service, tmp_path, "client")
        assert is_served(service)


@pytest.mark.parametrize(("fields", "tls_1_2", "tls_1_3"), [
    ("min_version: TLS12", True, True),
    ("min_version: TLS13", False, True),
    ("max_version: TLS12", True, False),
])  # fmt: skip
def test_versions(
    tmp_path: Path, store_path: Path, certificates: Path, fields: str, tls_1_2: bool, tls_1_3: bool
) -> None:
    with configured(store_path, tmp_path, certificates, TLS % fields) as service:
        for version, is_right in ((ssl.TLSVersion.TLSv1_2, tls_1_2), (ssl.TLSVersion.TLSv1_3, tls_1_3)):
            context = show(service, tmp_path, None)
            context.minimum_version = context.maximum_version = version
            assert is_served(service) == is_right


def test_ciphers(tmp_path: Path, store_path: Path, certificates: Path) -> None:
    names = "[TLS_AES_128_GCM_SHA256, TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA]"
    with configured(store_path, tmp_path, certificates, TLS % f"cipher_suites: {names}") as service:
        context = show(service, tmp_path, None)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with connected(service, context) as connection:
            found = connection.cipher()
            assert found is not None
            assert found[0] == "ECDHE-ECDSA-AES256-GCM-SHA384"
        context.set_ciphers("ECDHE-ECDSA-AES128-GCM-SHA256")
        assert not is_served(service)


WRONG = {
    "a CA alone": ("client_ca_file: ca.crt", "need each other"),
    "no CA": ("client_auth_type: RequireAndVerifyClientCert", "need each other"),
    "no such CA": (REQUIRED.replace("ca.crt", "missing.crt"), "missing.crt cannot be read"),
    "an empty CA": (REQUIRED.replace("ca.crt", "empty.crt"), "empty.crt holds no certificate in PEM"),
    "a key as CA": (REQUIRED.replace("ca.crt", "ca.key"), "ca.key holds no certificate in PEM"),
    "not verified": ("client_auth_type: RequireAnyClientCert", "RequireAnyClientCert' is not one of NoClientCert"),
    "an old version": ("min_version: TLS10", "tls_server_config.min_version: 'TLS10' is not one of TLS12, TLS13"),
    "no version": ("min_version: TLS13, max_version: TLS12", "min_version is higher than max_version"),
    "a cipher": ("cipher_suites: [TLS_RSA_WITH_RC4_128_SHA]", "'TLS_RSA_WITH_RC4_128_SHA' is not one of"),
    "names": ("client_allowed_sans: [a]", "client_allowed_sans is not supported"),
    "curves": ("curve_preferences: [X25519]", "curve_preferences is not supported"),
    "a text": ("cert: x", "cert is not supported; name a file in cert_file"),
}


@pytest.mark.parametrize(("fields", "said"), WRONG.values(), ids=WRONG.keys())
def test_wrong_fields(tmp_path: Path, store_path: Path, certificates: Path, fields: str, said: str) -> None:
    for file in certificates.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "empty.crt").touch()
    (tmp_path / "web.yml").write_text(fields if fields.startswith("tls_server_config") else TLS % fields)
    done = run_cli("serve", "--store", str(store_path), "--web.config.file", str(tmp_path / "web.yml"))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert said in done.stderr
