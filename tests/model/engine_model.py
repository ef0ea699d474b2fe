#!/usr/bin/env python3
"""An executable specification of the store: each writer has its own journal and file, and all share one document.

The store keeps a lifetime total. Every writer (one open tracker in one process) appends frames to its own journal.
A save counts all journals in one document. This program models the protocol of the storage package, and everything
that a disk, a kernel or an operator may do to the store. It visits every reachable state.

    python3 -m tests.model.engine_model                the protocol: each configuration, its states, its violations
    python3 -m tests.model.engine_model --mutants      each rule removed in turn: a violation must be found
    python3 -m tests.model.engine_model --trace NAME   the shortest run to a violation, in a configuration or mutant
    python3 -m tests.model.engine_model --short        only the smaller configurations, which the tests search

What is modelled
----------------
* A file has two contents: the content that processes read now (the page cache), and the content after a power loss
  (the disk).
* A power loss can restore a removed segment. The segment may have lost its content.
* If a name was created, replaced or removed without a directory fsync, this change may or may not survive a power loss,
  independently for each name. After a failed directory fsync the outcome is unknown.
* A frame that was written but not synced may or may not survive. After a failed sync the frame may be lost, on the
  disk, or readable now and lost after a power loss (a second fsync then succeeds without writing anything).
* A writer's file is never synced. Its watermark belongs to one boot. After a power loss the journal counts up to its
  last valid frame, even if the file itself is lost.
* A process can be stopped (while the others continue) or killed between any two steps. A restarted process is a new
  writer. Locks end with their process. A process may also close: it saves, removes its segments and ends.

What is checked, in every state
-------------------------------
* lost       {document, journals} and {previous document, journals} both contain every acknowledged record: in the
             current state, and in every combination of contents that a power loss could leave.
* twice      no record, acknowledged or not, is counted twice in any of them. All attempts with one idempotency key
             are one record.
* gap        no such combination has a gap in a writer's sequence numbers: recovery would report it as damage.
* doubt      no journal ends before the position that a document stores for it: recovery could not determine whether
             records are lost.
* backwards  totals that a reader sees never decrease, not even across a kill or a power loss.
* reader     a reader that takes no lock returns totals that were correct at one instant between its start and its end,
             and does not report existing records as lost.

The model is bounded: two processes, two to four records, one or two frames per segment, one or two saves per process,
and the faults that a configuration names. Within these bounds the search is complete.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

# ----------------------------------------------------------------------------------------------------------------------
# The rules. The defaults are the protocol. Every other value removes one rule.
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rules:
    """The rules of the protocol."""

    # The watermark is written "after" the frame is durable | "before".
    watermark: str = "after"
    # After a failed sync the "same" frame goes to a new segment | "renumber": with new sequence numbers | "resync": the
    # same segment is synced again.
    retry: str = "same"
    # Frames of a dead writer above its watermark: "rewrite" them, then count them | "trust": count them as they are.
    adopt: str = "rewrite"
    # Only a writer whose lock is free is adopted.
    liveness: bool = True
    # The writer's file is locked before its first segment has a name.
    lock_first: bool = True
    # A new segment's name is durable before a frame in it is acknowledged.
    segment_fsync: bool = True
    # One save at a time.
    store_lock: bool = True
    # Dead writers are determined before anything is counted.
    dead_first: bool = True
    # A save stores for each writer up to which number its journal is counted.
    through: bool = True
    # A document stores a position to continue reading only for writers that may record more.
    place_of_living: bool = True
    # A save keeps the document that it replaces.
    previous: bool = True
    # A save at close gives the new document both names.
    both_at_close: bool = True
    # A segment is retired when "both" documents cover it | the "new" one does | "early": before the directory fsync.
    retire: str = "both"
    # The segment that a living writer writes is not retired.
    spare_living: bool = True
    # A writer's file is removed when the writer has ended.
    file_of_ended: bool = True
    # A writer's entry is dropped in a save that begins with a directory fsync, made after its files were removed
    # | "unsynced": without one | "same": in the save that retires.
    drop: str = "synced"
    # A key is counted once, regardless of which journals contain it.
    keys_once: bool = True
    # Watermarks of an earlier boot are not used.
    boot: bool = True
    # "recheck": document, journals, document again | "once" | "segments": the segments are listed first.
    reader: str = "recheck"
    # Watermarks are read before segments are listed.
    limits_first: bool = True


# ----------------------------------------------------------------------------------------------------------------------
# The state. Everything is an immutable tuple, so that a state can be a key of a dictionary.
# ----------------------------------------------------------------------------------------------------------------------

NO_ENTRY = -1  # The document has no entry for this writer, so its journal counts from the first frame.
NOBODY = -1  # A lock that is free.
ALL = 99  # Instead of a watermark: the journal counts up to its last valid frame.

GONE, HERE, EITHER = 1, 2, 3  # The effect of a power loss on a name.
DURABLE, UNSYNCED, DOUBTFUL = 1, 2, 3  # A frame: on the disk | on its way | its sync failed, and it can be read now.


class Doc(NamedTuple):
    """A document: how often each record is counted, and for each writer how far its journal is, and in which segment
    the last counted frame was found (NO_ENTRY: not noted).
    """

    counts: tuple[int, ...]
    through: tuple[int, ...]
    place: tuple[int, ...]


class Name(NamedTuple):
    """A name of a document: its document now, and the possible ones after a power loss."""

    now: Doc
    after: frozenset[Doc]


class Segment(NamedTuple):
    """One segment; a frame is its sequence number, its record, and whether it is on the disk."""

    now: bool
    after: int
    frames: tuple[tuple[int, int, int], ...]


class File(NamedTuple):
    """The name of a writer's file."""

    now: bool = False
    after: int = GONE


Journals = tuple[tuple[Segment, ...], ...]


