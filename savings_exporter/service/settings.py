"""Settings of the commands: addresses, the web configuration file, logging, tracing."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import msgspec

from savings_exporter import yamlfile
from savings_exporter.errors import SettingsError
from savings_exporter.version import VERSION

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

_LONGEST_FLUSH_SECONDS = 5.0


class Tls(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the service's certificate and its key are, as PEM files."""

    cert_file: str
    key_file: str


class Authorization(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the bearer token that callers must show is kept."""

    credentials_file: str


class WebConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file given by ``--web.config.file``; its terms are those of Prometheus's own configuration."""

    tls_server_config: Tls | None = None
    authorization: Authorization | None = None

    def token(self) -> str | None:
        """The bearer token, or None when none is asked for."""
        if self.authorization is None:
            return None
        path = self.authorization.credentials_file
        try:
            with open(path, encoding="utf-8") as file:
                token = file.read().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"{path}: authorization.credentials_file cannot be read: {_why(error)}") from None
        if not token:
            raise SettingsError(f"{path}: authorization.credentials_file holds no token")
        return token


def web_config(path: str | None) -> WebConfig:
    """Read and check the web configuration file; paths in it are relative to it.

    Raises:
        SettingsError: it cannot be read, or a field of it is wrong.
    """
    if path is None:
        return WebConfig()
    config = yamlfile.converted(path, _without_gaps(path, yamlfile.read(path)), WebConfig)
    config = _beside(config, os.path.dirname(os.path.abspath(path)))
    if config.tls_server_config is not None:
        _check_certificate(path, config.tls_server_config)
    return config


def listen_address(text: str) -> tuple[str, int]:
    """``HOST:PORT``, ``[IPV6]:PORT`` or ``:PORT`` (all addresses) as a host and a port.

    Raises:
        ValueError: it is none of these.
    """
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{text!r} is not HOST:PORT with a port up to 65535")
    return host, int(port)


def configure_logging(level: str, log_format: str) -> None:
    """Log to standard error, one line an event, as ``logfmt`` or ``json``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LineFormatter(as_json=log_format == "json"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    if level != "debug":
        logging.getLogger("uvicorn").setLevel(logging.WARNING)


def be_quiet() -> None:
    """Log nothing: the command itself says in one line what went wrong."""
    logging.basicConfig(handlers=[logging.NullHandler()], force=True)


def tracer_provider() -> TracerProvider | None:
    """A provider that exports as the standard ``OTEL_*`` variables say, or None when they configure no exporter.

    Raises:
        SettingsError: a variable names an exporter that is not supported, or has a value that OpenTelemetry refuses.
    """
    names = ", ".join(sorted(name for name in os.environ if name.startswith("OTEL_")))
    complaints = _Complaints()
    with complaints:
        try:
            provider = _provider()
        except ValueError as error:
            complaints.lines.append(str(error))
    if complaints.lines:
        said = " ".join(complaints.lines[0].split())
        raise SettingsError(f'tracing cannot be set up: OpenTelemetry says "{said}"; correct or unset {names}')
    return provider


def flush_spans(provider: TracerProvider) -> None:
    """Send the remaining spans and stop. This takes at most 5 seconds when the collector does not answer."""
    # The provider's own shutdown waits 30 s for its exporter, and takes no timeout.
    flush = threading.Thread(target=provider.shutdown, daemon=True)
    flush.start()
    flush.join(_LONGEST_FLUSH_SECONDS)


def _provider() -> TracerProvider | None:
    wanted = _wanted_exporter()
    if wanted == "none":
        return None
    # Imported here, because the import reads some of the variables, and may refuse their values.
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    if "service.name=" not in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        os.environ.setdefault("OTEL_SERVICE_NAME", "savings-exporter")
    # The stable names of HTTP attributes, in place of the old ones.
    os.environ.setdefault("OTEL_SEMCONV_STABILITY_OPT_IN", "http")
    given = os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    version = {} if "service.version=" in given else {"service.version": VERSION}
    provider = TracerProvider(shutdown_on_exit=False, resource=Resource.create(version))
    provider.add_span_processor(BatchSpanProcessor(_span_exporter(wanted)))
    return provider


def _wanted_exporter() -> str:
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return "none"
    has_endpoint = any(
        os.environ.get(name) for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    )
    return os.environ.get("OTEL_TRACES_EXPORTER", "").strip() or ("otlp" if has_endpoint else "none")


def _span_exporter(wanted: str) -> SpanExporter:
    from opentelemetry.sdk.trace.export import ConsoleSpanExporter

    if wanted == "otlp":
        return _otlp_exporter()
    if wanted == "console":
        return ConsoleSpanExporter(out=sys.stderr)
    raise SettingsError(f"OTEL_TRACES_EXPORTER is {wanted!r}; use otlp, console or none")


def _otlp_exporter() -> SpanExporter:
    names = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    name = next((name for name in names if os.environ.get(name, "").strip()), names[1])
    protocol = os.environ.get(name, "").strip() or "http/protobuf"
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter()
    if protocol != "grpc":
        raise SettingsError(f"{name} is {protocol!r}; use http/protobuf or grpc")
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcSpanExporter
    except ImportError:
        raise SettingsError(
            f"{name} is grpc, and OTLP over gRPC is not installed: install savings-exporter[otlp-grpc], or use "
            "http/protobuf and the collector's port for it, usually 4318"
        ) from None
    return GrpcSpanExporter()


class _Complaints(logging.Handler):
    """Collects what OpenTelemetry logs in the block: for most invalid values it only logs and uses its defaults."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> None:
        logger = logging.getLogger("opentelemetry")
        self._before = logger.level, logger.propagate
        logger.addHandler(self)
        logger.setLevel(logging.WARNING)
        logger.propagate = False

    def __exit__(self, *_exception: object) -> None:
        logger = logging.getLogger("opentelemetry")
        logger.removeHandler(self)
        logger.level, logger.propagate = self._before


