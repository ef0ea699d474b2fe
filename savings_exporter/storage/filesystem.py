"""The file system as an object that is passed down; the only module that touches the disk.

Each method is one step and raises plain ``OSError``. Tests pass an object whose steps fail, and Windows has one of its
own: SQLite's VFS is the model.
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
_ZEROS = bytes(256 * 1024)
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_BOOT_ID_BYTES = 16
# On Windows a locked byte cannot be read through another handle. One far beyond the end may be locked, too (LockFile;
# SQLite's PENDING_BYTE is the same).
_LOCKED_BYTE = 0x40000000


class Identity(NamedTuple):
    """What tells one version of a file from another without reading it."""

    device: int
    inode: int
    modified_ns: int
    size: int


class NotAFileError(OSError):
    """Something that is no regular file has the name: a FIFO, a socket, a device."""

    def __init__(self, path: str) -> None:
        super().__init__(errno.EINVAL, "Not a regular file", path)


NO_SUCH_FILE = (FileNotFoundError, IsADirectoryError, NotAFileError)
"""There is no such file, or something else has its name. Any other error says nothing about the file."""


class DirectoryFsyncUnsupportedError(Exception):
    """This file system has no directory fsync. That is a property of it, not a failure."""


class FileSystem:
    """The files of a POSIX system.

    ``is_shared`` says whether several processes may use a store: whether locks of other processes can be seen.
    """

    is_shared = True

    # Names and properties.

    def resolved(self, path: str) -> str:
        """The file that a path means: absolute, symlinks followed, so that a link is never replaced by a file."""
        return os.path.realpath(path)

    def identity(self, path: str) -> Identity | None:
        """The file's identity, or None when there is no file.

        Raises:
            OSError: also when it is not a regular file.
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
        """The identity of an open file. It stays the file's own when the file gets another name."""
        status = os.fstat(descriptor)
        return Identity(status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)

    def device_of(self, path: str) -> int:
        """The device that a path lies on."""
        return os.stat(path).st_dev

    def is_directory(self, path: str) -> bool:
        """Whether the path is a directory (also through a symlink)."""
        return os.path.isdir(path)

    def is_network(self, directory: str) -> bool:
        """Whether other hosts may use this file system, too."""
        return mounts.filesystem_type(directory).is_network

    def is_at(self, path: str, descriptor: int) -> bool:
        """Whether a path leads to an open file: it was neither removed nor renamed nor replaced."""
        try:
            return os.path.samestat(os.stat(path), os.fstat(descriptor))
        except FileNotFoundError:
            return False

    def names_beside(self, path: str) -> list[str]:
        """The names in a file's directory that begin with the file's own name."""
        directory, name = os.path.split(path)
        return [entry for entry in os.listdir(directory) if entry.startswith(name)]

    def temporaries(self, path: str) -> list[str]:
        """Temporary files that were made for the document at ``path``, its previous version, or a writer's file."""
        directory, name = os.path.split(path)
        # Not every name that begins alike: another store's name may begin with this one's and a dot.
        made_here = re.compile(
            rf"\.{re.escape(name)}(\.previous|\.writer\.[0-9a-f]{{16}})?\.[0-9a-f]{{12}}{re.escape(_TEMPORARY)}"
        )
        return [os.path.join(directory, entry) for entry in os.listdir(directory) if made_here.fullmatch(entry)]

    def modified_ns(self, path: str) -> int:
        """When a file was last changed, in nanoseconds since 1970."""
        return os.stat(path).st_mtime_ns

    def boot_id(self) -> bytes:
        """What tells this boot of the machine from every other one (16 bytes); zeros where the platform does not say.

        Raises:
            OSError: the platform says it, but it cannot be read now.
        """
        if sys.platform != "linux":
            return bytes(_BOOT_ID_BYTES)
        try:
            with open(_BOOT_ID, encoding="ascii") as file:
                return bytes.fromhex(file.read().strip().replace("-", ""))
        except FileNotFoundError:
            # Without /proc, such as in a chroot.
            return bytes(_BOOT_ID_BYTES)

    # Reading.

    def read(self, path: str) -> tuple[bytes, Identity]:
        """The whole file, and the identity of what was read."""
        with self.opened(path) as descriptor:
            return self.read_at(descriptor, sys.maxsize, 0), self.identity_of(descriptor)

    @contextmanager
    def opened(self, path: str) -> Iterator[int]:
        """A regular file, opened to be read."""
        # Not blocking: a FIFO of that name would wait for its other end.
        descriptor = os.open(path, os.O_RDONLY | _NO_WAIT | _CLOSE_ON_EXEC | _BINARY)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise NotAFileError(path)
            yield descriptor
        finally:
            self.close(descriptor)

    def read_at(self, descriptor: int, size: int, offset: int) -> bytes:
        """The bytes at an offset, fewer where the file ends."""
        chunks, left = [], size
        while left > 0 and (chunk := self._pread(descriptor, min(left, 1 << 22), offset)):
            chunks.append(chunk)
            left, offset = left - len(chunk), offset + len(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def probe(self, path: str) -> None:
        """Open a file by its name and close it.

        After XFS has shut down, an fsync of a directory may still succeed, while an open fails with EIO.
        """
        self.close(os.open(path, os.O_RDONLY | _NO_WAIT | _CLOSE_ON_EXEC | _BINARY))

    # Making and writing files.

    def temporary_name(self, path: str) -> str:
        """A new name for a temporary file beside ``path``."""
        directory, name = os.path.split(path)
        return os.path.join(directory, f".{name}.{os.urandom(6).hex()}{_TEMPORARY}")

    def create(self, path: str, like: str) -> int:
        """Make a file that is not there yet, with the mode and, if permitted, the owner of another file, and open it.

        Where there is no such other file, the new one is for its owner's eyes only.

        Raises:
            FileExistsError: the name is taken.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_FOLLOW | _CLOSE_ON_EXEC | _BINARY
        descriptor = os.open(path, flags, _NEW_FILE_MODE)
        try:
            self._make_like(descriptor, like)
        except BaseException:
            self.close(descriptor)
            self.discard(path)
            raise
        return descriptor

    def open_to_write(self, path: str) -> int:
        """Open a file that is there, to read and write it."""
        return os.open(path, os.O_RDWR | _NO_FOLLOW | _NO_WAIT | _CLOSE_ON_EXEC | _BINARY)

    def open_direct(self, path: str) -> int:
        """Open a file so that each write is on stable storage when it returns, past the page cache (open(2)).

        Raises:
            OSError: EINVAL, this file system or platform has no such way.
        """
        if not _DIRECT or not _SYNCHRONOUS:
            raise OSError(errno.EINVAL, "No direct I/O on this platform", path)
        return os.open(path, os.O_WRONLY | _DIRECT | _SYNCHRONOUS | _NO_FOLLOW | _CLOSE_ON_EXEC)

    def write_all(self, descriptor: int, data: bytes | memoryview) -> None:
        """Write every byte, however many calls it takes."""
        written = os.write(descriptor, data)
        while written < len(data):
            written += os.write(descriptor, memoryview(data)[written:])

    def write_zeros(self, descriptor: int, size: int) -> None:
        """Write so many zero bytes."""
        for start in range(0, size, len(_ZEROS)):
            self.write_all(descriptor, _ZEROS[: size - start])

    def write_at(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        """Write every byte at an offset, however many calls it takes.

        Raises:
            OSError: it failed; EIO when the system takes no more bytes without saying why.
        """
        written = self._pwrite(descriptor, data, offset)
        while written < len(data):
            more = self._pwrite(descriptor, memoryview(data)[written:], offset + written)
            if more == 0:
                raise OSError(errno.EIO, "Nothing was written")
            written += more

    def write_direct(self, descriptor: int, data: memoryview, offset: int) -> None:
        """Write whole blocks of an aligned buffer; when it returns they are on stable storage.

        Raises:
            OSError: it failed, or only a part was written (EIO).
        """
        if os.pwritev(descriptor, [data], offset) != len(data):
            raise OSError(errno.EIO, "Only a part was written")

    def close(self, descriptor: int) -> None:
        """Close a descriptor. Its data is either synced already or not to be used, so an error says nothing new."""
        with suppress(OSError):
            os.close(descriptor)

    # Syncing.

    def fsync_file(self, descriptor: int) -> None:
        """Put the file's data and metadata on stable storage.

        On macOS ``fsync`` does not empty the drive's cache; ``F_FULLFSYNC`` does, where the file system has it
        (Apple's manual page of fsync(2)).
        """
        full_sync = getattr(fcntl, "F_FULLFSYNC", None) if sys.platform != "win32" else None
        if full_sync is not None:
            with suppress(OSError):
                fcntl.fcntl(descriptor, full_sync)
                return
        self._fsync(descriptor)

    def sync_data(self, descriptor: int) -> None:
        """Put a file's data on stable storage, and of its metadata only what reading the data takes (fdatasync(2)).

        Where there is no ``fdatasync``, macOS among them, this is ``fsync_file``.
        """
        if hasattr(os, "fdatasync"):
            os.fdatasync(descriptor)
        else:
            self.fsync_file(descriptor)

    def fsync_directory(self, path: str) -> None:
        """Put the directory's entries on stable storage.

        Raises:
            DirectoryFsyncUnsupportedError: the platform or the file system has no such operation.
            OSError: it failed. EROFS is a failure too: ext4 reports it when it has aborted after an error.
        """
        descriptor = os.open(path, os.O_RDONLY | _DIRECTORY | _CLOSE_ON_EXEC)
        try:
            self._fsync(descriptor)
        except OSError as error:
            if error.errno in DIR_FSYNC_UNSUPPORTED or (error.errno == errno.EBADF and _is_open_directory(descriptor)):
                raise DirectoryFsyncUnsupportedError(os.strerror(error.errno)) from error
            raise
        finally:
            self.close(descriptor)

    def fsync_path(self, path: str) -> None:
        """Sync a file by its name."""
        descriptor = self.open_to_write(path)
        try:
            self.fsync_file(descriptor)
        finally:
            self.close(descriptor)

    # Renaming and removing.

    def replace(self, temporary: str, path: str) -> None:
        """Give the new file the old one's name, at once for every reader."""
        os.replace(temporary, path)

    def rename(self, path: str, new: str) -> None:
        """Give a file another name."""
        os.rename(path, new)

    def link(self, path: str, new: str) -> None:
        """Give a file a second name (a hard link)."""
        os.link(path, new)

    def keep_copy(self, path: str, kept: str) -> None:
        """Give a file a second name, which stays with this version when ``path`` is replaced.

        Where there are no hard links, the bytes are copied. Either way the second name is never without a whole file.
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
        # rename() does nothing when both names are links to one file already (POSIX), and leaves the first one.
        self.discard(temporary)

    def write_new(self, path: str, data: bytes, like: str) -> None:
        """Write a new file, synced: all of its bytes, or no file."""
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
        """Remove a file that is of no use any more. That it stays does no harm, so this never fails."""
        with suppress(OSError):
            os.unlink(path)

    def make_directories(self, path: str) -> None:
        """Make a directory and those above it, durably; those that exist stay as they are."""
        missing = []
        while not os.path.isdir(path):
            missing.append(path)
            path = os.path.dirname(path)
        for directory in reversed(missing):
            with suppress(FileExistsError):
                os.mkdir(directory, 0o700)
            with suppress(DirectoryFsyncUnsupportedError):
                self.fsync_directory(os.path.dirname(directory))

    # Locks. They belong to the open file (flock(2)): a process that ends lets go of them, however it ends.

    def open_lock(self, path: str, like: str) -> int:
        """Open a lock file, made if it is not there, with the mode and, if permitted, the owner of the file that it is
        for. It is never renamed or removed.
        """
        flags = os.O_RDWR | _NO_FOLLOW | _NO_WAIT | _CLOSE_ON_EXEC | _BINARY
        with suppress(FileNotFoundError):
            return os.open(path, flags)
        descriptor = os.open(path, flags | os.O_CREAT, _NEW_FILE_MODE)
        try:
            self._make_like(descriptor, like)
        except BaseException:
            self.close(descriptor)
            raise
        return descriptor

    def try_lock(self, descriptor: int, *, shared: bool = False) -> bool:
        """Take the lock of an open file if it is free; a shared one may be held by several."""
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
    """The files of Windows: no directory fsync, no reads and writes at an offset, no direct I/O, and one process a
    store, because a lock file says nothing about a process on another open file there.
    """

    is_shared = False

    def __init__(self) -> None:
        # A file has one position, which the threads of the process share.
        self._seeking = threading.RLock()

    def is_network(self, directory: str) -> bool:  # noqa: ARG002
        """Not known; one process has the store anyway."""
        return False

    def boot_id(self) -> bytes:
        """Not known."""
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
                # write_all goes on where the last write ended.
                position = os.lseek(descriptor, 0, os.SEEK_CUR)
                os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
                try:
                    msvcrt.locking(descriptor, mode, 1)
                finally:
                    os.lseek(descriptor, position, os.SEEK_SET)

    def _make_like(self, descriptor: int, like: str) -> None:
        """Files get their rights from the directory there."""


LOCAL: FileSystem = WindowsFileSystem() if sys.platform == "win32" else FileSystem()
"""The file system of this platform."""


def place(path: str) -> str:
    """A short name for a path on this host, always the same (16 hexadecimal digits)."""
    return hashlib.sha256(f"{platform.node()}:{path}".encode("utf-8", "surrogateescape")).hexdigest()[:16]


def unused_name(path: str, suffix: str) -> str:
    """A name beside ``path`` that is not taken, to keep a file aside under."""
    return f"{path}.{suffix}-{os.urandom(6).hex()}"


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
    descriptor = os.open(path, os.O_RDONLY | _DIRECTORY | _CLOSE_ON_EXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


# On POSIX rename() replaces, on Windows it refuses to.
_rename_over = os.replace if sys.platform == "win32" else os.rename


def _give_to(descriptor: int, owner: os.stat_result) -> None:
    """Give a file the owner and group of another, if permitted."""
    try:
        # A command run once as root must not lock the service out. Other users may not give files away.
        os.fchown(descriptor, owner.st_uid, owner.st_gid)
    except OSError as error:
        # EINVAL: in a user namespace (user_namespaces(7)) an owner that it does not know has no number there.
        if error.errno not in (errno.EPERM, errno.EACCES, errno.EINVAL):
            raise


def _is_open_directory(descriptor: int) -> bool:
    try:
        return stat.S_ISDIR(os.fstat(descriptor).st_mode)
    except OSError:
        return False
