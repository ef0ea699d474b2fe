"""The file given by ``--web.config.file``: TLS and the bearer token. It is read again when it changes.

Its terms are those of Prometheus's configuration.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from savings_exporter import configfile
from savings_exporter.errors import SettingsError

if TYPE_CHECKING:
    from ssl import SSLContext, SSLObject, SSLSocket

logger = logging.getLogger(__name__)

_POLL_SECONDS = 1.0

# What shows that a file has changed: where it is, its size, and when its content and its mode were changed.
_Stamp = tuple[int, ...]


class Tls(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the service's certificate and its key are, as PEM files."""

    cert_file: str
    key_file: str


class Authorization(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the bearer token that callers must show is kept."""

    credentials_file: str


class _Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tls_server_config: Tls | None = None
    authorization: Authorization | None = None

    def files(self) -> list[str]:
        parts = (self.tls_server_config, self.authorization)
        return [file for part in parts if part is not None for file in msgspec.structs.asdict(part).values()]


class WebConfig(Collector):
    """TLS and the token of a service.

    As a context manager it looks every second whether one of its files has changed, and reads them again. If they are
    wrong then, it logs this, and the previous certificate and token stay in use. It collects metrics of this.

    Args:
        path: the file; None for a service without TLS and without a token.

    Attributes:
        wants_reload: set it to read the files again, changed or not. A signal handler may do so.

    Raises:
        SettingsError: a file cannot be read, or something in it is wrong.
    """

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._stamps: dict[str, _Stamp] = {}
        self._loaded = _Loaded(_Settings(), None, None)
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
    def token(self) -> str | None:
        """The bearer token that callers must show now; None when none is asked for."""
        return self._loaded.token

    @property
    def tls(self) -> Tls | None:
        """The certificate and the key; None when the service has no TLS."""
        return self._loaded.settings.tls_server_config

    @property
    def authorization(self) -> Authorization | None:
        """The token's file; None when no token is asked for."""
        return self._loaded.settings.authorization

    def ssl_context(self) -> SSLContext | None:
        """The context for a listening socket; None when the service has no TLS. Each connection gets the certificate
        that is current when it begins.
        """
        context = self._loaded.context
        if context is not None:
            # Called for every connection, also for one that names no server.
            context.sni_callback = self._use_current
        return context

    def collect(self) -> Iterator[Metric]:
        """Whether the files could be read when they were last read, and when they were last taken into use."""
        if self._path is not None:
            yield GaugeMetricFamily(
                "savings_web_config_last_reload_successful",
                "Whether the web configuration file, the certificate and the token were right when last read.",
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

    def _use_current(self, connection: SSLObject | SSLSocket, _name: str | None, _context: SSLContext) -> None:
        if self._loaded.context is not None:
            connection.context = self._loaded.context

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
            logger.error("%s. The certificate and the token from before stay in use", error)
            return
        self._loaded, self._is_valid, self._loaded_at = loaded, True, time.time()
        logger.info("%s: read again and in use, with the certificate and the token that it names", self._path)

    def _refuse_if_open(self, loaded: _Loaded) -> None:
        """Refuse what turns TLS on or off, or the token off: a file that is half written must not open the service."""
        before = self._loaded
        if (loaded.context is None) != (before.context is None):
            change = "removed" if loaded.context is None else "added"
            raise SettingsError(f"{self._path}: tls_server_config was {change}; restart to turn TLS on or off")
        if loaded.token is None and before.token is not None:
            raise SettingsError(f"{self._path}: authorization was removed; restart to turn the token off")

    def _read(self, path: str) -> _Loaded:
        # Each file is examined before it is read, so that a change in between is noticed at the next look.
        self._stamps = {path: _stamp(path)}
        settings = _settings(path)
        self._stamps |= {file: _stamp(file) for file in settings.files()}
        tls = settings.tls_server_config
        context = _checked_context(path, tls) if tls is not None else None
        token = _token(settings.authorization) if settings.authorization is not None else None
        return _Loaded(settings, context, token)


class _Loaded(NamedTuple):
    """The settings, the context with the certificate, and the token."""

    settings: _Settings
    context: SSLContext | None
    token: str | None


def _stamp(file: str) -> _Stamp:
    try:
        found = os.stat(file)
    except (OSError, ValueError):
        return ()
    # The time of the last change of the inode tells of a change of permissions, too.
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _settings(path: str) -> _Settings:
    """Read and check the file; paths in it are relative to it."""
    settings = configfile.converted(path, _without_gaps(path, configfile.read_yaml(path)), _Settings)
    directory = os.path.dirname(os.path.abspath(path))

    def absolute(part: Any) -> Any:
        if part is None:
            return None
        return type(part)(
            **{name: os.path.join(directory, file) for name, file in msgspec.structs.asdict(part).items()}
        )

    return _Settings(absolute(settings.tls_server_config), absolute(settings.authorization))


def _without_gaps(path: str, content: Any) -> Any:
    """The content, after a check that no field is empty: an empty template must not open a service to all."""
    if content is None:
        raise SettingsError(f"{path}: is empty; leave --web.config.file out for a service without TLS and token")
    for name, value in content.items() if isinstance(content, dict) else ():
        if value is None:
            raise SettingsError(f"{path}: {name} is empty; fill it in, or remove it")
    return content


def _checked_context(path: str, tls: Tls) -> SSLContext:
    # Imported here, because it takes time.
    import ssl

    for name, file in msgspec.structs.asdict(tls).items():
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
    return context


def _token(authorization: Authorization) -> str:
    path = authorization.credentials_file
    try:
        token = configfile.read_text(path).strip()
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: authorization.credentials_file cannot be read: {_why(error)}") from None
    if not token:
        raise SettingsError(f"{path}: authorization.credentials_file holds no token")
    if not token.isprintable() or " " in token:
        raise SettingsError(f"{path}: authorization.credentials_file holds more than one word")
    return token


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