class Process(NamedTuple):
    """``at`` is the next step, ``new`` the document that it saves. ``dead`` and ``listed`` (how many segments of each
    writer) are what its save found at its beginning, ``back`` where it goes on after a save.
    """

    at: str = "idle"
    writer: int = -1
    segment: int = -1
    sequence: int = 0
    record: int = -1
    new: Doc | None = None
    dead: frozenset[int] = frozenset()
    listed: tuple[int, ...] = ()
    back: str = ""
    victim: int = -1


class Reader(NamedTuple):
    """``floor`` is the total that was visible when it began, ``counts`` the total that it counted."""

    at: str = "document"
    doc: Doc | None = None
    floor: tuple[int, ...] = ()
    opened: tuple[tuple[int, int], ...] = ()
    limits: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    alarm: bool = False


class Left(NamedTuple):
    """The faults that may still happen."""

    saves: tuple[int, ...]
    kills: int
    losses: int
    write_faults: int
    fsync_faults: int


class State(NamedTuple):
    """Both documents, and by writer the journals, watermarks, files and locks; bit r of ``acked``: record r is."""

    doc: Name
    previous: Name
    journals: Journals
    watermarks: tuple[int, ...]
    files: tuple[File, ...]
    alive: tuple[bool, ...]
    processes: tuple[Process, ...]
    store_lock: int
    acked: int
    todo: tuple[tuple[int, ...], ...]
    used: int
    left: Left
    reader: Reader | None


Steps = Iterator[tuple[str, State]]


@dataclass(frozen=True)
class Config:
    """A configuration. ``same`` are pairs of records with one key, ``closing`` the processes that close."""

    name: str
    about: str
    records: tuple[tuple[int, ...], ...]
    same: tuple[tuple[int, int], ...] = ()
    saves: tuple[int, ...] = (1, 1)
    closing: tuple[int, ...] = ()
    kills: int = 0
    losses: int = 0
    write_faults: int = 0
    fsync_faults: int = 0
    frames: int = 1
    reader: bool = False
    rules: Rules = field(default_factory=Rules)

    @property
    def count(self) -> int:
        return sum(len(some) for some in self.records)

    @property
    def writers(self) -> int:
        return sum(1 for some in self.records if some) + self.kills + self.losses * len(self.records)

    def group(self, record: int) -> int:
        return next((first for first, second in self.same if record == second), record)

    def is_keyed(self, record: int) -> bool:
        return any(record in pair for pair in self.same)


def put(items: tuple[Any, ...], index: int, item: object) -> Any:
    return (*items[:index], item, *items[index + 1 :])


