"""The manual page and the scripts for completion in shells, from the definitions of the commands."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

import click
from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

from savings_exporter.cli import COMPLETION_VARIABLE
from savings_exporter.version import VERSION

PROGRAM = "savings-exporter"
_WIDTH = 72
_SHELLS: tuple[type[ShellComplete], ...] = (BashComplete, ZshComplete, FishComplete)
_END = (
    (
        "ENVIRONMENT",
        (
            ("SAVINGS_EXPORTER_...", "Each variable that is named above sets its option. The command line goes first."),
            ("STATE_DIRECTORY", "The directory of the default store, as systemd sets it for a service."),
            ("OTEL_...", "Where and how to send spans and metrics, as OpenTelemetry specifies it."),
        ),
    ),
    (
        "EXIT STATUS",
        (
            ("0", "Success."),
            ("1", "The command failed. One line on standard error says why, and what to do."),
            ("2", "Wrong usage."),
            ("130", "Interrupted."),
        ),
    ),
    (
        "FILES",
        (
            ("~/.local/state/savings-exporter/proxy_savings.json", "The default store."),
            ("proxy_savings.json.*", "The journals and other files of a store, beside its document."),
        ),
    ),
)


def manual_files(app: click.Command) -> dict[str, str]:
    """The manual page and the scripts, by path."""
    return {f"man/{PROGRAM}.1": manual_page(app)} | {
        f"completion/{PROGRAM}.{shell.name}": completion_script(app, shell) for shell in _SHELLS
    }


def completion_script(app: click.Command, shell: type[ShellComplete]) -> str:
    """The script that a user of the shell sources. It asks the program itself for what is possible."""
    completion = shell(app, {}, PROGRAM, COMPLETION_VARIABLE)
    # BashComplete.source() would look for a bash on this machine.
    return completion.source_template % completion.source_vars()


def manual_page(app: click.Command) -> str:
    """One page for all commands, in the man macros. It has no date, so that the same version writes the same page."""
    context = click.Context(app, info_name=PROGRAM, **app.context_settings)
    lines = [
        f'.TH {PROGRAM.upper()} 1 "" "{PROGRAM} {VERSION}"',
        ".SH NAME",
        f"{_roff(PROGRAM)} \\- {_roff(app.get_short_help_str(200).rstrip('.'))}",
        ".SH SYNOPSIS",
        f".B {_roff(PROGRAM)}",
        _roff(" ".join(app.collect_usage_pieces(context))),
        ".SH DESCRIPTION",
        *_description(app),
        *_options(app, context),
        ".SH COMMANDS",
        *_commands(app, context),
    ]
    for title, entries in _END:
        lines += [f".SH {title}", *(line for term, text in entries for line in _entry(term, text))]
    return "\n".join(lines) + "\n"


def _commands(group: click.Command, context: click.Context) -> Iterator[str]:
    """A section for each command of a group, and for each command of those that are groups themselves."""
    if not isinstance(group, click.Group):
        return
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        inner = click.Context(command, info_name=name, parent=context)
        usage = " ".join((inner.command_path.removeprefix(f"{PROGRAM} "), *command.collect_usage_pieces(inner)))
        yield f".SS {_roff(usage)}"
        yield from _description(command)
        yield from _options(command, inner)
        yield from _commands(command, inner)


def _description(command: click.Command) -> Iterator[str]:
    for number, paragraph in enumerate((command.help or "").split("\n\n")):
        if number:
            yield ".PP"
        yield _roff(paragraph)


def _options(command: click.Command, context: click.Context) -> Iterator[str]:
    for parameter in command.get_params(context):
        if record := parameter.get_help_record(context):
            yield from _entry(*record)


def _entry(term: str, text: str) -> Iterator[str]:
    yield ".TP"
    yield f"\\fB{_roff(term)}\\fR"
    yield _roff(text)


def _roff(text: str) -> str:
    """Text that the formatter fills into lines, and prints as it is otherwise."""
    lines = textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
    escaped = (line.replace("\\", "\\e").replace("-", "\\-") for line in lines)
    return "\n".join(f"\\&{line}" if line.startswith((".", "'")) else line for line in escaped)
