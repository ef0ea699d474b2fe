"""Bytes of a ``proxy_savings.json`` to totals and back. Pure.

The layout is Headroom's schema 6, so that whatever reads ``proxy_savings.json`` today goes on reading it, plus
one block of our own, ``savings_exporter``: the sequence, the totals per provider and model, and a checksum
over every byte of the document. Schemas 2 to 6 are read; what we do not know is kept.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

import msgspec

from savings_exporter.errors import CorruptStoreError, NewerSchemaError
from savings_exporter.records import UNKNOWN, clean_name, clean_project, parse_timestamp
from savings_exporter.totals import AMOUNTS, COUNTS, LARGEST_NUMBER, POINT_KEYS, Ledger, Pair, Totals, iso_utc, total_of

SCHEMA_VERSION = 6
OLDEST_SCHEMA_VERSION = 2
FORMAT = 1

_BLOCK = "savings_exporter"
_NO_CHECKSUM = "sha256:" + "0" * 64
# Our block comes first and its checksum before any name, so the first match is the checksum itself.
_CHECKSUM = re.compile(rb'"checksum": "(sha256:[0-9a-f]{64})"')

# Headroom takes money that can only be gained as zero or more, but lets savings go below zero.
_SIGNED_AMOUNTS = frozenset({"compression_savings_usd", "compression_savings_list_usd"})


class Document(msgspec.Struct, frozen=True, kw_only=True):
    """What a document says.

    ``store`` names the store for good (16 hexadecimal digits); it is empty in a document that another program wrote.
    ``epoch`` and ``offset`` say from where on the journal holds records that the document does not. ``keys`` are the
    idempotency keys that were counted, as ``idempotency.Keys`` packs them. ``kept`` is everything we do not know,
    ``problems`` what was wrong but not fatal.
    """

    ledger: Ledger = Ledger()
    store: str = ""
    epoch: int = 0
    offset: int = 0
    keys: str = ""
    saved_at: datetime | None = None
    kept: Mapping[str, Any] = {}
    problems: tuple[str, ...] = ()

    @property
    def is_ours(self) -> bool:
        """Whether this program wrote the document: only then was a checksum there to be checked."""
        return bool(self.store)


def decode(data: bytes) -> Document:
    """Read a document of any known schema.

    Raises:
        CorruptStoreError: it is no savings document, or not the one that was written.
        NewerSchemaError: a newer program wrote it.
    """
    raw = _parsed(data)
    schema = raw.get("schema_version")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < OLDEST_SCHEMA_VERSION:
        raise CorruptStoreError(f"not a savings document: schema_version is {_shown(schema)}")
    if schema > SCHEMA_VERSION:
        raise NewerSchemaError(f"schema_version is {schema}, and this program knows up to {SCHEMA_VERSION}")
    if _BLOCK in raw:
        return _decode_ours(data, raw)
    if any(isinstance(value, dict) and {"format", "checksum", "store"} <= value.keys() for value in raw.values()):
        raise CorruptStoreError(f"the name of its {_BLOCK} block is damaged")
    return _decode_foreign(raw)


def encode(document: Document) -> bytes:
    """Write a document as schema 6 with our block; readable, one entry a line."""
    ledger, kept = document.ledger, document.kept
    block = {
        "format": FORMAT,
        "checksum": _NO_CHECKSUM,
        "store": document.store,
        "sequence": ledger.sequence,
        "journal": {"epoch": document.epoch, "offset": document.offset},
        "saved_at": document.saved_at.isoformat() if document.saved_at else None,
        "totals": [
            {"provider": provider, "model": model, **_entry(totals)}
            for (provider, model), totals in ledger.by_provider_model.items()
        ],
        "idempotency_keys": document.keys,
    }
    lifetime = {"savings_basis": UNKNOWN, **_dict(kept.get("lifetime")), **_entry(ledger.lifetime)}
    known = {
        "schema_version": json.dumps(SCHEMA_VERSION),
        _BLOCK: json.dumps(block),
        "lifetime": json.dumps(lifetime),
        "projects": _lines(_entries(ledger.projects, _dict(kept.get("projects")))),
        "by_model": _lines(_entries(ledger.by_model, _dict(kept.get("by_model")))),
        "history": "[" + ",".join("\n  " + json.dumps(point) for point in ledger.history) + "]",
    }
    unknown = {key: json.dumps(value) for key, value in kept.items() if key not in known}
    members = (f"{json.dumps(key)}: {value}" for key, value in {**known, **unknown}.items())
    data = ("{\n" + ",\n".join(members) + "\n}\n").encode("ascii")
    return data.replace(_NO_CHECKSUM.encode(), _digest(data).encode(), 1)


def _parsed(data: bytes) -> dict[str, Any]:
    # The standard library's decoder, because it reads all that Python programs write with theirs: NaN, and
    # escaped halves of surrogate pairs in a client's model name.
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptStoreError(f"not JSON: {error}" if data.strip() else "the file is empty") from None
    if not isinstance(raw, dict):
        raise CorruptStoreError("not a savings document: it is not a JSON object")
    return raw


def _decode_ours(data: bytes, raw: dict[str, Any]) -> Document:
    block = raw[_BLOCK]
    written_format = _dict(block).get("format")
    if isinstance(written_format, int) and written_format > FORMAT:
        raise NewerSchemaError(f"its format is {written_format}, and this program knows up to {FORMAT}")
    checksum = _CHECKSUM.search(data)
    if checksum is None:
        raise CorruptStoreError("its checksum is missing: it was damaged, or rewritten by another program")
    blank = data[: checksum.start(1)] + _NO_CHECKSUM.encode() + data[checksum.end(1) :]
    if _digest(blank).encode() != checksum[1]:
        raise CorruptStoreError("its checksum does not match: it was damaged, or edited by another program")
    try:
        ledger = Ledger(
            sequence=block["sequence"],
            lifetime=msgspec.convert(raw["lifetime"], Totals),
            by_model=msgspec.convert(raw["by_model"], dict[str, Totals]),
            projects=msgspec.convert(raw["projects"], dict[str, Totals]),
            by_provider_model={
                (entry["provider"], entry["model"]): msgspec.convert(entry, Totals) for entry in block["totals"]
            },
            history=tuple(_points(raw["history"])),
        )
        saved_at = datetime.fromisoformat(block["saved_at"]) if block["saved_at"] else None
        return Document(
            ledger=ledger,
            store=block["store"],
            epoch=block["journal"]["epoch"],
            offset=block["journal"]["offset"],
            keys=block["idempotency_keys"],
            saved_at=saved_at,
            kept=_kept(raw),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptStoreError(f"its checksum matches, but a field is missing or wrong: {error}") from None


def _decode_foreign(raw: dict[str, Any]) -> Document:
    problems: list[str] = []
    history = sorted(_points(raw.get("history")), key=lambda point: str(point["timestamp"]))
    by_model = _named(raw.get("by_model"), "by_model", _model, problems)
    lifetime = _lifetime(raw, total_of(by_model.values()), history[-1] if history else {}, problems)
    pairs: dict[Pair, Totals] = {(UNKNOWN, model): totals for model, totals in by_model.items()}
    rest = lifetime.beyond(total_of(by_model.values()))
    if rest != Totals(last_activity_at=rest.last_activity_at):
        nobody = (UNKNOWN, UNKNOWN)
        pairs[nobody] = pairs.get(nobody, Totals()) + rest
    ledger = Ledger(
        sequence=lifetime.requests,
        lifetime=lifetime,
        by_model=by_model,
        projects=_named(raw.get("projects"), "projects", clean_project, problems),
        by_provider_model=pairs,
        history=tuple(history),
    )
    kept = _kept(raw)
    if raw["schema_version"] < SCHEMA_VERSION:
        # Until schema 6 every saving was priced at list price, and nothing said so.
        kept["lifetime"] = {"savings_basis": "list", **_dict(kept.get("lifetime"))}
    return Document(ledger=ledger, kept=kept, problems=tuple(problems))


def _lifetime(raw: dict[str, Any], models: Totals, point: Mapping[str, Any], problems: list[str]) -> Totals:
    """The lifetime totals of a document that has no checksum, never less than its own parts show.

    The last point of history is cumulative and written with the totals; Headroom trusts it where it is ahead, and so
    do we. Money is taken from it only when some count shows that the totals are behind, because an amount may
    rightly fall.
    """
    block = raw.get("lifetime")
    lifetime = _totals(block, "lifetime", problems)
    checkpoint = _totals({name: point[key] for name, key in POINT_KEYS.items() if key in point}, "history", problems)
    behind = "compression_savings_usd" not in _dict(block) or any(
        getattr(lifetime, name) < getattr(checkpoint, name) for name in COUNTS
    )
    values = msgspec.structs.asdict(lifetime)
    for name in COUNTS:
        values[name] = max(values[name], getattr(checkpoint, name), getattr(models, name))
    for name in AMOUNTS:
        if name not in _SIGNED_AMOUNTS:
            values[name] = max(values[name], getattr(checkpoint, name))
    if behind and point:
        values["compression_savings_usd"] = checkpoint.compression_savings_usd
    if "compression_savings_list_usd" not in _dict(block):
        values["compression_savings_list_usd"] = values["compression_savings_usd"]
    return Totals(**values)


def _totals(raw: Any, where: str, problems: list[str]) -> Totals:
    if not isinstance(raw, dict):
        if raw is not None:
            problems.append(f"{where} is not an object: {_shown(raw)}")
        return Totals()
    values: dict[str, Any] = {}
    for name in COUNTS:
        if name in raw:
            values[name] = _number(raw[name], int, f"{where}.{name}", problems, signed=False)
    for name in AMOUNTS:
        if name in raw:
            values[name] = _number(raw[name], float, f"{where}.{name}", problems, signed=name in _SIGNED_AMOUNTS)
    last_activity = raw.get("last_activity_at")
    moment = parse_timestamp(last_activity) if isinstance(last_activity, str) else None
    return Totals(**values, last_activity_at=iso_utc(moment) if moment else None)


def _number(value: Any, kind: Callable[[Any], Any], where: str, problems: list[str], *, signed: bool) -> Any:
    """A number as Headroom reads it: numeric text counts, and what cannot be one is zero, not an error."""
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= LARGEST_NUMBER:
        problems.append(f"{where} is not a number: {_shown(value)}")
        return kind(0)
    return number if signed else max(number, kind(0))


def _named(raw: Any, where: str, cleaned: Callable[[str], str | None], problems: list[str]) -> dict[str, Totals]:
    if not isinstance(raw, dict):
        if raw is not None:
            problems.append(f"{where} is not an object: {_shown(raw)}")
        return {}
    named: dict[str, Totals] = {}
    for key, value in raw.items():
        name = cleaned(key)
        if name is None or not isinstance(value, dict):
            problems.append(f"{where}[{_shown(key)}] is left out: {_shown(value)}")
            continue
        totals = _totals(value, f"{where}[{_shown(key)}]", problems)
        named[name] = named[name] + totals if name in named else totals
    return named


def _model(name: str) -> str:
    return clean_name("model", name) or UNKNOWN


def _points(raw: Any) -> Iterator[dict[str, Any]]:
    """History points that have a timestamp; Headroom's first releases wrote them as lists."""
    names = ("timestamp", "total_tokens_saved", "compression_savings_usd", "total_input_tokens", "total_input_cost_usd")
    for value in raw if isinstance(raw, list) else ():
        point = dict(zip(names, value, strict=False)) if isinstance(value, list) else value
        moment = parse_timestamp(point["timestamp"]) if isinstance(_dict(point).get("timestamp"), str) else None
        if moment is not None:
            yield {**point, "timestamp": iso_utc(moment)}


def _kept(raw: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key not in ("schema_version", _BLOCK, "history")}


def _entries(totals: Mapping[str, Totals], kept: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: {**_dict(kept.get(name)), **_entry(value)} for name, value in totals.items()}


def _entry(totals: Totals) -> dict[str, Any]:
    return msgspec.structs.asdict(totals)


def _lines(entries: dict[str, dict[str, Any]]) -> str:
    return "{" + ",".join(f"\n  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()) + "}"


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
