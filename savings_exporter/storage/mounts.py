"""Which file system holds a path, and whether other hosts may use it too. Only Linux provides this information."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from contextlib import suppress
from typing import NamedTuple

# Values of f_type in statfs(2), from linux/magic.h. The kernel does not list all of them there: the others are from the
# source code of the file systems.
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
# This includes file systems of a virtual machine's host (9p, vboxsf) and on disks that several hosts share (gfs2,
# ocfs2). In all of these, another kernel may change a file, and a lock may be valid on only one host.
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
# All FUSE file systems have the same f_type. These are their types in /proc/self/mountinfo.
_NETWORK_FUSE_TYPES = frozenset(
    {
        "virtiofs",
        *("fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.ceph-fuse", "fuse.mfs", "fuse.lizardfs", "fuse.smbnetfs"),
        *("fuse.s3fs", "fuse.mountpoint-s3", "fuse.goofys", "fuse.gcsfuse", "fuse.blobfuse", "fuse.blobfuse2"),
        *("fuse.juicefs", "fuse.seaweedfs", "fuse.rclone", "fuse.curlftpfs", "fuse.gvfsd-fuse"),
    }
)
# Larger than struct statfs on any platform. The structure begins with f_type.
_STATFS_BYTES = 512


class FilesystemType(NamedTuple):
    """The type of a file system. ``name`` is "unknown" when the platform does not provide the type."""

    name: str
    is_network: bool


class Mount(NamedTuple):
    """A file system's mount point, its type, and its device (or its server or another source, as the type requires)."""

    point: str
    type: str
    device: str


def filesystem_type(path: str) -> FilesystemType:
    """The type of the file system that holds a path, and whether other hosts may use it too.

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
    """The mount that holds a path, or None when the platform does not provide it.

    The mount is identified by its number (``mnt_id``, proc(5)). A device number is not enough, because several mounts
    can share it. A path is not enough, because it does not show which of two mounts is on top.

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
    # f_type is a signed machine word, so some types appear as negative numbers.
    return ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF


def _unescaped(field: bytes) -> str:
    """Decode a field of mountinfo, in which spaces and backslashes are octal escapes."""
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), field))
