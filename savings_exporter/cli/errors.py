"""How a command ends that did not do what it was asked for."""

from __future__ import annotations

import signal

INTERRUPTED = 128 + signal.SIGINT
"""The exit status that a shell gives to a command that Ctrl-C ended."""


class CommandError(Exception):
    """The command failed; the message is the line to print."""

    status = 1


class WrongUsageError(CommandError):
    """The arguments make no sense."""

    status = 2