class Model:
    """The transitions of one configuration."""

    def __init__(self, config: Config) -> None:
        self.c = config
        self.r = config.rules
        self.groups = [config.group(record) for record in range(config.count)]
        self.empty = Doc((0,) * config.count, (NO_ENTRY,) * config.writers, (NO_ENTRY,) * config.writers)
        self._good: dict[Any, str | None] = {}
        self._seen: dict[Any, tuple[int, ...]] = {}

    def start(self) -> State:
        c = self.c
        name = Name(self.empty, frozenset([self.empty]))
        return State(
            doc=name,
            previous=name,
            journals=((),) * c.writers,
            watermarks=(0,) * c.writers,
            files=(File(),) * c.writers,
            alive=(False,) * c.writers,
            processes=(Process(),) * len(c.records),
            store_lock=NOBODY,
            acked=0,
            todo=c.records,
            used=0,
            left=Left(c.saves, c.kills, c.losses, c.write_faults, c.fsync_faults),
            reader=Reader() if c.reader else None,
        )

    # ---- What is counted ---------------------------------------------------------------------------------------------

    @staticmethod
    def readable(segments: Sequence[Segment]) -> dict[int, tuple[int, int]]:
        """For every readable frame, by sequence number: its record, and the first segment that contains it."""
        found: dict[int, tuple[int, int]] = {}
        for place, segment in enumerate(segments):
            if segment.now:
                for number, record, _ in segment.frames:
                    found.setdefault(number, (record, place))
        return found

    def counted(self, doc: Doc, journals: Journals, limits: Sequence[int], copy: int = -1) -> Doc:
        """The counting rule: a frame counts if and only if its sequence number is the next one."""
        counts, through, place = list(doc.counts), list(doc.through), list(doc.place)
        for writer, segments in enumerate(journals):
            at = max(through[writer], 0)
            if not segments or limits[writer] <= at:
                continue
            frames = self.readable(segments)
            begin = at
            while at < limits[writer] and at + 1 in frames:
                at += 1
                record, found = frames[at]
                if not (self.r.keys_once and self.c.is_keyed(record) and self.is_counted(counts, record)):
                    counts[record] += 1
                if self.r.through:
                    place[writer] = found if copy < 0 else copy
            if self.r.through and at > begin:
                through[writer] = at
        return Doc(tuple(counts), tuple(through), tuple(place))

    def is_counted(self, counts: Sequence[int], record: int) -> bool:
        group = self.groups[record]
        return any(times for other, times in enumerate(counts) if self.groups[other] == group)

    def limits(self, s: State) -> tuple[int, ...]:
        """Up to which number each journal counts."""
        return tuple(mark if file.now else ALL for mark, file in zip(s.watermarks, s.files, strict=True))

    def visible(self, s: State) -> tuple[int, ...]:
        """The totals that a reader sees, by record (attempts with one key are one record)."""
        key = (s.doc.now, s.journals, self.limits(s))
        if key not in self._seen:
            totals = [0] * self.c.count
            for record, times in enumerate(self.counted(*key).counts):
                totals[self.groups[record]] += times
            self._seen[key] = tuple(totals)
        return self._seen[key]

    def is_dead(self, s: State, writer: int) -> bool:
        return not (self.r.liveness and s.alive[writer] and s.files[writer].now)

    # ---- What is checked ---------------------------------------------------------------------------------------------

    def broken(self, s: State) -> str | None:
        """The first invariant that does not hold in this state."""
        for name, what in ((s.doc, "document"), (s.previous, "previous document")):
            is_previous = name is s.previous
            if fault := self._check(name.now, s.journals, s.acked, "now"):
                return f"{fault} ({what}, now)"
            for doc in name.after:
                if fault := self._check(doc, s.journals, s.acked, "previous" if is_previous else "document"):
                    return f"{fault} ({what}, if the power is lost now)"
        return None

    def _check(self, doc: Doc, journals: Journals, acked: int, what: str) -> str | None:
        key = (doc, journals, acked, what)
        if key not in self._good:
            self._good[key] = self._examined(doc, journals, acked, what)
        return self._good[key]

    def _examined(self, doc: Doc, journals: Journals, acked: int, what: str) -> str | None:
        now = what == "now"
        count = self.c.count
        certain, possible = [0] * count, [0] * count
        for record in range(count):
            certain[self.groups[record]] += doc.counts[record]
            possible[self.groups[record]] += doc.counts[record]
        for writer, segments in enumerate(journals):
            frames: dict[int, tuple[int, bool]] = {}  # By sequence number: the record, and whether it certainly exists.
            for segment in segments:
                if not (segment.now if now else segment.after & HERE):
                    continue
                for number, record, state in segment.frames:
                    sure = now or (segment.after == HERE and state == DURABLE)
                    if number in frames and frames[number][0] != record:
                        return "twice: one sequence number, two records"
                    frames[number] = (record, sure or (number in frames and frames[number][1]))
            at = max(doc.through[writer], 0)
            end = max(frames, default=0)
            # Needing the previous document after a power loss counts as another fault.
            if what == "document" and at and self._is_doubtful(segments, at, doc.place[writer], frames):
                return "doubt: the journal may end before what the document holds of it"
            while at < end:
                at += 1
                if at not in frames:
                    return "gap: a frame is missing and a later one is there"
                record, sure = frames[at]
                possible[self.groups[record]] += 1
                if sure:
                    certain[self.groups[record]] += 1
                elif at < end:
                    return "gap: a frame may be missing and a later one be there"
        for record in range(count):
            group = self.groups[record]
            is_counted_once = self.r.keys_once and self.c.is_keyed(record)
            in_document = sum(doc.counts[other] for other in range(count) if self.groups[other] == group)
            if in_document > 1 or (possible[group] > 1 and not is_counted_once):
                return f"twice: record {group} is counted twice"
            if acked >> record & 1 and certain[group] < 1:
                return f"lost: record {record} is acknowledged and not held"
        return None

    @staticmethod
    def _is_doubtful(
        segments: Sequence[Segment], through: int, place: int, frames: Mapping[int, tuple[int, bool]]
    ) -> bool:
        """Whether a power loss may leave the segment of the last counted frame without it, and no later frame."""
        if place == NO_ENTRY or not segments[place].after & HERE:
            return False
        segment = segments[place]
        if segment.now and any(n == through and state == DURABLE for n, _, state in segment.frames):
            return False
        return not any(number >= through and sure for number, (_, sure) in frames.items())

    # ---- The steps of a process --------------------------------------------------------------------------------------

    def steps(self, s: State) -> Steps:
        for i, p in enumerate(s.processes):
            for label, t in getattr(self, "at_" + p.at)(s, i, p):
                yield f"P{i} {label}", t
            if s.left.kills and p.at != "ended" and (p.at != "idle" or p.writer >= 0):
                yield f"P{i} is killed", self.kill(s, i)
        if s.left.losses:
            yield from self.power_loss(s)
        if s.reader:
            yield from self.read(s, s.reader)

    def go(self, s: State, i: int, p: Process, at: str, **changes: Any) -> State:
        """Process i continues at the step ``at``. The changes apply to the process, or to the state."""
        mine = {name: changes.pop(name) for name in list(changes) if name in Process._fields}
        return s._replace(processes=put(s.processes, i, p._replace(at=at, **mine)), **changes)

    def at_idle(self, s: State, i: int, p: Process) -> Steps:
        if s.todo[i]:
            record = s.todo[i][0]
            if self.c.is_keyed(record):
                yield f"begins record {record} with a key", self.go(s, i, p, "look", record=record)
            else:
                yield from self.begin(s, i, p, record)
        elif i in self.c.closing and p.writer >= 0 and s.store_lock == NOBODY:
            yield from self.begin_save(s, i, p, "close")
        if s.left.saves[i] and s.store_lock == NOBODY:
            left = s.left._replace(saves=put(s.left.saves, i, s.left.saves[i] - 1))
            yield from self.begin_save(s._replace(left=left), i, p, "idle")

    def at_ended(self, s: State, i: int, p: Process) -> Steps:
        yield from ()

    # Commit: seal, write, sync, watermark, acknowledge.

    def begin(self, s: State, i: int, p: Process, record: int) -> Steps:
        if p.writer < 0:
            p = p._replace(writer=s.used)
            s = s._replace(
                used=s.used + 1,
                watermarks=put(s.watermarks, p.writer, 0),
                files=put(s.files, p.writer, File(now=True, after=EITHER)),
            )
            if self.r.lock_first:
                s = s._replace(alive=put(s.alive, p.writer, True))
        is_full = p.segment >= 0 and len(s.journals[p.writer][p.segment].frames) >= self.c.frames
        step = self.at_make_segment if p.segment < 0 or is_full else self.at_write
        yield from step(s, i, p._replace(record=record))

    def at_make_segment(self, s: State, i: int, p: Process) -> Steps:
        segments = (*s.journals[p.writer], Segment(now=True, after=EITHER, frames=()))
        s = s._replace(journals=put(s.journals, p.writer, segments))
        at = "sync_segment_name" if self.r.segment_fsync else "write"
        yield "makes a segment", self.go(s, i, p, at, segment=len(segments) - 1)

    def at_sync_segment_name(self, s: State, i: int, p: Process) -> Steps:
        synced = self.directory_fsync(s)
        if not self.r.lock_first and not s.alive[p.writer]:
            synced = synced._replace(alive=put(s.alive, p.writer, True))
        yield "syncs the directory", self.go(synced, i, p, "write")
        if s.left.fsync_faults:
            yield (
                "fails to sync the directory",
                self.go(self.directory_fsync_fails(s), i, p, "make_segment", segment=-1),
            )

    def at_write(self, s: State, i: int, p: Process) -> Steps:
        number = p.sequence + 1
        s = self.with_frames(s, p, (*self.frames(s, p), (number, p.record, UNSYNCED)))
        at = "sync" if self.r.watermark == "after" else "raise_watermark"
        yield f"writes frame {p.writer}:{number} (record {p.record})", self.go(s, i, p, at)

    def at_sync(self, s: State, i: int, p: Process) -> Steps:
        kept, (number, record, state) = self.frames(s, p)[:-1], self.frames(s, p)[-1]
        synced = self.with_frames(s, p, (*kept, (number, record, DURABLE if state == UNSYNCED else state)))
        at = "raise_watermark" if self.r.watermark == "after" else "acknowledge"
        yield "syncs it", self.go(synced, i, p, at)
        if s.left.write_faults and state == UNSYNCED:
            failed = s._replace(left=s.left._replace(write_faults=s.left.write_faults - 1))
            outcomes = (
                ("the frame is nowhere", kept),
                ("the frame is on the disk", (*kept, (number, record, DURABLE))),
                ("the frame can be read and is not on the disk", (*kept, (number, record, DOUBTFUL))),
            )
            for what, frames in outcomes:
                t, label = self.with_frames(failed, p, frames), f"fails to sync it: {what}"
                if self.r.retry == "same":
                    yield label, self.go(t, i, p, "make_segment", segment=-1)
                elif self.r.retry == "renumber":
                    yield label, self.go(t, i, p, "make_segment", segment=-1, sequence=p.sequence + 1)
                elif frames != kept:
                    yield label, self.go(t, i, p, "sync")

    def at_raise_watermark(self, s: State, i: int, p: Process) -> Steps:
        at = "acknowledge" if self.r.watermark == "after" else "sync"
        raised = s._replace(watermarks=put(s.watermarks, p.writer, p.sequence + 1))
        yield "raises its watermark", self.go(raised, i, p, at)

    def at_acknowledge(self, s: State, i: int, p: Process) -> Steps:
        s = s._replace(acked=s.acked | 1 << p.record, todo=put(s.todo, i, s.todo[i][1:]))
        yield f"acknowledges record {p.record}", self.go(s, i, p, "idle", record=-1, sequence=p.sequence + 1)

    def frames(self, s: State, p: Process) -> tuple[tuple[int, int, int], ...]:
        return s.journals[p.writer][p.segment].frames

    def with_frames(self, s: State, p: Process, frames: tuple[tuple[int, int, int], ...]) -> State:
        segments = s.journals[p.writer]
        changed = put(segments, p.segment, segments[p.segment]._replace(frames=frames))
        return s._replace(journals=put(s.journals, p.writer, changed))

    # A commit with a key: look it up, then commit.

    def at_look(self, s: State, i: int, p: Process) -> Steps:
        counts = self.counted(s.doc.now, s.journals, self.limits(s)).counts
        if self.is_counted(counts, p.record):
            yield "finds the key", self.go(s, i, p, "repeat")
        else:
            yield from self.begin(s, i, p, p.record)

    def at_repeat(self, s: State, i: int, p: Process) -> Steps:
        s = s._replace(acked=s.acked | 1 << p.record, todo=put(s.todo, i, s.todo[i][1:]))
        yield f"acknowledges record {p.record} as a repeat", self.go(s, i, p, "idle", record=-1)

    # Save: find dead writers, refresh, adopt, drop entries, keep the previous document, replace, sync, retire.

    def begin_save(self, s: State, i: int, p: Process, back: str) -> Steps:
        if self.r.store_lock:
            s = s._replace(store_lock=i)
        listed = tuple(len(segments) for segments in s.journals)
        p = p._replace(dead=self.dead_writers(s), listed=listed, back=back)
        yield "begins a save", self.go(s, i, p, "refresh")

    def dead_writers(self, s: State) -> frozenset[int]:
        return frozenset(
            w
            for w in range(s.used)
            if self.is_dead(s, w) and (s.files[w].now or any(segment.now for segment in s.journals[w]))
        )

    def at_refresh(self, s: State, i: int, p: Process) -> Steps:
        p = p._replace(new=self.counted(s.doc.now, s.journals, self.limits(s)))
        yield "counts what is durable", self.go(s, i, p, self.next_to_adopt(s, p))

    def next_to_adopt(self, s: State, p: Process) -> str:
        return "adopt" if self.tails(s, p) else "drop"

    def tails(self, s: State, p: Process) -> list[int]:
        """Dead writers that have frames beyond what is counted."""
        assert p.new is not None
        return [w for w in sorted(p.dead) if max(p.new.through[w], 0) + 1 in self.readable(s.journals[w])]

    def at_adopt(self, s: State, i: int, p: Process) -> Steps:
        assert p.new is not None
        w = self.tails(s, p)[0]
        if self.r.adopt == "trust":
            yield f"adopts writer {w}", self.go(s, i, p, "raise_adopted", victim=w)
            return
        tail = {n: r for n, (r, _) in self.readable(s.journals[w]).items() if n > p.new.through[w]}
        copy = Segment(now=True, after=EITHER, frames=tuple((n, r, DURABLE) for n, r in sorted(tail.items())))
        s = s._replace(journals=put(s.journals, w, (*s.journals[w], copy)))
        yield f"writes the tail of writer {w} again", self.go(s, i, p, "sync_adopted", victim=w)

    def at_sync_adopted(self, s: State, i: int, p: Process) -> Steps:
        yield "syncs the directory", self.go(self.directory_fsync(s), i, p, "raise_adopted")
        if s.left.fsync_faults:
            yield "fails to sync the directory", self.leave(self.directory_fsync_fails(s), i, p)

    def at_raise_adopted(self, s: State, i: int, p: Process) -> Steps:
        assert p.new is not None
        w = p.victim
        s = s._replace(watermarks=put(s.watermarks, w, max(self.readable(s.journals[w]), default=s.watermarks[w])))
        only = tuple(ALL if other == w else 0 for other in range(self.c.writers))
        copy = len(s.journals[w]) - 1 if self.r.adopt == "rewrite" else -1
        p = p._replace(new=self.counted(p.new, s.journals, only, copy), victim=-1)
        yield f"raises the watermark of writer {w}", self.go(s, i, p, self.next_to_adopt(s, p))

    def at_drop(self, s: State, i: int, p: Process) -> Steps:
        if not self.r.dead_first:
            p = p._replace(dead=self.dead_writers(s))
        gone = [
            w
            for w in range(s.used)
            if s.doc.now.through[w] != NO_ENTRY
            and not s.alive[w]
            and not s.files[w].now
            and not any(segment.now for segment in s.journals[w])
        ]
        if gone and self.r.drop == "synced":
            yield "syncs the directory to drop entries", self.composed(self.directory_fsync(s), i, p, gone)
            if s.left.fsync_faults:
                yield "fails to sync the directory", self.leave(self.directory_fsync_fails(s), i, p)
        else:
            yield "composes the document", self.composed(s, i, p, gone)

    def composed(self, s: State, i: int, p: Process, gone: Sequence[int]) -> State:
        assert p.new is not None
        through, place = list(p.new.through), list(p.new.place)
        for w in p.dead:
            through[w] = max(through[w], 0)
        if self.r.place_of_living:
            for w in p.dead | ({p.writer} if p.back == "close" else set()):
                place[w] = NO_ENTRY
        for w in gone:
            through[w], place[w] = NO_ENTRY, NO_ENTRY
        new = Doc(p.new.counts, tuple(through), tuple(place))
        if self.r.drop == "same":
            old = new if self.is_both(s, p) else s.doc.now
            for w in p.dead:
                if len(self.needless(s, w, new, old, p)) == sum(segment.now for segment in s.journals[w]):
                    new = new._replace(through=put(new.through, w, NO_ENTRY))
        at = "keep_previous" if self.r.previous and not self.is_both(s, p) else "replace"
        return self.go(s, i, p, at, new=new)

    def is_both(self, s: State, p: Process) -> bool:
        """Whether the new document gets both names: at close, and if there is no document yet."""
        return (p.back == "close" and self.r.both_at_close) or s.doc.now == self.empty

    def at_keep_previous(self, s: State, i: int, p: Process) -> Steps:
        previous = Name(s.doc.now, s.previous.after | {s.doc.now})
        yield "keeps the previous document", self.go(s._replace(previous=previous), i, p, "replace")

    def at_replace(self, s: State, i: int, p: Process) -> Steps:
        assert p.new is not None
        both = self.is_both(s, p)
        s = s._replace(doc=Name(p.new, s.doc.after | {p.new}))
        p = p._replace(back="both " + p.back if both else p.back)
        at = "replace_previous" if both and self.r.previous else self.after_replace()
        yield "replaces the document", self.go(s, i, p, at)

    def at_replace_previous(self, s: State, i: int, p: Process) -> Steps:
        assert p.new is not None
        previous = Name(p.new, s.previous.after | {p.new})
        yield "replaces the previous document", self.go(s._replace(previous=previous), i, p, self.after_replace())

    def after_replace(self) -> str:
        return "retire" if self.r.retire == "early" else "sync_save"

    def at_sync_save(self, s: State, i: int, p: Process) -> Steps:
        synced = self.directory_fsync(s)
        if self.r.retire == "early":
            yield "syncs the directory, ends the save", self.leave(synced, i, p)
        else:
            yield "syncs the directory", self.go(synced, i, p, "retire")
        if s.left.fsync_faults:
            yield "fails to sync the directory", self.leave(self.directory_fsync_fails(s), i, p)

    def at_retire(self, s: State, i: int, p: Process) -> Steps:
        journals = list(s.journals)
        for w in range(s.used):
            marked = self.needless(s, w, s.doc.now, s.previous.now, p)
            journals[w] = tuple(
                Segment(now=False, after=segment.after | GONE, frames=segment.frames) if n in marked else segment
                for n, segment in enumerate(journals[w])
            )
        removed = s._replace(journals=tuple(journals))
        files = [
            file.now
            and p.listed[w] >= 0
            and s.doc.now.through[w] != NO_ENTRY
            and (w in p.dead or not self.r.file_of_ended)
            and not any(segment.now for segment in removed.journals[w][: p.listed[w]])
            for w, file in enumerate(s.files)
        ]
        if any(files):
            yield "retires segments", self.go(removed, i, p, "remove_files", listed=tuple(map(int, files)))
        elif self.r.retire == "early":
            yield "retires segments", self.go(removed, i, p, "sync_save")
        else:
            yield "retires segments, ends the save", self.leave(removed, i, p)

    def at_remove_files(self, s: State, i: int, p: Process) -> Steps:
        files = tuple(
            File(now=False, after=file.after | GONE) if marked else file
            for file, marked in zip(s.files, p.listed, strict=True)
        )
        s = s._replace(files=files)
        if self.r.retire == "early":
            yield "removes writers' files", self.go(s, i, p, "sync_save")
        else:
            yield "removes writers' files, ends the save", self.leave(s, i, p)

    def needless(self, s: State, w: int, new: Doc, old: Doc, p: Process) -> list[int]:
        """The segments of a writer that both documents cover and that the writer will not use again."""
        if new.through[w] == NO_ENTRY:
            return []
        if self.r.retire == "new":
            old = new
        listed = [n for n, segment in enumerate(s.journals[w][: p.listed[w]]) if segment.now]
        is_finished = w in p.dead or (p.back.endswith("close") and w == p.writer) or not self.r.spare_living
        if p.back == "close":
            # A mutant removes the rule that both documents are new at close, but not the removal of segments.
            old = new
        if is_finished and old.through[w] >= new.through[w]:
            return listed
        first = min(new.place[w], old.place[w])
        return [n for n in listed if n < first]

    def leave(self, s: State, i: int, p: Process) -> State:
        """A save ends, with or without success. After a save at close, the process ends."""
        if s.store_lock == i:
            s = s._replace(store_lock=NOBODY)
        if p.back.endswith("close"):
            s = s._replace(alive=put(s.alive, p.writer, False))
            return s._replace(processes=put(s.processes, i, Process("ended")))
        return self.go(s, i, p, p.back.removeprefix("both "), back="", new=None, victim=-1, dead=frozenset(), listed=())

    # ---- The disk ----------------------------------------------------------------------------------------------------

    def directory_fsync(self, s: State) -> State:
        """Every name is now on the disk as it is visible."""
        journals = tuple(
            tuple(
                segment._replace(after=HERE) if segment.now else Segment(now=False, after=GONE, frames=())
                for segment in segments
            )
            for segments in s.journals
        )
        return s._replace(
            doc=Name(s.doc.now, frozenset([s.doc.now])),
            previous=Name(s.previous.now, frozenset([s.previous.now])),
            journals=journals,
            files=tuple(file._replace(after=HERE if file.now else GONE) for file in s.files),
        )

    def directory_fsync_fails(self, s: State) -> State:
        """The outcome is unknown, so the open possibilities stay open."""
        return s._replace(left=s.left._replace(fsync_faults=s.left.fsync_faults - 1))

    # ---- Crashes -----------------------------------------------------------------------------------------------------

    def kill(self, s: State, i: int) -> State:
        """Locks end with the process. Its client gives up, unless the record has a key and is sent elsewhere."""
        p = s.processes[i]
        return s._replace(
            processes=put(s.processes, i, Process()),
            alive=put(s.alive, p.writer, False) if p.writer >= 0 else s.alive,
            todo=put(s.todo, i, s.todo[i][1:]) if p.record >= 0 else s.todo,
            store_lock=NOBODY if s.store_lock == i else s.store_lock,
            left=s.left._replace(kills=s.left.kills - 1),
        )

    def power_loss(self, s: State) -> Steps:
        """Every combination of the possible contents of the disk."""
        todo = tuple(todo[1:] if p.record >= 0 else todo for p, todo in zip(s.processes, s.todo, strict=True))
        processes = tuple(Process("ended") if p.at == "ended" else Process() for p in s.processes)
        down = s._replace(
            processes=processes,
            alive=(False,) * self.c.writers,
            store_lock=NOBODY,
            todo=todo,
            left=s.left._replace(losses=s.left.losses - 1),
        )
        marks = [(ALL,) if self.r.boot else tuple({0, mark}) for mark in s.watermarks]
        files = [
            [File(h, HERE if h else GONE) for h in (True, False) if f.after & (HERE if h else GONE)] for f in s.files
        ]
        choices = [list(self.survivors(segment)) for segments in s.journals for segment in segments]
        shape = [len(segments) for segments in s.journals]
        seen = set()
        for doc, previous in itertools.product(s.doc.after, s.previous.after):
            # The newer one is used; the other stays until the next save.
            used = previous if sum(previous.counts) > sum(doc.counts) else doc
            for flat in itertools.product(*choices):
                rest = iter(flat)
                journals = tuple(tuple(itertools.islice(rest, size)) for size in shape)
                for some, left in itertools.product(itertools.product(*marks), itertools.product(*files)):
                    t = down._replace(
                        doc=Name(used, frozenset([doc])),
                        previous=Name(previous, frozenset([previous])),
                        journals=journals,
                        watermarks=some,
                        files=left,
                    )
                    if t not in seen:
                        seen.add(t)
                        yield "the power is lost", t

    @staticmethod
    def survivors(segment: Segment) -> Iterator[Segment]:
        if segment.after & GONE:
            yield Segment(now=False, after=GONE, frames=())
        if segment.after & HERE:
            sure = tuple(frame for frame in segment.frames if frame[2] == DURABLE)
            yield Segment(now=True, after=HERE, frames=sure)
            if not segment.now and sure:
                yield Segment(now=True, after=HERE, frames=())
            if len(sure) < len(segment.frames):
                yield Segment(now=True, after=HERE, frames=tuple((n, r, DURABLE) for n, r, _ in segment.frames))

    # ---- A reader without a lock -------------------------------------------------------------------------------------

    def read(self, s: State, r: Reader) -> Steps:
        order = ("document", "limits", "list") if self.r.limits_first else ("document", "list", "limits")
        if self.r.reader == "segments":
            order = ("list", "document", "limits")
        if r.at == "document" and not r.floor:
            r = r._replace(at=order[0], floor=self.visible(s))
        following = dict(zip(order, (*order[1:], "frames"), strict=True))
        if r.at == "document":
            yield "reader reads the document", s._replace(reader=r._replace(at=following[r.at], doc=s.doc.now))
        elif r.at == "limits":
            limits = tuple(
                limit if any(segment.now for segment in segments) else 0
                for limit, segments in zip(self.limits(s), s.journals, strict=True)
            )
            yield "reader reads the watermarks", s._replace(reader=r._replace(at=following[r.at], limits=limits))
        elif r.at == "list":
            opened = tuple((w, n) for w in range(s.used) for n, segment in enumerate(s.journals[w]) if segment.now)
            yield "reader lists the segments", s._replace(reader=r._replace(at=following[r.at], opened=opened))
        elif r.at == "frames":
            yield "reader reads the frames", s._replace(reader=self.read_frames(s, r))
        elif r.at == "check":
            if self.r.reader == "recheck" and s.doc.now != r.doc:
                yield "reader begins again", s._replace(reader=Reader())
            else:
                yield "reader answers", s._replace(reader=r._replace(at="done"))

    def read_frames(self, s: State, r: Reader) -> Reader:
        """Count the frames in the listed segments. An open segment can be read after its removal."""
        assert r.doc is not None
        opened = set(r.opened)
        journals = tuple(
            tuple(segment._replace(now=(w, n) in opened) for n, segment in enumerate(segments))
            for w, segments in enumerate(s.journals)
        )
        doc = self.counted(r.doc, journals, r.limits)
        alarm = any(
            limit != ALL and any(at == w for at, _ in opened) and max(doc.through[w], 0) < limit
            for w, limit in enumerate(r.limits)
        )
        return r._replace(at="check", limits=(), counts=doc.counts, opened=(), alarm=alarm)

    def misread(self, s: State) -> str | None:
        r = s.reader
        if r and r.at == "done":
            if r.alarm:
                return "reader: takes records for lost that are there"
            ceiling = self.visible(s)
            for record, times in enumerate(r.counts):
                if not r.floor[record] <= times <= ceiling[record]:
                    return f"reader: counts record {record} {times} times"
        return None


