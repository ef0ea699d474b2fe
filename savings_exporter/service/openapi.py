"""The description of the routes as an OpenAPI document. The schema of a record comes from ``SavingsRecord``."""

from __future__ import annotations

import inspect
import re
from http import HTTPStatus
from typing import Any

import msgspec

from savings_exporter.model.days import COLUMNS
from savings_exporter.model.keys import MAX_KEY_LENGTH
from savings_exporter.model.record import SavingsRecord
from savings_exporter.service.intake import IntakeLimits
from savings_exporter.service.paths import (
    DOCUMENTS_PATH,
    HEALTHY_PATH,
    HISTORY_PATH,
    OPENAPI_PATH,
    OTLP_PATH,
    READY_PATH,
    SAVINGS_PATH,
)
from savings_exporter.version import VERSION

_Schema = dict[str, Any]

# What can answer any request, and what can answer one that needs credentials.
_ALWAYS = (HTTPStatus.BAD_REQUEST, HTTPStatus.MISDIRECTED_REQUEST, HTTPStatus.SERVICE_UNAVAILABLE)
_GUARDED = (*_ALWAYS, HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
_RETRIED = (HTTPStatus.SERVICE_UNAVAILABLE,)
_POSTED = (
    *_GUARDED,
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    HTTPStatus.UNPROCESSABLE_ENTITY,
)


def document(telemetry_path: str, limits: IntakeLimits, *, takes_savings: bool, takes_otlp: bool) -> _Schema:
    """The description of a service. ``servers`` is not part of it, because it depends on the request."""
    savings = {"get": _get("The totals", _json(_ref("Totals")), _GUARDED)}
    if takes_savings:
        savings["post"] = _post()
    paths = {
        SAVINGS_PATH: savings,
        HISTORY_PATH: {"get": _history()},
        telemetry_path: {
            "get": _get("The metrics", _text("text/plain", "application/openmetrics-text"), _GUARDED),
        },
        HEALTHY_PATH: {"get": _get("Whether savings can be stored", _text("text/plain"), _ALWAYS, is_public=True)},
        READY_PATH: {"get": _get("Whether requests are accepted", _text("text/plain"), _ALWAYS, is_public=True)},
        OPENAPI_PATH: {"get": _get("This document", _json({"type": "object"}), _ALWAYS, is_public=True)},
        DOCUMENTS_PATH: {"get": _get("The list of documents", _text("text/html"), _ALWAYS, is_public=True)},
        DOCUMENTS_PATH + "{name}": {"get": _document()},
        "/": {"get": _get("The status page", _text("text/html"), _GUARDED)},
    }
    if takes_otlp:
        paths[OTLP_PATH] = {"post": _otlp()}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "savings-exporter",
            "version": VERSION,
            "description": "Keeps lifetime savings of LLM tokens durably. Every route also answers HEAD like GET.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        # A service without a web configuration file asks for no credentials.
        "security": [{}, {"bearer": []}, {"basic": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "basic": {"type": "http", "scheme": "basic"},
            },
            "schemas": {
                "SavingsRecord": _record(),
                "SavingsBatch": {
                    "type": "object",
                    "properties": {
                        "records": {
                            "type": "array",
                            "items": _ref("SavingsRecord"),
                            "minItems": 1,
                            "maxItems": limits.records,
                        }
                    },
                    "required": ["records"],
                    "additionalProperties": False,
                },
                "Receipt": _RECEIPT,
                "Totals": _TOTALS,
                "History": _HISTORY,
                "Problem": _PROBLEM,
            },
            "responses": {status.name: _problem(status) for status in sorted({*_POSTED, HTTPStatus.NOT_FOUND})},
        },
    }


_RECEIPT: _Schema = {
    "type": "object",
    "properties": {
        "sequence": {"type": ["integer", "null"], "description": "The number of the last record within its writer."},
        "writer": {"type": ["string", "null"], "description": "The writer that recorded it: 16 hexadecimal digits."},
        "accepted": {"type": "integer", "minimum": 1, "description": "How many records the request has."},
        "durable": {"type": "boolean", "description": "Whether the records survive a power loss."},
        "duplicate": {"const": True, "description": "The key was recorded before; the receipt is that of the first."},
    },
    "required": ["sequence", "writer", "accepted", "durable"],
    "additionalProperties": False,
}
_TOTALS: _Schema = {
    "type": "object",
    "properties": {
        "storage_path": {"type": "string"},
        "healthy": {"type": "boolean"},
        "reason": {"type": ["string", "null"]},
        "sequence": {"type": "integer", "minimum": 0},
        "pending_records": {"type": "integer", "minimum": 0},
        "pending_tokens": {"type": "integer", "minimum": 0},
        "lifetime": {"type": "object"},
        "by_model": {"type": "object", "additionalProperties": {"type": "object"}},
        "projects": {"type": "object", "additionalProperties": {"type": "object"}},
        "agents": {"type": "object", "additionalProperties": {"type": "object"}},
        "sources": {"type": "object", "additionalProperties": {"type": "object"}},
        "by_provider_model": {"type": "array", "items": {"type": "object"}},
        "history": {"type": "array", "items": {"type": "object"}},
    },
    "required": ["storage_path", "healthy", "sequence", "pending_records", "lifetime", "by_model", "history"],
}
_HISTORY: _Schema = {
    "type": "object",
    "properties": {
        "from": {"type": ["string", "null"]},
        "to": {"type": ["string", "null"]},
        "by": {"type": "array", "items": {"enum": list(COLUMNS)}},
        "rows": {"type": "array", "items": {"type": "object"}},
    },
    "required": ["from", "to", "by", "rows"],
    "additionalProperties": False,
}
_PROBLEM: _Schema = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "What is wrong, for people."},
        "field": {"type": "string", "description": "The field of the request that is wrong."},
    },
    "required": ["title", "status", "detail"],
    "additionalProperties": False,
}


