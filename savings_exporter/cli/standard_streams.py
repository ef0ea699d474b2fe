"""The standard streams. They are open, their errors name them, and what is printed cannot control a terminal."""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from savings_exporter.escaping import plain

OUTPUT = "standard output"

_ERRORS = "standard error"
_DESCRIPTORS = 3


class _NamedFile(io.FileIO):
    """A file that is named in its errors. The errors of a disk that fails have no name either."""

    def __init__(self, descriptor: int, name: str) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._name = name

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._name) from None


class _PlainText(io.TextIOWrapper):
    """A stream that prints plain text. ``styled`` is the same stream for a library that prints colours."""

    def __init__(self, given: io.TextIOWrapper, name: str) -> None:
        buffer = io.BufferedWriter(_NamedFile(given.fileno(), name))
        # Names and paths may hold characters that the encoding does not have.
        settings: dict[str, Any] = {
            "encoding": given.encoding,
            "errors": "backslashreplace",
            "line_buffering": given.line_buffering,
            "write_through": True,  # what goes to one of the two does not overtake what went to the other
        }
        super().__init__(buffer, **settings)
        self.styled = io.TextIOWrapper(buffer, **settings)

    def write(self, text: str) -> int:
        super().write(plain(text, keep="\n"))
        return len(text)


def prepare() -> None:
    """Fill in the streams that this process was started without, and replace ``sys.stdout`` and ``sys.stderr``."""
    for descriptor in range(_DESCRIPTORS):
        try:
            os.fstat(descriptor)
        except OSError:
            # The next file to be opened would have this number, and receive what is printed. Lower ones are taken.
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        # Text for a stream that is None is printed to standard output.
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = _replaced(sys.stdout, sys.__stdout__, OUTPUT)
    sys.stderr = _replaced(sys.stderr, sys.__stderr__ or sys.stderr, _ERRORS)


def _replaced(given: TextIO, original: TextIO | None, name: str) -> TextIO:
    # Another one is that of a program that calls main.
    is_replaced = given is original and isinstance(given, io.TextIOWrapper)
    return _PlainText(given, name) if is_replaced and isinstance(given, io.TextIOWrapper) else given


def styled(stream: TextIO) -> TextIO:
    """The same stream for a library that prints colours. It has to be given plain text."""
    return stream.styled if isinstance(stream, _PlainText) else stream


def write_text(pieces: Iterable[bytes]) -> None:
    """Print text in UTF-8, such as JSON (RFC 8259), whatever the encoding of standard output is."""
    sys.stdout.flush()
    for piece in pieces:
        sys.stdout.buffer.write(piece if _is_plain(piece) else plain(piece.decode(), keep="\n").encode())
    sys.stdout.buffer.flush()


def write_exactly(pieces: Iterable[bytes]) -> None:
    """Print UTF-8 for another program: with each byte, unless standard output is a terminal."""
    if sys.stdout.isatty():
        write_text(pieces)
    else:
        sys.stdout.flush()
        sys.stdout.buffer.writelines(pieces)
        sys.stdout.buffer.flush()


def takes_more(stream: TextIO) -> bool:
    """Whether a stream can be written to within a second. A pipe that is full and that nobody reads cannot."""
    # On Windows only sockets can be waited for.
    return not isinstance(stream, _PlainText) or os.name == "nt" or bool(select.select([], [stream], [], 1.0)[1])


def print_error(line: str) -> None:
    """Print a line to standard error at the end of the process, which does not wait for a reader that has stopped."""
    if takes_more(sys.stderr):
        print(line, file=sys.stderr, flush=True)


def _is_plain(piece: bytes) -> bool:
    return piece.isascii() and piece.replace(b"\n", b"").decode("ascii").isprintable()


def discard() -> None:
    """Write no more: Python would try to write what is left again at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
