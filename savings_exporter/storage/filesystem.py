"""File system access as an object that callers pass down. Only this module accesses the disk.

Each method is one step and raises plain ``OSError``. Tests pass an object whose steps fail. Windows has its own class.
The design follows SQLite's VFS.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from savings_exporter.storage import mounts
from savings_exporter.storage.operation import DIR_FSYNC_UNSUPPORTED

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)
_CLOSE_ON_EXEC = getattr(os, "O_CLOEXEC", 0)
_BINARY = getattr(os, "O_BINARY", 0)
_DIRECTORY = getattr(os, "O_DIRECTORY", 0)
_DIRECT = getattr(os, "O_DIRECT", 0)
_SYNCHRONOUS = getattr(os, "O_DSYNC", 0)
_TEMPORARY = ".tmp"
_NEW_FILE_MODE = 0o600
_LAST_STANDARD_DESCRIPTOR = 2
_ZEROS = bytes(256 * 1024)
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_BOOT_ID_BYTES = 16
# On Windows a locked byte cannot be read through another handle, so the lock is on a byte far beyond the end of the
# file. LockFile allows that, and SQLite's PENDING_BYTE has the same offset.
_LOCKED_BYTE = 0x40000000


class Identity(NamedTuple):
    """Identifies one version of a file without reading its content."""

    device: int
    inode: int
    modified_ns: int
    size: int


class NotAFileError(OSError):
    """The path is not a regular file but, for example, a FIFO, a socket or a device."""

    def __init__(self, path: str) -> None:
        super().__init__(errno.EINVAL, "Not a regular file", path)


NO_SUCH_FILE = (FileNotFoundError, IsADirectoryError, NotAFileError)
"""The file does not exist, or the path is not a regular file. Any other error does not show whether the file exists."""


class DirectoryFsyncUnsupportedError(Exception):
    """This file system does not support fsync of a directory. This is a property of the file system, not a failure."""


class FileSystem:
    """File system access on POSIX.

    ``is_shared`` says whether several processes may use a store. This requires that a process can see the locks of
    other processes.
    """

    is_shared = True

    # Names and properties.

    def resolved(self, path: str) -> str:
        """The absolute path with all symlinks resolved. Saving to it never replaces a symlink with a file."""
        return os.path.realpath(path)

    def identity(self, path: str) -> Identity | None:
        """The file's identity, or None when the file does not exist.

        Raises:
            OSError: the file cannot be examined, or it is not a regular file.
        """
        try:
            status = os.stat(path)
        except FileNotFoundError:
            return None
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(status.st_mode):
            raise NotAFileError(path)
        return Identity(status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)

    def identity_of(self, descriptor: int) -> Identity:
        """The identity of an open file. Renaming the file does not change it."""
        status = os.fstat(descriptor)
        return Identity(status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)

    def device_of(self, path: str) -> int:
        """The device that holds a path."""
        return os.stat(path).st_dev

    def is_directory(self, path: str) -> bool:
        """Whether the path is a directory or a symlink to one."""
        return os.path.isdir(path)

    def is_network(self, directory: str) -> bool:
        """Whether other hosts may also use this file system."""
        return mounts.filesystem_type(directory).is_network

    def is_at(self, path: str, descriptor: int) -> bool:
        """Whether a path still refers to this open file, which means that it was not removed, renamed or replaced."""
        try:
            return os.path.samestat(os.stat(path), os.fstat(descriptor))
        except FileNotFoundError:
            return False

    def names_beside(self, path: str) -> list[str]:
        """The names in a file's directory that begin with the file's own name."""
        directory, name = os.path.split(path)
        return [entry for entry in os.listdir(directory) if entry.startswith(name)]

    def temporaries(self, path: str) -> list[str]:
        """Temporary files for the document at ``path``, its previous version, or a writer's file."""
        directory, name = os.path.split(path)
        # A prefix match is not enough: another store's name may begin with this store's name and a dot.
        made_here = re.compile(
            rf"\.{re.escape(name)}(\.previous|\.writer\.[0-9a-f]{{16}})?\.[0-9a-f]{{12}}{re.escape(_TEMPORARY)}"
        )
        return [os.path.join(directory, entry) for entry in os.listdir(directory) if made_here.fullmatch(entry)]

    def modified_ns(self, path: str) -> int:
        """The time of a file's last change, in nanoseconds since 1970."""
        return os.stat(path).st_mtime_ns

    def boot_id(self) -> bytes:
        """The id of the machine's current boot (16 bytes), or zeros when the platform does not provide one.

        Raises:
            OSError: the platform provides the id, but it cannot be read now.
        """
        if sys.platform != "linux":
            return bytes(_BOOT_ID_BYTES)
        try:
            with open(_BOOT_ID, encoding="ascii") as file:
                return bytes.fromhex(file.read().strip().replace("-", ""))
        except FileNotFoundError:
            # There is no /proc, for example in a chroot.
            return bytes(_BOOT_ID_BYTES)

    # Reading.

    def read(self, path: str) -> tuple[bytes, Identity]:
        """The content of the whole file, and the identity of the version that was read."""
        with self.opened(path) as descriptor:
            return self.read_at(descriptor, sys.maxsize, 0), self.identity_of(descriptor)

    @contextmanager
    def opened(self, path: str) -> Iterator[int]:
        """Open a regular file for reading."""
        descriptor = _open_regular(path, os.O_RDONLY)
        try:
            yield descriptor
        finally:
            self.close(descriptor)

    def read_at(self, descriptor: int, size: int, offset: int) -> bytes:
        """Up to ``size`` bytes at an offset; fewer when the file ends before."""
        chunks, left = [], size
        while left > 0 and (chunk := self._pread(descriptor, min(left, 1 << 22), offset)):
            chunks.append(chunk)
            left, offset = left - len(chunk), offset + len(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def probe(self, path: str) -> None:
        """Open a file by its path and close it.

        This detects a shutdown of XFS: an fsync of a directory may still succeed then, but an open fails with EIO.
        """
        self.close(_open(path, os.O_RDONLY | _NO_WAIT))

    # Making and writing files.

    def temporary_name(self, path: str) -> str:
        """A new name for a temporary file beside ``path``."""
        directory, name = os.path.split(path)
        return os.path.join(directory, f".{name}.{os.urandom(6).hex()}{_TEMPORARY}")

    def create(self, path: str, like: str) -> int:
        """Create and open a new file with the mode and, if permitted, the owner of the file ``like``.

        If ``like`` does not exist, only the owner can read and write the new file.

        Raises:
            FileExistsError: a file with this name exists.
        """
        descriptor = _open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_FOLLOW)
        try:
            self._make_like(descriptor, like)
        except BaseException:
            self.close(descriptor)
            self.discard(path)
            raise
        return descriptor

    def open_to_write(self, path: str) -> int:
        """Open an existing regular file for reading and writing."""
        return _open_regular(path, os.O_RDWR | _NO_FOLLOW)

    def open_direct(self, path: str) -> int:
        """Open a file for writes that bypass the page cache and are on stable storage when they return (open(2)).

        Raises:
            OSError: it cannot be opened; EINVAL when this file system or platform does not support such writes.
        """
        if not _DIRECT or not _SYNCHRONOUS:
            raise OSError(errno.EINVAL, "No direct I/O on this platform", path)
        return _open_regular(path, os.O_WRONLY | _DIRECT | _SYNCHRONOUS | _NO_FOLLOW)

    def write_all(self, descriptor: int, data: bytes | memoryview) -> None:
        """Write all bytes, with as many calls as necessary."""
        written = os.write(descriptor, data)
        while written < len(data):
            written += os.write(descriptor, memoryview(data)[written:])

    def write_zeros(self, descriptor: int, size: int) -> None:
        """Write ``size`` zero bytes."""
        for start in range(0, size, len(_ZEROS)):
            self.write_all(descriptor, _ZEROS[: size - start])

    def write_at(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        """Write all bytes at an offset, with as many calls as necessary.

        Raises:
            OSError: a write failed; EIO when the system accepts no more bytes but reports no error.
        """
        written = self._pwrite(descriptor, data, offset)
        while written < len(data):
            more = self._pwrite(descriptor, memoryview(data)[written:], offset + written)
            if more == 0:
                raise OSError(errno.EIO, "Nothing was written")
            written += more

    def write_direct(self, descriptor: int, data: memoryview, offset: int) -> None:
        """Write whole blocks of an aligned buffer. They are on stable storage when this returns.

        Raises:
            OSError: the write failed, or wrote only a part of the data (EIO).
        """
        if os.pwritev(descriptor, [data], offset) != len(data):
            raise OSError(errno.EIO, "Only a part was written")

    def close(self, descriptor: int) -> None:
        """Close a descriptor. Errors are ignored, because the data is either synced already or will not be used."""
        with suppress(OSError):
            os.close(descriptor)

    # Syncing.

    def fsync_file(self, descriptor: int) -> None:
        """Put the file's data and metadata on stable storage.

        On macOS ``fsync`` does not flush the drive's cache. ``F_FULLFSYNC`` does, if the file system supports it
        (Apple's manual page of fsync(2)).
        """
        full_sync = getattr(fcntl, "F_FULLFSYNC", None) if sys.platform != "win32" else None
        if full_sync is not None:
            with suppress(OSError):
                fcntl.fcntl(descriptor, full_sync)
                return
        self._fsync(descriptor)

    def sync_data(self, descriptor: int) -> None:
        """Put a file's data on stable storage, with only the metadata that is needed to read the data (fdatasync(2)).

        On platforms without ``fdatasync``, such as macOS, this is ``fsync_file``.
        """
        if hasattr(os, "fdatasync"):
            os.fdatasync(descriptor)
        else:
            self.fsync_file(descriptor)

    def fsync_directory(self, path: str) -> None:
        """Put the directory's entries on stable storage.

        Raises:
            DirectoryFsyncUnsupportedError: the platform or the file system does not support this operation.
            OSError: the sync failed. EROFS is also a failure: ext4 reports it after it has aborted because of an error.
        """
        descriptor = _open(path, os.O_RDONLY | _DIRECTORY)
        try:
            self._fsync(descriptor)
        except OSError as error:
            if error.errno in DIR_FSYNC_UNSUPPORTED or (error.errno == errno.EBADF and _is_open_directory(descriptor)):
                raise DirectoryFsyncUnsupportedError(os.strerror(error.errno)) from error
            raise
        finally:
            self.close(descriptor)

    def fsync_path(self, path: str) -> None:
        """Sync the file at a path."""
        descriptor = self.open_to_write(path)
        try:
            self.fsync_file(descriptor)
        finally:
            self.close(descriptor)

    # Renaming and removing.

    def replace(self, temporary: str, path: str) -> None:
        """Atomically replace the file at ``path`` with the new file."""
        os.replace(temporary, path)

    def rename(self, path: str, new: str) -> None:
        """Rename a file."""
        os.rename(path, new)

    def link(self, path: str, new: str) -> None:
        """Give a file a second name (a hard link)."""
        os.link(path, new)

    def keep_copy(self, path: str, kept: str) -> None:
        """Give a file a second name, ``kept``, which still refers to this version after ``path`` is replaced.

        If the file system has no hard links, the content is copied. In both cases ``kept`` always refers to a complete
        file.
        """
        temporary = self.temporary_name(kept)
        try:
            try:
                self.link(path, temporary)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                    raise
                self.write_new(temporary, self.read(path)[0], like=path)
            _rename_over(temporary, kept)
        except BaseException:
            self.discard(temporary)
            raise
        # If both names already refer to the same file, rename() does nothing and leaves the old name (POSIX).
        self.discard(temporary)

    def write_new(self, path: str, data: bytes, like: str) -> None:
        """Write and sync a new file. If this fails, the file is removed."""
        descriptor = self.create(path, like)
        try:
            self.write_all(descriptor, data)
            self.fsync_file(descriptor)
        except BaseException:
            self.discard(path)
            raise
        finally:
            self.close(descriptor)

    def unlink(self, path: str) -> None:
        """Remove a file."""
        os.unlink(path)

    def discard(self, path: str) -> None:
        """Remove a file that is no longer needed. Errors are ignored, because a remaining file does no harm."""
        with suppress(OSError):
            os.unlink(path)

    def make_directories(self, path: str) -> None:
        """Create a directory and its missing parents, durably. Existing directories are not changed."""
        missing = []
        while not os.path.isdir(path):
            missing.append(path)
            path = os.path.dirname(path)
        for directory in reversed(missing):
            with suppress(FileExistsError):
                os.mkdir(directory, 0o700)
            with suppress(DirectoryFsyncUnsupportedError):
                self.fsync_directory(os.path.dirname(directory))

    # Locks. A lock belongs to the open file (flock(2)): the kernel releases it when the process ends for any reason.

    def open_lock(self, path: str, like: str) -> int:
        """Open a lock file. If it does not exist, create it with the mode and, if permitted, the owner of the file
        ``like``. A lock file is never renamed or removed.
        """
        flags = os.O_RDWR | _NO_FOLLOW
        with suppress(FileNotFoundError):
            return _open_regular(path, flags)
        descriptor = _open_regular(path, flags | os.O_CREAT)
        try:
            self._make_like(descriptor, like)
        except BaseException:
            self.close(descriptor)
            raise
        return descriptor

    def try_lock(self, descriptor: int, *, shared: bool = False) -> bool:
        """Try to take the lock of an open file. Several processes can hold a shared lock."""
        try:
            self._lock(descriptor, shared)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                return False
            raise
        return True

    def unlock(self, descriptor: int) -> None:
        """Release the lock of an open file."""
        with suppress(OSError):
            self._unlock(descriptor)

    def _lock(self, descriptor: int, shared: bool) -> None:
        if sys.platform != "win32":
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)

    def _unlock(self, descriptor: int) -> None:
        if sys.platform != "win32":
            fcntl.flock(descriptor, fcntl.LOCK_UN)

    def _pread(self, descriptor: int, size: int, offset: int) -> bytes:
        return os.pread(descriptor, size, offset)

    def _pwrite(self, descriptor: int, data: bytes | memoryview, offset: int) -> int:
        return os.pwrite(descriptor, data, offset)

    def _fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def _make_like(self, descriptor: int, like: str) -> None:
        with suppress(FileNotFoundError):
            status = os.stat(like)
            _give_to(descriptor, status)
            os.fchmod(descriptor, stat.S_IMODE(status.st_mode))


