"""Large answers keep no other request waiting, and take a bounded amount of memory while nobody reads them."""

from __future__ import annotations

import asyncio
import gzip
import threading
import tracemalloc
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response

from savings_exporter.service.answers import Answers, accepts_gzip
from savings_exporter.service.problems import RefusedError

LARGE = b"saved " * 100_000


def asked(accepted: str = "") -> Request:
    return Request({"type": "http", "method": "GET", "headers": [(b"accept-encoding", accepted.encode())]})


async def sent(response: Response) -> list[Any]:
    messages: list[Any] = []

    async def send(message: Any) -> None:
        messages.append(message)

    async def receive() -> Any:
        await asyncio.Event().wait()

    await response({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)
    return messages


def test_large_answer_is_sent_in_parts() -> None:
    async def run() -> list[Any]:
        return await sent(await Answers().response(asked(), "kind", lambda: LARGE, {}))

    start, *parts = asyncio.run(run())
    assert (b"content-length", b"%d" % len(LARGE)) in start["headers"]
    assert b"".join(part["body"] for part in parts) == LARGE
    assert max(len(part["body"]) for part in parts) < len(LARGE) / 5
    assert [part["more_body"] for part in parts] == [True] * (len(parts) - 1) + [False]


def test_requests_at_once_share_an_answer() -> None:
    """An answer that was begun before a request is too old for it."""
    begun, go_on = threading.Event(), threading.Event()
    built: list[int] = []

    def build() -> bytes:
        built.append(len(built))
        begun.set()
        assert go_on.wait(30)
        return b"%d" % built[-1]

    async def run() -> list[bytes]:
        answers = Answers()
        first = asyncio.create_task(answers.built("kind", build))
        await asyncio.to_thread(begun.wait, 30)
        others = [asyncio.create_task(answers.built("kind", build)) for _ in range(20)]
        await asyncio.sleep(0)
        go_on.set()
        return [await task for task in (first, *others)]

    assert asyncio.run(run()) == [b"0"] + [b"1"] * 20
    assert built == [0, 1]


def test_client_that_goes_away_leaves_the_answer_to_others() -> None:
    async def run() -> bytes:
        answers = Answers()
        going, staying = (asyncio.create_task(answers.built("kind", lambda: b"built")) for _ in range(2))
        await asyncio.sleep(0)
        going.cancel()
        return await staying

    assert asyncio.run(run()) == b"built"


def test_kinds_that_clients_choose_are_forgotten() -> None:
    """A scrape that names a version of its format has a kind of its own."""
    answers = Answers()

    async def run(versions: range) -> None:
        for version in versions:
            await answers.response(asked(), f"version={version}", lambda: b"", {})

    asyncio.run(run(range(10)))
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        asyncio.run(run(range(10, 1010)))
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 100_000


def test_unread_answers_are_bounded() -> None:
    async def run() -> int:
        answers, unread = Answers(most_bytes=3 * len(LARGE)), []

        async def never(_message: Any) -> None:
            await asyncio.Event().wait()

        async def send_one() -> None:
            response = await answers.response(asked(), "kind", lambda: LARGE[:-1] + b".", {})
            await response({"type": "http"}, never, never)  # type: ignore[arg-type]

        async def send_many() -> None:
            for _ in range(20):
                unread.append(asyncio.create_task(send_one()))
                await asyncio.wait(unread[-1:], timeout=0.05)
                if unread[-1].done():
                    await unread[-1]

        with pytest.raises(RefusedError) as refused:
            await send_many()
        assert (refused.value.status, refused.value.retry) == (503, True)
        for task in unread:
            task.cancel()
        await asyncio.wait(unread)
        # They are gone, so that the next one is answered.
        await answers.response(asked(), "kind", lambda: LARGE, {})
        return len(unread)

    assert asyncio.run(run()) == 5


def test_streams_wait_for_each_other() -> None:
    async def run() -> list[Any]:
        answers = Answers()
        first, second = [await answers.stream(asked(), [LARGE], {}) for _ in range(2)]
        third = asyncio.create_task(answers.stream(asked("gzip"), [b"a", b"b"], {}))
        await asyncio.wait([third], timeout=0.05)
        assert not third.done()
        await sent(first)
        messages = await sent(await third)
        await sent(second)
        return messages

    start, *parts = asyncio.run(run())
    assert (b"content-encoding", b"gzip") in start["headers"]
    assert gzip.decompress(b"".join(part["body"] for part in parts)) == b"ab"


@pytest.mark.parametrize(
    ("accepted", "is_taken"),
    [
        ("", False),
        ("gzip", True),
        ("deflate, GZIP;q=0.5", True),
        ("gzip;q=0", False),
        ("gzip; q=0.00, br", False),
        ("*", True),
        ("br, x-gzip", False),
    ],
)
def test_compressed_for_clients_that_take_it(accepted: str, is_taken: bool) -> None:
    async def run() -> bytes:
        start, *parts = await sent(await Answers().response(asked(accepted), "kind", lambda: LARGE, {}))
        assert ((b"content-encoding", b"gzip") in start["headers"]) == is_taken
        return b"".join(part["body"] for part in parts)

    body = asyncio.run(run())
    assert accepts_gzip(asked(accepted)) == is_taken
    assert (gzip.decompress(body) if is_taken else body) == LARGE
