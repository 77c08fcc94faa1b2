"""Checks a request before it meets a route: who asks, how, and with how much."""

import asyncio
import hmac
import ipaddress
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as AsgiMessage

from .json_body import JsonError, read_json
from .page import PREFIX
from .refused import Refused, refusal

# Names of this machine that only it can reach.
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")

# Seconds in which a body has to arrive, all of it: 4 MB over a megabit and a half.
BODY_SECONDS = 30

# Digits of a Content-Length; no body that anybody allows has more.
MOST_LENGTH_DIGITS = 15

# Bytes of a body that are read in passing, within milliseconds. Larger ones are read in a thread,
# few at a time, while others go on.
SMALL_BODY = 64 << 10

MOST_READ = 2

# Routes whose bodies may have pictures beside their text.
PICTURE_ROUTES = (
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/api/chat",
    "/api/generate",
    "/v1/fill",
    "/v1/choose",
)

# Bytes of all bodies together that are larger than any text may be, until they are answered.
MOST_HELD = 256_000_000

_JSON = re.compile(rb"application/(?:json|[\w.+-]+\+json)\s*(?:;.*)?", re.IGNORECASE | re.DOTALL)


def _headers(scope: Scope) -> dict[bytes, bytes]:
    return {name.lower(): value for name, value in scope["headers"]}


def _is_open(path: str) -> bool:
    """Say whether a path needs no key: the page asks for one itself."""
    return path in ("/", "/health") or path.startswith(PREFIX)


@dataclass(frozen=True)
class Access:
    """Who may ask, and how much.

    Attributes:
        api_key: what clients have to send, if anything.
        cors: origins whose pages may ask.
        loopback: only this machine can reach the server, so it answers only to `localhost` and
            the like; otherwise also to addresses and to this machine's own name.
        allowed_hosts: further names that it answers to; `*` is any.
        most_bytes: of a request's body, its pictures not counted.
        picture_bytes: of the pictures of a body, where a model sees any.
    """

    api_key: str | None = None
    cors: Sequence[str] = ()
    loopback: bool = True
    allowed_hosts: Sequence[str] = ()
    most_bytes: int = 4 << 20
    picture_bytes: int = 24 << 20

    def guard(self, app: Starlette) -> None:
        """Put all checks of this file before an application."""
        # The last one added is met first.
        app.add_middleware(
            Limits,
            most_bytes=self.most_bytes,
            picture_bytes=self.picture_bytes,
            api_key=self.api_key,
        )
        if self.cors:
            app.add_middleware(
                CORSMiddleware,
                allow_origins=list(self.cors),
                allow_methods=["*"],
                allow_headers=["*"],
            )
        app.add_middleware(
            Gate, loopback=self.loopback, allowed_hosts=self.allowed_hosts, origins=self.cors
        )


