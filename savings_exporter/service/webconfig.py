"""The file given by ``--web.config.file``: TLS, tokens, users and headers. It is read again when it changes.

Its terms are those of Prometheus's exporter-toolkit, and ``authorization``, which is ours.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import shlex
import socket
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from savings_exporter import configfile
from savings_exporter.errors import SettingsError
from savings_exporter.service.auth import Credentials, Token
from savings_exporter.service.browsers import Headers, security_headers

if TYPE_CHECKING:
    from ssl import SSLContext

logger = logging.getLogger(__name__)

_POLL_SECONDS = 1.0

# What shows that a file has changed: where it is, its size, and when its content and its mode were changed.
_Stamp = tuple[int, ...]


class Tls(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The service's certificate and its key, as PEM files, which clients must show a certificate, and what TLS does."""

    cert_file: str
    key_file: str
    client_auth_type: str = "NoClientCert"
    client_ca_file: str | None = None
    min_version: str = "TLS12"
    max_version: str = "TLS13"
    cipher_suites: list[str] = []
    prefer_server_cipher_suites: bool = True


class Authorization(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The files of the bearer tokens: one that permits everything, one to read, and one to write."""

    credentials_file: str | None = None
    read_credentials_file: str | None = None
    write_credentials_file: str | None = None

    @property
    def for_writing(self) -> str | None:
        """The file of a token that permits to write; None if there is none."""
        return self.write_credentials_file or self.credentials_file


class Http(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Headers of all answers. The service speaks HTTP/1.1 only, whether HTTP/2 is allowed or not."""

    http2: bool = False
    headers: dict[str, str] = {}


class _Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tls_server_config: Tls | None = None
    authorization: Authorization | None = None
    basic_auth_users: dict[str, str] | None = None
    http_server_config: Http = Http()

    def files(self) -> list[str]:
        parts = (self.tls_server_config, self.authorization)
        return [file for part in parts if part is not None for file in _files(part).values()]


class WebConfig(Collector):
    """TLS, the credentials and the headers of a service.

    As a context manager it looks every second whether one of its files has changed, and reads them again. If they are
    wrong then, it logs this, and the previous certificate and credentials stay in use. It collects metrics of this.

    Args:
        path: the file; None for a service without TLS and without credentials.
        names: the names under which the service is known; None if any name is right.

    Attributes:
        wants_reload: set it to read the files again, changed or not. A signal handler may do so.

    Raises:
        SettingsError: a file cannot be read, or something in it is wrong.
    """

    def __init__(self, path: str | None, names: Collection[str] | None = ()) -> None:
        self._path = path
        self._names = None if names is None else frozenset(name.lower().removesuffix(".") for name in names)
        self._stamps: dict[str, _Stamp] = {}
        self._loaded = _Loaded(_Settings(), None, None, *_headers("", Http()))
        self._is_valid, self._loaded_at = True, time.time()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="web configuration", daemon=True)
        self.wants_reload = False
        if path is not None:
            self._loaded = self._read(path)

    @property
    def has_file(self) -> bool:
        """Whether there is a file that can change."""
        return self._path is not None

    @property
    def credentials(self) -> Credentials | None:
        """What callers must show now; None when nothing is asked for."""
        return self._loaded.credentials

    @property
    def headers(self) -> Headers:
        """The security headers of all answers but those to a POST that is taken."""
        return self._loaded.headers

    @property
    def receipt_headers(self) -> Headers:
        """The security headers of the answers to a POST that is taken."""
        return self._loaded.receipt_headers

    @property
    def names(self) -> frozenset[str] | None:
        """The names under which browsers may use the service; None if any name is right.

        A page that makes its name lead to this service has no credentials for it, and no certificate of its name.
        """
        return self._names if self._loaded.is_open else None

    @property
    def tls(self) -> Tls | None:
        """The certificate and the key; None when the service has no TLS."""
        return self._loaded.settings.tls_server_config

    @property
    def authorization(self) -> Authorization | None:
        """The files of tokens; None when no token is asked for."""
        return self._loaded.settings.authorization

    @property
    def users(self) -> Collection[str]:
        """The names of the users."""
        return self._loaded.settings.basic_auth_users or ()

    def ssl_context(self) -> SSLContext | None:
        """The context for a connection that begins now; None when the service has no TLS."""
        return self._loaded.context

    def check_address(self, listener: socket.socket, *, allows_insecure: bool) -> None:
        """Refuse a service that other hosts can reach, and that asks for nothing, unless this is wanted.

        Raises:
            SettingsError: it is not wanted.
        """
        host, port = listener.getsockname()[:2]
        address = ipaddress.ip_address(host.partition("%")[0])
        if not self._loaded.is_open or (getattr(address, "ipv4_mapped", None) or address).is_loopback:
            return
        what = f"other hosts can reach {host} port {port}, and may read and record savings without a token and TLS"
        if not allows_insecure:
            raise SettingsError(
                f"{what}. Listen on 127.0.0.1, ask for a token or use TLS with --web.config.file, or allow it with "
                "--web.allow-insecure"
            )
        logger.warning("%s", what)

    def collect(self) -> Iterator[Metric]:
        """Whether the files could be read when they were last read, and when they were last taken into use."""
        if self._path is not None:
            yield GaugeMetricFamily(
                "savings_web_config_last_reload_successful",
                "Whether the web configuration file and the files that it names were right when last read.",
                value=float(self._is_valid),
            )
            yield GaugeMetricFamily(
                "savings_web_config_last_reload_success_timestamp_seconds",
                "When the web configuration that is in use was read.",
                value=self._loaded_at,
            )

    def __enter__(self) -> WebConfig:
        if self.has_file:
            self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        # The thread is not waited for: a file on a disk that hangs must not delay the last save.
        self._closing.set()

    def _run(self) -> None:
        last_look = self._stamps
        while not self._closing.wait(_POLL_SECONDS):
            stamps = {file: _stamp(file) for file in self._stamps}
            if self.wants_reload:
                self.wants_reload = False
                self._reload()
            elif stamps != self._stamps and stamps == last_look:
                # A second has passed since the change: a program that writes several files has ended.
                self._reload()
            last_look = stamps

    def _reload(self) -> None:
        assert self._path is not None
        try:
            loaded = self._read(self._path)
            self._refuse_if_open(loaded)
        except Exception as error:
            # Not only SettingsError: whatever is wrong with a file, the next change must be noticed.
            self._is_valid = False
            logger.error("%s. The certificate and the credentials from before stay in use", error)
            return
        self._loaded, self._is_valid, self._loaded_at = loaded, True, time.time()
        logger.info("%s: read again and in use, with the files that it names", self._path)

    def _refuse_if_open(self, loaded: _Loaded) -> None:
        """Refuse what turns TLS on or off, or no longer asks for credentials or for certificates of clients: a file
        that is half written must not open the service.
        """
        before = self._loaded
        if (loaded.context is None) != (before.context is None):
            change = "removed" if loaded.context is None else "added"
            raise SettingsError(f"{self._path}: tls_server_config was {change}; restart to turn TLS on or off")
        if loaded.credentials is None and before.credentials is not None:
            raise SettingsError(
                f"{self._path}: authorization and basic_auth_users were removed; restart to turn them off"
            )
        if before.context and loaded.context and loaded.context.verify_mode < before.context.verify_mode:
            raise SettingsError(
                f"{self._path}: tls_server_config.client_auth_type asks for less than before; restart to change it"
            )

    def _read(self, path: str) -> _Loaded:
        # Each file is examined before it is read, so that a change in between is noticed at the next look.
        self._stamps = {path: _stamp(path)}
        settings = _settings(path)
        self._stamps |= {file: _stamp(file) for file in settings.files()}
        tls = settings.tls_server_config
        context = _checked_context(path, tls) if tls is not None else None
        headers = _headers(path, settings.http_server_config)
        return _Loaded(settings, context, _credentials(path, settings), *headers)


