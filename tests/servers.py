"""Servers to ask: in a thread of this process, and one that is a process of its own."""

import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import anthropic
import httpx
import ollama
import openai
import pytest
import uvicorn
from gemma import gemma_tokenizer
from random_model import scripted, untrained
from starlette.types import ASGIApp

from mlx_diffgemma import DiffusionGemma, Tokenizer, load
from mlx_diffgemma.checkpoint.load import EMBEDDED
from mlx_diffgemma.server.access import Access
from mlx_diffgemma.server.app import make_app
from mlx_diffgemma.server.balancer import make_front
from mlx_diffgemma.server.connections import Connection
from mlx_diffgemma.server.thread import MlxThread
from mlx_diffgemma.server.worker import Resident, Worker
from mlx_diffgemma.tasks import request as requests

SUDOKU = Path(__file__).parent / "data" / "sudoku6"

Load = Callable[[], tuple[DiffusionGemma, Tokenizer]]


class Server:
    """A running server; `url` is its address."""

    def __init__(self, url: str):
        self.url = url
        self.port = int(url.rsplit(":", 1)[1])

    def client(self, **settings: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="x", max_retries=0, timeout=60, **settings
        )

    def anthropic(self, key: str = "x") -> anthropic.Anthropic:
        return anthropic.Anthropic(base_url=self.url, api_key=key, max_retries=0, timeout=60)

    def ollama(self) -> ollama.Client:
        return ollama.Client(host=self.url, timeout=60)

    def post(self, path: str, body: object, **settings: Any) -> httpx.Response:
        # As json= does, but halves of surrogate pairs can be sent, too.
        content = json.dumps(body)
        headers = {"Content-Type": "application/json"}
        return httpx.post(
            f"{self.url}{path}", content=content, headers=headers, timeout=60, **settings
        )

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        return float(re.search(rf"^diffgemma_{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)[1])  # type: ignore[index]


class Process(Server):
    """A server that is a process of its own."""

    def __init__(self, process: subprocess.Popen[str], url: str):
        super().__init__(url)
        self.process = process

    def memory(self) -> int:
        """Bytes of the process that are in memory."""
        shown = subprocess.check_output(["ps", "-o", "rss=", "-p", str(self.process.pid)])
        return 1024 * int(shown)


@contextmanager
def process(*arguments: str) -> Iterator[Process]:
    """A server with these arguments, on a free port."""
    made = subprocess.Popen(
        [sys.executable, "-m", "mlx_diffgemma", "serve", "--port", "0", *arguments],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert made.stderr
    said: list[str] = []
    for line in made.stderr:
        said.append(line)
        if found := re.search(r"running on (http://\S+)", line):
            break
    else:
        raise AssertionError("".join(said))
    threading.Thread(target=made.stderr.read, daemon=True).start()
    try:
        yield Process(made, found[1].replace("0.0.0.0", "127.0.0.1"))
    finally:
        made.terminate()
        made.wait(30)


@contextmanager
def listening(
    app: ASGIApp, http: type[Connection] = Connection, lifespan: Literal["on", "off"] = "off"
) -> Iterator[uvicorn.Server]:
    """An application on a free port, in a thread; whoever is still asked at the end is cut off."""
    config = uvicorn.Config(
        app,
        port=0,
        http=http,
        ws="none",
        lifespan=lifespan,
        log_level="critical",
        timeout_keep_alive=60,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield server
    finally:
        server.should_exit = True
        thread.join()


def address(server: uvicorn.Server) -> str:
    return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


@contextmanager
def working(
    model: Load = load,
    *,
    max_batch: int = 4,
    max_queue: int = 64,
    timeout: float = 600,
    name: str = "tiny",
    aliases: Sequence[str] = (),
) -> Iterator[MlxThread]:
    """A thread that has loaded the small model, or another."""
    worker = Worker(
        Resident(model),
        name=name,
        aliases=aliases,
        max_batch=max_batch,
        max_queue=max_queue,
        timeout=timeout,
    )
    thread = MlxThread([worker], cache_bytes=10**9)
    thread.start()
    try:
        yield thread
    finally:
        thread.stop()


@contextmanager
def serving(
    model: Load = load,
    *,
    max_batch: int = 4,
    max_queue: int = 64,
    timeout: float = 600,
    **settings: Any,
) -> Iterator[Server]:
    """A server in a thread, with settings of `Access`."""
    with working(model, max_batch=max_batch, max_queue=max_queue, timeout=timeout) as thread:
        app = make_app(thread, Access(**settings))
        with listening(app) as server:
            yield Server(address(server))


@contextmanager
def fronting(*addresses: str, **settings: Any) -> Iterator[Server]:
    """One address before workers at these, in a thread: settings of `Access` and `make_front`."""
    more = {name: settings.pop(name) for name in ("tell", "seconds") if name in settings}
    app = make_front(addresses, Access(**settings), **{"tell": lambda told: None, **more})
    with listening(app, lifespan="on") as server:
        yield Server(address(server))


def sudoku_model() -> tuple[DiffusionGemma, Tokenizer]:
    return load(str(SUDOKU))


def tiny(kind: type[DiffusionGemma] = DiffusionGemma) -> tuple[Any, Tokenizer]:
    """A model that knows nothing, with canvases of 24 tokens and a context of ten of them."""
    tokenizer = Tokenizer.from_directory(EMBEDDED)
    return untrained(tokenizer.vocab_size, 24, context=240, kind=kind), tokenizer


class Breaking(DiffusionGemma):
    """Breaks in its third pass."""

    def decode(self, passes: Any, evaluate: Any = None) -> Any:
        self.passes = getattr(self, "passes", 0) + 1
        if self.passes % 3 == 0:
            raise RuntimeError("broken")
        return super().decode(passes, evaluate)


def writing(*script: str, context: int = 4096) -> Load:
    """A model that writes these answers in turn, the last for ever, and whose template knows tools
    and thoughts. An answer that is longer than a canvas takes several."""

    def made() -> tuple[DiffusionGemma, Tokenizer]:
        tokenizer = gemma_tokenizer()
        model = scripted()
        answers = [*script, *script[-1:] * 99]
        model.context = context
        model.begin(
            *(
                ids[i : i + 64]
                for ids in ([*tokenizer.encode(answer), 6] for answer in answers)
                for i in range(0, len(ids), 64)
            )
        )
        return model, tokenizer

    return made


def leave(server: Server, path: str, body: Any, when: Callable[[], bool]) -> None:
    """Ask, and close the connection once something is so."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(head.encode() + data)
        wait_until(when)


@contextmanager
def reading(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Collects the chats that are encoded, as the template has written them."""
    found: list[str] = []
    encode = requests.encode_text

    def noted(tokenizer: Tokenizer, text: str, *rest: Any) -> list[int]:
        found.append(text)
        return encode(tokenizer, text, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(requests, "encode_text", noted)
        yield found


def wait_until(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)
