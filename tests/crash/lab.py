"""The crash lab: power losses, killed writers, and the checks after the store is opened again.

A power loss is the shutdown ioctl of ext4 and XFS with the log not flushed: what the filesystem had not written to
its device is lost, and every call fails until it is mounted again. This does not model a drive that loses data after a
flush.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import re
import signal
import struct
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple, TypeVar

from savings_exporter import SavingsCollector, SavingsTracker, Snapshot, StoreError, Totals
from savings_exporter.storage.segment import SyncMethod
from tests.crash import writers
from tests.crash.ledger import Account, size_of
from tests.support.scrape import samples
from tests.support.service import run_cli
from tests.support.wait import WAIT_SECONDS, eventually

LONG = os.environ.get("CRASH_LAB") == "long"

FILESYSTEMS = ("ext4", "xfs")

METHODS: tuple[SyncMethod, ...] = ("direct", "fdatasync")
"""The sync methods of the journal. Every experiment runs with both."""

# ext4 flushes a file that is about to replace another by itself. Other filesystems do not, and no promise rests on it.
_MOUNT_OPTIONS = {"ext4": "loop,noauto_da_alloc", "xfs": "loop"}
_MAKE = {"ext4": ["mkfs.ext4", "-q", "-b", "4096"], "xfs": ["mkfs.xfs", "-q"]}
_IMAGE_BYTES = 320 * 1024 * 1024  # XFS needs at least 300 MiB

_SHUTDOWN = 0x8004587D
_DONT_FLUSH_THE_LOG = struct.pack("I", 2)

# Processes are forked from one that has imported the package already and has no threads.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.crash.writers", "savings_exporter"])


_SEGMENT = re.compile(r".*\.journal\.[0-9a-f]{16}\.\d{8}")
_WRITER = re.compile(r".*\.writer\.[0-9a-f]{16}")
_MOST_TORN_TAILS = 10


class LostError(AssertionError):
    """The store does not contain all acknowledged records."""


@dataclass
class Figures:
    """The results of one experiment, over all its rounds."""

    crashes: int = 0
    attempted: int = 0
    acknowledged: int = 0
    recovered: int = 0
    lost: int = 0
    duplicates: int = 0
    torn_frames: int = 0
    faults_injected: int = 0
    bytes_damaged: int = 0


RESULTS: dict[str, Figures] = {}
"""The figures of every experiment in this run, by name."""


def reported(experiment: str) -> Figures:
    """The figures of an experiment, which are printed at the end of the run."""
    return RESULTS.setdefault(experiment, Figures())


def rounds(short: int, long: int) -> int:
    """The number of rounds of an experiment. The short form is part of every run; the long form is ``make crash``."""
    return long if LONG else short


class Disk:
    """An image of a filesystem, mounted over a loop device."""

    def __init__(self, filesystem: str, directory: Path) -> None:
        self.mountpoint = directory / "disk"
        self.is_mounted = False
        self._image = directory / "image"
        self._options = _MOUNT_OPTIONS[filesystem]
        with self._image.open("wb") as file:
            file.truncate(_IMAGE_BYTES)
        subprocess.run([*_MAKE[filesystem], self._image], check=True)
        self.mountpoint.mkdir()

    def mount(self) -> None:
        """Mount it, replaying the log after a power loss."""
        subprocess.run(["mount", "-o", self._options, self._image, self.mountpoint], check=True)
        self.is_mounted = True

    def unmount(self) -> None:
        """Unmount it as soon as it is not in use; this also removes its loop device."""
        unmount(self.mountpoint)
        self.is_mounted = False

    def lose_power(self) -> None:
        """Discard all data that is not on the device, and fail every later call."""
        descriptor = os.open(self.mountpoint, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(descriptor, _SHUTDOWN, _DONT_FLUSH_THE_LOG)
        finally:
            os.close(descriptor)


class ThinDisk(Disk):
    """A disk that allocates space when blocks are written, and frees it when it is trimmed.

    Its device is written page by page: the loop driver of Linux 6.18 says that a request was written when there was
    room for a part of it only. No filesystem notices that, so nothing above one can.
    """

    def mount(self) -> None:
        """Mount it."""
        super().mount()
        device = self.mountpoint.stat().st_dev
        self._request_size = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/queue/max_sectors_kb")
        self._usual_size = self._request_size.read_text()
        self._request_size.write_text("4")

    def unmount(self) -> None:
        """Unmount it, and keep its loop device."""
        super().unmount()
        self._request_size.write_text(self._usual_size)

    def trim(self) -> None:
        """Free the space of removed files. A disk that has already failed frees nothing."""
        subprocess.run(["fstrim", self.mountpoint], check=False, capture_output=True)


AnyDisk = TypeVar("AnyDisk", bound=Disk)


class Pool:
    """A tmpfs that contains thin disks. When it has no space left, their devices fail."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={2 * _IMAGE_BYTES}", "crash-lab", path], check=True)

    def leave_no_room(self) -> None:
        """Use up all space that is left."""
        # Other processes write at the same time, so the used space may grow at any moment.
        eventually(lambda: self._resize(self._used()), "the pool to be as small as what is in it")

    def enlarge(self) -> None:
        """Provide enough space for all data that the file systems can store."""
        assert self._resize(2 * _IMAGE_BYTES)

    def _used(self) -> int:
        status = os.statvfs(self.path)
        return (status.f_blocks - status.f_bfree) * status.f_frsize

    def _resize(self, size: int) -> bool:
        resized = subprocess.run(["mount", "-o", f"remount,size={size}", self.path], check=False, capture_output=True)
        return resized.returncode == 0