class _Loaded(NamedTuple):
    """The settings, and what is made of them and of the files that they name."""

    settings: _Settings
    context: SSLContext | None
    credentials: Credentials | None
    headers: Headers
    receipt_headers: Headers

    @property
    def is_open(self) -> bool:
        """Whether the service talks to anyone who reaches it, without TLS."""
        return self.context is None and self.credentials is None


def _stamp(file: str) -> _Stamp:
    try:
        found = os.stat(file)
    except (OSError, ValueError):
        return ()
    # The time of the last change of the inode tells of a change of permissions, too.
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _settings(path: str) -> _Settings:
    """Read and check the file; paths in it are relative to it."""
    settings = configfile.converted(path, _supported(path, configfile.read_yaml(path)), _Settings)
    directory = os.path.dirname(os.path.abspath(path))

    def absolute(part: Any) -> Any:
        if part is None:
            return None
        return msgspec.structs.replace(
            part, **{name: os.path.join(directory, file) for name, file in _files(part).items()}
        )

    return msgspec.structs.replace(
        settings,
        tls_server_config=absolute(settings.tls_server_config),
        authorization=absolute(settings.authorization),
    )


def _files(part: Tls | Authorization) -> dict[str, str]:
    """The files that a part of the settings names."""
    fields = msgspec.structs.asdict(part)
    return {name: file for name, file in fields.items() if name.endswith("_file") and file is not None}


