"""Rules of the storage engine, each with a patch that removes it from the code and the tests that must then fail.

``make mutants`` (or ``python -m tests.mutants [NAME ...]``) applies each patch in a copy of the tree and runs its
tests. It exits with 1 when a mutant survives, when a patch no longer applies, or when a test fails without any patch.
If no test fails after the removal of a rule, the rule is not tested.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from tests.support.paths import ROOT

MOST_SECONDS = 180
"""The time limit for the tests of one mutant, in seconds; tests that take longer count as failed."""

RULES = "tests/storage/test_rules.py"
NAMES = "tests/storage/test_store_names.py"
RETIRING = "tests/storage/test_retiring.py"
COMMIT = "tests/storage/test_commit.py"
RECOVERY = "tests/storage/test_recovery.py"
MERGE = "tests/storage/test_merge.py"
REPAIR = "tests/storage/test_repair.py"
LOST = "tests/storage/test_lost_document.py"
PRICES = "tests/storage/test_prices.py"
UNREADABLE = "tests/storage/test_unreadable_files.py"

_TREE = ("savings_exporter", "tests", "pyproject.toml", "dashboards")


class Edit(NamedTuple):
    """A text that occurs exactly once in a file of the package, and its replacement."""

    file: str
    old: str
    new: str


class Mutant(NamedTuple):
    """A rule, the edits that remove it, and the tests of which at least one must then fail."""

    rule: str
    edits: Sequence[Edit]
    tests: Sequence[str]


def mutant(rule: str, file: str, old: str, new: str, *tests: str) -> Mutant:
    """A mutant with one edit."""
    return Mutant(rule, [Edit(file, old, new)], tests)


MUTANTS = [
    # Commits.
    mutant(
        "The watermark is raised after the frame is durable",
        "storage/journal.py",
        "        if last > self._written:\n",
        "        self.writer.raise_watermark(last)\n        if last > self._written:\n",
        f"{RULES}::test_watermark_comes_last",
    ),
    mutant(
        "A frame is synced before it is acknowledged",
        "storage/segment.py",
        "            self._fs.sync_data(self._descriptor)\n",
        "            pass\n",
        f"{RULES}::test_watermark_comes_last",
    ),
    mutant(
        "A new segment is synced before its frame is acknowledged",
        "storage/segment.py",
        "            fs.fsync_file(descriptor)\n",
        "            pass\n",
        f"{RULES}::test_new_segment_is_synced",
    ),
    mutant(
        "A new segment's name is synced before its frame is acknowledged",
        "storage/segment.py",
        "            directory.sync(step, path)\n",
        "            pass\n",
        f"{RULES}::test_new_segment_is_synced",
    ),
    mutant(
        "After any error a segment is never written again",
        "storage/journal.py",
        "            except BaseException:\n                self._poison()\n                raise\n"
        "            self._written",
        "            except BaseException:\n                raise\n            self._written",
        f"{RULES}::test_poisoned_segment",
    ),
    mutant(
        "An interrupt poisons the segment, too",
        "storage/journal.py",
        "            except BaseException:\n                self._poison()\n                raise\n"
        "            self._written",
        "            except Exception:\n                self._poison()\n                raise\n"
        "            self._written",
        f"{COMMIT}::test_interrupted_write",
    ),
    Mutant(
        "A frame is tried again with the same sequence numbers",
        [
            Edit(
                "storage/journal.py",
                "        first = self.sequence + 1\n",
                '        first = max(self.sequence, getattr(self, "_sealed", 0)) + 1\n'
                "        self._sealed = first + count - 1\n",
            ),
            Edit("tracking/group_commit.py", "        if batch.frame is None:\n", "        if True:\n"),
        ],
        [f"{RULES}::test_copies_count_once"],
    ),
    Mutant(
        "Frames never go to a segment before the newest",
        [
            Edit("storage/journal.py", "has_room_for(size) and ready.path > self._newest", "has_room_for(size)"),
            Edit("storage/journal.py", "if made.path < self._newest:", "if False:"),
        ],
        [f"{RULES}::test_segment_order"],
    ),
    mutant(
        "Where direct I/O is refused, writes are buffered",
        "storage/segment.py",
        '            if method == "direct" or error.errno not in NO_DIRECT_IO:\n',
        "            if True:\n",
        f"{COMMIT}::test_no_direct_io_is_buffered",
    ),
    # Counting.
    mutant(
        "A frame that was counted is skipped",
        "storage/reader.py",
        "        if frame.last < expected:\n",
        "        if False:\n",
        f"{RULES}::test_copies_count_once",
    ),
    mutant(
        "Frames in a row count if the first one has the next number",
        "formats/frame.py",
        "        if found != first or of_writer",
        "        if of_writer",
        f"{RULES}::test_copies_count_once",
    ),
    mutant(
        "Frames in a row count up to the watermark",
        "formats/frame.py",
        "        if (limit is not None and first > limit + 1) or zlib",
        "        if zlib",
        f"{RULES}::test_up_to_the_watermark",
    ),
    mutant(
        "A frame whose checksum is wrong does not count",
        "formats/frame.py",
        " or zlib.crc32(view[position + _CHECK.size : end]) != check:",
        ":",
        f"{RECOVERY}::test_journal",
    ),
    mutant(
        "A document says how far each journal is counted",
        "storage/view.py",
        "            through=position.sequence, segment=position.segment, offset=position.offset, ended=is_ended\n",
        "            through=0, segment=0, offset=0, ended=is_ended\n",
        f"{RULES}::test_saved_is_not_counted_again",
    ),
    mutant(
        "A gap in the sequence numbers is refused",
        "storage/reader.py",
        "        if frame.first > expected:\n            self.lost.append((expected, frame.first - 1))\n",
        "",
        f"{RULES}::test_gap_is_refused",
    ),
    mutant(
        "A journal that ends before its watermark is refused",
        "storage/reader.py",
        "        if replay.position.sequence < least:\n",
        "        if False:\n",
        f"{RULES}::test_end_before_the_watermark",
    ),
    mutant(
        "A journal that ends before what the document holds of it is refused",
        "storage/reader.py",
        "        if not is_known and replay.last_seen < start.sequence:\n",
        "        if False:\n",
        f"{RULES}::test_end_before_the_document",
    ),
    mutant(
        "A frame above the watermark of a living writer does not count",
        "storage/reader.py",
        "            return facts.watermark if facts.boot == boot else None\n",
        "            return None\n",
        f"{RULES}::test_up_to_the_watermark",
    ),
    mutant(
        "A file that cannot be read is not a missing one",
        "storage/filesystem.py",
        "NO_SUCH_FILE = (FileNotFoundError, IsADirectoryError, NotAFileError)",
        "NO_SUCH_FILE = (OSError,)",
        f"{UNREADABLE}::test_previous_document_under_another_programs",
    ),
    mutant(
        "Without a whole document, the newest one that is known is the base",
        "storage/reader.py",
        "        return max(views, key=lambda found: found.document.ledger.records)\n",
        "        return view\n",
        f"{LOST}::test_newest_document_is_the_base",
    ),
    mutant(
        "Watermarks of an earlier boot are not used",
        "storage/reader.py",
        "            return facts.watermark if facts.boot == boot else None\n",
        "            return facts.watermark\n",
        f"{RULES}::test_watermark_of_earlier_boot",
    ),
    mutant(
        "What a watermark of an earlier boot names was durable",
        "storage/reader.py",
        "else self._watermark_of(view.store, writer)",
        "else 0",
        f"{RECOVERY}::test_watermark_of_other_boot",
    ),
    mutant(
        "Records go only under the name that the lock file holds",
        "storage/store.py",
        "        self._name_store()\n",
        "",
        f"{NAMES}::test_two_agree_on_a_name",
        f"{NAMES}::test_takeover_without_a_name",
    ),
    mutant(
        "A document with less than the previous one is not taken over",
        "storage/recovery.py",
        "if adds_nothing and (previous is None or _is_later(whole, previous)):",
        "if adds_nothing:",
        f"{NAMES}::test_document_with_less",
        f"{REPAIR}::test_unrelated_document_after_close",
    ),
    mutant(
        "A request of another program is not taken for a record of ours",
        "storage/other_program.py",
        "*(_name(point.get(name)) for name in NAMES_OF_POINT),",
        "*(UNKNOWN for name in NAMES_OF_POINT),",
        f"{MERGE}::test_same_savings_as_ours",
    ),
    mutant(
        "A document with points of ours that are not known is not merged",
        "storage/other_program.py",
        "return rest is not None and all(map(_is_named, rest)) and _holds(theirs.ledger, ledger)",
        "return rest is not None and _holds(theirs.ledger, ledger)",
        f"{MERGE}::test_later_document_that_is_gone",
    ),
    mutant(
        "What was merged does not count again",
        "storage/repair.py",
        "view.document, included=merged.digest,",
        "view.document,",
        f"{MERGE}::test_merged_document_comes_back",
    ),
    mutant(
        "A killed merge leaves the conflict",
        "storage/repair.py",
        "is_saved=content.is_saved, is_begun=content.is_begun)",
        "is_saved=content.is_saved)",
        f"{MERGE}::test_killed_at_every_call",
    ),
    mutant(
        "A copy of a document that is taken over is kept",
        "storage/checkpoint.py",
        "    reader.fs.keep_copy(reader.path, copy_path(reader.path, digest))\n",
        "",
        f"{MERGE}::test_taken_over_and_still_written",
    ),
    mutant(
        "A document of another program that cannot be read is not replaced",
        "formats/document.py",
        "    return b'\"lifetime\"' in data and",
        "    return False and",
        f"{REPAIR}::test_unreadable_document_of_other_program",
        f"{REPAIR}::test_unreadable_document_under_a_tracker",
    ),
    mutant(
        "A document is not taken over beside a journal of which it may hold records",
        "storage/reader.py",
        "if view.document.is_ours or view.positions or self.own is not None:",
        "if view.document.is_ours or view.positions:",
        f"{NAMES}::test_first_save_in_doubt",
    ),
    mutant(
        "A frame of which only the watermark failed is not written again",
        "storage/journal.py",
        "            self._written = last\n",
        "",
        f"{NAMES}::test_watermark_fails",
    ),
    mutant(
        "A key is counted once, whichever journals it stands in",
        "storage/view.py",
        "    return (known.writer, known.sequence) == (writer, sequence)\n",
        "    return True\n",
        f"{RULES}::test_key_sent_to_two",
    ),
    mutant(
        "A key is looked up in what other processes recorded",
        "tracking/group_commit.py",
        "        self._store.key_entry(digest)\n",
        "",
        f"{RULES}::test_key_known_to_another",
    ),
    mutant(
        "A key with other content is refused",
        "tracking/group_commit.py",
        "    if not is_same:\n",
        "    if False:\n",
        f"{COMMIT}::test_key_with_other_content",
    ),
    # Living and dead writers.
    mutant(
        "A writer's file is locked before it has its name",
        "storage/writers.py",
        "                if not self._fs.try_lock(descriptor):\n"
        '                    raise BlockingIOError(errno.EAGAIN, "another process looks at it", temporary)\n',
        "",
        f"{RULES}::test_locked_before_it_has_a_name",
    ),
    mutant(
        "There is no writer without its lock",
        "storage/writers.py",
        "                if not self._fs.try_lock(descriptor):\n",
        "                if self._fs.try_lock(descriptor) is None:\n",
        f"{RULES}::test_lock_of_new_writer",
    ),
    mutant(
        "Only a writer whose lock is free is dead",
        "storage/checkpoint.py",
        "if not reader.is_alive(writer, listing) and not",
        "if not",
        f"{RULES}::test_living_writer_keeps_its_files",
    ),
    mutant(
        "Dead writers are determined before anything is counted",
        "storage/checkpoint.py",
        "gone = _gone(reader, view, listing)",
        "gone = _gone(reader, view, listing); dead = dead_writers(reader, view, listing)",
        f"{RULES}::test_writer_dies_within_a_save",
    ),
    mutant(
        "A dead writer's tail is written again before it counts",
        "storage/checkpoint.py",
        "                make_segment(\n"
        '                    reader.fs, path, next_block(len(data)), operation, file.directory, "fdatasync", data\n'
        "                ).close()\n",
        "                pass\n",
        f"{RULES}::test_adopted_frame_is_on_disk",
    ),
    mutant(
        "A torn write is kept aside",
        "storage/checkpoint.py",
        "        if reading.tail is not None:\n            _keep_torn_tail",
        "        if False:\n            _keep_torn_tail",
        f"{RECOVERY}::test_torn_tail",
    ),
    mutant(
        "Another program's document that is away is no empty store",
        "storage/recovery.py",
        "(bool(lock.store) and not lock.is_foreign)",
        "bool(lock.store)",
        "tests/service/test_watch.py::test_document_that_is_away",
    ),
    mutant(
        "Something else in a store's place is damage, and its loss is stated",
        "storage/recovery.py",
        "lock.is_saved or lock.is_begun or bool(listing.segments) or bool(listing.writers)",
        "bool(listing.segments)",
        "tests/service/test_commands.py::test_something_else_in_a_stores_place",
    ),
    mutant(
        "A writer's file stays until its counters are in a document",
        "storage/checkpoint.py",
        "        if after.ended and before is not None and before.ended and len(needless) == len(numbers):\n",
        "        if len(needless) == len(numbers):\n",
        f"{RULES}::test_counters_survive_close",
    ),
    mutant(
        "The operation counters that are shown are those that were published",
        "storage/store.py",
        "return self._others.plus(own)",
        "return self._others.plus(self._counts())",
        "tests/storage/test_processes.py::test_counters_that_rise_during_a_scrape",
    ),
    # Saves.
    mutant(
        "One save at a time",
        "storage/store.py",
        "self._lock.take(CLOSING_PATIENCE_SECONDS if closing else PATIENCE_SECONDS)\n",
        "pass\n",
        f"{COMMIT}::test_held_lock_delays_saves_only",
    ),
    mutant(
        "A document is synced before it replaces the old one",
        "storage/atomic_file.py",
        "                self._fs.fsync_file(descriptor)\n",
        "                pass\n",
        f"{RETIRING}::test_failed_save_keeps_all",
    ),
    mutant(
        "The directory is synced after the replace",
        "storage/atomic_file.py",
        "            self.directory.sync(step, self.path)\n",
        "            pass\n",
        f"{RETIRING}::test_failed_save_keeps_all",
    ),
    mutant(
        "The document is opened again after the directory fsync",
        "storage/atomic_file.py",
        "        self._fs.probe(path)\n",
        "",
        f"{RULES}::test_document_is_opened_again",
    ),
    mutant(
        "A save keeps the previous document",
        "storage/atomic_file.py",
        "                if not both and self._fs.identity(self.path) is not None:\n",
        "                if False:\n",
        f"{RULES}::test_saves_keep_the_previous",
    ),
    mutant(
        "A save at close gives the document both names",
        "storage/checkpoint.py",
        "both = closing or view.identity",
        "both = view.identity",
        f"{RULES}::test_both_names_at_close",
    ),
    mutant(
        "A change of names gives the document both names",
        "storage/store.py",
        "self._checkpoint(operation, changed, both=True)",
        "self._checkpoint(operation, changed)",
        "tests/storage/test_names.py::test_fold_survives_a_damaged_document",
    ),
    mutant(
        "The document is replaced before the previous one",
        "storage/atomic_file.py",
        "                self._fs.replace(written[-1], self.path)\n                if both:\n",
        "                if both:\n                    self._fs.replace(written[0], self.previous)\n"
        "                self._fs.replace(written[-1], self.path)\n                if False:\n",
        f"{RULES}::test_kill_between_names",
    ),
    mutant(
        "A document notes no place to read on for writers that record no more",
        "storage/view.py",
        "if is_ended or (closing is not None and writer == closing.hex()):",
        "if False:",
        f"{RULES}::test_removed_segment_comes_back",
    ),
    mutant(
        "A frame that is missing where reading goes on may stand in a later segment",
        "storage/reader.py",
        "if not is_known and replay.last_seen < start.sequence:",
        "if not is_known:",
        f"{RULES}::test_first_copy_is_gone",
    ),
    mutant(
        "A damaged document is kept aside before it is replaced",
        "storage/checkpoint.py",
        "if view.identity is not None and not view.is_whole:",
        "if False:",
        f"{RULES}::test_damaged_is_kept_aside",
    ),
    mutant(
        "A segment goes when both documents cover it",
        "storage/checkpoint.py",
        "number < min(after.segment, before.segment)]",
        "number < after.segment]",
        f"{RULES}::test_previous_keeps_its_segment",
    ),
    mutant(
        "All segments of a dead writer go when both documents cover them",
        "storage/checkpoint.py",
        "    if is_finished and before.through >= after.through:\n",
        "    if is_finished:\n",
        f"{RETIRING}::test_needed_by_previous",
    ),
    mutant(
        "The segment that a living writer writes stays",
        "storage/checkpoint.py",
        "number < min(after.segment, before.segment)]",
        "number <= min(after.segment, before.segment)]",
        f"{RULES}::test_living_writer_keeps_its_files",
    ),
    mutant(
        "Segments are removed after the directory fsync",
        "storage/checkpoint.py",
        "identity = file.save(data, operation, both=both)",
        "_retire(reader, document, document if both else view.document, listing, dead); "
        "identity = file.save(data, operation, both=both)",
        f"{RETIRING}::test_failed_save_keeps_all",
    ),
    mutant(
        "A writer's entry is dropped after a directory fsync",
        "storage/checkpoint.py",
        "if gone:",
        "if False:",
        f"{RETIRING}::test_entry_goes_after_a_sync",
        f"{RETIRING}::test_entry_stays_if_sync_fails",
    ),
    mutant(
        "A writer's entry stays while there are segments of it",
        "storage/checkpoint.py",
        "if writer not in listing.segments and writer not in listing.writers and",
        "if writer not in listing.writers and",
        f"{RETIRING}::test_segment_comes_back",
    ),
    # Readers without a lock.
    mutant(
        "A reader looks whether the document is still the same",
        "storage/reader.py",
        "if self.is_current(current):\n                    return followed\n",
        "if True:\n                    return followed\n",
        f"{RULES}::test_reader_and_two_saves",
    ),
    mutant(
        "A store is examined again when its document was replaced meanwhile",
        "storage/recovery.py",
        "        if reader.fs.identity(reader.path) == identity:\n            return found\n",
        "        return found\n",
        f"{RULES}::test_inspect_and_a_save",
    ),
    Mutant(
        "Watermarks are read before segments are listed",
        [
            Edit(
                "storage/reader.py",
                "        limits = self._limits_of_writers(view.store)\n",
                "        segments = self.listing().segments\n        limits = self._limits_of_writers(view.store)\n",
            ),
            Edit(
                "storage/reader.py",
                "        segments = self.listing().segments\n        for writer, limit in limits",
                "        for writer, limit in limits",
            ),
        ],
        [f"{RULES}::test_segment_made_meanwhile"],
    ),
    # The platform, other programs, and observers.
    mutant(
        "A failed directory fsync is no unsupported one",
        "storage/operation.py",
        "DIR_FSYNC_UNSUPPORTED = frozenset({",
        "DIR_FSYNC_UNSUPPORTED = frozenset({errno.EIO, ",
        f"{RULES}::test_failed_or_unsupported",
    ),
    mutant(
        "A network file system takes one process",
        "storage/store.py",
        "not fs.is_shared or fs.is_network(os.path.dirname(path))",
        "not fs.is_shared",
        f"{COMMIT}::test_network_takes_one_process",
    ),
    mutant(
        "A lifetime total that cannot be read is a damage",
        "formats/headroom.py",
        '        raise _damaged("lifetime", block)\n',
        "        block = None\n",
        "tests/unit/formats/test_foreign.py::test_lifetime_that_is_no_object",
    ),
    mutant(
        "A document whose checksum does not match is a damage",
        "formats/document.py",
        "    if _digest(whole[: checksum.start(1)], _NO_CHECKSUM, whole[checksum.end(1) :]) != checksum[1]:\n",
        "    if False:\n",
        f"{RULES}::test_damaged_is_kept_aside",
    ),
    mutant(
        "Metrics are told of an operation after tracing",
        "tracker.py",
        "        return Observers([self._tracing, self._counters, self._recent])\n",
        "        return Observers([self._counters, self._tracing, self._recent])\n",
        f"{RULES}::test_order_of_observers",
    ),
    # Prices.
    mutant(
        "A retry after a change of prices has the same content",
        "tracking/group_commit.py",
        "            keyed = None if key is None or isinstance(records, Group) else self._looked_up(records, key)\n"
        "            if self._prices is not None and not isinstance(records, Group):\n"
        "                records = self._prices.priced(records)\n",
        "            if self._prices is not None and not isinstance(records, Group):\n"
        "                records = self._prices.priced(records)\n"
        "            keyed = None if key is None or isinstance(records, Group) else self._looked_up(records, key)\n",
        f"{PRICES}::test_retry_after_a_change_of_prices",
    ),
    mutant(
        "The prices that were used are durable with the records",
        "storage/view.py",
        "            sums.add_bases(reading.sums.bases)\n",
        "",
        f"{PRICES}::test_killed_processes",
    ),
    mutant(
        "A save keeps the prices that were used",
        "formats/document.py",
        '        "prices": ascii_json(document.ledger.bases),\n',
        "",
        f"{PRICES}::test_change_of_prices",
    ),
]


def applied(edit: Edit, text: str) -> str:
    """The text of a file with the edit.

    Raises:
        ValueError: the text to replace does not occur exactly once.
    """
    if text.count(edit.old) != 1:
        raise ValueError(f"{edit.file}: this text stands there {text.count(edit.old)} times:\n{edit.old}")
    return text.replace(edit.old, edit.new)


def problem_of(some: Mutant, tree: Path) -> str:
    """The reason why a mutant survives in a copy of the tree; empty if it is killed."""
    originals = {edit.file: (tree / "savings_exporter" / edit.file).read_text() for edit in some.edits}
    changed = dict(originals)
    try:
        for edit in some.edits:
            changed[edit.file] = applied(edit, changed[edit.file])
        for file, text in changed.items():
            (tree / "savings_exporter" / file).write_text(text)
        status, output = run(some.tests, tree)
    except ValueError as error:
        return f"its patch does not apply: {error}"
    finally:
        for file, text in originals.items():
            (tree / "savings_exporter" / file).write_text(text)
    if status in (1, None):
        return ""
    return "survived" if status == 0 else f"its tests could not be run:\n{output}"


def run(tests: Sequence[str], tree: Path) -> tuple[int | None, str]:
    """Run tests in a tree. Return the exit status of pytest (None after the time limit) and its output."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=MOST_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stdout + done.stderr


