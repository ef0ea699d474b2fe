"""The recipe that replaces a file so that a power loss leaves the old version or the new one, whole.

::

    temp = create(directory, O_EXCL | O_NOFOLLOW, mode of the old file)
    write(temp); fsync(temp)              # the new bytes are on stable storage, under a name that is not read
    link(path, previous)                  # the old bytes keep a name
    rename(temp, path)                    # readers see the new file from here on
    fsync(directory)                      # and after a power loss, too
    open(path)                            # the file system has not shut down unnoticed

``docs/internals.md`` says what is done when a step fails. Nothing is retried here: a file whose sync failed is never
synced again, because the page cache may have dropped its data and call it clean. The caller runs the whole recipe again
with a new file.
"""

from __future__ import annotations

import logging
import os

from savings_exporter.storage.filesystem import DirectoryFsyncUnsupportedError, FileSystem, Identity
from savings_exporter.storage.operation import FSYNC_DIR, FSYNC_FILE, REPLACE, WRITE, Operation, Step

logger = logging.getLogger(__name__)


class Directory:
    """The directory of a store, whose entries are synced. New files get mode and owner of ``like``, the document."""

    def __init__(self, fs: FileSystem, document: str) -> None:
        self.path = os.path.dirname(document)
        self.like = document
        self._fs = fs
        self._devices_without_fsync: set[int] = set()

    def sync(self, step: Step, path: str) -> None:
        """Make the directory's entries durable; ``path`` is the entry that was made.

        Where the file system has no directory fsync, the file of that name is synced instead, and the step's outcome is
        ``unsupported``.

        Raises:
            OSError: it failed, or the file cannot be opened: then the file system has shut down.
        """
        device = self._fs.device_of(self.path)
        if device not in self._devices_without_fsync:
            try:
                self._fs.fsync_directory(self.path)
            except DirectoryFsyncUnsupportedError as reason:
                self._devices_without_fsync.add(device)
                logger.warning(
                    "%s: this file system has no directory fsync (%s); each renamed file is synced instead, and a "
                    "power loss may undo the last save",
                    self.path,
                    reason,
                )
        if device in self._devices_without_fsync:
            step.fsync_target = "file"
            self._fs.fsync_path(path)
            step.outcome = "unsupported"
        self._fs.probe(path)


class AtomicFile:
    """A file that is only ever replaced as a whole. ``path`` is absolute and no symlink."""

    def __init__(self, fs: FileSystem, path: str, directory: Directory) -> None:
        self.path = path
        self.previous = path + ".previous"
        self.directory = directory
        self._fs = fs

    def save(self, data: bytes, operation: Operation, *, both: bool) -> Identity:
        """Replace the file, and keep the version before it under the name ``previous``.

        With ``both``, the new version gets both names: as two files, so that damage to one leaves the other.

        Returns:
            The new file's identity.

        Raises:
            OSError: some step failed. If the replace was tried, a power loss may bring back either version.
        """
        written: list[str] = []
        try:
            if both:
                self._write(data, written, operation)
            identity = self._write(data, written, operation)
            with operation.step(REPLACE):
                if not both and self._fs.identity(self.path) is not None:
                    self._fs.keep_copy(self.path, self.previous)
                self._fs.replace(written[-1], self.path)
                if both:
                    # Not before the other: a previous version newer than the file itself looks like a damage.
                    self._fs.replace(written[0], self.previous)
        finally:
            # After a replace these names are gone.
            for temporary in written:
                self._fs.discard(temporary)
        with operation.step(FSYNC_DIR, "directory") as step:
            self.directory.sync(step, self.path)
        return identity

    def _write(self, data: bytes, written: list[str], operation: Operation) -> Identity:
        temporary = self._fs.temporary_name(self.path)
        written.append(temporary)
        descriptor = -1
        try:
            with operation.step(WRITE) as step:
                step.size = len(data)
                descriptor = self._fs.create(temporary, like=self.directory.like)
                self._fs.write_all(descriptor, data)
            with operation.step(FSYNC_FILE, "file"):
                self._fs.fsync_file(descriptor)
            return self._fs.identity_of(descriptor)
        finally:
            if descriptor >= 0:
                self._fs.close(descriptor)