# ----------------------------------------------------------------------------------------------------------------------
# The search is breadth-first, so the first violation has a shortest run.
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """The result of a search; ``is_complete``: the search visited all states and found no violation."""

    states: int
    seconds: float
    violation: str | None
    trace: list[str]
    is_complete: bool


def search(config: Config, limit: int) -> Result:
    """Visit every state, up to a limit; stop at the first violation."""
    model, began = Model(config), time.monotonic()
    start = model.start()
    parent: dict[State, tuple[State, str] | None] = {start: None}
    queue = deque([start])

    def trace(s: State, last: str) -> list[str]:
        steps = [last]
        while link := parent[s]:
            s, label = link
            steps.append(label)
        return steps[::-1]

    def result(violation: str | None, steps: list[str], *, is_complete: bool) -> Result:
        return Result(len(parent), time.monotonic() - began, violation, steps, is_complete)

    while queue:
        if len(parent) > limit:
            return result(None, [], is_complete=False)
        s = queue.popleft()
        before = model.visible(s)
        for label, t in model.steps(s):
            after = model.visible(t)
            fault = None
            if any(new < old for old, new in zip(before, after, strict=True)):
                fault = f"backwards: a reader saw {sum(before)} records, then {sum(after)}"
            is_known = t in parent
            if not is_known and fault is None:
                fault = model.broken(t) or model.misread(t)
            if fault:
                return result(fault, trace(s, label), is_complete=True)
            if not is_known:
                parent[t] = (s, label)
                queue.append(t)
    return result(None, [], is_complete=True)


