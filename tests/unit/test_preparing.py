"""Requests are prepared beside one another, and nobody waits for what nobody wants any more."""

import asyncio
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from servers import tiny, working

from mlx_diffgemma import Request
from mlx_diffgemma.server.app import make_app
from mlx_diffgemma.server.preparing import MOST_SLOW, Places
from mlx_diffgemma.server.thread import MlxThread
from mlx_diffgemma.server.worker import Gone, Patience, Timeout, Worker


def test_what_is_quick_does_not_wait_for_what_is_slow() -> None:
    """Two slow schemas kept everybody else waiting, even after those who had sent them left."""

    async def check() -> None:
        places, go = Places(), threading.Event()
        slow = [
            asyncio.create_task(places.prepare(lambda: go.wait(20), quick=False))
            for _ in range(MOST_SLOW + 1)
        ]
        await asyncio.sleep(0.05)
        assert await places.prepare(lambda: "quick", quick=True) == "quick"
        for task in slow:  # one waits for its place, the others' threads go on for now
            task.cancel()
        assert [type(e) for e in await asyncio.gather(*slow, return_exceptions=True)] == [
            asyncio.CancelledError
        ] * len(slow)
        last = asyncio.create_task(places.prepare(lambda: "slow", quick=False))
        await asyncio.sleep(0.05)
        assert not last.done()  # no more threads than there are places
        go.set()
        assert await asyncio.wait_for(last, 20) == "slow"

    asyncio.run(check())


class Slow(Worker):
    """Takes for ever to prepare a request, but looks whether anybody still waits."""

    model: Any = SimpleNamespace(sight=None)
    ended: BaseException | None = None
    begun, over = threading.Event(), threading.Event()

    def prepare(self, task: Any, patience: Patience | None = None) -> Any:
        assert patience
        self.begun.set()
        try:
            while not self.over.wait(0.01):
                patience.check()
        except BaseException as error:
            self.ended = error
            raise
        finally:
            self.over.set()
        return task


def asked(worker: Worker, left: Callable[[], bool]) -> tuple[int, Any]:
    """Status and answer of a chat, whose client goes away once it has `left`."""
    body = json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode()
    sent: list[Any] = []
    given = [{"type": "http.request", "body": body}]

    async def receive() -> Any:
        if given:
            return given.pop()
        while not left():
            await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "root_path": "",
        "query_string": b"",
        "headers": [
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    app: Any = make_app(MlxThread([worker], cache_bytes=0))
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 20))
    return sent[0]["status"], json.loads(b"".join(m.get("body", b"") for m in sent[1:]))


@pytest.mark.parametrize(
    ("timeout", "goes", "status", "error"),
    # Whichever of the two the thread sees first when the time is over.
    [(0.5, False, 504, (Gone, Timeout)), (60.0, True, 499, Gone)],
)
def test_time_and_leaving_end_preparation(
    timeout: float, goes: bool, status: int, error: type[Exception] | tuple[type[Exception], ...]
) -> None:
    """`--timeout` began only in the queue, and a client that left was prepared for to the end."""
    source: Any = None
    worker = Slow(source, max_batch=1, max_queue=1, timeout=timeout)
    worker.begun, worker.over = threading.Event(), threading.Event()
    found, answer = asked(worker, lambda: goes and worker.begun.is_set())
    assert found == status
    assert answer["error"]["message"]
    assert worker.over.wait(20)
    assert isinstance(worker.ended, error)


@dataclass(eq=False)
class Leaving(Patience):
    """Somebody who goes away once they have been asked so many times whether they still wait."""

    looks: int = 0

    def check(self) -> None:
        self.looks += 1
        self.gone = self.looks > 20
        super().check()


def test_a_schema_of_a_client_that_left_is_not_compiled_to_its_end() -> None:
    """It was, for as long as a schema may take: twenty seconds of a thread for nobody."""
    with working(tiny) as thread:
        (worker,) = thread.workers
        leaving = Leaving(60, time.monotonic() + 60)
        schema = {"enum": [f"option {i}" for i in range(500)]}
        with pytest.raises(Gone):
            worker.prepare(Request("x", schema=schema), leaving)
        assert leaving.looks == 21


def test_time_ends_where_the_thread_does_not_look() -> None:
    """Whoever waited for a place, or for one long piece of work, waited without an end."""
    source: Any = None
    worker = Slow(source, max_batch=1, max_queue=1, timeout=0.3)
    worker.begun, worker.over = threading.Event(), threading.Event()
    go = threading.Event()

    def deaf(task: Any, patience: Patience | None = None) -> Any:
        go.wait(10)
        return task

    worker.prepare = deaf  # type: ignore[method-assign]
    threading.Timer(3, go.set).start()  # without the limit, it would go on to the queue then
    status, answer = asked(worker, lambda: False)
    assert status == 504
    assert "longer than 0.3 seconds" in answer["error"]["message"]
