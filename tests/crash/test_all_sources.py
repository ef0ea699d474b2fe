"""One service follows all sources at once, while they are written to, rotated and damaged, and is killed again and
again. In the end each source has what was written to it.
"""

from __future__ import annotations

import http.client
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path

from savings_exporter import SavingsRecord
from savings_exporter.sources.record_queue import RecordQueue
from savings_exporter.storage.repair import inspect
from savings_exporter.watched import WatchedFile
from tests.crash.lab import LONG
from tests.support.headroom_files import HeadroomFiles
from tests.support.rtk_files import Rtk
from tests.support.service import Service, running
from tests.support.wait import WAIT_SECONDS, eventually

SECONDS = 600 if LONG else 40

LONGEST_LIFE_SECONDS = 15.0


class Writers:
    """Threads that write to all sources until they are stopped. ``saved`` is what they have saved, by source."""

    def __init__(self, directory: Path, store: Path) -> None:
        now = datetime.now(timezone.utc)
        self.headroom = HeadroomFiles(directory, begun=now - timedelta(hours=1))
        (directory / "rtk").mkdir()
        self.rtk = Rtk(directory / "rtk" / "history.db")
        self.environment = {
            "HEADROOM_WORKSPACE_DIR": str(self.headroom.directory),
            "RTK_DB_PATH": str(self.rtk.path),
        }
        self.saved = {"litellm": 0, "http": 0}
        self.service: Service | None = None
        self.is_over = False
        self._queue = RecordQueue(store)
        self._ended = threading.Event()
        self._errors: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._repeated, args=(write, pause), daemon=True)
            for write, pause in (
                (self._write_headroom, 0.02),
                (self._write_rtk, 0.05),
                (self._write_litellm, 0.02),
                (self._post, 0.05),
            )
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(WAIT_SECONDS)
        self._queue.close()
        assert self._errors == []

    def _repeated(self, write: Callable[[random.Random, int], None], pause: float) -> None:
        chance, number = random.Random(write.__name__), 0
        try:
            while not self._ended.wait(pause):
                number += 1
                write(chance, number)
        except BaseException as error:
            self._errors.append(error)

    def _write_headroom(self, chance: random.Random, number: int) -> None:
        files = self.headroom
        files.now = max(datetime.now(timezone.utc), files.now)
        if number % 7 == 0:
            files.mcp_call(chance.randrange(50))
        files.request(chance.randrange(900), tools=chance.choice([0, 7]), project="p", seconds=0)
        if number % 300 == 0:
            # The ledger is trimmed, and the document is damaged for a while.
            files.compact(files.now - timedelta(minutes=10))
            files.document.write_text("{")
        if number % 500 == 0:
            self._ended.wait(3)  # the service sees what is in the ledger
            files.flush()
            files.now += timedelta(seconds=2)
            files.crash()

    def _write_rtk(self, chance: random.Random, number: int) -> None:
        self.rtk.now = max(datetime.now(timezone.utc), self.rtk.now)
        self.rtk.command(chance.randrange(7000), chance.randrange(900))
        if number % 150 == 0:
            # Rows vanish once they are imported: RTK keeps 90 days.
            self._ended.wait(3)
            self.rtk.change("DELETE FROM commands WHERE id <= (SELECT max(id) FROM commands) - 400")
        if number % 200 == 0:
            good = self.rtk.path.with_suffix(".good")
            shutil.copy(self.rtk.path, good)
            self.rtk.path.write_bytes(b"damaged" * 2000)
            self._ended.wait(1.5)
            good.replace(self.rtk.path)

    def _write_litellm(self, chance: random.Random, number: int) -> None:
        saved = chance.randrange(500)
        record = SavingsRecord(model="gpt-4o", provider="openai", tokens_saved=saved, source="litellm")
        for _ in range(1 + number % 2):
            # LiteLLM reports some requests twice.
            self._queue.put(record, f"call-{number}")
        self.saved["litellm"] += saved

    def _post(self, chance: random.Random, number: int) -> None:
        saved = chance.randrange(500)
        saving = {"model": "m", "tokens_saved": saved, "source": "http"}
        answered = False
        while not answered:
            # The service may have been killed. The one after it takes the saving.
            with suppress(OSError, http.client.HTTPException):
                assert self.service is not None
                status, _ = self.service.post(saving, headers={"Idempotency-Key": f"post-{number}"})
                answered = status == 200
            if not answered and self._ended.wait(0.05) and self.is_over:
                return
        self.saved["http"] += saved


def test_each_source_has_what_was_written_to_it(tmp_path: Path, store_path: Path) -> None:
    chance = random.Random(0)
    writers = Writers(tmp_path, store_path)
    arguments = ("serve", "--discover", "--store", str(store_path))
    ends, kills = time.monotonic() + SECONDS, 0
    highest = 0.0
    try:
        while time.monotonic() < ends:
            with running(*arguments, env=writers.environment) as service:
                if writers.service is None:
                    writers.service = service
                    writers.start()
                writers.service = service
                assert total_of(service) >= highest
                time.sleep(min(chance.uniform(3, LONGEST_LIFE_SECONDS), max(ends - time.monotonic(), 0)))
                highest = total_of(service)
                service.process.send_signal(signal.SIGKILL)
                service.process.wait()
                kills += 1
        with running(*arguments, env=writers.environment) as service:
            writers.service = service
            writers.stop()
            writers.headroom.flush()
            expected = {**writers.saved, "rtk": writers.rtk.saved, "headroom": writers.headroom.saved}
            eventually(lambda: total_of(service) >= sum(expected.values()), "all savings")
            assert service.stop()[0] == 0
    finally:
        writers.is_over = True
    snapshot = WatchedFile(store_path).snapshot()
    assert {name: totals.tokens_saved for name, totals in snapshot.sources.items()} == expected
    assert snapshot.lifetime.tool_tokens_saved == writers.headroom.tools
    assert not snapshot.cursors or all(not cursor.rejected for cursor in snapshot.cursors.values())
    assert kills >= 3
    assert inspect(str(store_path)).problems == ()


def total_of(service: Service) -> float:
    return sum(value for name, value in service.metrics().items() if name.startswith("savings_tokens_saved_total"))