_NOT_SUPPORTED = {
    "rate_limit": "is not supported; use a proxy that limits the rate",
    "tls_server_config.cert": "is not supported; name a file in cert_file",
    "tls_server_config.key": "is not supported; name a file in key_file",
    "tls_server_config.client_ca": "is not supported; name a file in client_ca_file",
    "tls_server_config.client_allowed_sans": "is not supported; use a CA that signs only the clients that are allowed",
    "tls_server_config.curve_preferences": "is not supported; remove it",
}


def _supported(path: str, content: Any) -> Any:
    """The content, after a check that no field is empty, and that the service can do what it says."""
    content = _without_gaps(path, content)
    for name, problem in _NOT_SUPPORTED.items():
        part, _, field = name.rpartition(".")
        within = content.get(part) if part and isinstance(content, dict) else content
        if isinstance(within, dict) and field in within:
            raise SettingsError(f"{path}: {name} {problem}")
    return content


def _without_gaps(path: str, content: Any) -> Any:
    """The content, after a check that no field is empty: an empty template must not open a service to all."""
    if content is None:
        raise SettingsError(f"{path}: is empty; leave --web.config.file out for a service without TLS and credentials")
    for name, value in content.items() if isinstance(content, dict) else ():
        if value is None:
            raise SettingsError(f"{path}: {name} is empty; fill it in, or remove it")
    return content


_NEEDED_CERTIFICATES = {
    "NoClientCert": "CERT_NONE",
    "VerifyClientCertIfGiven": "CERT_OPTIONAL",
    "RequireAndVerifyClientCert": "CERT_REQUIRED",
}
_VERSIONS = {"TLS12": "TLSv1_2", "TLS13": "TLSv1_3"}
# Go's names, and OpenSSL's. Those of TLS 1.3 cannot be chosen, in Go either.
_CIPHERS = {
    "TLS_AES_128_GCM_SHA256": "",
    "TLS_AES_256_GCM_SHA384": "",
    "TLS_CHACHA20_POLY1305_SHA256": "",
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA": "ECDHE-ECDSA-AES128-SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA": "ECDHE-ECDSA-AES256-SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA": "ECDHE-RSA-AES128-SHA",
    "TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA": "ECDHE-RSA-AES256-SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256": "ECDHE-ECDSA-AES128-GCM-SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384": "ECDHE-ECDSA-AES256-GCM-SHA384",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256": "ECDHE-RSA-AES128-GCM-SHA256",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384": "ECDHE-RSA-AES256-GCM-SHA384",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-RSA-CHACHA20-POLY1305",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-ECDSA-CHACHA20-POLY1305",
}


def _checked_context(path: str, tls: Tls) -> SSLContext:
    # Imported here, because it takes time.
    import ssl

    for name, file in _files(tls).items():
        try:
            if "ENCRYPTED" in configfile.read_text(file):
                raise SettingsError(f"{path}: tls_server_config.{name}: {file} is encrypted; remove its passphrase")
        except (OSError, ValueError) as error:
            raise SettingsError(f"{path}: tls_server_config.{name}: {file} cannot be read: {_why(error)}") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # With a password, a key that needs one is an error, not a question on the terminal.
        context.load_cert_chain(tls.cert_file, tls.key_file, password="")
    except OSError as error:  # ssl.SSLError is one
        if getattr(error, "reason", "") == "KEY_VALUES_MISMATCH":
            raise SettingsError(f"{path}: {tls.key_file} is not the key of the certificate {tls.cert_file}") from None
        raise SettingsError(
            f"{path}: {tls.cert_file} and {tls.key_file} are not a certificate and its key in PEM: {_why(error)}"
        ) from None
    _ask_for_certificates(path, tls, context)
    context.minimum_version = ssl.TLSVersion[_chosen(path, "min_version", tls.min_version, _VERSIONS)]
    context.maximum_version = ssl.TLSVersion[_chosen(path, "max_version", tls.max_version, _VERSIONS)]
    if context.minimum_version > context.maximum_version:
        raise SettingsError(f"{path}: tls_server_config.min_version is higher than max_version")
    ciphers = [_chosen(path, "cipher_suites", name, _CIPHERS) for name in tls.cipher_suites]
    if any(ciphers):
        context.set_ciphers(":".join(filter(None, ciphers)))
    if not tls.prefer_server_cipher_suites:
        context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    return context


