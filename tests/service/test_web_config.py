"""The certificate, the token and the web configuration file are taken up while the service runs."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from savings_exporter.watched import WatchedFile
from tests.support.paths import DATA, ROOT
from tests.support.service import Service, run_cli, running
from tests.support.wait import eventually

HEADROOM = DATA / "headroom" / "v6" / "proxy_savings.json"
IS_RIGHT = "savings_web_config_last_reload_successful"
READ_AT = "savings_web_config_last_reload_success_timestamp_seconds"


def make_certificate(folder: Path, name: str) -> None:
    """Write ``service.crt`` and ``service.key``."""
    folder.mkdir(exist_ok=True)
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    files = ["-keyout", str(folder / "service.key"), "-out", str(folder / "service.crt")]
    subject = ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    subprocess.run([*command, *files, *subject], check=True, capture_output=True)


def shown_name(service: Service) -> str:
    """The name in the certificate that a new connection gets."""
    host, _, port = service.url.removeprefix("https://").partition(":")
    certificate = ssl.get_server_certificate((host, int(port)))
    shown = subprocess.run(
        ["openssl", "x509", "-noout", "-subject"], input=certificate, capture_output=True, text=True, check=True
    )
    return shown.stdout.strip().rpartition("= ")[2]


def trust(service: Service, folder: Path) -> None:
    service.context = ssl.create_default_context(cafile=folder / "service.crt")


def move_into(source: Path, target: Path) -> None:
    for file in source.iterdir():
        os.replace(file, target / file.name)


@contextmanager
def with_token(store: Path, folder: Path) -> Iterator[tuple[Service, Path]]:
    """A service that asks for the token ``first``, and the token's file."""
    (folder / "token").write_text("first\n")
    (folder / "web.yml").write_text("authorization: {credentials_file: token}")
    with running("serve", "--store", str(store), "--web.config.file", str(folder / "web.yml")) as service:
        yield service, folder / "token"


def status_with(service: Service, token: str) -> int:
    return service.get("/metrics", {"Authorization": f"Bearer {token}"})[0]


def metric(service: Service, name: str, token: str = "first") -> float:
    status, text = service.get("/metrics", {"Authorization": f"Bearer {token}"})
    assert status == 200, text
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(name + " "))


@pytest.mark.needs("openssl")
def test_new_certificate(tmp_path: Path, store_path: Path) -> None:
    """A connection gets the new one; one that is open goes on. A broken one changes nothing."""
    used, new = tmp_path / "used", tmp_path / "new"
    make_certificate(used, "first")
    (tmp_path / "web.yml").write_text("tls_server_config: {cert_file: used/service.crt, key_file: used/service.key}")
    with running("serve", "--store", str(store_path), "--web.config.file", str(tmp_path / "web.yml")) as service:
        trust(service, used)
        assert shown_name(service) == "first"
        before = service.metrics()
        assert before[IS_RIGHT] == 1
        make_certificate(new, "second")
        # First the certificate, then the key: in between they do not match.
        os.replace(new / "service.crt", used / "service.crt")
        os.replace(new / "service.key", used / "service.key")
        eventually(lambda: shown_name(service) == "second", "the new certificate")
        trust(service, used)
        assert service.metrics()[IS_RIGHT] == 1
        assert service.metrics()[READ_AT] > before[READ_AT]

        make_certificate(new, "third")
        os.replace(new / "service.key", used / "service.key")
        eventually(lambda: service.metrics()[IS_RIGHT] == 0, "the mismatch to be noticed")
        assert shown_name(service) == "second"
        assert service.post({"model": "m", "tokens_saved": 1})[0] == 200
        (used / "service.crt").write_text("nonsense")
        make_certificate(new, "fourth")
        move_into(new, used)
        eventually(lambda: shown_name(service) == "fourth", "the new certificate")
        trust(service, used)
        assert service.metrics()[IS_RIGHT] == 1
        status, _, logged = service.stop()
    assert status == 0
    assert f"{used / 'service.key'} is not the key of the certificate {used / 'service.crt'}" in logged
    assert "The certificate and the credentials from before stay in use" in logged


@pytest.mark.needs("openssl")
def test_key_with_a_passphrase(tmp_path: Path, store_path: Path) -> None:
    make_certificate(tmp_path, "first")
    key = tmp_path / "service.key"
    encrypted = subprocess.run(
        ["openssl", "pkcs8", "-topk8", "-passout", "pass:secret", "-in", str(key)], check=True, capture_output=True
    )
    key.write_bytes(encrypted.stdout)
    config = tmp_path / "web.yml"
    config.write_text("tls_server_config: {cert_file: service.crt, key_file: service.key}")
    done = run_cli("serve", "--store", str(store_path), "--web.config.file", str(config))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"tls_server_config.key_file: {key} is encrypted; remove its passphrase" in done.stderr