def drop_caches() -> None:
    """Drop the kernel's cached contents of the disks."""
    Path("/proc/sys/vm/drop_caches").write_text("3")


def unmount(mountpoint: Path) -> None:
    """Unmount the file system there as soon as it is not in use."""
    eventually(
        lambda: subprocess.run(["umount", mountpoint], check=False, capture_output=True).returncode == 0,
        f"the end of those who use {mountpoint}",
    )


@contextmanager
def mounted(disk: AnyDisk) -> Iterator[AnyDisk]:
    """Mount a disk, and unmount it at the end in every case."""
    try:
        disk.mount()
        yield disk
    finally:
        if disk.is_mounted:
            disk.unmount()


@contextmanager
def pooled(directory: Path) -> Iterator[Pool]:
    """A new pool in a directory, unmounted at the end. Its disks must have been removed before."""
    pool = Pool(directory / "pool")
    try:
        yield pool
    finally:
        unmount(pool.path)


class Running(NamedTuple):
    """A process of the lab. The other end of ``alive`` is closed when the process and all its children have ended."""

    process: BaseProcess
    alive: Connection

    def kill(self) -> None:
        """Kill it and its children, and wait until they have ended."""
        self.process.kill()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.join()
        self.await_end()

    def await_end(self) -> None:
        """Wait until it and its children have ended."""
        assert self.alive.poll(WAIT_SECONDS), "a process of the lab does not end"
        with suppress(EOFError):
            self.alive.recv()
        self.alive.close()


