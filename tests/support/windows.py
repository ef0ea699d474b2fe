"""Make the interpreter imitate Windows for later imports: ``python -c "import tests.support.windows; ..."``.

``os`` has no ``pread``, no ``pwrite``, no ``fdatasync``, no ``fork`` and no flags of POSIX; directories cannot be
opened; files that are open cannot be renamed, replaced or removed; there is ``msvcrt`` and no ``fcntl``. A byte that
``msvcrt.locking`` has locked cannot be read through another descriptor. Only what this package does is imitated.
"""

# The modules that the package's dependencies import must see the real platform.
import asyncio  # noqa: F401
import errno
import importlib.metadata  # noqa: F401
import multiprocessing.util  # noqa: F401
import os
import sys
import types
from typing import Any, NoReturn

import msgspec.json  # noqa: F401
import opentelemetry.trace  # noqa: F401
import platformdirs  # noqa: F401
import prometheus_client  # noqa: F401

MISSING = (
    *("pread", "preadv", "pwrite", "pwritev", "fdatasync", "fchmod", "fchown", "fork", "register_at_fork", "geteuid"),
    *("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_DIRECTORY", "O_DIRECT", "O_DSYNC"),
)

_locked: dict[tuple[int, int, int], int] = {}
"""Device, inode and offset of each locked byte, and the descriptor that locked it."""

_real: dict[str, Any] = {name: getattr(os, name) for name in ("open", "read", "rename", "replace", "unlink", "close")}


def _is_open(path: Any) -> bool:
    """Whether a descriptor of this process refers to the file at a path."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return False
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        try:
            if os.path.samestat(os.fstat(descriptor), status):
                return True
        except OSError:
            continue
    return False


def _refuse(path: Any) -> NoReturn:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)


def _open(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
    if os.path.isdir(path):
        _refuse(path)
    descriptor: int = _real["open"](path, flags, mode, dir_fd=dir_fd)
    return descriptor


def _read(descriptor: int, size: int) -> bytes:
    status, start = os.fstat(descriptor), os.lseek(descriptor, 0, os.SEEK_CUR) if _is_file(descriptor) else 0
    for (device, inode, offset), owner in _locked.items():
        is_there = (device, inode) == (status.st_dev, status.st_ino) and start <= offset < start + size
        if is_there and owner != descriptor:
            _refuse(None)
    data: bytes = _real["read"](descriptor, size)
    return data


def _is_file(descriptor: int) -> bool:
    return os.path.isfile(f"/proc/self/fd/{descriptor}")


def _rename(path: Any, new: Any) -> None:
    if os.path.exists(new):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path, None, new)
    _replace(path, new)


def _replace(path: Any, new: Any) -> None:
    if _is_open(path) or _is_open(new):
        _refuse(path)
    _real["replace"](path, new)


def _unlink(path: Any) -> None:
    if _is_open(path):
        _refuse(path)
    _real["unlink"](path)


def _close(descriptor: int) -> None:
    for place in [place for place, owner in _locked.items() if owner == descriptor]:
        del _locked[place]
    _real["close"](descriptor)


def _locking(descriptor: int, mode: int, count: int) -> None:
    assert count == 1
    status = os.fstat(descriptor)
    place = status.st_dev, status.st_ino, os.lseek(descriptor, 0, os.SEEK_CUR)
    if mode == 0:
        if _locked.pop(place, None) != descriptor:
            _refuse(None)
    elif place in _locked:
        _refuse(None)
    else:
        _locked[place] = descriptor


for _name in MISSING:
    delattr(os, _name)
for _name in _real:
    setattr(os, _name, globals()[f"_{_name}"])
msvcrt = types.ModuleType("msvcrt")
vars(msvcrt).update(LK_UNLCK=0, LK_NBLCK=2, locking=_locking)
sys.modules["msvcrt"] = msvcrt
sys.modules["fcntl"] = None  # type: ignore[assignment]
sys.platform = "win32"