@pytest.mark.needs("openssl")
def test_tls_cannot_be_turned_off(tmp_path: Path, store_path: Path) -> None:
    make_certificate(tmp_path, "first")
    config = tmp_path / "web.yml"
    config.write_text("tls_server_config: {cert_file: service.crt, key_file: service.key}")
    with running("serve", "--store", str(store_path), "--web.config.file", str(config)) as service:
        trust(service, tmp_path)
        (tmp_path / "token").write_text("secret")
        config.write_text("authorization: {credentials_file: token}")
        eventually(lambda: service.metrics()[IS_RIGHT] == 0, "the change to be refused")
        assert shown_name(service) == "first"
        _, _, logged = service.stop()
    assert "tls_server_config was removed; restart to turn TLS on or off" in logged


@pytest.mark.needs("openssl")
def test_secret_mounted_by_a_link(tmp_path: Path, store_path: Path) -> None:
    """As Kubernetes changes a mounted secret: one link to the folder is replaced."""
    for name in ("first", "second"):
        make_certificate(tmp_path / name, name)
    link = tmp_path / "data"
    link.symlink_to("first")
    config = tmp_path / "web.yml"
    config.write_text("tls_server_config: {cert_file: data/service.crt, key_file: data/service.key}")
    with running("serve", "--store", str(store_path), "--web.config.file", str(config)) as service:
        assert shown_name(service) == "first"
        (tmp_path / "next").symlink_to("second")
        os.replace(tmp_path / "next", link)
        eventually(lambda: shown_name(service) == "second", "the new certificate")


def test_new_token(tmp_path: Path, store_path: Path) -> None:
    with with_token(store_path, tmp_path) as (service, token):
        assert (status_with(service, "first"), status_with(service, "second")) == (200, 401)
        token.write_text("second")
        eventually(lambda: status_with(service, "second") == 200, "the new token")
        assert status_with(service, "first") == 401
        assert metric(service, IS_RIGHT, "second") == 1


def make_pipe(token: Path) -> None:
    os.mkfifo(token)


def make_huge(token: Path) -> None:
    with token.open("wb") as file:
        file.truncate(10**9)


BROKEN = {
    "missing": lambda _token: None,
    "empty": lambda token: token.write_text(""),
    "not text": lambda token: token.write_bytes(b"\xff"),
    "two lines": lambda token: token.write_text("one\ntwo\n"),
    "directory": lambda token: token.mkdir(),
    "pipe": make_pipe,
    "huge": make_huge,
}


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_token(tmp_path: Path, store_path: Path, broken: str) -> None:
    """The previous one stays in use: a service must not become open to all, nor closed to its callers."""
    with with_token(store_path, tmp_path) as (service, token):
        token.unlink()
        BROKEN[broken](token)
        eventually(lambda: metric(service, IS_RIGHT) == 0, "the broken token to be noticed")
        assert status_with(service, "") == 401
        (tmp_path / "new").write_text("second")
        token.rmdir() if token.is_dir() else None
        os.replace(tmp_path / "new", token)
        eventually(lambda: status_with(service, "second") == 200, "the new token")
        assert metric(service, IS_RIGHT, "second") == 1
        status, _, logged = service.stop()
    assert status == 0
    assert logged.count("authorization.credentials_file") == 1
    assert f"{token}: authorization.credentials_file" in logged


@pytest.mark.parametrize("step", ["start", "stop"])
def test_pipe_in_place_of_the_token(tmp_path: Path, store_path: Path, step: str) -> None:
    """Neither the start nor the stop waits for a writer."""
    if step == "start":
        os.mkfifo(tmp_path / "token")
        (tmp_path / "web.yml").write_text("authorization: {credentials_file: token}")
        done = run_cli("serve", "--store", str(store_path), "--web.config.file", str(tmp_path / "web.yml"))
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "cannot be read: is not a regular file" in done.stderr
        return
    with with_token(store_path, tmp_path) as (service, token):
        token.unlink()
        os.mkfifo(token)
        eventually(lambda: metric(service, IS_RIGHT) == 0, "the pipe to be noticed")
        assert service.stop()[0] == 0