# ----------------------------------------------------------------------------------------------------------------------
# The configurations
# ----------------------------------------------------------------------------------------------------------------------

SHORT = [
    Config("plain", "2 writers, 2 saves each, no fault", ((0,), (1,)), saves=(2, 2)),
    Config("kill", "2 writers, 1 kill", ((0,), (1,)), saves=(0, 2), kills=1),
    Config("power", "2 writers, 1 power loss", ((0,), (1,)), saves=(0, 2), losses=1),
    Config("kill-power", "1 writer, 1 saver, 1 kill and 1 power loss", ((0,), ()), saves=(0, 2), kills=1, losses=1),
    Config("write-fault", "1 writer, 1 saver, a failing write, 1 kill, 1 power loss", ((0,), ()), saves=(0, 1),
           kills=1, losses=1, write_faults=1),
    Config("directory", "1 writer, 1 saver, a failing directory fsync, 1 power loss", ((0,), ()), saves=(0, 2),
           losses=1, fsync_faults=1),
    Config("drop", "1 writer that is killed, 4 saves, 1 power loss", ((0,), ()), saves=(0, 4), kills=1, losses=1),
    Config("close", "1 writer that closes, 1 saver, 1 power loss", ((0, 1), ()), saves=(0, 1), closing=(0,), losses=1),
    Config("close-kill", "2 writers that close, 1 kill", ((0,), (1,)), saves=(0, 1), closing=(0, 1), kills=1),
    Config("close-drop", "1 writer that closes, 4 saves, 1 power loss", ((0,), ()), saves=(0, 4), closing=(0,),
           losses=1),
    Config("close-directory", "1 writer that closes, 1 saver, a failing directory fsync, 1 power loss", ((0,), ()),
           saves=(0, 2), closing=(0,), losses=1, fsync_faults=1),
    Config("close-write-fault", "1 writer that closes, 1 saver, a failing write, 1 power loss", ((0,), ()),
           saves=(0, 1), closing=(0,), losses=1, write_faults=1),
    Config("key", "one keyed record sent to both, 1 kill", ((0,), (1,)), same=((0, 1),), saves=(0, 1), kills=1),
    Config("two-frames", "2 frames a segment, a failing write", ((0, 1), ()), saves=(0, 2), frames=2, write_faults=1),
    Config("reader", "a reader beside a writer and 2 saves", ((0, 1), ()), saves=(0, 2), reader=True),
    Config("reader-close", "a reader beside a writer that closes", ((0,), ()), saves=(0, 2), closing=(0,),
           reader=True),
]  # fmt: skip

