"""A service under full load is killed again and again; its clients send each request until it is answered."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import random
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from savings_exporter import SavingsTracker
from tests.crash.lab import rounds
from tests.support.service import Service, free_port, running
from tests.support.wait import WAIT_SECONDS, eventually

pytestmark = pytest.mark.needs("linux")

CLIENTS = 16


class Client(threading.Thread):
    """Sends one request after the other. Each is sent with the same key until it is answered as durable.

    ``durable`` holds what was answered: how many records and tokens, by model.
    """

    def __init__(self, name: str, port: int, stopping: threading.Event) -> None:
        super().__init__(name=name)
        self.records: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.answered = self.repeated = self.duplicates = 0
        self.problem = ""
        self._port = port
        self._stopping = stopping
        self._random = random.Random(name)
        self._connection: http.client.HTTPConnection | None = None

    def run(self) -> None:
        try:
            for number in itertools.count():
                if self._stopping.is_set():
                    return
                self._record(f"{self.name}-{number}")
        except AssertionError as error:
            self.problem = str(error)

    def _record(self, key: str) -> None:
        count = self._random.choice((1, 1, 1, 20))
        records: list[dict[str, Any]] = [
            {"model": f"m{self._random.randrange(3)}", "tokens_saved": self._random.randrange(1000)}
            for _ in range(count)
        ]
        body = json.dumps({"records": records} if count > 1 else records[0])
        for answer in self._answers(key, body):
            if answer["durable"]:
                assert answer["accepted"] == count
                self.duplicates += answer.get("duplicate", False)
                break
        self.answered += 1
        for record in records:
            self.records[record["model"]] += 1
            self.tokens[record["model"]] += record["tokens_saved"]

    def _answers(self, key: str, body: str) -> Iterator[dict[str, Any]]:
        """Send a request until the caller is satisfied. After a kill there is no answer, or only a part of it."""
        headers = {"Content-Type": "application/json", "Idempotency-Key": key}
        for attempt in itertools.count():
            self.repeated += attempt > 0
            try:
                if self._connection is None:
                    self._connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=WAIT_SECONDS)
                self._connection.request("POST", "/v1/savings", body, headers)
                response = self._connection.getresponse()
                text = response.read()
            except (OSError, http.client.HTTPException):
                self._connection = None
                threading.Event().wait(0.02)  # the next service is being started
                continue
            assert response.status in (200, 202, 503), text
            if response.status != 503:
                yield json.loads(text)


def test_killed_service(store_path: Path) -> None:
    """After 20 kills the totals are exactly what was answered as durable, and no request counts twice."""
    port, stopping = free_port(), threading.Event()
    clients = [Client(f"client{number}", port, stopping) for number in range(CLIENTS)]
    kills = rounds(20, 200)
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(_started(store_path, port))
        for client in clients:
            client.start()
        try:
            for kill in range(kills):
                answered = [client.answered for client in clients]
                # Every client has work under way when the kill comes, at any instant of it.
                eventually(
                    lambda answered=answered: all(  # type: ignore[misc]
                        client.answered > before or client.problem
                        for client, before in zip(clients, answered, strict=True)
                    ),
                    f"answers after kill {kill}",
                )
                threading.Event().wait(random.random() * 0.1)
                service.process.kill()
                service.process.wait()
                service = stack.enter_context(_started(store_path, port))
        finally:
            stopping.set()
            for client in clients:
                client.join()
        assert service.stop()[0] == 0
    assert [client.problem for client in clients if client.problem] == []
    records, tokens = sum((c.records for c in clients), Counter()), sum((c.tokens for c in clients), Counter())
    with SavingsTracker(store_path) as tracker:
        by_model = tracker.snapshot().by_model
        lifetime = tracker.snapshot().lifetime
    assert {name: totals.requests for name, totals in by_model.items()} == dict(records)
    assert {name: totals.tokens_saved for name, totals in by_model.items()} == dict(tokens)
    assert lifetime.requests == sum(records.values())
    repeated, duplicates = sum(c.repeated for c in clients), sum(c.duplicates for c in clients)
    print(f"{kills} kills, {lifetime.requests} records; {repeated} repeats, {duplicates} of them already recorded")
    # The test would show nothing if no answer had been lost after its records had become durable.
    assert duplicates > 0


def _started(store: Path, port: int) -> contextlib.AbstractContextManager[Service]:
    return running("serve", "--store", str(store), address=f"127.0.0.1:{port}")