class Gate:
    """Checks, as ASGI, the name that is asked for, and whose page asks through a browser.

    Args:
        app: what lies behind.
        loopback: only this machine can reach the server. If not, it also answers to addresses,
            which nobody can point elsewhere, and to this machine's own name.
        allowed_hosts: further names; `*` is any.
        origins: whose pages may ask besides our own; `*` is any.
    """

    def __init__(
        self, app: ASGIApp, *, loopback: bool, allowed_hosts: Sequence[str], origins: Sequence[str]
    ):
        self._app = app
        self._addresses = not loopback
        self._names = {*LOOPBACK, *map(str.lower, allowed_hosts)}
        if not loopback:
            own = socket.gethostname().lower()
            self._names |= {own, f"{own.removesuffix('.local')}.local"}
        self._origins = frozenset(origin.lower() for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # no route speaks it
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "http":
            headers = _headers(scope)
            if not self._is_ours(headers.get(b"host", b"")):
                # A page elsewhere may point its own name at this machine and ask as its own.
                told = "this server does not answer to this name (--allowed-host)"
                await refusal(Refused(403, told), scope["path"])(scope, receive, send)
                return
            if self._is_foreign(scope["method"], headers):
                told = "pages of other origins may not ask this server (--cors)"
                await refusal(Refused(403, told), scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_ours(self, host: bytes) -> bool:
        name = host_name(host)
        return (
            name in self._names
            or "*" in self._names
            or (self._addresses and _is_address(name.strip("[]")))
        )

    def _is_foreign(self, method: str, headers: dict[bytes, bytes]) -> bool:
        """Say whether a browser asks on behalf of a page that is not ours."""
        origin = headers.get(b"origin")
        if origin is not None:
            given = origin.decode("latin-1").lower()
            host = headers.get(b"host", b"").decode("latin-1").lower()
            own = bool(host) and given.partition("://")[2] == host
            return not (own or given in self._origins or "*" in self._origins)
        # Without an origin come links, which may be followed, and images, scripts and the like.
        followed = headers.get(b"sec-fetch-mode") == b"navigate" and method in ("GET", "HEAD")
        site = headers.get(b"sec-fetch-site", b"none")
        return site not in (b"none", b"same-origin") and not followed


def host_name(host: bytes) -> str:
    """Take the port off a Host header."""
    name = host.decode("latin-1").lower()
    return name if name.endswith("]") else name.rsplit(":", 1)[0]


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Limits:
    """Checks, as ASGI, the API key, and a body's kind, size, time and JSON.

    Args:
        app: what lies behind.
        most_bytes: of a body, its pictures not counted.
        picture_bytes: of the pictures of a body, on the routes that take them.
        api_key: what clients have to send, if anything.
        seconds: in which a body has to arrive.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        most_bytes: int,
        picture_bytes: int = 0,
        api_key: str | None,
        seconds: float = BODY_SECONDS,
    ):
        self._app = app
        self._most, self._pictures = most_bytes, picture_bytes
        self._held = 0  # bytes of large bodies
        # A command line may hold bytes that are no text.
        self._key = None if api_key is None else api_key.encode("utf-8", "surrogateescape")
        self._seconds = seconds
        self._reading = asyncio.Semaphore(MOST_READ)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with self._holding() as hold:
            await self._take(scope, receive, send, hold)

    async def _take(
        self, scope: Scope, receive: Receive, send: Send, hold: Callable[[int], None]
    ) -> None:
        """Receive and check a request, and pass it on."""
        try:
            self._check_head(scope)
            body = await self._body(receive, self._most_of(scope), hold)
            if body is None:
                return
            if scope["method"] == "POST":
                await self._check_json(body)
        except Refused as error:
            await refusal(error, scope["path"])(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # whoever sends the answer leaves its body out
            scope = {**scope, "method": "GET"}
        held = [body]

        async def replay() -> AsgiMessage:
            if held:
                return {"type": "http.request", "body": held.pop(), "more_body": False}
            return await receive()

        await self._app(scope, replay, send)

    def _most_of(self, scope: Scope) -> int:
        return self._most + self._pictures * (scope["path"] in PICTURE_ROUTES)

    @contextmanager
    def _holding(self) -> Iterator[Callable[[int], None]]:
        """Count a body that is larger than any text may be, until its answer has ended.

        What is given is to be called with the bytes received so far; it raises `Refused` where all
        such bodies have too many.
        """
        mine = 0

        def hold(size: int) -> None:
            nonlocal mine
            if size <= self._most:
                return
            self._held += size - mine
            mine = size
            if self._held > MOST_HELD:
                raise Refused(429, "the server holds too many large bodies, try again soon", "busy")

        try:
            yield hold
        finally:
            self._held -= mine

    def _check_head(self, scope: Scope) -> None:
        """Raise `Refused` for what need not be read."""
        headers = _headers(scope)
        if self._key is not None and not _is_open(scope["path"]):
            given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
            other = headers.get(b"x-api-key", b"")
            # Both are compared whatever comes of the first: the time tells nothing.
            if not hmac.compare_digest(given, self._key) | hmac.compare_digest(other, self._key):
                raise Refused(401, "a valid API key is needed")
        length = headers.get(b"content-length", b"0")
        digits = length.isdigit() and len(length) <= MOST_LENGTH_DIGITS
        if not digits or int(length) > self._most_of(scope):
            raise self._too_large(self._most_of(scope))
        kind = headers.get(b"content-type", b"")
        if scope["method"] == "POST" and not _JSON.fullmatch(kind):
            # Forms and plain text are what any page may send anywhere without being asked.
            raise Refused(415, "the Content-Type of a request has to be application/json")
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise Refused(415, "bodies are read as they are, without a Content-Encoding")

    @staticmethod
    def _too_large(most: int) -> Refused:
        return Refused(413, f"bodies may have {most} bytes")

    async def _body(self, receive: Receive, most: int, hold: Callable[[int], None]) -> bytes | None:
        """Receive the whole body; None if the client has gone.

        Raises:
            Refused: it is too large or too slow.
        """
        body = bytearray()
        try:
            async with asyncio.timeout(self._seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise self._too_large(most)
                    hold(len(body))
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise Refused(408, f"the body took longer than {self._seconds:g} seconds") from None

    async def _check_json(self, body: bytes) -> None:
        try:
            if len(body) <= min(SMALL_BODY, self._most):
                read_json(body)
                return
            async with self._reading:
                pictures = await asyncio.to_thread(_pictures_of, body)
            if len(body) - pictures > self._most:
                raise Refused(413, f"bodies may have {self._most} bytes beside their pictures")
        except JsonError as error:
            raise Refused(400, f"the body is refused: {error}") from None


def _pictures_of(body: bytes) -> int:
    """Check a large body, and count its characters that are pictures; raises `JsonError`."""
    return bytes_of_pictures(read_json(body))


def bytes_of_pictures(value: Any) -> int:
    """Count characters of a body's texts that are data: URLs, or base64 as Anthropic and Ollama
    have it; `read_json` has bounded the value."""
    count, waiting = 0, [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            rest = dict(each)
            if rest.get("type") == "base64" and isinstance(rest.get("data"), str):
                count += len(rest.pop("data"))
            if isinstance(images := rest.get("images"), list):
                count += sum(len(image) for image in images if isinstance(image, str))
                rest["images"] = [image for image in images if not isinstance(image, str)]
            waiting += rest.values()
        elif isinstance(each, list):
            waiting += each
        elif isinstance(each, str) and each[:5].lower() == "data:":
            count += len(each)
    return count