LONG = [
    Config("plain-long", "2 writers, 3 records, 2 saves each, no fault", ((0, 1), (2,)), saves=(2, 2)),
    Config("kill-power-2", "1 writer, 1 saver, 2 records, 1 kill and 1 power loss", ((0, 1), ()), saves=(0, 2), kills=1,
           losses=1),
    Config("write-fault-2", "1 writer, 2 records, a failing write, 1 kill, 1 power loss", ((0, 1), ()), saves=(0, 1),
           kills=1, losses=1, write_faults=1),
    Config("directory-2", "1 writer, 2 records, a failing directory fsync, 1 power loss", ((0, 1), ()), saves=(1, 2),
           losses=1, fsync_faults=1),
    Config("close-2", "1 writer that closes, 2 saves, 1 power loss", ((0, 1), ()), saves=(0, 2), closing=(0,),
           losses=1),
    Config("reader-2", "a reader beside a writer and 3 saves", ((0, 1), ()), saves=(0, 3), reader=True),
    Config("reader-close-2", "a reader beside a writer of 2 records that closes", ((0, 1), ()), saves=(0, 2),
           closing=(0,), reader=True),
    Config("kill-long", "2 writers, 3 records, 1 kill", ((0, 1), (2,)), saves=(1, 2), kills=1),
    Config("two-kills", "2 writers, 2 records, 2 kills", ((0,), (1,)), saves=(1, 2), kills=2),
    Config("power-long", "2 writers, 3 records, 1 power loss", ((0, 1), (2,)), saves=(1, 2), losses=1),
    Config("kill-power-long", "2 writers, 2 records, 1 kill, 1 power loss", ((0,), (1,)), saves=(1, 2), kills=1,
           losses=1),
    Config("two-powers", "1 writer and 1 saver, 2 records, 2 power losses", ((0, 1), ()), saves=(0, 3), losses=2),
    Config("write-fault-long", "2 writers, 2 records, a failing write, 1 kill, 1 power loss", ((0,), (1,)),
           saves=(0, 2), kills=1, losses=1, write_faults=1),
    Config("directory-long", "2 writers, 2 records, 2 failing directory fsyncs, 1 power loss", ((0,), (1,)),
           saves=(1, 2), losses=1, fsync_faults=2),
    Config("drop-long", "1 writer that is killed, 5 saves, a failing directory fsync, 1 power loss", ((0, 1), ()),
           saves=(0, 5), kills=1, losses=1, fsync_faults=1),
    Config("close-long", "2 writers that close, 1 power loss", ((0,), (1,)), saves=(0, 1), closing=(0, 1), losses=1),
    Config("close-kill-power", "1 writer that closes, 1 kill, 1 power loss", ((0, 1), ()), saves=(0, 3), closing=(0,),
           kills=1, losses=1),
    Config("close-write-fault-2", "1 writer that closes, 2 records, a failing write, 1 power loss", ((0, 1), ()),
           saves=(0, 2), closing=(0,), losses=1, write_faults=1),
    Config("key-long", "one keyed record sent to both, 1 kill, a failing write, 1 power loss", ((0,), (1,)),
           same=((0, 1),), saves=(0, 1), kills=1, losses=1, write_faults=1),
    Config("key-directory", "one keyed record sent to both, 1 kill, a failing directory fsync, 1 power loss",
           ((0,), (1,)), same=((0, 1),), saves=(0, 1), kills=1, losses=1, fsync_faults=1),
    Config("two-frames-long", "2 frames a segment, a failing write, 1 power loss", ((0, 1, 2), ()), saves=(0, 3),
           frames=2, losses=1, write_faults=1),
    Config("reader-long", "a reader beside 2 writers and 4 saves", ((0, 1), (2,)), saves=(1, 3), reader=True),
    Config("reader-kill", "a reader beside a writer that is killed and 4 saves", ((0, 1), ()), saves=(0, 4), kills=1,
           reader=True),
]  # fmt: skip

