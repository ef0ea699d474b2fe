"""The command line: one line for an error, exit status 0, 1 (it failed) or 2 (wrong usage).

Each command is a function in the module of its name. The module is imported when the command is called, so that
``record`` does not load a web server.
"""

from __future__ import annotations

import io
import os
import re
import sys
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from savings_exporter.cli.errors import INTERRUPTED, CommandError
from savings_exporter.errors import SettingsError, StoreError

COMMANDS = ("serve", "watch", "record", "show", "verify", "drill", "doctor")

_SETTINGS: dict[str, Any] = {
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}


class _Commands(TyperGroup):
    """The commands, by name. ``--help`` needs all of them, and a call only its own."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        # Typer's suggestions for a misspelt command come from these names.
        self.commands = dict.fromkeys(COMMANDS, TyperCommand(None))

    def get_command(self, _context: Any, name: str) -> TyperCommand | None:
        return _imported(name) if name in COMMANDS else None


def _imported(name: str) -> TyperCommand:
    function = getattr(import_module(f"{__name__}.{name}"), name)
    alone = typer.Typer(**_SETTINGS)
    alone.command(name)(function)
    command = typer.main.get_command(alone)
    assert isinstance(command, TyperCommand)
    return command


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"savings-exporter {version('savings-exporter')}")
        raise typer.Exit


app = typer.Typer(
    name="savings-exporter",
    help="Keeps lifetime LLM token savings durably, for Prometheus and OpenTelemetry.",
    cls=_Commands,
    **_SETTINGS,
)


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> NoReturn:
    """Run the command line and exit with its status."""
    if sys.stdout is None:  # as Python has it when standard output was closed before the start
        _exit(1, "standard output is closed; redirect it to /dev/null if it is not needed")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names and paths may hold characters that the output's encoding does not have.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = app(standalone_mode=False, prog_name="savings-exporter")
        sys.stdout.flush()
    except CommandError as error:
        _exit(error.status, str(error))
    except (StoreError, SettingsError) as error:
        _exit(1, str(error))
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(INTERRUPTED)
    except typer.TyperException as error:
        _exit(error.exit_code, f"{_plain(' '.join(error.format_message().split()))} (--help says more)")
    except BrokenPipeError:
        # The reader has closed the pipe. Python would report that again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _exit(1, f"{error.filename or ''}: {error.strerror or error}".lstrip(": "))
    sys.exit(status if isinstance(status, int) else 0)


def _plain(message: str) -> str:
    """A message of the command line's library without the words of the library that it validates with."""
    message = message.replace("Value error, ", "")
    return re.sub(r"Input should be a valid (\w+), unable to .*", r"it must be a valid \1", message)


def _exit(status: int, line: str) -> NoReturn:
    print(f"savings-exporter: {line}", file=sys.stderr)
    sys.exit(status)
