"""The file system object: what file system a path is on, and its steps one by one."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from savings_exporter.storage import mounts
from savings_exporter.storage.filesystem import LOCAL, FileSystem
from savings_exporter.storage.mounts import FilesystemType, Mount
from tests.support.mounts import mounted

_FUSE_INIT, _FUSE_STATFS = 26, 17


@contextmanager
def fuse(mountpoint: Path, subtype: str) -> Iterator[None]:
    """A FUSE filesystem that answers nothing but what ``statfs`` needs."""
    descriptor = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={descriptor},rootmode=40000,user_id=0,group_id=0"
    command = ["mount", "--internal-only", "-t", f"fuse.{subtype}", "-o", options, "example.org:/data", str(mountpoint)]
    answering = threading.Thread(target=_answer_kernel, args=(descriptor,))
    try:
        subprocess.run(command, pass_fds=[descriptor], check=True)
        try:
            answering.start()
            yield
        finally:
            subprocess.run(["umount", "--lazy", mountpoint], check=True)
            answering.join()
    finally:
        os.close(descriptor)


def _answer_kernel(descriptor: int) -> None:
    """Answer requests until the filesystem is unmounted, which ENODEV says (fuse(4))."""
    answers = {
        _FUSE_INIT: struct.pack("=IIIIHHIIHH8I", 7, 31, 0, 0, 0, 0, 4096, 1, 0, 0, *[0] * 8),
        _FUSE_STATFS: struct.pack("=5Q10I", *[0] * 5, 4096, 255, 4096, *[0] * 7),
    }
    with suppress(OSError):
        while True:
            _, opcode, unique = struct.unpack_from("=IIQ", os.read(descriptor, 1 << 17))
            answer = answers.get(opcode)
            error, body = (0, answer) if answer is not None else (-errno.ENOSYS, b"")
            os.write(descriptor, struct.pack("=IiQ", 16 + len(body), error, unique) + body)


@pytest.mark.needs("linux")
def test_mount_is_what_findmnt_says(tmp_path: Path) -> None:
    answer = subprocess.run(
        ["findmnt", "--noheadings", "--raw", "--output", "FSTYPE,TARGET,SOURCE", "--target", tmp_path],
        capture_output=True,
        text=True,
        check=True,
    )
    name, point, device = answer.stdout.split()
    assert mounts.mount_of(str(tmp_path)) == Mount(point, name, device)
    known_as = {"ext2": "ext4", "ext3": "ext4", "overlay": "overlayfs"}.get(name, name)
    assert mounts.filesystem_type(str(tmp_path)).name == known_as


@pytest.mark.needs("mount")
@pytest.mark.parametrize("name", ["tmpfs", "ramfs"])
def test_upper_of_two_mounts(tmp_path: Path, name: str) -> None:
    mountpoint = tmp_path / "a disk with \\ in its name"
    below = mounts.mount_of(str(tmp_path))
    with mounted(mountpoint, name), mounted(mountpoint, name, source="the upper one"):
        (mountpoint / "directory").mkdir()
        assert mounts.mount_of(str(mountpoint / "directory")) == Mount(str(mountpoint), name, "the upper one")
        assert mounts.filesystem_type(str(mountpoint)) == FilesystemType(name, is_network=False)
    assert mounts.mount_of(str(mountpoint)) == below


@pytest.mark.needs("fuse")
@pytest.mark.parametrize(("subtype", "is_network"), [("sshfs", True), ("glusterfs", True), ("bindfs", False)])
def test_fuse_by_its_subtype(tmp_path: Path, subtype: str, is_network: bool) -> None:
    with fuse(tmp_path, subtype):
        assert mounts.filesystem_type(str(tmp_path)) == FilesystemType(f"fuse.{subtype}", is_network)
        assert mounts.mount_of(str(tmp_path)) == Mount(str(tmp_path), f"fuse.{subtype}", "example.org:/data")


def test_missing_path_has_no_mount(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    for ask in (mounts.filesystem_type, mounts.mount_of):
        with pytest.raises(FileNotFoundError) as raised:
            ask(missing)
        assert raised.value.filename == missing


@pytest.mark.parametrize("size", [0, 1, 4096, 1_000_001])
def test_file_of_zeros(tmp_path: Path, size: int) -> None:
    path = tmp_path / "zeros"
    with created(path) as descriptor:
        LOCAL.write_zeros(descriptor, size)
        assert path.read_bytes() == bytes(size)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert not os.get_inheritable(descriptor)
        LOCAL.write_at(descriptor, b"frame", size)
        LOCAL.sync_data(descriptor)
        assert LOCAL.read_at(descriptor, 100, size) == b"frame"


@contextmanager
def created(path: Path, fs: FileSystem = LOCAL) -> Iterator[int]:
    """A new file, open."""
    descriptor = fs.create(str(path), like=str(path))
    try:
        yield descriptor
    finally:
        fs.close(descriptor)


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("elsewhere")], ids=["file", "symlink"])
def test_create_replaces_nothing(tmp_path: Path, make: Callable[[Path], object]) -> None:
    path = tmp_path / "taken"
    make(path)
    with pytest.raises(FileExistsError):
        LOCAL.create(str(path), like=str(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]


class CannotCopyRights(FileSystem):
    def _make_like(self, descriptor: int, like: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_create_that_fails_leaves_nothing(tmp_path: Path) -> None:
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="Input/output error"):
        CannotCopyRights().create(str(tmp_path / "file"), like=str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == open_before


@pytest.mark.needs("mount")
def test_write_new_on_a_full_disk(tmp_path: Path) -> None:
    with mounted(tmp_path, "tmpfs", options="size=256k"):
        open_before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(OSError, match="No space left"):
            LOCAL.write_new(str(tmp_path / "file"), bytes(1024 * 1024), like=str(tmp_path / "file"))
        assert list(tmp_path.iterdir()) == []
        assert len(os.listdir("/proc/self/fd")) == open_before


class InPieces(FileSystem):
    """Writes three bytes at a time and reads two; ``is_stuck``: writes nothing."""

    is_stuck = False

    def _pwrite(self, descriptor: int, data: bytes | memoryview, offset: int) -> int:
        return 0 if self.is_stuck else super()._pwrite(descriptor, data[:3], offset)

    def _pread(self, descriptor: int, size: int, offset: int) -> bytes:
        return super()._pread(descriptor, min(size, 2), offset)


def test_reads_and_writes_in_pieces(tmp_path: Path) -> None:
    fs = InPieces()
    with created(tmp_path / "file", fs) as descriptor:
        fs.write_zeros(descriptor, 20)
        fs.write_at(descriptor, b"0123456789", 5)
        assert fs.read_at(descriptor, 12, 4) == b"\x000123456789\x00"
        assert fs.read_at(descriptor, 100, 14) == b"9\x00\x00\x00\x00\x00"


def test_write_that_gets_nowhere(tmp_path: Path) -> None:
    fs = InPieces()
    with created(tmp_path / "file", fs) as descriptor:
        fs.is_stuck = True
        with pytest.raises(OSError, match="Nothing was written") as raised:
            fs.write_at(descriptor, b"data", 0)
        assert raised.value.errno == errno.EIO


@pytest.mark.needs("direct-io")
def test_direct_write_reads_back(tmp_path: Path) -> None:
    with created(tmp_path / "file") as descriptor:
        LOCAL.write_zeros(descriptor, 8192)
        direct = LOCAL.open_direct(str(tmp_path / "file"))
        buffer = memoryview(mmap.mmap(-1, 4096))
        buffer[:] = b"x" * 4096
        LOCAL.write_direct(direct, buffer, 4096)
        LOCAL.close(direct)
        assert LOCAL.read_at(descriptor, 8192, 0) == bytes(4096) + b"x" * 4096


@pytest.mark.parametrize("has_links", [True, False])
def test_keep_copy(tmp_path: Path, has_links: bool) -> None:
    fs = FileSystem() if has_links else WithoutLinks()
    path, kept = tmp_path / "file", tmp_path / "kept"
    path.write_bytes(b"one")
    fs.keep_copy(str(path), str(kept))
    fs.keep_copy(str(path), str(kept))
    assert (path.read_bytes(), kept.read_bytes()) == (b"one", b"one")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "kept"]
    assert path.samefile(kept) == has_links


class WithoutLinks(FileSystem):
    def link(self, path: str, new: str) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def test_locks_are_the_open_files(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    one, two = (LOCAL.open_lock(path, like=path) for _ in range(2))
    try:
        assert LOCAL.try_lock(one)
        assert not LOCAL.try_lock(two)
        assert not LOCAL.try_lock(two, shared=True)
        LOCAL.unlock(one)
        assert LOCAL.try_lock(two, shared=True)
        assert LOCAL.try_lock(one, shared=True)
    finally:
        LOCAL.close(one)
        LOCAL.close(two)