class WindowsFileSystem(FileSystem):
    """File system access on Windows. It has no directory fsync, no reads and writes at an offset, and no direct I/O.
    Only one process may use a store, because a lock on Windows does not show which other processes are alive.
    """

    is_shared = False

    def __init__(self) -> None:
        # All threads of the process share the position of an open file.
        self._seeking = threading.RLock()

    def is_network(self, directory: str) -> bool:  # noqa: ARG002
        """Unknown, and not needed: only one process may use the store."""
        return False

    def boot_id(self) -> bytes:
        """Unknown."""
        return bytes(_BOOT_ID_BYTES)

    def open_direct(self, path: str) -> int:
        """Not supported."""
        raise OSError(errno.EINVAL, "No direct I/O on this platform", path)

    def sync_data(self, descriptor: int) -> None:
        """Put the file's data on stable storage."""
        os.fsync(descriptor)

    def fsync_file(self, descriptor: int) -> None:
        """Put the file's data on stable storage."""
        os.fsync(descriptor)

    def fsync_directory(self, path: str) -> None:  # noqa: ARG002
        """Not supported."""
        raise DirectoryFsyncUnsupportedError("Windows has no directory fsync")

    def _pread(self, descriptor: int, size: int, offset: int) -> bytes:
        with self._seeking:
            os.lseek(descriptor, offset, os.SEEK_SET)
            return os.read(descriptor, size)

    def _pwrite(self, descriptor: int, data: bytes | memoryview, offset: int) -> int:
        with self._seeking:
            os.lseek(descriptor, offset, os.SEEK_SET)
            return os.write(descriptor, data)

    def _lock(self, descriptor: int, shared: bool) -> None:
        if sys.platform == "win32" and not shared:
            self._locking(descriptor, msvcrt.LK_NBLCK)

    def _unlock(self, descriptor: int) -> None:
        if sys.platform == "win32":
            self._locking(descriptor, msvcrt.LK_UNLCK)

    def _locking(self, descriptor: int, mode: int) -> None:
        if sys.platform == "win32":
            with self._seeking:
                # The position is restored, because write_all continues where the last write ended.
                position = os.lseek(descriptor, 0, os.SEEK_CUR)
                os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
                try:
                    msvcrt.locking(descriptor, mode, 1)
                finally:
                    os.lseek(descriptor, position, os.SEEK_SET)

    def _make_like(self, descriptor: int, like: str) -> None:
        """Does nothing: on Windows, files inherit their permissions from the directory."""