CONFIGS = {config.name: config for config in SHORT + LONG}

MUTANTS: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "watermark before the sync": ({"watermark": "before"}, "power"),
    "no liveness": ({"liveness": False}, "kill"),
    "lock after the segment": ({"lock_first": False}, "kill"),
    "no directory fsync of a segment": ({"segment_fsync": False}, "power"),
    "no store lock": ({"store_lock": False}, "plain-long"),
    "dead writers determined last": ({"dead_first": False}, "kill"),
    "no counting rule": ({"through": False}, "plain"),
    "place of an ended writer": ({"place_of_living": False}, "close"),
    "no previous document": ({"previous": False, "retire": "new"}, "kill"),
    "new document alone at close": ({"both_at_close": False}, "close"),
    "retire what one document covers": ({"retire": "new"}, "kill"),
    "retire before the directory fsync": ({"retire": "early"}, "power"),
    "retire a living writer's segment": ({"spare_living": False}, "two-frames"),
    "remove a living writer's file": ({"file_of_ended": False}, "close"),
    "drop an entry in the same save": ({"drop": "same"}, "drop"),
    "drop an entry without an fsync": ({"drop": "unsynced"}, "drop"),
    "renumber a frame that failed": ({"retry": "renumber"}, "write-fault"),
    "sync a poisoned segment again": ({"retry": "resync"}, "write-fault"),
    "adopt without writing again": ({"adopt": "trust"}, "write-fault"),
    "keys counted twice": ({"keys_once": False}, "key"),
    "watermarks of an earlier boot": ({"boot": False}, "power"),
    "reader does not look again": ({"reader": "once"}, "reader"),
    "reader lists segments first": ({"reader": "segments"}, "reader"),
    "segments listed before watermarks": ({"limits_first": False}, "reader"),
}


