"""Brings events from the worker's thread to a handler, and on to a client as a stream."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any

from fastapi import Request as Http
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ..diffusion.prompt_cache import ContextError
from ..errors import Error
from ..tasks.request import Draft, Prepared
from ..text.tokenizer import Tokenizer
from .events import failed_event, sse
from .leaving import unless_gone
from .refused import Refused
from .worker import Busy, NotLoaded, Patience, Stopped, Ticket, Timeout, Worker


class Stream:
    """Gives the events of several pieces of work, in the order in which they happen.

    Raises:
        Refused: the queue is full, when it is made; an error of the work, when it is read.
    """

    def __init__(self, worker: Worker, works: Sequence[Prepared[object]], patience: Patience):
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[list[Any]] = asyncio.Queue()
        self._drafts: dict[int, list[Any]] = {}  # those that nobody has taken from the queue yet
        self._tickets: list[Ticket] = []
        self._open = len(works)
        try:
            for i, work in enumerate(works):
                self._tickets.append(worker.submit(work, self._listener(i), patience))
        except Busy:
            self.close()
            raise Refused(429, "the server is busy, try again soon", "queue_full") from None

    def _listener(self, index: int) -> Callable[[object], None]:
        def listen(event: object) -> None:
            with suppress(RuntimeError):  # the loop has gone
                self._loop.call_soon_threadsafe(self._put, index, event)

        return listen

    def _put(self, index: int, event: object) -> None:
        """Queue an event. Whoever reads slowly misses drafts: thousands of them would pile up."""
        waiting = self._drafts.pop(index, None)
        if isinstance(event, Draft):
            if waiting is None:
                self._events.put_nowait(waiting := [index, event])
            waiting[1] = event
            self._drafts[index] = waiting
        else:
            self._events.put_nowait([index, event])

    def close(self) -> None:
        """Stop the work: nobody waits for it any more."""
        for ticket in self._tickets:
            self._worker.cancel(ticket)

    async def __aiter__(self) -> AsyncIterator[tuple[int, object]]:
        while self._open:
            item = await self._events.get()
            index, event = item
            if self._drafts.get(index) is item:
                del self._drafts[index]
            if event is None:
                self._open -= 1
            elif isinstance(event, Exception):
                raise _refused(event)
            else:
                yield index, event


def _refused(error: Exception) -> Refused:
    """Tell a client of an error."""
    match error:
        case Timeout():
            return Refused(504, str(error), "timeout")
        case Stopped():
            return Refused(503, str(error), "stopping")
        case NotLoaded():
            return Refused(503, str(error), "model_not_loaded")
        case ContextError():
            return Refused(400, str(error), "context_length_exceeded")
        case Error():
            return Refused(400, str(error))
    return Refused(500, "a defect of the server")


async def gathered(http: Http, stream: Stream) -> list[tuple[int, object]]:
    """Collect all events, but of the drafts only the last of each canvas."""

    async def collect() -> list[tuple[int, object]]:
        # Drafts are for those who watch; only the last of a canvas tells how sure the model was.
        found: list[tuple[int, object]] = []
        last: dict[int, Draft] = {}
        async for index, event in stream:
            if isinstance(event, Draft):
                last[index] = event
                continue
            if index in last:
                found.append((index, last.pop(index)))
            found.append((index, event))
        return found

    return await unless_gone(http, collect(), stream.close)


async def begun(http: Http, stream: Stream) -> AsyncIterator[tuple[int, object]]:
    """Give the events, once there is one: an error before it still has a status of its own."""
    events = stream.__aiter__()

    async def first() -> tuple[int, object]:
        return await anext(events)

    item = await unless_gone(http, first(), stream.close)

    async def every() -> AsyncIterator[tuple[int, object]]:
        yield item
        async for each in events:
            yield each

    return every()


class Lines(StreamingResponse):
    """Sends events and their end; an error is one more of them.

    `end` and `failed` are how OpenAI's streams have them, unless they are given.
    """

    def __init__(
        self,
        lines: AsyncIterator[str],
        stream: Stream,
        headers: dict[str, str],
        *,
        end: str = "data: [DONE]\n\n",
        failed: Callable[[Refused], str] = failed_event,
        media_type: str = "text/event-stream",
    ):
        async def every() -> AsyncIterator[str]:
            try:
                async for line in lines:
                    yield line
                if end:
                    yield end
            except Refused as error:
                yield failed(error)

        headers = {"Cache-Control": "no-store", **headers}
        super().__init__(every(), media_type=media_type, headers=headers)
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # not in the generator: a client may be gone before its first line is asked for
            self._stream.close()


def draft_event(index: int, draft: Draft, tokenizer: Tokenizer) -> str:
    """Write a step as a server-sent event of its own type, with how sure each token is."""
    facts = {
        "index": index,
        "canvas": draft.canvas,
        "step": draft.step,
        "steps": draft.steps,
        "text": draft.text,
        "accepted": sum(draft.accepted),
        "length": len(draft.accepted),
        "tokens": shown_tokens(draft, tokenizer),
        "positions": "".join(map(_sign, draft.accepted, draft.probabilities)),
    }
    return sse(facts, "draft")


def shown_tokens(draft: Draft, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Give the tokens that a reader sees, which together are the draft's text.

    Bytes of one character, which are no text by themselves, are one entry, as sure as the least of
    them.
    """
    shown = [i for i in range(draft.end) if draft.visible[i]]
    pieces = tokenizer.pieces([draft.tokens[i] for i in shown])
    found: list[dict[str, Any]] = []
    pairs = zip(shown, pieces, strict=True)
    for whole, run in groupby(pairs, key=lambda pair: "\ufffd" not in pair[1]):
        for part in [[each] for each in run] if whole else [[*run]]:
            places = [i for i, _ in part]
            text = part[0][1] if whole else tokenizer.decode([draft.tokens[i] for i in places])
            accepted = all(draft.accepted[i] for i in places)
            probability = min(draft.probabilities[i] for i in places)
            facts = {"text": text, "accepted": accepted, "probability": round(probability, 3)}
            found.append(facts)
    return found


def _sign(accepted: bool, probability: float) -> str:
    """Write a position of a canvas as `#`, or its probability as a digit."""
    return "#" if accepted else str(int(9 * probability))
