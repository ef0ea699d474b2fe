"""Reading files of the configuration: YAML, and other small text such as tokens and certificates."""

from __future__ import annotations

import errno
import os
import stat
from typing import Any, TypeVar

import msgspec

from savings_exporter.errors import SettingsError
from savings_exporter.wording import WrongValue

_MOST_BYTES = 1024 * 1024

Kind = TypeVar("Kind", bound=msgspec.Struct)


def read_text(path: str) -> str:
    """The content of a small text file.

    Raises:
        OSError: it cannot be read, or is not a regular file: reading a pipe would never end.
        ValueError: it is not UTF-8, it is too large, or the path is not a path.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "is not a regular file")
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
    return data.decode()


def read_yaml(path: str) -> Any:
    """The content of a YAML file; None when it is empty.

    Raises:
        SettingsError: it cannot be read, or is not YAML.
    """
    # Imported here, because few commands read such a file.
    import yaml

    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # The library lets some values raise other errors, such as a date that there is not.
        raise SettingsError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None


def converted(path: str, content: Any, kind: type[Kind]) -> Kind:
    """The content of a file as a struct.

    Raises:
        SettingsError: a field is wrong.
    """
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        raise SettingsError(f"{path}: {WrongValue(error, kind).text}") from None
