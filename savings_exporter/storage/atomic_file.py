"""The recipe that replaces a file so that a power loss leaves the old one or the new one, whole.

::

    temp = create(directory, O_EXCL | O_NOFOLLOW, mode of the old file)
    write(temp); fsync(temp)              # the new bytes are on the disk, under a name nobody reads
    link(path, previous)                  # the old bytes keep a name
    rename(temp, path)                    # readers see the new file from here on
    fsync(directory)                      # and after a power loss, too
    open(path)                            # the filesystem has not quietly shut down

What is done when a step fails is in ``docs/durability.md``. Nothing here retries: a failed file is never
synced again, because the page cache may have dropped its data and call it clean, so the caller runs the whole
recipe again with new bytes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from mmap import mmap

from savings_exporter.storage import filesystem
from savings_exporter.storage.steps import FSYNC_DIR, FSYNC_FILE, REPLACE, WRITE, Operation, Step

logger = logging.getLogger(__name__)


class AtomicFile:
    """A file that is only ever replaced as a whole. ``path`` is absolute and no symlink; ``previous`` is the name that
    the bytes of before keep, where they are worth keeping.
    """

    def __init__(self, path: str, previous: str | None = None) -> None:
        self.path = path
        self.previous = previous
        self.directory = os.path.dirname(path)
        self._like = path
        self._devices_without_dir_fsync: set[int] = set()
        # Set from the moment the new file may be visible until it is known to be durable.
        self.outcome_unknown = False

    @property
    def keeps_previous(self) -> bool:
        """Whether the next save keeps the bytes of before.

        After a save of unknown outcome the file may not be on the disk yet, while the one kept before it is.
        """
        return self.previous is not None and not self.outcome_unknown

    def beside(self, path: str) -> AtomicFile:
        """Another file in the same directory, for the same eyes."""
        other = AtomicFile(path)
        other._like = self.path
        other._devices_without_dir_fsync = self._devices_without_dir_fsync
        return other

    def save(
        self,
        data: bytes | mmap,
        operation: Operation,
        written: Callable[[filesystem.Identity], object] | None = None,
    ) -> None:
        """Replace the file. ``written`` is told the new file's identity before anybody can see it under its name.

        Raises:
            OSError: some step failed. While ``outcome_unknown`` is set, a power loss may bring back either
                version; otherwise the old one stands.
        """
        temporary = filesystem.temporary_name(self.path)
        try:
            identity = self._write_durably(temporary, data, operation)
            if written is not None:
                written(identity)
            with operation.step(REPLACE):
                self._keep_previous()
                # From here on even an error may hide a success, and nothing is ever unlinked again.
                self.outcome_unknown = True
                filesystem.replace(temporary, self.path)
        except BaseException:
            # Harmless where the replace did happen: the temporary name is gone then, and the target is not touched.
            filesystem.discard(temporary)
            raise
        with operation.step(FSYNC_DIR) as step:
            self._make_rename_durable(step)
        self.outcome_unknown = False

    def _write_durably(self, temporary: str, data: bytes | mmap, operation: Operation) -> filesystem.Identity:
        descriptor = -1
        try:
            with operation.step(WRITE) as step:
                step.size = len(data)
                descriptor = filesystem.create_temporary(temporary, like=self._like)
                filesystem.write_all(descriptor, data)
            with operation.step(FSYNC_FILE) as step:
                step.fsync_target = "file"
                filesystem.fsync_file(descriptor)
            return filesystem.identity_of(descriptor)
        finally:
            if descriptor >= 0:
                filesystem.close(descriptor)

    def _keep_previous(self) -> None:
        if self.previous is not None and self.keeps_previous and filesystem.identity(self.path) is not None:
            filesystem.keep_copy(self.path, self.previous)

    def _make_rename_durable(self, step: Step) -> None:
        step.fsync_target = "directory"
        device = filesystem.device_of(self.directory)
        if device not in self._devices_without_dir_fsync:
            try:
                filesystem.fsync_directory(self.directory)
            except filesystem.DirectoryFsyncUnsupportedError as reason:
                self._devices_without_dir_fsync.add(device)
                logger.warning(
                    "%s: this filesystem has no directory fsync (%s); the renamed file is synced instead, and a "
                    "save may be lost in a power loss",
                    self.directory,
                    reason,
                )
        if device in self._devices_without_dir_fsync:
            step.fsync_target = "file"
            filesystem.fsync_path(self.path)
            step.outcome = "unsupported"
        filesystem.probe(self.path)
