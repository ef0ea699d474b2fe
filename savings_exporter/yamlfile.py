"""Reading a YAML file that a person wrote."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from savings_exporter.errors import SettingsError
from savings_exporter.wording import WrongValue

Kind = TypeVar("Kind", bound=msgspec.Struct)


def read(path: str) -> Any:
    """The content of a file; None when it is empty.

    Raises:
        SettingsError: it cannot be read, or is not YAML.
    """
    # Imported here, because few commands read such a file.
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            return yaml.safe_load(file)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
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
