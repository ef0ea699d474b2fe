"""File systems on which some of the lab's processes work: slow ones, broken ones, and ones that kill their process."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from typing import Any

from savings_exporter.storage.filesystem import FileSystem
from tests.crash.ledger import Ledger

LONGEST_SYNC_SECONDS = 0.01
"""The maximum time of a sync on a slow disk, in seconds."""

_CHANGES = (
    *("create", "write_all", "write_zeros", "write_at", "write_direct", "fsync_file", "sync_data", "fsync_directory"),
    *("replace", "keep_copy", "unlink", "discard"),
)
_COUNTED_FROM = ("replace", "keep_copy", "write_at")
_MOST_STEPS = 200


class _Broken(FileSystem):
    """Direct writes do not sync, so that a subclass decides when to sync."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def _open_buffered(self, path: str) -> int:
        return os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)


class NoDirectoryFsync(_Broken):
    """Directories are not synced."""

    def fsync_directory(self, path: str) -> None:
        pass


class NoDataSync(_Broken):
    """Data is not synced."""

    def open_direct(self, path: str) -> int:
        return self._open_buffered(path)

    def fsync_file(self, descriptor: int) -> None:
        pass

    def sync_data(self, descriptor: int) -> None:
        pass


class _SyncsApart(_Broken):
    """Direct writes are two steps, a write and a sync."""

    def open_direct(self, path: str) -> int:
        return self._open_buffered(path)

    def write_direct(self, descriptor: int, data: memoryview, offset: int) -> None:
        super().write_direct(descriptor, data, offset)
        self.sync_data(descriptor)


class SlowSyncs(_SyncsApart):
    """Written data is visible to other processes, but becomes durable only after a delay."""

    def fsync_file(self, descriptor: int) -> None:
        _wait()
        super().fsync_file(descriptor)

    def sync_data(self, descriptor: int) -> None:
        _wait()
        super().sync_data(descriptor)

    def fsync_directory(self, path: str) -> None:
        _wait()
        super().fsync_directory(path)


class SyncAgain(_SyncsApart):
    """A second sync is trusted after the first sync of the file failed."""

    def fsync_file(self, descriptor: int) -> None:
        self._twice(super().fsync_file, descriptor)

    def sync_data(self, descriptor: int) -> None:
        self._twice(super().sync_data, descriptor)

    def _twice(self, sync: Callable[[int], None], descriptor: int) -> None:
        try:
            sync(descriptor)
        except OSError:
            self.ledger.failed()
            sync(descriptor)


class TornWrite(_Broken):
    """At some write, only part of the bytes is written, and the process is killed by SIGKILL."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(ledger)
        self._life = random.randint(1, 20)

    def write_all(self, descriptor: int, data: bytes | memoryview) -> None:
        self._tear(descriptor, data, None)
        super().write_all(descriptor, data)

    def write_at(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        self._tear(descriptor, data, offset)
        super().write_at(descriptor, data, offset)

    def write_direct(self, descriptor: int, data: memoryview, offset: int) -> None:
        self._tear(descriptor, data, offset)
        super().write_direct(descriptor, data, offset)

    def _tear(self, descriptor: int, data: bytes | memoryview, offset: int | None) -> None:
        self._life -= 1
        if self._life > 0 or len(data) < 2:
            return
        # Uses another descriptor, because a direct write can only write whole blocks.
        buffered = os.open(os.readlink(f"/proc/self/fd/{descriptor}"), os.O_WRONLY)
        place = os.lseek(descriptor, 0, os.SEEK_CUR) if offset is None else offset
        self.ledger.torn(os.pwrite(buffered, data[: random.randrange(1, len(data))], place))
        os.kill(os.getpid(), signal.SIGKILL)


class SuddenDeath(_Broken):
    """The process ends by SIGKILL right after some step that changes a file: what would have come next never does.

    Which one is counted from the first step of some kind, because those that matter most are rare; a process that does
    not come to that step dies, too.
    """

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(ledger)
        self._first, self._life = random.choice(_COUNTED_FROM), random.randint(1, 10)
        self._steps = 0
        self._is_dying = False

    def step_done(self, name: str) -> None:
        """A step has ended."""
        self._steps += 1
        self._is_dying = self._is_dying or name == self._first or self._steps == _MOST_STEPS
        self._life -= self._is_dying
        if self._life == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def _deadly(name: str) -> Callable[..., Any]:
    step = getattr(FileSystem, name)

    def die_after(self: SuddenDeath, *arguments: Any, **options: Any) -> Any:
        result = step(self, *arguments, **options)
        self.step_done(name)
        return result

    return die_after


for _name in _CHANGES:
    setattr(SuddenDeath, _name, _deadly(_name))


def _wait() -> None:
    time.sleep(random.uniform(0, LONGEST_SYNC_SECONDS))


SABOTAGES: dict[str, type[_Broken]] = {
    "no directory fsync": NoDirectoryFsync,
    "no data sync": NoDataSync,
    "slow syncs": SlowSyncs,
    "sync again": SyncAgain,
    "torn write": TornWrite,
    "sudden death": SuddenDeath,
}


def filesystem(sabotage: str | None, ledger: Ledger) -> FileSystem:
    """The file system of a process."""
    return FileSystem() if sabotage is None else SABOTAGES[sabotage](ledger)
