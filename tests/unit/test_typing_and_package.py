"""What a program that depends on the package sees of it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from importlib.metadata import distribution
from importlib.resources import files
from pathlib import Path

import pytest

import savings_exporter
from savings_exporter import SavingsRecord, SavingsTracker
from savings_exporter.tracker import RecordArguments

if sys.version_info >= (3, 11):
    from typing import get_type_hints
else:
    # The standard library's does not know typing_extensions.Required.
    from typing_extensions import get_type_hints

OF_EXTRAS = {"savings_exporter.sources.litellm"}
"""Modules that import what only an extra installs."""

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(savings_exporter.__path__, "savings_exporter.")
    if not module.name.endswith("__main__") and module.name not in OF_EXTRAS
)


def test_public_names() -> None:
    assert savings_exporter.__all__ == [
        "CorruptStoreError",
        "Health",
        "KeyConflictError",
        "NewerSchemaError",
        "OtherFileError",
        "Receipt",
        "SavingsCollector",
        "SavingsError",
        "SavingsRecord",
        "SavingsTracker",
        "Snapshot",
        "StoreError",
        "Totals",
    ]
    assert all(hasattr(savings_exporter, name) for name in savings_exporter.__all__)


def test_tree_of_errors() -> None:
    assert issubclass(savings_exporter.CorruptStoreError, savings_exporter.StoreError)
    assert issubclass(savings_exporter.NewerSchemaError, savings_exporter.StoreError)
    assert issubclass(savings_exporter.StoreError, savings_exporter.SavingsError)
    assert issubclass(savings_exporter.KeyConflictError, (savings_exporter.SavingsError, ValueError))


def test_package_is_typed() -> None:
    assert files("savings_exporter").joinpath("py.typed").is_file()


def test_distribution_and_this_python() -> None:
    metadata = distribution("savings-exporter").metadata
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert sys.version_info >= (3, 10)


def test_arguments_of_record_request() -> None:
    parameters = inspect.signature(SavingsTracker.record_request).parameters
    assert {name for name in parameters if name not in ("self", "wait", "idempotency_key")} == set(
        SavingsRecord.__struct_fields__
    )
    assert all(parameter.kind is parameter.KEYWORD_ONLY for name, parameter in parameters.items() if name != "self")


def test_async_face_takes_the_same() -> None:
    arguments = get_type_hints(RecordArguments)
    hints = get_type_hints(SavingsTracker.record_request)
    assert arguments == {name: hint for name, hint in hints.items() if name != "return"}


SAMPLE = """
from savings_exporter import Receipt, SavingsTracker

async def record(tracker: SavingsTracker) -> Receipt:
    tracker.record_request(model="m", tokens_saved=1, project=None)
    return await tracker.record_request_async(model="m", tokens_saved=1, {argument})
"""


@pytest.mark.slow
def test_mypy_knows_the_arguments(tmp_path: Path) -> None:
    arguments = {
        "right": 'project="p", wait=False',
        "misspelt": "token_saved=1",
        "mistyped": 'input_tokens="1"',
    }
    for name, argument in arguments.items():
        (tmp_path / f"{name}.py").write_text(SAMPLE.format(argument=argument))
    (tmp_path / "missing.py").write_text(SAMPLE.format(argument="").replace("tokens_saved=1, )", ")"))
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "--no-error-summary", "."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    lines = [line for line in checked.stdout.splitlines() if " error: " in line]
    errors = {line.partition(":")[0]: line.partition(" error: ")[2] for line in lines}
    assert errors.keys() == {"misspelt.py", "mistyped.py", "missing.py"}, checked.stdout + checked.stderr
    assert 'Unexpected keyword argument "token_saved"' in errors["misspelt.py"]
    assert '"input_tokens"' in errors["mistyped.py"]
    assert 'Missing named argument "tokens_saved"' in errors["missing.py"]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    module = importlib.import_module(name)
    undocumented = [
        f"{name}.{thing}"
        for thing, value in vars(module).items()
        if not thing.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == name
        and not inspect.getdoc(value)
    ]
    assert not undocumented
    is_empty = Path(inspect.getfile(module)).stat().st_size == 0
    assert module.__doc__ or is_empty


def test_annotations_resolve() -> None:
    hints = get_type_hints(SavingsTracker.record_request)
    assert hints["return"] is savings_exporter.Receipt
    assert hints["model"] is str