def copied_tree(directory: Path) -> Path:
    """A copy of all files that the tests need."""
    skipped = shutil.ignore_patterns("__pycache__", ".*")
    for name in _TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, directory / name, ignore=skipped)
        else:
            shutil.copy(ROOT / name, directory / name)
    return directory


def main() -> int:
    parser = argparse.ArgumentParser(description="Take each rule out of the code: a test must fail.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only rules that contain this text")
    names = [name.lower() for name in parser.parse_args().names]
    chosen = [some for some in MUTANTS if not names or any(name in some.rule.lower() for name in names)]
    if not chosen:
        print("no mutant has such a name")
        return 0
    with tempfile.TemporaryDirectory() as directory:
        workers = max((os.cpu_count() or 2) // 2, 1)
        trees: SimpleQueue[Path] = SimpleQueue()
        for number in range(workers):
            trees.put(copied_tree(Path(directory, str(number))))
        tree = trees.get()
        status, output = run(sorted({test for some in chosen for test in some.tests}), tree)
        trees.put(tree)
        if status != 0:
            print(f"the tests fail without any patch:\n{output}")
            return 1

        def tried(some: Mutant) -> bool:
            tree, began = trees.get(), time.monotonic()
            problem = problem_of(some, tree)
            trees.put(tree)
            print(f"{problem or 'killed':<9} {time.monotonic() - began:5.1f} s  {some.rule}", flush=True)
            return not problem

        with ThreadPoolExecutor(workers) as pool:
            killed = sum(pool.map(tried, chosen))
    print(f"{killed} of {len(chosen)} mutants killed")
    return 0 if killed == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
