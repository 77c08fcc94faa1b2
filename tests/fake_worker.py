"""Workers that are none: they speak to a front as a test wants, down to the bytes."""

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

# Answers a request of a path, with a body, on a connection that is closed afterwards.
Handler = Callable[[socket.socket, str, bytes], None]

MODEL = {"id": "tiny", "context_length": 240, "canvas_length": 24}

HEALTH = {"status": "ok", "waiting": 0, "running": 0, "max_batch": 2, "max_queue": 2}


def written(status: int, value: Any, **headers: str) -> bytes:
    """A whole answer in JSON."""
    body = json.dumps(value).encode()
    lines = {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
    return head(status, lines) + body


def head(status: int, headers: dict[str, str]) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} x\r\n{lines}\r\n".encode()


STREAM = head(200, {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"})

LINES = head(200, {"Content-Type": "application/x-ndjson", "Transfer-Encoding": "chunked"})


def chunk(data: str) -> bytes:
    return f"{len(data.encode()):x}\r\n{data}\r\n".encode()


class Fake:
    """A worker whose answers are those of a handler, and which says of itself what is in `facts`.

    Attributes:
        asked: paths and bodies of what it was asked, /health and /v1/models not counted.
        facts: what it answers there, or bytes that are sent as they are.
    """

    def __init__(self, handle: Handler):
        self.handle = handle
        self.asked: list[tuple[str, bytes]] = []
        self.heads: list[bytes] = []
        self.facts: dict[str, Any] = {"/health": HEALTH, "/v1/models": {"data": [MODEL]}}
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        threading.Thread(target=self._listen, args=(self._listener,), daemon=True).start()

    def _listen(self, listener: socket.socket) -> None:
        while True:
            try:
                made, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(made,), daemon=True).start()

    def _answer(self, made: socket.socket) -> None:
        with made, suppress(OSError):
            data = b""
            while b"\r\n\r\n" not in data:
                if not (more := made.recv(1 << 16)):
                    return
                data += more
            first, _, body = data.partition(b"\r\n\r\n")
            found = re.search(rb"(?i)\r\ncontent-length: *(\d+)", first)
            length = int(found[1]) if found else 0
            while len(body) < length:
                body += made.recv(1 << 16)
            path = first.split()[1].decode()
            if path in self.facts:
                facts = self.facts[path]
                made.sendall(facts if isinstance(facts, bytes) else written(200, facts))
                return
            self.asked.append((path, body))
            self.heads.append(first)
            self.handle(made, path, body)

    def stop(self) -> None:
        """Take no more connections: whoever tries is told so at once."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def start(self) -> None:
        """Take connections again, at the same address."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._listen, args=(self._listener,), daemon=True).start()


def fine(made: socket.socket, path: str, body: bytes) -> None:
    """Answers anything."""
    made.sendall(written(200, {"text": "fine"}))


def busy(made: socket.socket, path: str, body: bytes) -> None:
    """Has no room."""
    made.sendall(written(429, {"error": {"message": "busy"}}, Retry_After="2"))


@contextmanager
def fakes(*handlers: Handler) -> Iterator[list[Fake]]:
    """A worker for each handler."""
    made = [Fake(handle) for handle in handlers]
    try:
        yield made
    finally:
        for each in made:
            each.stop()
