"""Check what this user may mount, and mount it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def can_mount() -> bool:
    """Whether this user may mount a tmpfs."""
    return sys.platform == "linux" and os.geteuid() == 0


def can_mount_fuse() -> bool:
    """Whether this user may mount a FUSE file system that a test implements."""
    return can_mount() and os.path.exists("/dev/fuse")


def can_make_user_namespaces() -> bool:
    """Whether this user is root and may make a user namespace (util-linux's unshare)."""
    return (
        can_mount()
        and subprocess.run(["unshare", "--user", "--map-root-user", "true"], capture_output=True).returncode == 0
    )


@contextmanager
def mounted(mountpoint: Path, kind: str, *, source: str = "savings-test", options: str = "rw") -> Iterator[None]:
    """A file system mounted on a directory, which is created if needed. It is unmounted at the end."""
    mountpoint.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", kind, "-o", options, source, mountpoint], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", mountpoint], check=True)
