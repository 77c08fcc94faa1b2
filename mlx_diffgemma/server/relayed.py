"""Cuts a worker's stream between its events, so that an error may follow if the worker is lost."""

import json
from typing import Any

from .events import sse
from .refused import Refused, told

# Bytes of one event of a stream, or of an answer that is none.
MOST_EVENT = 1 << 26

# What ends an event, by the kind of a stream.
STREAMS = {"text/event-stream": b"\n\n", "application/x-ndjson": b"\n"}


class Events:
    """Gives the events of a stream, each whole, as they come.

    Attributes:
        count: of those that were given.
        first: what the stream began with.
    """

    def __init__(self, kind: str):
        self._mark = STREAMS[kind]
        self._rest = bytearray()
        self.count = 0
        self.first = b""

    def take(self, chunk: bytes) -> bytes:
        """Take a part of the stream, and give the events that it completes.

        Raises:
            Refused: an event is too long to be one.
        """
        begin = max(len(self._rest) - len(self._mark) + 1, 0)
        self._rest += chunk
        end = self._rest.rfind(self._mark, begin)
        if end < 0:
            if len(self._rest) > MOST_EVENT:
                raise Refused(502, "the worker's answer is none", "worker_lost")
            return b""
        end += len(self._mark)
        whole = bytes(self._rest[:end])
        del self._rest[:end]
        self.count += whole.count(self._mark)
        self.first = self.first or whole.partition(self._mark)[0]
        return whole

    def failed(self, path: str, error: Refused) -> bytes:
        """Write an error as the last event, as the clients of a route expect it."""
        facts = told(path, error)
        if path.startswith("/v1/messages"):
            return sse(facts, "error").encode()
        if path.startswith("/api/"):
            return f"{json.dumps(facts)}\n".encode()
        if path == "/v1/responses":
            return self._failed_response(error).encode()
        return sse(facts).encode()

    def _failed_response(self, error: Refused) -> str:
        """As `ResponseReply.failed` does; what the response is stands in the first event."""
        facts = {"code": error.code, "message": error.message}
        number = {"sequence_number": self.count}
        written = sse({"type": "error", **number, **facts, "param": None}, "error")
        response = _response_in(self.first)
        if response is None:
            return written
        kind, response = "response.failed", {**response, "status": "failed", "error": facts}
        number = {"sequence_number": self.count + 1}
        return written + sse({"type": kind, **number, "response": response}, kind)


def _response_in(event: bytes) -> dict[str, Any] | None:
    """The response that an event is about."""
    try:
        found = json.loads(event.partition(b"data: ")[2])["response"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