def _beside(config: WebConfig, directory: str) -> WebConfig:
    def absolute(part: Any) -> Any:
        if part is None:
            return None
        paths = {name: os.path.join(directory, path) for name, path in msgspec.structs.asdict(part).items()}
        return type(part)(**paths)

    return WebConfig(absolute(config.tls_server_config), absolute(config.authorization))


def _without_gaps(path: str, content: Any) -> Any:
    """The content, after a check that no field is empty: an empty template must not open a service to all."""
    if content is None:
        raise SettingsError(f"{path}: is empty; leave --web.config.file out for a service without TLS and token")
    for name, value in content.items() if isinstance(content, dict) else ():
        if value is None:
            raise SettingsError(f"{path}: {name} is empty; fill it in, or remove it")
    return content


def _check_certificate(path: str, tls: Tls) -> None:
    import ssl

    for name, file in msgspec.structs.asdict(tls).items():
        try:
            open(file, "rb").close()
        except OSError as error:
            raise SettingsError(f"{path}: tls_server_config.{name}: {file} cannot be read: {_why(error)}") from None
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tls.cert_file, tls.key_file, password="")
    except OSError as error:  # ssl.SSLError is one
        raise SettingsError(
            f"{path}: {tls.cert_file} and {tls.key_file} are not a certificate and its key in PEM: {_why(error)}"
        ) from None


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


class _LineFormatter(logging.Formatter):
    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "ts": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": record.getMessage(),
        }
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            fields["error"] = f"{type(error).__name__}: {error}"
        fields |= _trace_of_caller()
        if hasattr(record, "drill"):
            fields["drill"] = record.drill
        if self._as_json:
            return json.dumps(fields)
        return " ".join(f"{key}={_logfmt(value)}" for key, value in fields.items())


def _trace_of_caller() -> dict[str, str]:
    """The trace and the span within which something is logged, when there is one."""
    # A program that traces has loaded it.
    trace = sys.modules.get("opentelemetry.trace")
    context = trace.get_current_span().get_span_context() if trace is not None else None
    if context is None or not context.is_valid:
        return {}
    return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}


def _logfmt(value: str) -> str:
    plain = value.isascii() and value.isprintable() and not set(value) & set(' "=\\')
    return value if plain and value else json.dumps(value)
