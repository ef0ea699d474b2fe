"""The manual page and the completion in shells say what the commands are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from savings_exporter.cli import COMMANDS, app
from tests.support.paths import ROOT
from tests.support.service import run_cli
from tests.support.wait import WAIT_SECONDS

BASH = """
source {script}
COMP_WORDS=({words} '{last}')
COMP_CWORD={position}
_savings_exporter_completion savings-exporter
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
ZSH = """
compdef() {{ }}
_describe() {{ print -l -- ${{completions_with_descriptions%%:*}} }}
compadd() {{ print -l -- $completions }}
source {script}
words=({words} '{last}')
CURRENT={position}+1
_savings_exporter_completion
"""
FISH = """
source {script}
complete --do-complete '{words} {last}'
"""
SHELLS = {"bash": ("bash", "--norc"), "zsh": ("zsh", "-f"), "fish": ("fish", "--no-config")}
PROGRAMS = {"bash": BASH, "zsh": ZSH, "fish": FISH}

each_shell = pytest.mark.parametrize(
    "shell",
    [
        "bash",
        pytest.param("zsh", marks=pytest.mark.needs("zsh")),
        pytest.param("fish", marks=pytest.mark.needs("fish")),
    ],
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    done = run_cli("assets", "--output", str(folder))
    assert done.returncode == 0, done.stderr
    return folder / "deploy"


def checked(*command: str | Path) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    return done.stdout


@pytest.mark.needs("mandoc")
def test_page_is_valid(written: Path) -> None:
    page = written / "man/savings-exporter.1"
    done = subprocess.run(["mandoc", "-T", "lint", "-W", "warning", page], capture_output=True, text=True)
    # The page has no date on purpose.
    assert re.sub(r'.*WARNING: missing date, using "": TH\n', "", done.stdout) == ""
    assert "Print the version and exit." in checked("mandoc", "-T", "ascii", page)


def commands(group: click.Command, context: click.Context) -> Iterator[tuple[str, click.Command]]:
    assert isinstance(group, click.Group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        inner = click.Context(command, info_name=name, parent=context)
        yield inner.command_path.removeprefix("savings-exporter "), command
        if isinstance(command, click.Group):
            yield from commands(command, inner)


def test_page_has_every_command_and_option(written: Path) -> None:
    text = (written / "man/savings-exporter.1").read_text().replace("\\-", "-").replace("\\&", "")
    sections = {section.split("\n")[0]: section for section in re.split(r"^\.SS ", text, flags=re.MULTILINE)[1:]}
    found = dict(commands(app, click.Context(app, info_name="savings-exporter")))
    assert {"names let-in", "serve", *COMMANDS} <= found.keys()
    assert len(sections) == len(found)
    for name, command in found.items():
        section = next(section for title, section in sections.items() if re.fullmatch(rf"{name}( [A-Z\[].*)?", title))
        words = " ".join(section.split())
        for option in command.params:
            if isinstance(option, click.Option):
                assert all(f"\\fB{option.opts[0]}" in section or one in section for one in option.opts)
                assert " ".join((option.help or "").split()) in words
                assert not isinstance(option.envvar, str) or option.envvar in words


def test_page_is_named_by_the_unit(written: Path) -> None:
    assert "Documentation=man:savings-exporter(1)" in (ROOT / "deploy/systemd/savings-exporter.service").read_text()
    assert (written / "man/savings-exporter.1").read_text().startswith(".TH SAVINGS-EXPORTER 1 ")


@each_shell
def test_script_has_valid_syntax(written: Path, shell: str) -> None:
    checked(SHELLS[shell][0], "-n", written / f"completion/savings-exporter.{shell}")


@pytest.mark.needs("shellcheck")
def test_script_of_bash_has_no_other_flaws_than_its_template(written: Path) -> None:
    checked(
        "shellcheck", "--shell=bash", "--exclude=SC2086,SC2162,SC2206", written / "completion/savings-exporter.bash"
    )


@each_shell
@pytest.mark.parametrize(
    ("words", "last", "possible"),
    [
        ("", "", set(COMMANDS)),
        ("", "na", {"names"}),
        ("names", "l", {"let-in"}),
        ("serve", "--web", {"--web.listen-address", "--web.telemetry-path", "--web.config.file"}),
        ("serve --log.level", "", {"debug", "info", "warning", "error"}),
        ("names fold", "pro", {"project"}),
    ],
)
def test_shell_completes(written: Path, shell: str, words: str, last: str, possible: set[str]) -> None:
    line = f"savings-exporter {words}".rstrip()
    script = written / f"completion/savings-exporter.{shell}"
    program = PROGRAMS[shell].format(script=script, words=line, last=last, position=len(line.split()))
    offered = {line.split("\t")[0] for line in checked(*SHELLS[shell], "-c", program).splitlines() if line}
    assert possible <= offered
    assert {one for one in offered if not one.startswith(last)} == set()


@pytest.mark.needs("fish")
def test_paths_are_completed(written: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.json").touch()
    script = written / "completion/savings-exporter.fish"
    for words in ("serve --store", "watch", "import"):
        program = FISH.format(script=script, words=f"savings-exporter {words}", last=f"{tmp_path}/mi")
        assert checked(*SHELLS["fish"], "-c", program).split("\t")[0].strip() == str(tmp_path / "mine.json")


@pytest.mark.parametrize("value", ["bash_complete", "fish_complete", "zsh_source", "x"])
def test_variable_of_completion_alone_means_nothing(value: str) -> None:
    done = run_cli("--version", env={"_SAVINGS_EXPORTER_COMPLETE": value})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("savings-exporter ")
