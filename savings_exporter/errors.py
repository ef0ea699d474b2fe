"""What can be wrong with a store, as exceptions whose messages say what to do."""

from __future__ import annotations


class StoreError(Exception):
    """The store cannot be opened or used. The message names the file, the reason and the remedy."""


class CorruptStoreError(StoreError):
    """A file of the store is damaged, and opening it would lose savings that were acknowledged."""


class NewerSchemaError(StoreError):
    """The document was written by a newer program; rewriting it would lose what that program knows."""
