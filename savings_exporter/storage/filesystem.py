"""The only module that touches the disk. Every function is one step and raises plain ``OSError``."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import platform
import re
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from mmap import mmap
from typing import NamedTuple

from savings_exporter.storage.steps import DIR_FSYNC_UNSUPPORTED

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)
_CLOSE_ON_EXEC = getattr(os, "O_CLOEXEC", 0)
_BINARY = getattr(os, "O_BINARY", 0)
_CAN_ADVISE = hasattr(os, "posix_fadvise")
IS_WINDOWS = sys.platform == "win32"
_TEMPORARY = ".tmp"
_NEW_FILE_MODE = 0o600
_ZEROS = bytes(256 * 1024)

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
# Also those of a virtual machine's host (9p, vboxsf) and of disks that several hosts share (gfs2, ocfs2): what they
# have in common is that somebody else than this kernel may change a file, and that a lock may hold on one host only.
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


class Identity(NamedTuple):
    """What tells one version of a file from another without reading it."""

    device: int
    inode: int
    modified_ns: int
    size: int


class FilesystemType(NamedTuple):
    """What kind of filesystem a path is on; ``name`` is "unknown" where the platform does not say."""

    name: str
    is_network: bool


class Mount(NamedTuple):
    """Where a filesystem is mounted, of what type, and from which device (or server, or whatever its type has)."""

    point: str
    type: str
    device: str


class DirectoryFsyncUnsupportedError(Exception):
    """This filesystem has no directory fsync: a fact about it, not a failure."""


def resolved(path: str) -> str:
    """The file that a path means: absolute, symlinks followed, so that a link is never replaced by a file."""
    return os.path.realpath(path)


def identity(path: str) -> Identity | None:
    """The file's identity, or None when there is no file."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", path)
    return Identity(status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)


def identity_of(descriptor: int) -> Identity:
    """The identity of an open file. It stays the file's own when the file gets another name."""
    status = os.fstat(descriptor)
    return Identity(status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)


def device_of(path: str) -> int:
    """The device that a path lies on."""
    return os.stat(path).st_dev


def place(path: str) -> str:
    """A short name for a path on this host, the same whenever it is asked for (16 hexadecimal digits)."""
    return hashlib.sha256(f"{platform.node()}:{path}".encode("utf-8", "surrogateescape")).hexdigest()[:16]


def is_directory(path: str) -> bool:
    """Whether the path is a directory (also through a symlink)."""
    return os.path.isdir(path)


def filesystem_type(path: str) -> FilesystemType:
    """The filesystem that a path is on, and whether other hosts may use it too (asked of Linux only).

    Raises:
        OSError: there is no such path, or it may not be looked at.
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
        OSError: there is no such path, or it may not be looked at.
    """
    if sys.platform != "linux":
        return None
    with _opened(os.open(path, os.O_PATH | os.O_CLOEXEC)) as descriptor, suppress(FileNotFoundError):
        with open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii") as info:
            number = next((line.split()[1] for line in info if line.startswith("mnt_id:")), None)
        with open("/proc/self/mountinfo", "rb") as mounts:
            for line in mounts:
                fields = [_unescaped(field) for field in line.split()]
                if fields[0] == number:
                    # Before the dash there are optional fields, as many as there happen to be.
                    kind, device = fields[fields.index("-", 6) + 1 :][:2]
                    return Mount(fields[4], kind, device)
    return None