WRONG = {
    "removed": "tls_server_config: {cert_file: a, key_file: b}",
    "empty object": "{}",
    "nul": 'authorization: {credentials_file: "a\\0b"}',
    "surrogate": 'authorization: {credentials_file: "a\\uD800b"}',
    "deep": "[" * 5000,
    "no date": "authorization: {credentials_file: 2024-99-99}",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_web_config_file(tmp_path: Path, store_path: Path, wrong: str) -> None:
    """Whatever is in it: the token stays in use, and the next change is noticed."""
    with with_token(store_path, tmp_path) as (service, token):
        config = tmp_path / "web.yml"
        config.write_text(WRONG[wrong])
        eventually(lambda: metric(service, IS_RIGHT) == 0, "the wrong file to be noticed")
        assert status_with(service, "") == 401
        token.write_text("second")
        config.write_text("authorization: {credentials_file: token}")
        eventually(lambda: status_with(service, "second") == 200, "the new token")
        status, _, logged = service.stop()
    assert status == 0
    assert "Traceback" not in logged


def test_same_size_and_time(tmp_path: Path, store_path: Path) -> None:
    """A file that is replaced by one with the same size and time is noticed."""
    with with_token(store_path, tmp_path) as (service, token):
        found = token.stat()
        (tmp_path / "new").write_text("third\n")
        os.utime(tmp_path / "new", ns=(found.st_atime_ns, found.st_mtime_ns))
        os.replace(tmp_path / "new", token)
        eventually(lambda: status_with(service, "third") == 200, "the new token")


def test_new_web_config_file(tmp_path: Path, store_path: Path) -> None:
    """Also one that names a file which is written later."""
    with with_token(store_path, tmp_path) as (service, _):
        config = tmp_path / "web.yml"
        for broken in ("authorization: {credentials_file: [}", "", "authorization: {credentials_file: other}"):
            config.write_text("authorization: {credentials_file: token}")
            eventually(lambda: metric(service, IS_RIGHT) == 1, "the right file to be read")
            config.write_text(broken)
            eventually(lambda: metric(service, IS_RIGHT) == 0, "the broken file to be noticed")
        (tmp_path / "other").write_text("second")
        eventually(lambda: status_with(service, "second") == 200, "the other token")


@pytest.mark.parametrize("command", [["serve", "--store"], ["watch"]], ids=["serve", "watch"])
def test_hangup(tmp_path: Path, store_path: Path, command: list[str]) -> None:
    """SIGHUP reads the files again, changed or not."""
    path = store_path if command[0] == "serve" else HEADROOM
    (tmp_path / "token").write_text("first")
    (tmp_path / "web.yml").write_text("authorization: {credentials_file: token}")
    with running(*command, str(path), "--web.config.file", str(tmp_path / "web.yml")) as service:
        before = metric(service, READ_AT)
        service.process.send_signal(signal.SIGHUP)
        eventually(lambda: metric(service, READ_AT) > before, "the files to be read")
        status, _, logged = service.stop()
    assert status == 0
    assert f"{tmp_path / 'web.yml'}: read again and in use" in logged


@pytest.mark.parametrize("ignored", [False, True], ids=["usual", "nohup"])
def test_hangup_without_a_file(store_path: Path, ignored: bool) -> None:
    """A terminal that is closed stops the service as SIGTERM does, unless nohup was used."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with running("serve", "--store", str(store_path)) as service:
            assert service.post({"model": "m", "tokens_saved": 1})[0] == 200
            assert IS_RIGHT not in service.metrics()
            if ignored:
                service.process.send_signal(signal.SIGHUP)
                assert service.post({"model": "m", "tokens_saved": 1})[0] == 200
            status, _, _ = service.stop(signal.SIGTERM if ignored else signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert status == 0
    assert WatchedFile(store_path).snapshot().lifetime.tokens_saved == (2 if ignored else 1)
    assert not list(store_path.parent.glob("*.journal.*"))


def test_hangup_during_the_start(tmp_path: Path, store_path: Path) -> None:
    """It does not end a service that does not handle it yet."""
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, signal\n"
        "import importlib.abc, sys\n"
        "class Hangup(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name in ('starlette', 'uvicorn', 'savings_exporter.storage.store'):\n"
        "            os.kill(os.getpid(), signal.SIGHUP)\n"
        "sys.meta_path.insert(0, Hangup())\n"
    )
    path = f"{ROOT}{os.pathsep}{tmp_path}"
    with running("serve", "--store", str(store_path), env={"PYTHONPATH": path}) as service:
        assert service.post({"model": "m", "tokens_saved": 1})[0] == 200
        assert service.stop()[0] == 0
