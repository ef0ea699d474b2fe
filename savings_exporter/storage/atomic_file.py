"""Atomic file replacement: after a power loss the file is either the complete old version or the complete new one.

::

    temp = create(directory, O_EXCL | O_NOFOLLOW, mode of the old file)
    write(temp); fsync(temp)              # the new version is on stable storage, under a name that no reader opens
    link(path, previous)                  # the old version gets a second name
    rename(temp, path)                    # from here on readers see the new version
    fsync(directory)                      # the rename survives a power loss
    open(path)                            # detects a file system that has shut down

``docs/internals.md`` describes what happens when a step fails. This module retries nothing. A file whose sync failed is
never synced again, because the page cache may have dropped its data and marked the pages as clean. The caller repeats
all steps with a new file.
"""

from __future__ import annotations

import errno
import logging
import os
from contextlib import suppress

from savings_exporter.storage.filesystem import LOCAL, DirectoryFsyncUnsupportedError, FileSystem, Identity
from savings_exporter.storage.operation import FSYNC_DIR, FSYNC_FILE, REPLACE, WRITE, Operation, Step

logger = logging.getLogger(__name__)


class Directory:
    """A store's directory, whose entries can be synced. New files get the mode and owner of ``like``, the document."""

    def __init__(self, fs: FileSystem, document: str) -> None:
        self.path = os.path.dirname(document)
        self.like = document
        self._fs = fs
        self._devices_without_fsync: set[int] = set()

    def sync(self, step: Step, path: str) -> None:
        """Make the directory's entries durable. ``path`` is the entry that was created.

        If the file system does not support fsync of a directory, the file at ``path`` is synced instead, and the step's
        outcome is ``unsupported``.

        Raises:
            OSError: the sync failed, or the file cannot be opened because the file system has shut down.
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
    """A file that is always replaced as a whole. ``path`` is absolute and is not a symlink."""

    def __init__(self, fs: FileSystem, path: str, directory: Directory) -> None:
        self.path = path
        self.previous = path + ".previous"
        self.directory = directory
        self._fs = fs

    def save(self, data: bytes, operation: Operation, *, both: bool) -> Identity:
        """Replace the file, and keep the old version under the name ``previous``.

        With ``both``, the new version is written under both names, as two files. Damage to one does not affect the
        other.

        Returns:
            The new file's identity.

        Raises:
            OSError: a step failed. If the replace was attempted, either version may be there after a power loss.
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
                    # Only after the file itself: a previous version that is newer than the file looks like damage.
                    self._fs.replace(written[0], self.previous)
        finally:
            # A successful replace has already removed these names.
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


def write_new_file(path: str, data: bytes, fs: FileSystem = LOCAL) -> None:
    """Create a file that is complete when it has its name, and survives a power loss.

    Raises:
        FileExistsError: there is a file at the path, which is left as it is.
        OSError: the file cannot be written.
    """
    path = os.path.abspath(path)
    if fs.identity(path) is not None:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
    temporary = fs.temporary_name(path)
    fs.write_new(temporary, data, like=path)
    try:
        fs.replace(temporary, path)
    finally:
        fs.discard(temporary)
    with suppress(DirectoryFsyncUnsupportedError):
        fs.fsync_directory(os.path.dirname(path))
