"""The disk runs full under the filesystem: a sync fails once, the next one succeeds, and the data is gone.

The image lies on a tmpfs that has no room left, so the device under the filesystem fails and not the filesystem
itself. The tests of the facts say what the kernel does; the store's promises rest on them.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from crash.lab import FILESYSTEMS, Disk, experiment, mounted, unmount
from support import eventually

pytestmark = pytest.mark.needs("linux", "root", "mount", "xfsprogs", "e2fsprogs")

BLOCK = 64 * 1024

# Less than what the writers go on to need, more than what one sync needs.
ROOM_BYTES = 256 * 1024


class ThinDisk(Disk):
    """A disk whose image takes room on a tmpfs as it is written to."""

    def __init__(self, filesystem: str, directory: Path, pool: Path) -> None:
        super().__init__(filesystem, pool / "image", directory / filesystem)