LOCAL: FileSystem = WindowsFileSystem() if sys.platform == "win32" else FileSystem()
"""The file system of this platform."""


def place(path: str) -> str:
    """A short, stable name for a path on this host (16 hexadecimal digits)."""
    return hashlib.sha256(f"{platform.node()}:{path}".encode("utf-8", "surrogateescape")).hexdigest()[:16]


class FreeSpace(NamedTuple):
    """The free space of a file system, for a process that is not privileged.

    Attributes:
        bytes: free bytes.
        inodes: free inodes; None where the file system allocates inodes as needed.
    """

    bytes: int
    inodes: int | None


def free_space(path: str) -> FreeSpace | None:
    """The free space of the file system of a path's directory. None if it cannot be determined."""
    directory = os.path.dirname(os.path.realpath(path))
    try:
        if not hasattr(os, "statvfs"):
            import shutil

            return FreeSpace(shutil.disk_usage(directory).free, None)
        found = os.statvfs(directory)
    except OSError:
        return None
    return FreeSpace(found.f_bavail * found.f_frsize, found.f_favail if found.f_files else None)


def unused_name(path: str, suffix: str) -> str:
    """An unused name in the same directory as ``path``, for a copy that is kept."""
    return f"{path}.{suffix}-{os.urandom(6).hex()}"


