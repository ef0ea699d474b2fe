"""The command line: one line for an error, exit status 0, 1 (it failed) or 2 (wrong usage).

Each command is a function in the module of its name. The module is imported when the command is called, so that
``record`` does not load a web server.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from importlib import import_module
from keyword import iskeyword
from types import FrameType
from typing import Any, NoReturn

import click

from savings_exporter.cli import standard_streams
from savings_exporter.cli.errors import INTERRUPTED, CommandError
from savings_exporter.errors import SettingsError, StoreError
from savings_exporter.escaping import plain
from savings_exporter.version import VERSION

COMPLETION_VARIABLE = "_SAVINGS_EXPORTER_COMPLETE"
"""The variable in which the scripts for completion say what they ask the program for; Click makes its name."""

_LONGEST_MESSAGE = 1000
_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
# With one of these, prometheus_client keeps values in files, which another process with the same number goes on with.
_VALUES_IN_FILES = ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir")
COMMANDS = (
    "serve",
    "watch",
    "record",
    "discover",
    "import",
    "show",
    "names",
    "export",
    "backfill",
    "verify",
    "drill",
    "doctor",
    "ready",
    "assets",
)


class _Commands(click.Group):
    """The commands, by name. ``--help`` needs all of them, and a call only its own."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        # Click's suggestions for a misspelt command come from these names.
        self.commands = dict.fromkeys(COMMANDS, click.Command(None))

    def _main_shell_completion(self, *arguments: Any, **named: Any) -> None:
        """Answer a script for completion. Variables that none of the scripts sets mean nothing."""
        if os.environ.get(COMPLETION_VARIABLE, "").endswith("_complete"):
            with contextlib.suppress(LookupError, ValueError):
                super()._main_shell_completion(*arguments, **named)

    def list_commands(self, _context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, _context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = f"{name}_" if iskeyword(name) else name
        command: click.Command = getattr(import_module(f"{__name__}.{module}"), module)
        return command


@click.group(
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(VERSION, message="savings-exporter %(version)s", help="Print the version and exit.")
@click.pass_context
def app(context: click.Context) -> None:
    """Keeps lifetime LLM token savings durably, for Prometheus and OpenTelemetry."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> NoReturn:
    """Run the command line and exit with its status."""
    standard_streams.prepare()
    if sys.stdout is None:  # as Python has it when standard output was closed before the start
        _exit(1, "standard output is closed; redirect it to /dev/null if it is not needed")
    for name in _VALUES_IN_FILES:
        os.environ.pop(name, None)
    _handle_signals(is_service=sys.argv[1:2] in (["serve"], ["watch"]))
    try:
        status = app(standalone_mode=False, prog_name="savings-exporter")
        sys.stdout.flush()
    except CommandError as error:
        _exit(error.status, str(error))
    except (StoreError, SettingsError) as error:
        _exit(1, str(error))
    except (click.Abort, KeyboardInterrupt):
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        # It repeats arguments, which can be very long.
        message = " ".join(error.format_message().split())[:_LONGEST_MESSAGE]
        _exit(error.exit_code, f"{message} (--help says more)")
    except BrokenPipeError:
        # The reader has closed the pipe.
        standard_streams.discard()
        sys.exit(1)
    except OSError as error:
        if error.filename == standard_streams.OUTPUT:
            standard_streams.discard()
        _exit(1, f"{error.filename or ''}: {error.strerror or error}".lstrip(": "))
    sys.exit(status if isinstance(status, int) else 0)


def _handle_signals(*, is_service: bool) -> None:
    """End by an exception, so that what is pending is saved and temporary files are removed on the way out. In a
    service, SIGHUP does nothing until the service handles it. A signal that is ignored (nohup) stays ignored.
    """
    for number in _ENDING:
        if signal.getsignal(number) == signal.SIG_DFL:
            is_held = is_service and number != signal.SIGTERM
            signal.signal(number, (lambda _number, _frame: None) if is_held else _end)


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    # The last save follows, and a further signal must not interrupt it.
    for ending in _ENDING:
        signal.signal(ending, signal.SIG_IGN)
    sys.exit(128 + number)


def _exit(status: int, line: str) -> NoReturn:
    if (logging := sys.modules.get("logging")) is not None:
        # What was logged before comes first.
        for handler in logging.getLogger().handlers:
            handler.flush()
    # One line, whatever arguments and names of files hold.
    standard_streams.print_error(f"savings-exporter: {plain(line)}")
    sys.exit(status)
