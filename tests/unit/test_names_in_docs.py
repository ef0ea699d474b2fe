"""Paths, make targets, needs of tests and names of the code that the developer documents mention must exist."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.needs import NEEDS
from tests.support.paths import ROOT

DOCUMENTS = ("CONTRIBUTING.md", "docs/architecture.md")
FOLDERS = ("savings_exporter", "tests", "benchmarks", "dashboards")

MADE = tuple(line.rstrip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").split())
"""Files that a run creates are not in the repository."""

SETTINGS = ("Makefile", "pyproject.toml", ".ci/run", "docker-compose.yml", "Dockerfile")
"""Packages, programs, options and variables are named in these."""

FOREIGN = {"posix_fadvise", "OTEL_*", "pre-commit", "--strict", "&&"}
"""Names from other projects that occur in none of our files."""

_PATH = re.compile(r"[\w.-]*/[\w./-]*|[\w-]+\.(?:py|md|json|toml|yml|yaml)|Makefile")
_NAME = re.compile(r"[A-Za-z_][\w.]*")

each_document = pytest.mark.parametrize("document", DOCUMENTS)


class Span(NamedTuple):
    """Something in a document that is code: between backticks, or a line of a block."""

    line: int
    text: str


class Code(NamedTuple):
    """What the code defines, and the words of its strings, docstrings aside: those are documents, too."""

    defined: set[str]
    members: dict[str, set[str]]
    words: set[str]


@each_document
def test_each_path_exists(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    linked = [Span(number, path) for number, path in _found(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)]
    folder = (ROOT / document).parent
    missing = [link for link in linked if not (folder / link.text).exists()]
    missing += [span for span in spans(document) for path in paths(span.text) if not is_there(path)]
    assert not missing, listed(document, missing)


@each_document
def test_each_make_target_exists(document: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    missing = [span for span in spans(document) if (made := target(span.text)) and made not in targets]
    assert not missing, listed(document, missing)


@each_document
def test_each_need_exists(document: str) -> None:
    missing = [
        span
        for span in spans(document)
        for needs in re.findall(r"\bneeds\(([^)]*)\)", span.text)
        if set(re.findall(r'"([^"]+)"', needs)) - NEEDS.keys()
    ]
    assert not missing, listed(document, missing)


@each_document
def test_each_name_exists(document: str) -> None:
    missing = [span for span in inline(document) if not is_known(span.text)]
    assert not missing, listed(document, missing)


def test_a_wrong_name_is_found() -> None:
    for text in ("SavingsTracker", "SavingsTracker.close", "SavingsTracker.record_request(...)", "ruff"):
        assert is_known(text), text
    for text in ("SavingsTracked", "SavingsTracker.closes", "SavingsTracker.record_requests(...)", "--demos"):
        assert not is_known(text), text
    assert is_there("tests/unit/")
    assert not is_there("tests/units/")


def inline(document: str) -> list[Span]:
    """What a document has between backticks in its sentences."""
    text = (ROOT / document).read_text(encoding="utf-8")
    # Blocks become as many empty lines, so that what comes after them keeps its number.
    prose = re.sub(r"^```.*?^```", lambda block: "\n" * block[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)
    return [Span(number, code) for number, code in _found(r"`([^`]+)`", prose)]


def spans(document: str) -> list[Span]:
    """What a document has between backticks, and the lines of its blocks."""
    lines = (ROOT / document).read_text(encoding="utf-8").splitlines()
    in_block, found = False, inline(document)
    for number, line in enumerate(lines, 1):
        if line.startswith("```"):
            in_block = not in_block
        elif in_block:
            found.append(Span(number, line.partition("  #")[0]))
    return found


def _found(pattern: str, text: str) -> Iterator[tuple[int, str]]:
    for match in re.finditer(pattern, text):
        yield text.count("\n", 0, match.start()) + 1, match[1]


def listed(document: str, missing: list[Span]) -> str:
    """One line for each."""
    return "\n".join(["not there:", *(f"{document}:{span.line}: {span.text}" for span in missing)])


def target(text: str) -> str | None:
    """The target of a command that is make's."""
    found = re.match(r"make ([a-z-]+)", text)
    return found[1] if found else None


def paths(text: str) -> list[str]:
    """The paths in a piece of code; a route of the service is none."""
    return [word for word in re.split(r'[\s"=,]+', text) if _PATH.fullmatch(word) and not word.startswith("/")]


def is_there(path: str) -> bool:
    """Whether a path is there, in the repository or in the package, or is made by a run."""
    if any(fnmatch(path.split("/")[0], made) for made in MADE):
        return True
    return any(
        (folder / path).is_dir() if path.endswith("/") else (folder / path).exists()
        for folder in (ROOT, ROOT / "savings_exporter")
    )


def is_known(text: str) -> bool:
    """Whether a path, a name of the code, or each word of a command is known."""
    if target(text):
        return True  # whether it is there has a test of its own, and so has a path
    name = re.sub(r"\(.*\)$|=\w*$", "", text)
    if _NAME.fullmatch(name) and _is_defined(name):
        return True
    return all(_is_word(word) or paths(word) == [word] for word in text.split())


def _is_defined(name: str) -> bool:
    owner, _, member = name.rpartition(".")
    if owner in code().members:
        return member in code().members[owner]
    return all(part in code().defined for part in name.split("."))


def _is_word(word: str) -> bool:
    return not {word, word.partition("=")[0]}.isdisjoint(code().words | FOREIGN)


@cache
def code() -> Code:
    """All the code, and the settings."""
    found = Code(set(dir(builtins)), {}, set())
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            if path == Path(__file__):
                continue
            found.defined.update((path.stem, path.parent.name))
            nodes = list(_visible(ast.parse(path.read_text(encoding="utf-8"))))
            docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
            for node in nodes:
                names = set(_defined_by(node))
                found.defined.update(names)
                if isinstance(node, ast.ClassDef):
                    inside = {name for child in _visible(node) for name in _defined_by(child)}
                    found.members.setdefault(node.name, set()).update(inside)
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
                    found.words.update(_words(node.value))
    for setting in SETTINGS:
        found.words.update(_words((ROOT / setting).read_text(encoding="utf-8")))
    return found


def _visible(node: ast.AST) -> Iterator[ast.AST]:
    """What is below a node, but for private classes and local variables."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef) and child.name.startswith("_"):
            continue
        yield child
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from (inner for inner in _visible(child) if not (is_function and isinstance(inner, ast.Name)))


def _defined_by(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
            yield name


def _words(text: str) -> Iterator[str]:
    """Words as commands have them: names, packages, options, routes."""
    for word in re.findall(r"[\w./-]+", text):
        yield word.rstrip(".")