def mutated(name: str) -> Config:
    """The configuration in which a mutant is detected."""
    changes, where = MUTANTS[name]
    return replace(CONFIGS[where], rules=replace(Rules(), **changes))


def report(name: str, result: Result, *, is_expected: bool) -> bool:
    states = f"{result.states:,}" + ("" if result.is_complete else "+")
    verdict = result.violation or ("no violation" if result.is_complete else "no violation so far")
    print(f"{name:36}{states:>12}{result.seconds:8.1f} s  {verdict}", flush=True)
    return bool(result.violation) == is_expected and result.is_complete


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the protocol of the store in every reachable state.")
    parser.add_argument("--mutants", action="store_true", help="take each rule out in turn")
    parser.add_argument("--short", action="store_true", help="the smaller configurations alone")
    parser.add_argument("--trace", metavar="NAME", help="print the shortest violating run of a configuration or mutant")
    parser.add_argument("--only", metavar="NAME", action="append", help="only this configuration or mutant")
    parser.add_argument("--limit", type=int, default=3_000_000, help="stop a search at so many states")
    args = parser.parse_args()
    if args.trace:
        result = search(mutated(args.trace) if args.trace in MUTANTS else CONFIGS[args.trace], args.limit)
        print(f"{args.trace}: {result.violation or 'no violation'}")
        for number, step in enumerate(result.trace, 1):
            print(f"  {number:2}. {step}")
        return 0
    names = list(MUTANTS) if args.mutants else [config.name for config in (SHORT if args.short else SHORT + LONG)]
    is_good = True
    for name in args.only or names:
        config = mutated(name) if args.mutants else CONFIGS[name]
        is_good &= report(name, search(config, args.limit), is_expected=args.mutants)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