def _record() -> _Schema:
    (_, schemas) = msgspec.json.schema_components([SavingsRecord], ref_template="#/components/schemas/{name}")
    schema: _Schema = schemas["SavingsRecord"]
    schema["description"] = "What one LLM request saved."
    # Python started with -OO keeps no docstrings.
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", inspect.getdoc(SavingsRecord) or "", re.MULTILINE)
    for name, text in found:
        if name in schema["properties"]:
            schema["properties"][name]["description"] = " ".join(text.replace("``", "`").split())
    return schema


def _post() -> _Schema:
    key = {
        "name": "Idempotency-Key",
        "in": "header",
        "description": "Identifies the request: of all requests with the same key, the first is counted.",
        "schema": {"type": "string", "minLength": 1, "maxLength": MAX_KEY_LENGTH},
    }
    receipt = _json(_ref("Receipt"))
    return {
        "summary": "Record savings; either all of a request or none",
        "parameters": [key],
        "requestBody": {
            "required": True,
            "content": _json({"oneOf": [_ref("SavingsRecord"), _ref("SavingsBatch")]}),
        },
        "responses": {
            "200": {"description": "The records survive a power loss.", "content": receipt},
            "202": {"description": "Accepted and pending; do not send them again.", "content": receipt},
            **_problems(_POSTED),
        },
    }


def _otlp() -> _Schema:
    """The OpenTelemetry protocol defines the messages; a refused one is answered with a Status in the same encoding."""
    protobuf: _Schema = {"application/x-protobuf": {}}
    message = {"type": "object", "description": "A message of the OpenTelemetry protocol, as JSON."}
    content = {**_json(message), **protobuf}
    refused = {
        str(int(status)): {
            "description": status.phrase,
            "content": {**content, "application/problem+json": {"schema": _ref("Problem")}},
        }
        for status in sorted(set(_POSTED) - {HTTPStatus.UNPROCESSABLE_ENTITY})
    }
    return {
        "summary": "Take token usage as OpenTelemetry metrics, by OTLP/HTTP",
        "requestBody": {"required": True, "content": content},
        "responses": {"200": {"description": "All that is new is durable.", "content": content}, **refused},
    }


def _history() -> _Schema:
    day = {"anyOf": [{"type": "string", "format": "date"}, {"const": ""}]}
    by = {
        "type": "array",
        "items": {"enum": list(COLUMNS)},
        "minItems": 1,
        "uniqueItems": True,
        "default": ["day", "model"],
    }
    content = {**_json(_ref("History")), **_text("text/csv")}
    return {
        **_get("Savings by day", content, (*_GUARDED, HTTPStatus.UNPROCESSABLE_ENTITY)),
        "parameters": [
            _query("from", "The first day, in UTC; empty for no limit.", day),
            _query("to", "The last day, in UTC, not before the first; empty for no limit.", day),
            {**_query("by", "The columns of the rows.", by), "style": "form", "explode": False},
            _query("format", "The format of the answer.", {"enum": ["json", "csv"], "default": "json"}),
        ],
    }


def _document() -> _Schema:
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    statuses = (*_ALWAYS, HTTPStatus.NOT_FOUND)
    return {
        **_get("A document", _text("text/html", "text/css", "image/*"), statuses, is_public=True),
        "parameters": [name],
    }


def _get(summary: str, content: _Schema, refused: tuple[HTTPStatus, ...], *, is_public: bool = False) -> _Schema:
    operation: _Schema = {
        "summary": summary,
        "responses": {"200": {"description": summary, "content": content}, **_problems(refused)},
    }
    if is_public:
        operation["security"] = []
    return operation


def _query(name: str, description: str, schema: _Schema) -> _Schema:
    return {"name": name, "in": "query", "description": description, "schema": schema}


def _problems(statuses: tuple[HTTPStatus, ...]) -> _Schema:
    return {str(int(status)): {"$ref": f"#/components/responses/{status.name}"} for status in sorted(statuses)}


def _problem(status: HTTPStatus) -> _Schema:
    response: _Schema = {
        "description": status.phrase,
        "content": {"application/problem+json": {"schema": _ref("Problem")}},
    }
    if status in _RETRIED:
        seconds = {"type": "integer", "minimum": 1}
        response["headers"] = {"Retry-After": {"description": "When to try again, in seconds.", "schema": seconds}}
    return response


def _json(schema: _Schema) -> _Schema:
    return {"application/json": {"schema": schema}}


def _text(*media_types: str) -> _Schema:
    return {media_type: {"schema": {"type": "string"}} for media_type in media_types}


def _ref(name: str) -> _Schema:
    return {"$ref": f"#/components/schemas/{name}"}