def _ask_for_certificates(path: str, tls: Tls, context: SSLContext) -> None:
    """Let the context ask clients for certificates, if the settings say so."""
    import ssl

    context.verify_mode = ssl.VerifyMode[_chosen(path, "client_auth_type", tls.client_auth_type, _NEEDED_CERTIFICATES)]
    is_asked = context.verify_mode != ssl.CERT_NONE
    if is_asked != (tls.client_ca_file is not None):
        raise SettingsError(
            f"{path}: tls_server_config: client_ca_file and a client_auth_type such as RequireAndVerifyClientCert need "
            "each other; add the one that is missing"
        )
    if tls.client_ca_file is not None:
        try:
            context.load_verify_locations(tls.client_ca_file)
        except OSError as error:
            raise SettingsError(
                f"{path}: tls_server_config.client_ca_file: {tls.client_ca_file} holds no certificate in PEM: "
                f"{_why(error)}"
            ) from None


def _chosen(path: str, field: str, value: str, known: Mapping[str, str]) -> str:
    if value not in known:
        raise SettingsError(f"{path}: tls_server_config.{field}: {value!r} is not one of {', '.join(known)}")
    return known[value]


def _credentials(path: str, settings: _Settings) -> Credentials | None:
    authorization, users = settings.authorization, settings.basic_auth_users
    if users is not None and not users:
        raise SettingsError(f"{path}: basic_auth_users names no user; add one, or remove it")
    for name, found in (users or {}).items():
        _check_user(path, name, found)
    tokens = []
    if authorization is not None:
        for field, file in _files(authorization).items():
            reads, writes = field != "write_credentials_file", field != "read_credentials_file"
            tokens.append(Token(_token(file, field).encode(), reads, writes))
        if not tokens:
            raise SettingsError(f"{path}: authorization lacks the field credentials_file")
    return Credentials(tokens, users or {}) if tokens or users else None


_HASH = re.compile(r"\$2[aby]\$(\d\d)\$[./A-Za-z0-9]{53}", re.ASCII)
# One more doubles the time of a check; this takes seconds.
_HIGHEST_COST = 15


def _check_user(path: str, name: str, found: str) -> None:
    if ":" in name or not name.isprintable():
        raise SettingsError(f"{path}: basic_auth_users: {name!r} cannot be the name of a user")
    hashed = _HASH.fullmatch(found)
    if hashed is None:
        # Without the value, which may be a password.
        raise SettingsError(
            f"{path}: basic_auth_users.{name} is not a bcrypt hash; make one with: htpasswd -nBC 10 {shlex.quote(name)}"
        )
    if not 4 <= int(hashed[1]) <= _HIGHEST_COST:
        raise SettingsError(
            f"{path}: basic_auth_users.{name} has the cost {hashed[1]}; use one from 4 to {_HIGHEST_COST}"
        )


_CONFIGURABLE = {
    "Content-Security-Policy": (),
    "Strict-Transport-Security": (),
    "X-Content-Type-Options": ("", "nosniff"),
    "X-Frame-Options": ("", "deny", "sameorigin"),
    "X-XSS-Protection": (),
}


def _headers(path: str, http: Http) -> tuple[Headers, Headers]:
    """The headers of answers, and of those to a POST that is taken."""
    for name, text in http.headers.items():
        where = f"{path}: http_server_config.headers.{name}"
        if name not in _CONFIGURABLE:
            raise SettingsError(f"{where} cannot be set; these can: {', '.join(_CONFIGURABLE)}")
        if _CONFIGURABLE[name] and text not in _CONFIGURABLE[name]:
            raise SettingsError(f"{where} must be {' or '.join(filter(None, _CONFIGURABLE[name]))}")
        if not text.isascii() or not text.isprintable():
            raise SettingsError(f"{where} holds a character that a header cannot have")
    return security_headers(http.headers), security_headers(http.headers, of_receipts=True)


def _token(path: str, field: str) -> str:
    try:
        token = configfile.read_text(path).strip()
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: authorization.{field} cannot be read: {_why(error)}") from None
    if not token:
        raise SettingsError(f"{path}: authorization.{field} holds no token")
    if not token.isprintable() or " " in token:
        raise SettingsError(f"{path}: authorization.{field} holds more than one word")
    return token


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
