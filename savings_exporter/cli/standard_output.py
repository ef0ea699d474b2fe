"""Standard output whose errors name it."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

NAME = "standard output"


class _NamedFile(io.FileIO):
    """A file that is named in its errors. The errors of a disk that fails have no name either."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, NAME) from None


def install() -> None:
    """Replace ``sys.stdout``. Names and paths may hold characters that its encoding does not have."""
    given = sys.stdout
    # Another one is that of a program that calls main.
    if given is sys.__stdout__ and isinstance(given, io.TextIOWrapper):
        raw = _NamedFile(given.fileno(), "w", closefd=False)
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(raw), given.encoding, "backslashreplace", line_buffering=given.line_buffering
        )


def discard() -> None:
    """Write no more: Python would try to write what is left again at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
