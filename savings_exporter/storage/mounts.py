"""Which file system a path is on, and whether other hosts may use it too. Asked of Linux; other platforms don't say."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from contextlib import suppress
from typing import NamedTuple

# What statfs(2) gives as f_type: linux/magic.h, and the sources of those that the kernel does not list there.
_LOCAL_FILESYSTEMS = {
    0x0000EF53: "ext4",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0x2FC12FC1: "zfs",
    0xF2F52010: "f2fs",
    0xCA451A4E: "bcachefs",
    0x00004D44: "vfat",
    0x2011BAB0: "exfat",
    0x794C7630: "overlayfs",
    0x01021994: "tmpfs",
    0x858458F6: "ramfs",
}
# Also those of a virtual machine's host (9p, vboxsf) and of disks that several hosts share (gfs2, ocfs2). In all of
# them another kernel may change a file, and a lock may be valid on one host only.
_NETWORK_FILESYSTEMS = {
    0x00006969: "nfs",
    0xFF534D42: "cifs",
    0xFE534D42: "smb2",
    0x0000517B: "smb",
    0x0000564C: "ncp",
    0x5346414F: "afs",
    0x6B414653: "afs",
    0x73757245: "coda",
    0x00C36400: "ceph",
    0x01021997: "9p",
    0x786F4256: "vboxsf",
    0x0BD00BD0: "lustre",
    0x47504653: "gpfs",
    0x19830326: "beegfs",
    0x20030528: "orangefs",
    0x01161970: "gfs2",
    0x7461636F: "ocfs2",
}
# All of FUSE has one f_type; these are the types that /proc/self/mountinfo gives.
_NETWORK_FUSE_TYPES = frozenset(
    {
        "virtiofs",
        *("fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.ceph-fuse", "fuse.mfs", "fuse.lizardfs", "fuse.smbnetfs"),
        *("fuse.s3fs", "fuse.mountpoint-s3", "fuse.goofys", "fuse.gcsfuse", "fuse.blobfuse", "fuse.blobfuse2"),
        *("fuse.juicefs", "fuse.seaweedfs", "fuse.rclone", "fuse.curlftpfs", "fuse.gvfsd-fuse"),
    }
)
# More than struct statfs takes on any platform; it begins with f_type.
_STATFS_BYTES = 512


class FilesystemType(NamedTuple):
    """The kind of file system that a path is on; ``name`` is "unknown" where the platform does not say."""

    name: str
    is_network: bool


class Mount(NamedTuple):
    """Where a file system is mounted, its type, and its device (or server, or whatever its type has)."""

    point: str
    type: str
    device: str


def filesystem_type(path: str) -> FilesystemType:
    """The file system that a path is on, and whether other hosts may use it too.

    Raises:
        OSError: the path does not exist or cannot be examined.
    """
    if sys.platform != "linux":
        return FilesystemType("unknown", is_network=False)
    magic = _statfs_type(path)
    if magic in _NETWORK_FILESYSTEMS:
        return FilesystemType(_NETWORK_FILESYSTEMS[magic], is_network=True)
    if magic in _LOCAL_FILESYSTEMS:
        return FilesystemType(_LOCAL_FILESYSTEMS[magic], is_network=False)
    mount = mount_of(path)
    if mount is None:
        return FilesystemType("unknown", is_network=False)
    return FilesystemType(mount.type, is_network=mount.type in _NETWORK_FUSE_TYPES)


def mount_of(path: str) -> Mount | None:
    """The mount that a path is on, or None where the platform does not say.

    The kernel is asked for the mount's number (``mnt_id``, proc(5)), because device numbers do not tell mounts apart,
    and paths do not tell which of two mounts lies on top.

    Raises:
        OSError: the path does not exist or cannot be examined.
    """
    if sys.platform != "linux":
        return None
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        with suppress(FileNotFoundError):
            with open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii") as info:
                number = next((line.split()[1] for line in info if line.startswith("mnt_id:")), None)
            with open("/proc/self/mountinfo", "rb") as mounts:
                for line in mounts:
                    fields = [_unescaped(field) for field in line.split()]
                    if fields[0] == number:
                        # A variable number of optional fields precedes the dash.
                        kind, device = fields[fields.index("-", 6) + 1 :][:2]
                        return Mount(fields[4], kind, device)
    finally:
        os.close(descriptor)
    return None


def _statfs_type(path: str) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(_STATFS_BYTES)
    if libc.statfs(os.fsencode(path), buffer) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    # A signed word of the machine's size, in which some types appear negative.
    return ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF


def _unescaped(field: bytes) -> str:
    """A field of mountinfo, where blanks and backslashes are written in octal."""
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), field))