def read(path: str) -> tuple[bytes, Identity]:
    """The whole file, and the identity of what was read."""
    # A pipe of that name must not keep us waiting for somebody who writes into it.
    with open(os.open(path, os.O_RDONLY | _NO_WAIT | _CLOSE_ON_EXEC | _BINARY), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", path)
        return file.read(), identity_of(file.fileno())


def create_temporary(path: str, like: str) -> int:
    """Open a new temporary file beside the file it will replace, with that file's mode and, if we may, its owner.

    A new file is for its owner's eyes only.
    """
    return _made_like(path, os.O_WRONLY | os.O_EXCL | _NO_FOLLOW | _CLOSE_ON_EXEC | _BINARY, like)


def create_zero_filled(path: str, size: int) -> int:
    """Make a new file of so many zero bytes, sync it, and open it to read and write.

    Its size and its blocks do not change when it is written to later, so that a sync then has no metadata to write.
    Its name is durable only after a sync of the directory.

    Raises:
        OSError: it failed, and there is no file.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_FOLLOW | _CLOSE_ON_EXEC | _BINARY
    descriptor = os.open(path, flags, _NEW_FILE_MODE)
    try:
        for start in range(0, size, len(_ZEROS)):
            write_all(descriptor, _ZEROS[: size - start])
        fsync_file(descriptor)
    except BaseException:
        close(descriptor)
        discard(path)
        raise
    return descriptor


def temporary_name(path: str) -> str:
    """A new name for a temporary file beside ``path``."""
    directory, name = os.path.split(path)
    return os.path.join(directory, f".{name}.{secrets.token_hex(6)}{_TEMPORARY}")


def unused_name(path: str, suffix: str) -> str:
    """A name beside ``path`` that nothing has, to keep a file aside under."""
    return f"{path}.{suffix}-{secrets.token_hex(6)}"


def write_all(descriptor: int, data: bytes | mmap) -> None:
    """Write every byte, however many calls it takes."""
    written = 0
    while written < len(data):
        with memoryview(data) as view, view[written:] as rest:
            written += os.write(descriptor, rest)


def open_segment(path: str) -> int:
    """Open a segment of the journal, to read and to write."""
    return os.open(path, os.O_RDWR | _NO_FOLLOW | _CLOSE_ON_EXEC | _BINARY)


def append_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write every byte at an offset, however many calls it takes.

    Raises:
        OSError: it failed; EIO when the system takes no more bytes without saying why.
    """
    while data:
        written = os.pwrite(descriptor, data, offset)
        if written == len(data):
            return
        if written == 0:
            raise OSError(errno.EIO, "Nothing was written")
        data, offset = memoryview(data)[written:], offset + written


def begin_writing(descriptor: int, size: int, offset: int) -> None:
    """Have the disk begin to write what was written there, for a sync that comes soon; only a hint.

    On Linux, POSIX_FADV_DONTNEED of part of a page begins to write that page and keeps it in the cache
    (posix_fadvise(2)). That it fails, or cannot be said, shows at the sync.
    """
    if _CAN_ADVISE:
        with suppress(OSError):
            os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """The bytes at an offset, fewer where the file ends."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more
    return data


def fsync_file(descriptor: int) -> None:
    """Have the file's data on the disk, not only in a cache of it.

    On macOS ``fsync`` does not empty the drive's cache; ``F_FULLFSYNC`` does, where the filesystem has it
    (Apple's manual page of fsync(2)).
    """
    full_sync = getattr(fcntl, "F_FULLFSYNC", None) if sys.platform != "win32" else None
    if full_sync is not None:
        with suppress(OSError):
            fcntl.fcntl(descriptor, full_sync)
            return
    os.fsync(descriptor)


def sync_data(descriptor: int) -> None:
    """Have a file's data on the disk, and of its metadata only what reading the data takes (fdatasync(2)).

    Where there is no ``fdatasync``, macOS among them, this is ``fsync_file``.
    """
    if hasattr(os, "fdatasync"):
        os.fdatasync(descriptor)
    else:
        fsync_file(descriptor)


def fsync_directory(path: str) -> None:
    """Have the directory's entries on the disk.

    Raises:
        DirectoryFsyncUnsupportedError: the platform or the filesystem has no such thing.
        OSError: it failed. EROFS is a failure too: ext4 says so when it has given up after an error.
    """
    if IS_WINDOWS:
        raise DirectoryFsyncUnsupportedError("Windows has no directory fsync")
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | _CLOSE_ON_EXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in DIR_FSYNC_UNSUPPORTED or (error.errno == errno.EBADF and _is_open_directory(descriptor)):
            raise DirectoryFsyncUnsupportedError(os.strerror(error.errno)) from error
        raise
    finally:
        close(descriptor)


def fsync_path(path: str) -> None:
    """Sync a file by its name."""
    descriptor = os.open(path, os.O_RDWR | _NO_FOLLOW | _CLOSE_ON_EXEC | _BINARY)
    try:
        fsync_file(descriptor)
    finally:
        close(descriptor)


def keep_copy(path: str, kept: str) -> None:
    """Give a file a second name, which then stays with this version when ``path`` is replaced.

    Where there are no hard links, the bytes are copied. Either way the second name is never without a whole file.
    """
    temporary = temporary_name(kept)
    try:
        try:
            os.link(path, temporary)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                raise
            _copy(path, temporary)
        _rename_over(temporary, kept)
    except BaseException:
        discard(temporary)
        raise
    # rename() does nothing when both names are links to one file already (POSIX), and leaves the first one.
    discard(temporary)


def kept_under(path: str, suffix: str) -> str | None:
    """Which second name of this kind a file has already."""
    for name in with_suffix(path, f".{suffix}-"):
        with suppress(FileNotFoundError):
            if os.path.samefile(name, path):
                return name
    return None


def write_aside(path: str, data: bytes) -> None:
    """Keep bytes under a new name, all of them or none."""
    with _opened(
        os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _CLOSE_ON_EXEC | _BINARY, _NEW_FILE_MODE)
    ) as file:
        try:
            write_all(file, data)
            fsync_file(file)
        except BaseException:
            discard(path)
            raise


def replace(temporary: str, path: str) -> None:
    """Give the new file the old one's name, at once for every reader."""
    os.replace(temporary, path)


def probe(path: str) -> None:
    """Open a file by its name, and nothing else.

    After XFS has shut down, an fsync of a directory may still succeed, while an open fails with EIO.
    """
    close(os.open(path, os.O_RDONLY | _CLOSE_ON_EXEC | _BINARY))


def discard(path: str) -> None:
    """Remove a file that nobody needs. That it stays is no harm, so this never fails."""
    with suppress(OSError):
        os.unlink(path)


def socket_at(path: str) -> tuple[int, int] | None:
    """Device and inode of the Unix socket's file of that name; None if there is none, or another kind of file."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISSOCK(status.st_mode) else None


@contextmanager
def opened_directory(path: str) -> Iterator[int]:
    """A directory, opened only to name what is in it."""
    with _opened(os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | _CLOSE_ON_EXEC)) as descriptor:
        yield descriptor


def close(descriptor: int) -> None:
    """Close a descriptor. Its data is either synced already or not to be used, so an error says nothing new."""
    with suppress(OSError):
        os.close(descriptor)


def rename(path: str, new: str) -> None:
    """Give a file another name."""
    os.rename(path, new)


def temporaries(path: str) -> list[str]:
    """Temporary files that were made for the document at ``path``, the one kept before it, or its journal."""
    directory, name = os.path.split(path)
    # Not all that begin alike: with a name and a dot begins the name of another store, too.
    made_here = re.compile(
        rf"\.{re.escape(name)}(\.previous|\.journal\.[0-9]+)?\.[0-9a-f]{{12}}{re.escape(_TEMPORARY)}"
    )
    return [os.path.join(directory, entry) for entry in os.listdir(directory) if made_here.fullmatch(entry)]


def with_suffix(path: str, suffix: str) -> list[str]:
    """The files whose names begin with that of ``path`` and a suffix."""
    directory, name = os.path.split(path)
    return [os.path.join(directory, entry) for entry in os.listdir(directory) if entry.startswith(name + suffix)]


def make_directories(path: str) -> None:
    """Make a directory and those above it, durably; nothing happens to those that exist."""
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for directory in reversed(missing):
        with suppress(FileExistsError):
            os.mkdir(directory, 0o700)
        with suppress(DirectoryFsyncUnsupportedError):
            fsync_directory(os.path.dirname(directory))


def open_lock(path: str, like: str) -> int:
    """Open the lock file, making it if it is not there, with the mode and, if we may, the owner of the file that it is
    for. We never rename or remove it.
    """
    flags = os.O_RDWR | _NO_FOLLOW | _CLOSE_ON_EXEC
    with suppress(FileNotFoundError):
        return os.open(path, flags)
    return _made_like(path, flags, like)


def try_lock(descriptor: int) -> bool:
    """Take the lock if it is free. It goes with the open file, so a killed process lets go of it."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        raise
    return True


def is_at(path: str, descriptor: int) -> bool:
    """Whether a path leads to an open file: that was not removed or renamed, and no other took its place."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def modified_ns(path: str) -> int:
    """When a file or directory was last changed, in nanoseconds since 1970."""
    return os.stat(path).st_mtime_ns


@contextmanager
def opened_shared(path: str) -> Iterator[int | None]:
    """A lock file, opened by somebody who only reads; None when there is none or it is not for us."""
    try:
        descriptor = os.open(path, os.O_RDONLY | _NO_FOLLOW | _CLOSE_ON_EXEC)
    except OSError:
        yield None
        return
    try:
        yield descriptor
    finally:
        close(descriptor)


def try_shared_lock(descriptor: int) -> bool:
    """Take the lock if nobody writes. Others who only read may have it too."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_mark(descriptor: int, data: bytes) -> None:
    """Write the mark into the lock file. It is not synced, and nothing that was acknowledged depends on it."""
    os.pwrite(descriptor, data, 0)


def unlock(descriptor: int) -> None:
    """Let go of the lock."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    except OSError:
        pass


# On POSIX rename() replaces, on Windows it refuses to.
_rename_over = os.replace if sys.platform == "win32" else os.rename


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


def _made_like(path: str, flags: int, like: str) -> int:
    """Make a file and open it, with the mode and, if we may, the owner of another, if there is that one."""
    descriptor = os.open(path, flags | os.O_CREAT, _NEW_FILE_MODE)
    try:
        with suppress(FileNotFoundError):
            status = os.stat(like)
            if sys.platform != "win32":
                _give_to(descriptor, status)
                os.fchmod(descriptor, stat.S_IMODE(status.st_mode))
    except BaseException:
        close(descriptor)
        raise
    return descriptor


def _give_to(descriptor: int, owner: os.stat_result) -> None:
    """Give a file the owner and group of another, if we may."""
    try:
        # A tool run once as root must not lock the service out. Others may not give files away.
        os.fchown(descriptor, owner.st_uid, owner.st_gid)
    except OSError as error:
        # EINVAL: in a user namespace (user_namespaces(7)) an owner that it does not know has no number to be named by.
        if error.errno not in (errno.EPERM, errno.EACCES, errno.EINVAL):
            raise


def _is_open_directory(descriptor: int) -> bool:
    try:
        return stat.S_ISDIR(os.fstat(descriptor).st_mode)
    except OSError:
        return False


def _copy(path: str, copy: str) -> None:
    with _opened(create_temporary(copy, like=path)) as descriptor:
        data, _ = read(path)
        write_all(descriptor, data)
        fsync_file(descriptor)


@contextmanager
def _opened(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        close(descriptor)
