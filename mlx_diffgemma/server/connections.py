"""Bounds the time of a connection: uvicorn waits for ever for a request's head, and for a reader.

A client that opens many connections and says little on each would take all that a process may have.
"""

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .refused import error_body

# Seconds for the head of a request, from its first byte or the connection's beginning.
HEAD_SECONDS = 10

# Seconds that what has been written may wait for a client to read some of it.
STALL_SECONDS = 60

# Connections side by side; beyond them, the one that has been silent for longest makes room, unless
# its request is being answered. macOS gives a process 256 files unless told otherwise.
MOST_CONNECTIONS = 128


class Connection(H11Protocol):
    """Speaks HTTP/1.1, and bounds how long a client may hold a connection and ask nothing."""

    head_seconds: float = HEAD_SECONDS
    stall_seconds: float = STALL_SECONDS
    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _heard: float = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._note()
        self._make_room()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._note()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timer = self.loop.call_later(self.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP as JSON, too, but not behind the beginning of another answer."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        body = json.dumps(error_body(400, msg)).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body)))]
        headers.append(("connection", "close"))
        events: list[Any] = [h11.Response(status_code=400, headers=headers)]
        for event in [*events, h11.Data(data=body), h11.EndOfMessage()]:
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    @property
    def _between(self) -> bool:
        """Say whether a head is awaited, or the rest of a request that has its answer already."""
        return self.conn.their_state is h11.IDLE or self.conn.our_state is h11.DONE

    def _note(self) -> None:
        """Note that the client has said something; if that was no whole head, time is running."""
        self._heard = self.loop.time()
        if not self._between:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_seconds, self._late)

    def _late(self) -> None:
        self._head_timer = None
        if self._between:
            self.transport.abort()

    def _make_room(self) -> None:
        others = [each for each in self.connections if isinstance(each, Connection)]
        open_ones = [each for each in others if not each.transport.is_closing()]
        if len(open_ones) <= MOST_CONNECTIONS:
            return
        silent = [
            each for each in open_ones if each._between or each.conn.their_state is h11.SEND_BODY
        ]
        if silent:
            min(silent, key=lambda each: each._heard).transport.abort()