class Lab:
    """A store, the processes that record in it, and the accounts of the answers that they got.

    ``outside`` is a directory on a disk that is not in the experiment. At the end of a ``with`` no process is left.
    """

    def __init__(self, store: Path, outside: Path, figures: Figures, method: SyncMethod = "auto") -> None:
        self.store = store
        self.figures = figures
        self.accounts: dict[str, Account] = {}
        self.running: dict[str, Running] = {}
        self._method = method
        self._streams: dict[str, list[Account]] = {}
        self._outside = outside
        self._counted = Counter[str]()
        self._torn_frames = 0
        outside.mkdir(exist_ok=True)

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_exception: object) -> None:
        for name in tuple(self.running):
            self.running.pop(name).kill()

    def account(self, name: str, *, sizes: tuple[int, ...] = (1,), keyed: bool = True) -> Account:
        """The account of a stream, opened at its first use."""
        return self.accounts.setdefault(name, Account(self._outside / name, sizes=sizes, keyed=keyed))

    def start(self, name: str, kind: str, sabotage: str | None = None) -> None:
        """Start a process that continues the streams of the previous process with this name."""
        streams = writers.STREAMS.get(kind, 1)
        names = [f"{name}-{n}" for n in range(streams)] if streams > 1 else [name]
        sizes = writers.BATCHES if kind == "batches" else (1,)
        accounts = [self.account(stream, sizes=sizes) for stream in names]
        for account in accounts:
            account.read()
        self._streams[name] = accounts
        told = [account.stream for account in accounts]
        alive, end = _processes.Pipe(duplex=False)
        with end:
            arguments = (kind, self.store, told, sabotage, self._method, end)
            process = _processes.Process(target=writers.run, args=arguments, daemon=True)
            process.start()
        self.running[name] = Running(process, alive)

    def goes_on(self) -> None:
        """Wait until every running process has received a new acknowledgement."""
        waiting = {name: self._told(name) for name in self.running}

        def all_went_on() -> bool:
            for name in [name for name, told in waiting.items() if self._told(name) > told]:
                del waiting[name]
            ended = [name for name in waiting if not self.running[name].process.is_alive()]
            assert not ended, f"ended by themselves: {ended}; {self._left_behind(writers.REFUSED)}"
            return not waiting

        try:
            eventually(all_went_on, "all writers to go on")
        except AssertionError as error:
            raise AssertionError(f"{error}: {sorted(waiting)} do not") from error

    def failures(self) -> int:
        """How often writers have met a failing disk so far."""
        return sum(self._noted(name, "failed") for name in self._streams)

    def _told(self, name: str) -> int:
        return self._noted(name, "acknowledged", "seen")

    def _noted(self, name: str, *notes: str) -> int:
        for account in self._streams[name]:
            account.read()
        return sum(account.notes[note] for account in self._streams[name] for note in notes)

    def kill(self, *names: str) -> None:
        """Kill these processes (all, if none is named), and check that they had not ended in another way."""
        for name in names or tuple(self.running):
            self.running.pop(name).kill()
        raised = self._left_behind(writers.RAISED)
        if "CorruptStoreError" in raised:
            self._read()
            self._count_streams({})
            raise LostError(f"a writer could not open the store: {raised}")
        assert not raised, f"a writer raised: {raised}"

    def _left_behind(self, suffix: str) -> str:
        """The files that processes left beside their ledgers when they ended by themselves."""
        return "\n".join(path.read_text() for path in sorted(self._outside.glob(f"*{suffix}")))

    def _read(self) -> None:
        for account in self.accounts.values():
            account.read()

    def check(self) -> Snapshot:
        """Open the store again, and check that nothing is lost, counted twice or left behind."""
        self._read()
        try:
            held = _records_in(self.store)
            with self._opened() as tracker:
                snapshot, metrics, health = tracker.snapshot(), samples(SavingsCollector(tracker)), tracker.health()
        except (ValueError, StoreError) as error:
            self._count_streams({})
            raise LostError(f"the store is not whole: {error}") from error
        assert health.healthy, health.reason
        torn_frames = int(metrics.get('savings_recoveries_total{kind="torn_tail"}', 0))
        self.figures.torn_frames += torn_frames - self._torn_frames
        self._torn_frames = torn_frames
        self._count_streams(snapshot.by_model)
        self._check_streams(snapshot.by_model)
        self._check_saves(held)
        self._check_claims()
        self._check_exports(snapshot)
        self._check_sums(snapshot)
        self._check_files(snapshot)
        for name, account in self.accounts.items():
            account.settle(_requests(snapshot.by_model, name))
        return snapshot

    def verify(self) -> None:
        """Check that ``savings-exporter verify`` finds no problem either."""
        verified = run_cli("verify", "--store", str(self.store))
        assert verified.returncode == 0, verified.stderr

    def _count_streams(self, by_model: Mapping[str, Totals]) -> None:
        """Add the results since the last check to the figures."""
        counted = Counter[str]()
        for name, account in self.accounts.items():
            recovered = _requests(by_model, name)
            counted["attempted"] += account.records["attempted"]
            counted["acknowledged"] += account.records["acknowledged"]
            counted["recovered"] += recovered
            counted["lost"] += max(account.least - recovered, 0)
            counted["duplicates"] += max(recovered - account.most, 0)
        for figure, value in counted.items():
            setattr(self.figures, figure, getattr(self.figures, figure) + value - self._counted[figure])
        self._counted = counted

    def _check_streams(self, by_model: Mapping[str, Totals]) -> None:
        """Acknowledged records are among the recovered, and those among the attempted ones. No batch is partial."""
        lost, wrong = [], []
        for name, account in self.accounts.items():
            recovered = _requests(by_model, name)
            says = f"{name}: {account.least} acknowledged, {recovered} recovered, {account.most} attempted"
            if recovered < account.least:
                lost.append(says)
            elif not account.allows(recovered):
                wrong.append(says)
        if lost:
            raise LostError("; ".join(lost))
        assert not wrong, "; ".join(wrong)

    def _check_saves(self, held: int) -> None:
        """Before any repair, the document contained at least the records that ``save`` had reported."""
        saved = max((account.saved for account in self.accounts.values()), default=0)
        if held < saved:
            self.figures.lost += saved - held
            raise LostError(f"a save of the document with {saved} records is gone; the one there has {held}")

    def _check_claims(self) -> None:
        """No two receipts name the same place in the store."""
        claims = sorted(
            (answer.writer, answer.sequence, size_of(answer.number, account.sizes), f"{name} {answer.number}")
            for name, account in self.accounts.items()
            for answer in account.answers
        )
        for (one_writer, before, _, one), (writer, sequence, size, other) in pairwise(claims):
            if writer == one_writer and sequence - size < before:
                self.figures.duplicates += 1
                raise AssertionError(f"{one} and {other} were both told that they are record {before} of {writer:016x}")

    def _check_exports(self, snapshot: Snapshot) -> None:
        """Totals that a reader saw are in the store, and never decreased."""
        for name, account in self.accounts.items():
            back = [(before, after) for before, after in pairwise(account.seen) if after < before]
            assert not back, f"the lifetime total that {name} showed went back: {back}"
            if account.seen and snapshot.lifetime.tokens_saved < account.seen[-1]:
                raise LostError(f"{account.seen[-1]} tokens were exported, {snapshot.lifetime.tokens_saved} are there")
            del account.seen[:-1]

    def _check_sums(self, snapshot: Snapshot) -> None:
        """Every record counts one token, and the total is the sum of the streams."""
        assert snapshot.by_model.keys() <= self.accounts.keys()
        assert all(totals.requests == totals.tokens_saved for totals in snapshot.by_model.values())
        requests = sum(totals.requests for totals in snapshot.by_model.values())
        assert requests == snapshot.lifetime.requests == snapshot.lifetime.tokens_saved == snapshot.sequence

    def _check_files(self, snapshot: Snapshot) -> None:
        """The document contains everything, and after two more saves no files of ended writers are left."""
        assert _records_in(self.store) == snapshot.sequence, "the document saved at the end lacks something"
        with self._opened() as tracker:
            # The first save records that a writer has ended; after the second save, both documents contain this.
            assert tracker.save()
            assert tracker.save()
            again = tracker.snapshot().lifetime
            assert again == snapshot.lifetime, f"opened again: {again}, not {snapshot.lifetime}"
        for document in (self.store, self.store.with_name(f"{self.store.name}.previous")):
            assert _records_in(document) == snapshot.sequence, f"{document.name} lacks something"
        names = [entry.name for entry in self.store.parent.iterdir()]
        left = [name for name in names if name.endswith(".tmp") or _SEGMENT.fullmatch(name)]
        assert not left, f"stayed, though all writers have ended: {left}"
        assert sum(1 for name in names if _WRITER.fullmatch(name)) <= 1, f"writers that have ended stayed: {names}"
        assert sum(1 for name in names if ".torn-" in name) <= _MOST_TORN_TAILS

    def _opened(self) -> SavingsTracker:
        return SavingsTracker(self.store, sync_method=self._method)


def _requests(by_model: Mapping[str, Totals], name: str) -> int:
    return by_model[name].requests if name in by_model else 0


def _records_in(document: Path) -> int:
    """The number of records in a document, for a reader that only knows JSON; 0 if there is no document yet."""
    if not document.exists():
        return 0
    # An incomplete document raises ValueError.
    records: int = json.loads(document.read_bytes())["lifetime"]["requests"]
    return records
