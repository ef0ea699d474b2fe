"""What a program that depends on the package sees of it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from importlib.metadata import distribution
from importlib.resources import files
from pathlib import Path
from typing import get_type_hints

import pytest

import savings_exporter
from savings_exporter import SavingsRecord, SavingsTracker

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(savings_exporter.__path__, "savings_exporter.")
    if not module.name.endswith("__main__")
)


def test_the_public_names_are_these() -> None:
    assert savings_exporter.__all__ == [
        "CorruptStoreError",
        "NewerSchemaError",
        "Receipt",
        "SavingsRecord",
        "SavingsTracker",
        "Snapshot",
        "StoreError",
    ]
    assert all(hasattr(savings_exporter, name) for name in savings_exporter.__all__)


def test_damage_and_newer_schemas_are_caught_as_store_errors() -> None:
    assert issubclass(savings_exporter.CorruptStoreError, savings_exporter.StoreError)
    assert issubclass(savings_exporter.NewerSchemaError, savings_exporter.StoreError)


def test_the_package_says_that_it_is_typed() -> None:
    assert files("savings_exporter").joinpath("py.typed").is_file()


def test_the_distribution_supports_the_running_python() -> None:
    metadata = distribution("savings-exporter").metadata
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert sys.version_info >= (3, 10)


def test_record_request_takes_a_records_fields_by_name_only() -> None:
    parameters = inspect.signature(SavingsTracker.record_request).parameters
    assert {name for name in parameters if name not in ("self", "wait", "idempotency_key")} == set(
        SavingsRecord.__struct_fields__
    )
    assert all(parameter.kind is parameter.KEYWORD_ONLY for name, parameter in parameters.items() if name != "self")


@pytest.mark.parametrize("name", MODULES)
def test_every_public_thing_has_a_docstring(name: str) -> None:
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


def test_public_annotations_can_be_resolved() -> None:
    hints = get_type_hints(SavingsTracker.record_request)
    assert hints["return"] is savings_exporter.Receipt
    assert hints["model"] is str
