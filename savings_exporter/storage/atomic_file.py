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

from savings_exporter.storage import filesystem
from savings_exporter.storage.steps import FSYNC_DIR, FSYNC_FILE, REPLACE, WRITE, Observer, Operation, observed

logger = logging.getLogger(__name__)


class AtomicFile:
    """A file that is only ever replaced as a whole. ``path`` is absolute and no symlink."""

    def __init__(self, path: str, previous: str) -> None:
        self.path = path
        self.previous = previous
        self.directory = os.path.dirname(path)
        # One directory, so one device: what was learned about it stays true until the file is opened anew.
        self._dir_fsync_unsupported = False
        # Set from the moment the new file may be visible until it is known to be durable.
        self.outcome_unknown = False

    def save(self, data: bytes, observer: Observer, save: Operation) -> None:
        """Replace the file.

        Raises:
            OSError: some step failed. While ``outcome_unknown`` is set, a power loss may bring back either
                version; otherwise the old one stands.
        """
        temporary = filesystem.temporary_name(self.path)
        try:
            self._write_durably(temporary, data, observer, save)
            with observed(observer, REPLACE, save):
                self._keep_previous()
                # From here on even an error may hide a success, and nothing is ever unlinked again.
                self.outcome_unknown = True
                filesystem.replace(temporary, self.path)
        except BaseException:
            # Harmless where the replace did happen: the temporary name is gone then, and the target is not touched.
            filesystem.discard(temporary)
            raise
        with observed(observer, FSYNC_DIR, save) as step:
            self._make_rename_durable(step)
        self.outcome_unknown = False

    def _write_durably(self, temporary: str, data: bytes, observer: Observer, save: Operation) -> None:
        descriptor = -1
        try:
            with observed(observer, WRITE, save) as step:
                step.size = len(data)
                descriptor = filesystem.create_temporary(temporary, like=self.path)
                filesystem.write_all(descriptor, data)
            with observed(observer, FSYNC_FILE, save) as step:
                step.fsync_target = "file"
                filesystem.fsync_file(descriptor)
        finally:
            if descriptor >= 0:
                filesystem.close(descriptor)

    def _keep_previous(self) -> None:
        # After a save of unknown outcome the file may not be on the disk yet, while the one kept before it is.
        if not self.outcome_unknown and filesystem.identity(self.path) is not None:
            filesystem.keep_copy(self.path, self.previous)

    def _make_rename_durable(self, step: Operation) -> None:
        step.fsync_target = "directory"
        if not self._dir_fsync_unsupported:
            try:
                filesystem.fsync_directory(self.directory)
            except filesystem.DirectoryFsyncUnsupportedError as reason:
                self._dir_fsync_unsupported = True
                logger.warning(
                    "%s: this filesystem has no directory fsync (%s); the renamed file is synced instead, and a "
                    "save may be lost in a power loss",
                    self.directory,
                    reason,
                )
        if self._dir_fsync_unsupported:
            step.fsync_target = "file"
            filesystem.fsync_path(self.path)
            step.outcome = "unsupported"
        filesystem.probe(self.path)