def socket_at(path: str) -> tuple[int, int] | None:
    """The device and inode of the Unix socket at a path; None when there is no file or the file is not a socket."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISSOCK(status.st_mode) else None


@contextmanager
def opened_directory(path: str) -> Iterator[int]:
    """Open a directory, so that its entries can be addressed relative to it."""
    descriptor = _open(path, os.O_RDONLY | _DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _open(path: str, flags: int) -> int:
    """Open a path. The descriptor is never that of a standard stream."""
    descriptor = os.open(path, flags | _CLOSE_ON_EXEC | _BINARY, _NEW_FILE_MODE)
    if sys.platform == "win32" or descriptor > _LAST_STANDARD_DESCRIPTOR:
        return descriptor
    # This process was started without one of these streams. What anything prints would become content of the file.
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _LAST_STANDARD_DESCRIPTOR + 1)
    finally:
        os.close(descriptor)


def _open_regular(path: str, flags: int) -> int:
    """Open a regular file.

    Raises:
        OSError: it cannot be opened; ``NotAFileError`` if it is something else.
    """
    try:
        # O_NONBLOCK: opening a FIFO would otherwise wait for another process.
        descriptor = _open(path, flags | _NO_WAIT)
    except OSError as error:
        # A socket, a device without a driver, or a FIFO that nobody reads.
        if error.errno in (errno.ENXIO, errno.ENODEV):
            raise NotAFileError(path) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotAFileError(path)
    return descriptor


# rename() replaces an existing file on POSIX, but fails on Windows.
_rename_over = os.replace if sys.platform == "win32" else os.rename


def _give_to(descriptor: int, owner: os.stat_result) -> None:
    """Give a file the owner and group of another file, if permitted."""
    try:
        # A command that runs once as root must not lock out the service. Other users are not permitted to change the
        # owner.
        os.fchown(descriptor, owner.st_uid, owner.st_gid)
    except OSError as error:
        # EINVAL: in a user namespace (user_namespaces(7)), an owner that is not mapped has no number.
        if error.errno not in (errno.EPERM, errno.EACCES, errno.EINVAL):
            raise


def _is_open_directory(descriptor: int) -> bool:
    try:
        return stat.S_ISDIR(os.fstat(descriptor).st_mode)
    except OSError:
        return False
