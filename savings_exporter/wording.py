"""Messages of msgspec in the terms of JSON and YAML in place of Python's types."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from msgspec import inspect

_KINDS = {
    "array": "a list",
    "bool": "true or false",
    "datetime": "a timestamp",
    "float": "a number",
    "int": "an integer",
    "null": "null",
    "object": "an object",
    "str": "text",
}
_PLAIN = {
    "Invalid RFC3339 encoded datetime": "must be a timestamp such as 2026-01-31T12:00:00Z",
    "Number out of range": "must be a smaller number",
}
_WRONG_KIND = re.compile("Expected `([^`]*)`, got `([^`]*)`")
_LIMIT = re.compile(r"Expected `(?:int|float)` ([<>]=) (-?[0-9.]+)")
_MISSING = re.compile("Object missing required field `(.*)`", re.DOTALL)
_UNKNOWN = re.compile("Object contains unknown field `(.*)`", re.DOTALL)
_PATH = re.compile(r"(?:\.\w+|\[\d+\]|\[\.\.\.\])*")
_LONGEST_PATH = 200


class WrongValue:
    """A value that does not have the expected type or range.

    Attributes:
        text: what is wrong, for people.
        field: the field that is wrong, such as ``records[3].model``; empty for the whole value.
    """

    def __init__(self, error: msgspec.ValidationError, kind: type[msgspec.Struct]) -> None:
        what, where = _taken_apart(str(error), kind)
        named = ""
        if wrong := _WRONG_KIND.fullmatch(what):
            found = "one with a fraction" if wrong[1] == "int" and wrong[2] == "float" else _kinds(wrong[2])
            self.text = f"{where or 'the content'} must be {_kinds(wrong[1])}, not {found}"
        elif missing := _MISSING.fullmatch(what):
            named = missing[1]
            self.text = f"{where or 'the content'} lacks the field {named}"
        elif unknown := _UNKNOWN.fullmatch(what):
            named = unknown[1]
            known = ", ".join(_fields(kind, where))
            self.text = f"{where or 'the content'} has an unknown field {named}; the fields are {known}"
        elif limit := _LIMIT.fullmatch(what):
            self.text = f"{where or 'the content'} {_limit(limit[1], limit[2])}"
        elif what in _PLAIN:
            self.text = f"{where} {_PLAIN[what]}"
        else:
            # A message of SavingsRecord, which begins with the field.
            named = what.partition(" must ")[0] if " must " in what else ""
            self.text = f"{where}: {what}" if where else what
        self.field = ".".join(filter(None, (where, named)))


def _taken_apart(message: str, kind: type[msgspec.Struct]) -> tuple[str, str]:
    """What is wrong, and the path of the field.

    A client can send a key that looks like a path, so only a path that the struct has is taken for one.
    """
    what, found, end = message.rpartition(" - at `$")
    path = end.removesuffix("`")
    if found and len(path) <= _LONGEST_PATH and _PATH.fullmatch(path) and _struct_at(kind, path) is not None:
        return what, path.removeprefix(".")
    return message, ""


def _limit(sign: str, number: str) -> str:
    number = number.removesuffix(".0")
    if sign == "<=":
        return f"must be at most {number}"
    return "must not be negative" if number == "0" else f"must be at least {number}"


def _kinds(names: str) -> str:
    return " or ".join(_KINDS.get(name, name) for name in names.split(" | "))


def _fields(kind: type[msgspec.Struct], where: str) -> Sequence[str]:
    """The names of the fields of a struct, or of the one in it at a path."""
    struct = _struct_at(kind, where)
    return [field.encode_name for field in struct.fields] if struct is not None else []


def _struct_at(kind: type[msgspec.Struct], path: str) -> inspect.StructType | None:
    """The struct at a path, or the one that has the field at the path; None when there is no such field."""
    from msgspec import inspect

    struct = _struct_of(inspect.type_info(kind))
    assert struct is not None
    for name in re.findall(r"\w+", re.sub(r"\[[^\]]*\]", "", path)):
        of_field = next((field.type for field in struct.fields if field.encode_name == name), None)
        if of_field is None:
            return None
        struct = _struct_of(of_field) or struct
    return struct


def _struct_of(info: Any) -> inspect.StructType | None:
    from msgspec import inspect

    if isinstance(info, inspect.UnionType):
        info = next((each for each in info.types if isinstance(each, inspect.StructType)), None)
    if isinstance(info, inspect.ListType):
        info = info.item_type
    return info if isinstance(info, inspect.StructType) else None
