"""The behaviour of ext4 and XFS after a power loss and on a full disk. The store's promises depend on these facts."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import pytest

from tests.crash.lab import FILESYSTEMS, Disk, ThinDisk, drop_caches, mounted, pooled

pytestmark = pytest.mark.needs("linux", "root", "mount", "xfsprogs", "e2fsprogs")

BLOCK = 64 * 1024
PAGE = 4096


@pytest.mark.parametrize("filesystem", FILESYSTEMS)
@pytest.mark.parametrize(("sync_directory", "comes_back"), [(False, b"old"), (True, b"new")])
def test_a_power_loss_undoes_a_rename_unless_the_directory_was_synced(
    tmp_path: Path, filesystem: str, sync_directory: bool, comes_back: bytes
) -> None:
    with mounted(Disk(filesystem, tmp_path)) as disk:
        document, temporary = disk.mountpoint / "document", disk.mountpoint / "temporary"
        write(document, b"old", sync=True)
        sync(disk.mountpoint)
        write(temporary, b"new", sync=True)
        temporary.replace(document)
        if sync_directory:
            sync(disk.mountpoint)
        assert document.read_bytes() == b"new"
        disk.lose_power()
        disk.unmount()
        disk.mount()
        assert document.read_bytes() == comes_back


@pytest.mark.parametrize("filesystem", FILESYSTEMS)
def test_a_power_loss_empties_a_file_whose_data_was_not_synced(tmp_path: Path, filesystem: str) -> None:
    with mounted(Disk(filesystem, tmp_path)) as disk:
        document, temporary = disk.mountpoint / "document", disk.mountpoint / "temporary"
        write(temporary, b"new", sync=False)
        temporary.replace(document)
        sync(disk.mountpoint)
        disk.lose_power()
        disk.unmount()
        disk.mount()
        assert document.read_bytes() == b""


@pytest.mark.parametrize(("filesystem", "says"), [("ext4", errno.EIO), ("xfs", 0)])
def test_a_filesystem_that_has_shut_down_may_still_sync_an_open_directory(
    tmp_path: Path, filesystem: str, says: int
) -> None:
    with mounted(Disk(filesystem, tmp_path)) as disk:
        document = disk.mountpoint / "document"
        write(document, b"whole", sync=True)
        descriptor = os.open(disk.mountpoint, os.O_RDONLY)
        try:
            disk.lose_power()
            assert [outcome(lambda: os.fsync(descriptor)) for _ in range(2)] == [says, says]
        finally:
            os.close(descriptor)
        # Opening a file fails on both after a shutdown. Therefore a save ends with opening the document.
        with pytest.raises(OSError, match="Input/output error"):
            os.open(document, os.O_RDONLY)


@pytest.mark.parametrize(
    ("filesystem", "first_error", "new_file"),
    [
        # Which of the two it is depends on whether the data or the journal needs room first.
        ("ext4", {errno.ENOSPC, errno.EIO}, errno.EROFS),
        ("xfs", {errno.ENOSPC}, 0),
    ],
)
def test_a_sync_fails_once_then_succeeds_and_the_data_is_gone(
    tmp_path: Path, filesystem: str, first_error: set[int], new_file: int
) -> None:
    with pooled(tmp_path) as pool, mounted(ThinDisk(filesystem, pool.path)) as disk:
        file = disk.mountpoint / "file"
        write(file, b"", sync=True)
        os.sync()
        pool.leave_no_room()
        data = os.urandom(BLOCK)
        descriptor = os.open(file, os.O_RDWR)
        try:
            os.pwrite(descriptor, data, 0)
            first, *later = [outcome(lambda: os.fsync(descriptor)) for _ in range(3)]
            assert first in first_error
            assert later[-1] == 0, "a later sync admits that the data is not there"
            assert os.pread(descriptor, BLOCK, 0) == data
        finally:
            os.close(descriptor)
        drop_caches()
        assert file.read_bytes() != data
        # ext4 has aborted, and new operations fail; XFS continues without an error.
        assert outcome((disk.mountpoint / "another").touch) == new_file


@pytest.mark.parametrize("filesystem", FILESYSTEMS)
@pytest.mark.parametrize("content", [b"", bytes(BLOCK)], ids=["append", "into-zeros"])
def test_direct_synchronous_write_survives(tmp_path: Path, filesystem: str, content: bytes) -> None:
    with mounted(Disk(filesystem, tmp_path)) as disk:
        file = disk.mountpoint / "segment"
        write(file, content, sync=True)
        sync(disk.mountpoint)
        with opened(file, os.O_WRONLY | os.O_DIRECT | os.O_DSYNC) as descriptor:
            for number in range(4):
                os.pwritev(descriptor, [page_of(number + 1)], number * PAGE)
            disk.lose_power()
        disk.unmount()
        disk.mount()
        assert [file.read_bytes()[number * PAGE] for number in range(4)] == [1, 2, 3, 4]


@pytest.mark.parametrize("filesystem", FILESYSTEMS)
def test_direct_write_alone_is_lost(tmp_path: Path, filesystem: str) -> None:
    """Without ``O_DSYNC``: what the file system knows of the blocks is not on the disk."""
    with mounted(Disk(filesystem, tmp_path)) as disk:
        file = disk.mountpoint / "segment"
        write(file, b"", sync=True)
        sync(disk.mountpoint)
        with opened(file, os.O_WRONLY | os.O_DIRECT) as descriptor:
            os.pwritev(descriptor, [page_of(1)], 0)
            disk.lose_power()
        disk.unmount()
        disk.mount()
        assert file.read_bytes() == b""


@pytest.mark.parametrize("filesystem", FILESYSTEMS)
def test_buffered_reads_are_coherent(tmp_path: Path, filesystem: str) -> None:
    """A buffered read sees each direct write that has returned, and none of them disappears again."""
    with mounted(Disk(filesystem, tmp_path)) as disk:
        file = disk.mountpoint / "segment"
        write(file, bytes(BLOCK), sync=True)
        ended, seen = Event(), list[int]()

        def read_on(descriptor: int) -> None:
            while not ended.is_set():
                seen.append(number_in(os.pread(descriptor, PAGE, 0)))

        with opened(file, os.O_WRONLY | os.O_DIRECT | os.O_DSYNC) as writer, opened(file, os.O_RDONLY) as reader:
            thread = Thread(target=read_on, args=(reader,))
            thread.start()
            try:
                for number in range(1, 301):
                    os.pwritev(writer, [page_of(number)], 0)
                    assert number_in(os.pread(reader, PAGE, 0)) == number
            finally:
                ended.set()
                thread.join()
        assert seen == sorted(seen)


def page_of(number: int) -> memoryview:
    """An aligned page full of a number."""
    page = mmap.mmap(-1, PAGE)
    page[:] = number.to_bytes(2, "little") * (PAGE // 2)
    return memoryview(page)


def number_in(page: bytes) -> int:
    """The number in the first place of a page."""
    return int.from_bytes(page[:2], "little")


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def write(path: Path, data: bytes, *, sync: bool) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        if sync:
            os.fsync(file.fileno())


def sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def outcome(call: Callable[[], object]) -> int:
    """The errno of a call, 0 for success."""
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0
