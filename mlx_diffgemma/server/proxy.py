"""Sends a request on to a worker, and what that answers back as it comes."""

import asyncio
import re
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from starlette.requests import Request as Http
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from .access import MOST_READ, SMALL_BODY
from .affinity import Beginnings, beginnings_of
from .backends import Backend, Backends, Patience
from .leaving import unless_gone
from .lookout import LOOK_SECONDS
from .refused import Refused
from .relayed import MOST_EVENT, STREAMS, Events

Result = TypeVar("Result")

# Seconds beyond the request's own time that a worker has to say itself that it is over.
GRACE_SECONDS = 10

# Headers of an answer that go on to the client.
_HEADERS = ("cache-control", "x-ignored-parameters")

# Characters that stand in a query as they are.
_QUERY = "!$%&'()*+,/:;=?@"

# Where responses are found by their ids, which only the worker that has written one knows.
_RESPONSES = "/v1/responses/"

_IDENTITY = re.compile(r"[\w-]{1,100}")


@dataclass
class Counters:
    """Counts what has become of requests."""

    answered: int = 0
    failed: int = 0
    cancelled: int = 0
    refused: int = 0
    tried_again: int = 0


class Proxy:
    """Answers requests by the workers that fit best.

    Args:
        backends: the workers.
        client: asks them.
        seconds: that a request may take.
    """

    def __init__(self, backends: Backends, client: httpx.AsyncClient, seconds: float):
        self.backends, self.client = backends, client
        self.seconds = seconds + GRACE_SECONDS
        self.counters = Counters()
        self._reading = asyncio.Semaphore(MOST_READ)

    async def __call__(self, http: Http) -> Response:
        """Answer a request of a route.

        Raises:
            Refused: no worker is there, all are full, or the one that had it is lost.
        """
        body, path = await http.body(), http.scope["path"]
        if {".", ".."} & {*path.split("/")}:  # whoever writes an address resolves them
            raise Refused(404, "Not Found")
        beginnings = await self._beginnings(path, body)
        left = await self._who_may(path, beginnings)
        while True:
            try:
                backend = self.backends.choose(beginnings, left)
            except Refused:
                self.counters.refused += 1
                raise
            left = [each for each in left if each is not backend]
            response = await self._by(backend, http, body, beginnings)
            if response is not None:
                return response
            self.counters.tried_again += 1
            if not left and backend.out is not None:  # what it kept is gone: others can say so
                left = [each for each in self.backends.all if each is not backend]

    async def _by(
        self, backend: Backend, http: Http, body: bytes, beginnings: Beginnings
    ) -> Response | None:
        """Have a worker answer; None if another is to be asked.

        Raises:
            Refused: the worker is lost, or the client has gone.
        """
        exchange = Exchange(self, backend, http)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(exchange.close)
            reply = await exchange.begin(body)
            if reply is None or self._is_elsewheres(backend, reply.status_code):
                return None
            if reply.status_code == 200:
                self.backends.note(beginnings, backend)
            response = await exchange.answer(reply)
            if isinstance(response, Relay):  # which closes it
                stack.pop_all()
            return response

    async def _beginnings(self, path: str, body: bytes) -> Beginnings:
        """Read what a request says of its conversation; large ones in a thread, few at a time."""
        if not body:
            return Beginnings()
        if len(body) <= SMALL_BODY:
            return beginnings_of(path, body)
        async with self._reading:
            return await asyncio.to_thread(beginnings_of, path, body)

    async def _who_may(self, path: str, beginnings: Beginnings) -> Sequence[Backend]:
        """Find the worker that keeps the response in question; all may where nobody does."""
        asked = path.removeprefix(_RESPONSES) if path.startswith(_RESPONSES) else None
        identity, there = asked or beginnings.previous, self.backends.there
        if identity is None or not _IDENTITY.fullmatch(identity) or len(there) < 2:
            return self.backends.all
        keeps = await asyncio.gather(*(self._keeps(each, identity) for each in there))
        return [each for each, kept in zip(there, keeps, strict=True) if kept] or self.backends.all

    async def _keeps(self, backend: Backend, identity: str) -> bool:
        url = f"http://{backend.address}{_RESPONSES}{identity}"
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                return (await self.client.head(url)).status_code == 200
        except (TimeoutError, httpx.HTTPError):
            return False

    def _is_elsewheres(self, backend: Backend, status: int) -> bool:
        """Say whether another worker is to be asked; leave this one out if it cannot answer."""
        if status in (401, 403):
            self.backends.leave_out(backend, "it wants another key (--api-key)")
        elif status == 503:
            self.backends.leave_out(backend, "it stops")
        return status in (401, 403, 429, 503)


