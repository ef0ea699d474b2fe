"""Finds sources: in the usual places of this user, and by what a file contains."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import msgspec

from savings_exporter.sources import rtk
from savings_exporter.sources.headroom import DOCUMENT_NAME, LEDGER_NAME, Headroom, HeadroomLedger
from savings_exporter.sources.rtk import MOST_INPUT_TOKENS, RtkDatabase
from savings_exporter.sources.source import Source, SourceError
from savings_exporter.sources.table import JSON_LINES_SUFFIXES
from savings_exporter.storage.filesystem import LOCAL

_FIRST_BYTES = 4096
_SQLITE = b"SQLite format 3\0"
_HEADROOM_DIRECTORY = os.path.join("~", ".headroom")


def usual_sources(environ: Mapping[str, str], *, most_rtk_tokens: int = MOST_INPUT_TOKENS) -> Sequence[Source]:
    """The sources of this user that exist.

    Args:
        environ: the environment, whose variables of the other programs change the places.
        most_rtk_tokens: commands of RTK with more input tokens are kept out.
    """
    found: list[Source] = []
    document, ledger = _headroom_paths(environ)
    if os.path.isfile(document):
        found.append(Headroom(document, ledger))
    found += [RtkDatabase(path, most_rtk_tokens) for path in rtk.usual_paths(environ) if os.path.isfile(path)]
    return found


def source_of(path: str, *, most_rtk_tokens: int = MOST_INPUT_TOKENS) -> Source:
    """The source that a file is, by its content.

    Args:
        path: the file.
        most_rtk_tokens: as in ``usual_sources``.

    Raises:
        SourceError: the file cannot be read, or is not known.
    """
    try:
        with LOCAL.opened(path) as descriptor:
            start = LOCAL.read_at(descriptor, _FIRST_BYTES, 0)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}", path=path) from None
    if start.startswith(_SQLITE):
        return RtkDatabase(path, most_rtk_tokens)
    directory = os.path.dirname(path)
    if _is_ledger(start.partition(b"\n")[0]):
        document = os.path.join(directory, DOCUMENT_NAME)
        is_beside = os.path.basename(path) == LEDGER_NAME and os.path.isfile(document)
        return Headroom(document, path) if is_beside else HeadroomLedger(path)
    if start.lstrip().startswith(b"{") and not path.lower().endswith(JSON_LINES_SUFFIXES[:2]):
        return Headroom(path)
    raise SourceError(f"{path}: is not a file that is known; name its columns with --map", path=path)


def _is_ledger(line: bytes) -> bool:
    """Whether a first line is one of Headroom's ledger."""
    try:
        event = msgspec.json.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    return isinstance(event, dict) and event.keys() >= {"ts", "before", "after", "saved"}


def _headroom_paths(environ: Mapping[str, str]) -> tuple[str, str]:
    """Where Headroom 0.42 keeps its document and its ledger."""
    workspace = _path(environ, "HEADROOM_WORKSPACE_DIR") or os.path.expanduser(_HEADROOM_DIRECTORY)
    document = _path(environ, "HEADROOM_SAVINGS_PATH") or os.path.join(workspace, DOCUMENT_NAME)
    ledger = _path(environ, "HEADROOM_SAVINGS_EVENTS_PATH") or os.path.join(workspace, LEDGER_NAME)
    return document, ledger


def _path(environ: Mapping[str, str], variable: str) -> str:
    return os.path.expanduser(environ.get(variable, "").strip())
