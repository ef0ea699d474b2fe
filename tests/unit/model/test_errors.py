"""The tree of errors, and the data they carry."""

from __future__ import annotations

import errno
import pickle

import pytest

from savings_exporter.errors import CorruptStoreError, KeyConflictError, NewerSchemaError, SavingsError, StoreError


def test_tree() -> None:
    assert issubclass(CorruptStoreError, StoreError)
    assert issubclass(NewerSchemaError, StoreError)
    assert issubclass(StoreError, SavingsError)
    assert issubclass(KeyConflictError, SavingsError)
    assert issubclass(KeyConflictError, ValueError)


def test_attributes() -> None:
    error = StoreError("cannot", path="/x", step="write", errno=errno.EIO)
    assert (str(error), error.path, error.step, error.errno) == ("cannot", "/x", "write", errno.EIO)
    assert (SavingsError("x").path, SavingsError("x").step, SavingsError("x").errno) == (None, None, None)
    damaged = CorruptStoreError("damaged", field="lifetime.requests", lost=3)
    assert (damaged.field, damaged.lost, damaged.path) == ("lifetime.requests", 3, None)


@pytest.mark.parametrize("kind", [SavingsError, StoreError, CorruptStoreError, NewerSchemaError, KeyConflictError])
def test_pickle(kind: type[SavingsError]) -> None:
    error = pickle.loads(pickle.dumps(kind("cannot", path="/x")))
    assert (type(error), str(error), error.path) == (kind, "cannot", "/x")
