"""The disk room's own functions: what filesystem a path is on, and files that are appended to at an offset."""

from __future__ import annotations

import errno
import os
import stat
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from savings_exporter.storage import filesystem
from savings_exporter.storage.filesystem import FilesystemType, Mount
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
def test_a_filesystem_and_its_mount_are_what_findmnt_says(tmp_path: Path) -> None:
    answer = subprocess.run(
        ["findmnt", "--noheadings", "--raw", "--output", "FSTYPE,TARGET,SOURCE", "--target", tmp_path],
        capture_output=True,
        text=True,
        check=True,
    )
    name, point, device = answer.stdout.split()
    assert filesystem.mount_of(str(tmp_path)) == Mount(point, name, device)
    known_as = {"ext2": "ext4", "ext3": "ext4", "overlay": "overlayfs"}.get(name, name)
    assert filesystem.filesystem_type(str(tmp_path)).name == known_as


@pytest.mark.needs("mount")
@pytest.mark.parametrize("name", ["tmpfs", "ramfs"])
def test_a_mounted_filesystem_is_told_from_what_lies_below_it(tmp_path: Path, name: str) -> None:
    mountpoint = tmp_path / "a disk with \\ in its name"
    below = filesystem.mount_of(str(tmp_path))
    with mounted(mountpoint, name), mounted(mountpoint, name, source="the upper one"):
        (mountpoint / "directory").mkdir()
        assert filesystem.mount_of(str(mountpoint / "directory")) == Mount(str(mountpoint), name, "the upper one")
        assert filesystem.filesystem_type(str(mountpoint)) == FilesystemType(name, is_network=False)
    assert filesystem.mount_of(str(mountpoint)) == below


@pytest.mark.needs("fuse")
@pytest.mark.parametrize(("subtype", "is_network"), [("sshfs", True), ("glusterfs", True), ("bindfs", False)])
def test_fuse_is_a_network_filesystem_by_its_subtype(tmp_path: Path, subtype: str, is_network: bool) -> None:
    with fuse(tmp_path, subtype):
        assert filesystem.filesystem_type(str(tmp_path)) == FilesystemType(f"fuse.{subtype}", is_network)
        assert filesystem.mount_of(str(tmp_path)) == Mount(str(tmp_path), f"fuse.{subtype}", "example.org:/data")


def test_what_is_not_there_has_no_filesystem(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    for ask in (filesystem.filesystem_type, filesystem.mount_of):
        with pytest.raises(FileNotFoundError) as raised:
            ask(missing)
        assert raised.value.filename == missing


@pytest.mark.parametrize("size", [0, 1, 4096, 1_000_001])
def test_a_zero_filled_file_has_its_size_and_is_for_its_owner_only(tmp_path: Path, size: int) -> None:
    path = tmp_path / "zeros"
    descriptor = filesystem.create_zero_filled(str(path), size)
    try:
        assert path.read_bytes() == bytes(size)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert not os.get_inheritable(descriptor)
        filesystem.append_at(descriptor, b"frame", size)
        filesystem.sync_data(descriptor)
        assert filesystem.read_at(descriptor, 100, size) == b"frame"
    finally:
        filesystem.close(descriptor)


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("elsewhere")])
def test_a_zero_filled_file_never_takes_anothers_place(tmp_path: Path, make: Callable[[Path], object]) -> None:
    path = tmp_path / "zeros"
    make(path)
    with pytest.raises(FileExistsError):
        filesystem.create_zero_filled(str(path), 4096)
    assert [entry.name for entry in tmp_path.iterdir()] == ["zeros"]


@pytest.mark.needs("mount")
def test_a_zero_filled_file_that_does_not_fit_is_removed(tmp_path: Path) -> None:
    with mounted(tmp_path, "tmpfs", options="size=256k"):
        open_before = os.listdir("/proc/self/fd")
        with pytest.raises(OSError, match="No space left"):
            filesystem.create_zero_filled(str(tmp_path / "zeros"), 1024 * 1024)
        assert list(tmp_path.iterdir()) == []
        assert len(os.listdir("/proc/self/fd")) == len(open_before)


def test_a_write_in_pieces_is_whole_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_pwrite, whole_pread = os.pwrite, os.pread
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: whole_pwrite(descriptor, data[:3], offset))
    monkeypatch.setattr(os, "pread", lambda descriptor, size, offset: whole_pread(descriptor, min(size, 2), offset))
    descriptor = filesystem.create_zero_filled(str(tmp_path / "zeros"), 20)
    try:
        filesystem.append_at(descriptor, b"0123456789", 5)
        assert filesystem.read_at(descriptor, 12, 4) == b"\x000123456789\x00"
        assert filesystem.read_at(descriptor, 100, 14) == b"9\x00\x00\x00\x00\x00"
    finally:
        filesystem.close(descriptor)


def test_a_write_that_gets_nowhere_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    descriptor = filesystem.create_zero_filled(str(tmp_path / "zeros"), 20)
    try:
        monkeypatch.setattr(os, "pwrite", lambda *_: 0)
        with pytest.raises(OSError, match="Nothing was written") as raised:
            filesystem.append_at(descriptor, b"data", 0)
        assert raised.value.errno == errno.EIO
    finally:
        filesystem.close(descriptor)
