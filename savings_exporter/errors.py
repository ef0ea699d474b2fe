"""All exceptions of this package. Attributes carry the data about a failure, so callers never need to parse a message.

::

    SavingsError
    ├── StoreError                  the store cannot be opened or used
    │   ├── CorruptStoreError       a file is damaged; opening the store would lose acknowledged records
    │   │   └── OtherFileError      the file is not a savings document
    │   └── NewerSchemaError        a newer program wrote the document
    ├── KeyConflictError            an idempotency key was reused with different content (also a ValueError)
    └── SettingsError               a setting is wrong
"""

from __future__ import annotations


class SavingsError(Exception):
    """The base of all errors that this package raises on purpose.

    Attributes:
        path: the file or directory concerned, None when the error does not concern one.
        step: the step of a save or commit that failed (``write``, ``fsync_file``, ...), None outside of one.
        errno: the operating system's error number, None when there was none.
    """

    def __init__(
        self, message: str = "", *, path: str | None = None, step: str | None = None, errno: int | None = None
    ) -> None:
        super().__init__(message)
        self.path = path
        self.step = step
        self.errno = errno


class StoreError(SavingsError):
    """The store cannot be opened or used. The message names the file, the reason and the remedy.

    Attributes:
        problem: the message without the remedy, for programs that only read the store.
    """

    def __init__(
        self,
        problem: str = "",
        remedy: str = "",
        *,
        path: str | None = None,
        step: str | None = None,
        errno: int | None = None,
    ) -> None:
        super().__init__(f"{problem}. {remedy}" if remedy else problem, path=path, step=step, errno=errno)
        self.problem = problem


class CorruptStoreError(StoreError):
    """A file of the store is damaged, and opening the store would lose acknowledged records.

    Attributes:
        field: the field that cannot be read, such as ``lifetime.tokens_saved``; None when no single field is affected.
        lost: how many acknowledged records are missing, None when the number is not known.
    """

    def __init__(
        self,
        problem: str = "",
        remedy: str = "",
        *,
        path: str | None = None,
        field: str | None = None,
        lost: int | None = None,
    ) -> None:
        super().__init__(problem, remedy, path=path)
        self.field = field
        self.lost = lost


class OtherFileError(CorruptStoreError):
    """The file at the path is intact but is not a savings document. It is left unchanged."""


class NewerSchemaError(StoreError):
    """A newer program wrote the document. Rewriting it would lose data that only that program understands."""


class KeyConflictError(SavingsError, ValueError):
    """An idempotency key was reused for records that differ from the first ones."""


class SettingsError(SavingsError):
    """A setting is wrong. The message names it and says what it should be."""