class Exchange:
    """Has one request answered by one worker, which counts it as under way until `close`."""

    def __init__(self, proxy: Proxy, backend: Backend, http: Http):
        self._proxy, self._backend, self._http = proxy, backend, http
        self._patience = Patience(proxy.seconds)
        self._reply: httpx.Response | None = None
        backend.begin(self._patience)

    async def begin(self, body: bytes) -> httpx.Response | None:
        """Send the request, and give what the answer begins with.

        None is given if the request cannot have reached the worker.

        Raises:
            Refused: the worker is lost, or the client has gone.
        """
        headers = {"Content-Type": "application/json"} if body else {}
        request = self._proxy.client.build_request(
            self._http.method, self._url(), headers=headers, content=body or None
        )

        async def send() -> httpx.Response:
            async with self._patience.wait():
                return await self._proxy.client.send(request, stream=True)

        try:
            self._reply = await self._unless_gone(send())
        except (httpx.ConnectError, httpx.ConnectTimeout):
            self._proxy.backends.leave_out(self._backend, "it cannot be connected to")
        return self._reply

    def _url(self) -> httpx.URL:
        """The worker's address, with path and query as they came; nothing else leads anywhere.

        Raises:
            Refused: no client takes so long an address.
        """
        path = self._http.scope["path"]
        query = self._http.scope["query_string"].decode("latin-1")
        asked = quote(path) + ("?" + quote(query, safe=_QUERY) if query else "")
        try:
            url = httpx.URL(f"http://{self._backend.address}")
            return url.copy_with(raw_path=asked.encode())
        except httpx.InvalidURL:
            raise Refused(404, "Not Found") from None

    async def answer(self, reply: httpx.Response) -> Response:
        """Give what the worker answers: a stream as it comes, anything else once it is whole.

        Raises:
            Refused: the worker is lost, or the client has gone.
        """
        kind = reply.headers.get("content-type", "").partition(";")[0].strip().lower()
        bounded = {"content-length", "transfer-encoding"} & reply.headers.keys()
        known = kind in STREAMS or kind == "application/json"
        if not (known and bounded) or "content-encoding" in reply.headers:
            raise self._failed(Refused(502, "the worker's answer is none", "worker_lost"))
        headers = {name: reply.headers[name] for name in _HEADERS if name in reply.headers}
        if kind in STREAMS:
            return Relay(self, Events(kind), kind, reply.status_code, headers)
        whole = await self._unless_gone(self._whole())
        self._proxy.counters.answered += 1
        return Response(whole, reply.status_code, headers, kind)

    async def _unless_gone(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Do a part of the exchange, which ends where it fails or the client goes."""
        try:
            return await unless_gone(self._http, work, lambda: None)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise
        except Refused as error:
            raise self._failed(error) from None
        except (TimeoutError, httpx.HTTPError, httpx.StreamError) as error:
            raise self._failed(self._refused(error)) from None

    async def _whole(self) -> bytes:
        found = bytearray()
        async for chunk in self._chunks():
            found += chunk
            if len(found) > MOST_EVENT:
                raise Refused(502, "the worker's answer is none", "worker_lost")
        return bytes(found)

    async def _chunks(self) -> AsyncIterator[bytes]:
        assert self._reply is not None
        chunks = self._reply.aiter_raw()
        while True:
            async with self._patience.wait():
                chunk = await anext(chunks, None)
            if chunk is None:
                return
            yield chunk

    async def events(self, events: Events) -> AsyncIterator[bytes]:
        """Give the events of a stream; an error is one more of them."""
        path = self._http.scope["path"]
        try:
            async for chunk in self._chunks():
                if whole := events.take(chunk):
                    yield whole
            self._proxy.counters.answered += 1
        except Refused as error:
            yield events.failed(path, self._failed(error))
        except (TimeoutError, httpx.HTTPError, httpx.StreamError) as error:
            yield events.failed(path, self._failed(self._refused(error)))

    def _refused(self, error: Exception) -> Refused:
        """Tell a client what has become of its request."""
        if isinstance(error, TimeoutError) and not self._patience.lost:
            return Refused(504, "the request took too long", "timeout")
        self._backend.look.set()
        told = "the worker that had this request is lost; what is asked again goes to another"
        return Refused(502, told, "worker_lost")

    def _failed(self, error: Refused) -> Refused:
        counters = self._proxy.counters
        if error.status == 499:
            counters.cancelled += 1
        else:
            counters.failed += 1
        return error

    async def close(self) -> None:
        """Let the worker go; it stops what it has not done yet."""
        self._backend.end(self._patience)
        if self._reply is not None:
            with suppress(httpx.HTTPError):
                await self._reply.aclose()


class Relay(StreamingResponse):
    """Sends a worker's stream on to a client, and lets go of the worker at its end."""

    def __init__(
        self, exchange: Exchange, events: Events, kind: str, status: int, headers: dict[str, str]
    ):
        super().__init__(exchange.events(events), status, headers, kind)
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # not in the generator: a client may be gone before its first event is asked for
            await self._exchange.close()
