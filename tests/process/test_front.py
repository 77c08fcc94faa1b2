"""One address before several servers: `serve --workers`."""

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import anthropic
import httpx
import ollama
import openai
import pytest
from fake_worker import HEALTH, LINES, MODEL, STREAM, Fake, busy, chunk, fakes, fine, head, written
from servers import (
    SUDOKU,
    Server,
    fronting,
    leave,
    process,
    serving,
    sudoku_model,
    wait_until,
    writing,
)

from mlx_diffgemma.server import lookout, proxy
from mlx_diffgemma.server.backends import Backend

CHAT = "/v1/chat/completions"

HELLO: list[Any] = [{"role": "user", "content": "hello"}]

LONG = {"messages": [{"role": "user", "content": "1" * 50}], "max_tokens": 3000, "seed": 0}


@pytest.fixture(autouse=True, scope="module")
def _soon() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lookout, "LOOK_EVERY", 0.05)
        yield


@pytest.fixture(scope="module")
def two() -> Iterator[list[Server]]:
    """Two servers with one answer."""
    with serving(writing("Fine.")) as one, serving(writing("Fine.")) as other:
        yield [one, other]


@pytest.fixture(scope="module")
def front(two: list[Server]) -> Iterator[Server]:
    """What stands before them."""
    with fronting(*(f"127.0.0.1:{each.port}" for each in two)) as server:
        wait_until(lambda: healthy(server) == len(two))
        yield server


@pytest.fixture(scope="module")
def single() -> Iterator[tuple[Fake, Server]]:
    """A worker that is none, and what stands before it."""
    with fakes(fine) as (worker,), fronting(worker.address) as server:
        wait_until(lambda: healthy(server) == 1)
        yield worker, server


# Asked again and again: one of its own would read certificates each time.
CLIENT = httpx.Client(timeout=60)


def healthy(front: Server) -> int:
    return CLIENT.get(f"{front.url}/health").json()["workers"].count("ok")


def metric(front: Server, name: str) -> list[int]:
    text = CLIENT.get(f"{front.url}/metrics").text
    return [int(each) for each in re.findall(rf"^diffgemma_{name}(?:{{.*}})? (\d+)$", text, re.M)]


def told(reply: httpx.Response, status: int) -> str:
    assert reply.status_code == status, reply.text[:300]
    error = reply.json()["error"]
    return str(error if isinstance(error, str) else error["message"])


def test_conversations_stay_where_they_began(front: Server, two: list[Server]) -> None:
    """What a worker has read of them is not read again, and new ones are spread."""
    before = [each.metric("answered_total") for each in two]
    client = front.client()
    for i in range(4):
        chat = [{"role": "user", "content": f"hello, I am number {i}"}]
        read = 0
        for _ in range(3):
            done = client.chat.completions.create(model="tiny", messages=chat, seed=0, max_tokens=9)
            assert done.usage
            assert done.usage.prompt_tokens_details
            assert (done.usage.prompt_tokens_details.cached_tokens or 0) >= read
            read = done.usage.prompt_tokens
            answer = done.choices[0].message.content or ""
            chat += [{"role": "assistant", "content": answer}, {"role": "user", "content": "Why?"}]
    after = [each.metric("answered_total") for each in two]
    assert [now - then for now, then in zip(after, before, strict=True)] == [6, 6]


def test_the_clients_of_all_apis_are_answered(front: Server) -> None:
    wanted = "Fine."
    asked: Any = {"model": "tiny", "messages": HELLO}
    with front.anthropic().messages.stream(**asked, max_tokens=100, extra_body={"seed": 0}) as got:
        assert got.get_final_text() == wanted
    parts = front.ollama().chat("tiny", HELLO, options={"seed": 0}, stream=True)
    assert "".join(part.message.content or "" for part in parts) == wanted
    stream = front.client().chat.completions.create(**asked, seed=0, stream=True)
    assert "".join(each.choices[0].delta.content or "" for each in stream) == wanted
    assert [each.id for each in front.client().models.list()] == ["tiny"]
    page = httpx.get(front.url)
    assert "<title>" in page.text
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert set(httpx.get(f"{front.url}/openapi.json").json()["paths"]) > {CHAT}


def test_a_response_is_gone_on_with_where_it_is_kept(front: Server, two: list[Server]) -> None:
    client, seed = front.client(), {"extra_body": {"seed": 0}}
    last = None
    for i in range(4):  # each worker would have been the next for one of them
        done = client.responses.create(
            model="x", input="hello", previous_response_id=last, max_output_tokens=9, **seed
        )
        last = done.id
        assert client.responses.retrieve(last).id == last
        client.chat.completions.create(model="x", messages=[*HELLO, *HELLO * i], max_tokens=9)
    kept = [httpx.get(f"{each.url}/v1/responses/{last}").status_code for each in two]
    assert sorted(kept) == [200, 404]
    client.responses.delete(last)
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(model="x", input="hello", previous_response_id=last)
    assert error.value.code == "previous_response_not_found"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(last)


def test_a_response_that_is_lost_with_its_worker_is_told_so() -> None:
    """As a server says it that has been started again."""

    def keeps(made: socket.socket, path: str, body: bytes) -> None:
        made.sendall(written(200, {"text": "kept"}))
        workers[0].stop()

    def unknown(made: socket.socket, path: str, body: bytes) -> None:
        made.sendall(written(404 if path.startswith("/v1/responses/") else 400, {"error": "gone"}))

    body = {"input": "a", "previous_response_id": "resp_1"}
    both = fakes(keeps, unknown)
    with both as workers, fronting(*(each.address for each in workers)) as server:
        wait_until(lambda: healthy(server) == 2)
        reply = server.post("/v1/responses", body)
        assert (reply.status_code, reply.json()) == (400, {"error": "gone"})
        assert [len(each.asked) for each in workers] == [1, 2]


def test_who_leaves_frees_a_place_of_the_worker() -> None:
    with serving(sudoku_model) as worker, fronting(f"127.0.0.1:{worker.port}") as server:
        wait_until(lambda: healthy(server) == 1)
        for stream in (True, False):

            def begun(stream: bool = stream) -> bool:
                return worker.metric("requests_running") == 1

            leave(server, CHAT, {**LONG, "stream": stream}, begun)
            wait_until(lambda: worker.metric("requests_running") == 0)
            wait_until(lambda: metric(server, "worker_under_way") == [0])
        wait_until(lambda: metric(server, "front_cancelled_total") == [2])


# A worker that is lost --------------------------------------------------------------------------


CREATED = {"id": "resp_1", "object": "response", "status": "in_progress", "output": []}

# How a stream begins on a route, before the worker is lost in the middle of an event.
BEGUN: dict[str, list[str]] = {
    CHAT: ['data: {"id": "a", "choices": [{"index": 0, "delta": {"content": "He"}}]}\n\n'],
    "/v1/messages": [
        'event: message_start\ndata: {"type": "message_start", "message": {"id": "a", "role": '
        '"assistant", "content": [], "usage": {"input_tokens": 1, "output_tokens": 0}}}\n\n'
    ],
    "/api/chat": ['{"model": "tiny", "message": {"role": "assistant", "content": "He"}}\n'],
    "/v1/responses": [
        "event: response.created\ndata: "
        + json.dumps({"type": "response.created", "sequence_number": 0, "response": CREATED})
        + "\n\n"
    ],
}


def dying(made: socket.socket, path: str, body: bytes) -> None:
    """Is lost in the middle of a stream's second event."""
    made.sendall(LINES if path.startswith("/api/") else STREAM)
    for event in BEGUN[path]:
        made.sendall(chunk(event))
    made.sendall(chunk('data: {"half": "of an ev'))


def by_openai(front: Server) -> str:
    asked: Any = {"model": "x", "messages": HELLO}
    text = ""
    with pytest.raises(openai.APIError) as error:  # noqa: PT012
        for each in front.client().chat.completions.create(**asked, stream=True):
            text += each.choices[0].delta.content or ""
    assert text == "He"
    return error.value.message


def by_anthropic(front: Server) -> str:
    asked: Any = {"model": "x", "messages": HELLO, "max_tokens": 9}
    with pytest.raises(anthropic.APIStatusError) as error:
        list(front.anthropic().messages.create(**asked, stream=True))
    return str(error.value)


def by_ollama(front: Server) -> str:
    with pytest.raises(ollama.ResponseError) as error:
        list(front.ollama().chat("x", HELLO, stream=True))
    return str(error.value)


def by_responses(front: Server) -> str:
    found: list[Any] = list(front.client().responses.create(model="x", input="a", stream=True))
    assert [each.type for each in found] == ["response.created", "error", "response.failed"]
    assert [each.sequence_number for each in found] == [0, 1, 2]
    assert (found[2].response.id, found[2].response.status) == ("resp_1", "failed")
    return str(found[1].message)


@pytest.mark.parametrize("ask", [by_openai, by_anthropic, by_ollama, by_responses])
def test_a_stream_whose_worker_is_lost_ends_with_an_error(ask: Callable[[Server], str]) -> None:
    with fakes(dying) as (worker,), fronting(worker.address) as server:
        wait_until(lambda: healthy(server) == 1)
        assert "the worker that had this request is lost" in ask(server)
        assert metric(server, "front_failed_total") == [1]
        assert metric(server, "worker_under_way") == [0]


def test_an_answer_whose_worker_is_lost_is_an_error() -> None:
    """It may have been begun, so nobody else is asked; one that cannot be reached has not begun."""

    def dies(made: socket.socket, path: str, body: bytes) -> None:
        made.sendall({"/v1/fill": b"HTTP/1.1 200 OK\r\nContent-", "/v1/edit": b""}.get(path, half))

    half = written(200, {"text": "fine"})[:-3]
    with fakes(dies, dies) as workers, fronting(*(each.address for each in workers)) as server:
        wait_until(lambda: healthy(server) == 2)
        for path in (CHAT, "/v1/fill", "/v1/edit", "/v1/messages", "/api/chat"):
            assert "is lost" in told(server.post(path, {}), 502)
        assert sum(len(each.asked) for each in workers) == 5
        for each in workers:
            each.handle = fine
        workers[0].stop()
        assert [server.post(CHAT, {}).status_code for _ in range(4)] == [200] * 4
        wait_until(lambda: healthy(server) == 1)
        workers[1].stop()
        assert "none of the workers" in told(server.post(CHAT, {}), 503)
        assert httpx.get(f"{server.url}/health").status_code == 503
        for each in workers:
            each.asked.clear()
            each.start()
        wait_until(lambda: healthy(server) == 2)
        assert [server.post(CHAT, {}).status_code for _ in range(4)] == [200] * 4
        assert [len(each.asked) for each in workers] == [2, 2]


def test_what_cannot_be_begun_goes_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anybody has looked whether the worker is still there."""

    async def blind(self: lookout.Lookout, backend: Backend) -> None:
        pass

    with fakes(fine, fine) as workers, fronting(*(each.address for each in workers)) as server:
        wait_until(lambda: healthy(server) == 2)
        monkeypatch.setattr(lookout.Lookout, "look", blind)
        time.sleep(0.2)  # a look that had begun is over
        workers[0].stop()
        assert healthy(server) == 2
        assert [server.post(CHAT, {}).status_code for _ in range(4)] == [200] * 4
        assert (healthy(server), metric(server, "front_tried_again_total")) == (1, [1])


def test_a_worker_that_falls_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cable that is pulled closes no connection: clients waited for the whole --timeout."""

    def silent(made: socket.socket, path: str, body: bytes) -> None:
        if path == CHAT:
            made.sendall(STREAM + chunk(BEGUN[CHAT][0]))
        worker.stop()
        monkeypatch.setattr(lookout, "SILENT_SECONDS", 0.3)
        made.recv(1)

    for path, wanted in ((CHAT, 200), ("/v1/fill", 502)):
        with fakes(silent) as (worker,), fronting(worker.address) as server:
            wait_until(lambda: healthy(server) == 1)
            reply = server.post(path, {})
            assert reply.status_code == wanted
            assert "is lost" in reply.text
        monkeypatch.undo()


def test_where_all_are_slow_one_is_still_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundred clients at once made both too slow to say that they are there: all got 503."""
    with fakes(fine, fine) as workers, fronting(*(each.address for each in workers)) as server:
        wait_until(lambda: healthy(server) == 2)
        monkeypatch.setattr(lookout, "LOOK_SECONDS", 0.1)
        monkeypatch.setattr(lookout, "LOOK_EVERY", 0.01)
        for each in workers:
            each.delay = 0.3
        wait_until(lambda: healthy(server) == 1)
        time.sleep(0.5)
        assert server.post(CHAT, {}).status_code == 200
        monkeypatch.undo()
        for each in workers:
            each.delay = 0
        wait_until(lambda: healthy(server) == 2)


def test_a_worker_that_drips_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that says it is well, and never answers."""
    monkeypatch.setattr(proxy, "GRACE_SECONDS", 0)

    def drips(made: socket.socket, path: str, body: bytes) -> None:
        made.sendall(STREAM if path == CHAT else b"HTTP/1.1 200")
        while True:
            made.sendall(chunk("data") if path == CHAT else b" ")
            time.sleep(0.05)

    with fakes(drips) as (worker,), fronting(worker.address, seconds=0.5) as server:
        wait_until(lambda: healthy(server) == 1)
        assert "too long" in server.post(CHAT, {}).text
        assert "too long" in told(server.post("/v1/fill", {}), 504)


def test_all_full_is_429() -> None:
    with fakes(busy, fine) as workers, fronting(*(each.address for each in workers)) as server:
        wait_until(lambda: healthy(server) == 2)
        assert [server.post(CHAT, {}).status_code for _ in range(4)] == [200] * 4
        assert workers[0].asked
        workers[1].handle = busy
        reply = server.post(CHAT, {})
        assert "busy" in told(reply, 429)
        assert int(reply.headers["retry-after"]) > 0


def test_who_cannot_is_asked_once_and_others_are() -> None:
    """A server that stops, or has no memory for a model; if that holds for all, it is told."""

    def cannot(made: socket.socket, path: str, body: bytes) -> None:
        made.sendall(written(503, {"error": {"message": "no memory for it"}}))

    with fakes(cannot, fine) as workers, fronting(*(each.address for each in workers)) as server:
        wait_until(lambda: healthy(server) == 2)
        assert [server.post(CHAT, {}).status_code for _ in range(4)] == [200] * 4
        workers[1].handle = cannot
        assert told(server.post(CHAT, {}), 503) == "no memory for it"
        assert healthy(server) == 2
        workers[0].stop()
        wait_until(lambda: healthy(server) == 1)
        assert told(server.post(CHAT, {}), 503) == "no memory for it"


def test_more_than_all_have_room_for_is_not_sent_on() -> None:
    """Refusing it asked each worker, with the whole body."""
    ends = threading.Event()

    def waits(made: socket.socket, path: str, body: bytes) -> None:
        ends.wait()

    with fakes(waits) as (worker,), fronting(worker.address) as server:
        wait_until(lambda: healthy(server) == 1)
        pool = ThreadPoolExecutor(5)
        replies = [pool.submit(server.post, CHAT, {}) for _ in range(5)]
        wait_until(lambda: len(worker.asked) == 4 and any(each.done() for each in replies))
        assert HEALTH["max_batch"] + HEALTH["max_queue"] == 4
        ends.set()
        assert sorted(each.result().status_code for each in replies) == [429] + [502] * 4
        assert len(worker.asked) == 4


def test_what_is_too_long_for_one_memory_goes_to_a_larger_one() -> None:
    """A context follows from what is free. Other mistakes are told by whoever is asked first."""

    def short(made: socket.socket, path: str, body: bytes) -> None:
        made.sendall(written(400, {"error": {"message": "too long"}}))

    with fakes(short, fine) as workers:
        workers[1].facts["/v1/models"] = {"data": [{**MODEL, "context_length": 999}]}
        with fronting(*(each.address for each in workers)) as server:
            wait_until(lambda: healthy(server) == 2)
            assert [server.post(CHAT, {}).status_code for _ in range(2)] == [200] * 2
            assert [len(each.asked) for each in workers] == [2, 2]
            workers[1].handle = busy
            assert "busy" in told(server.post(CHAT, {}), 429)
            workers[1].handle = short
            assert told(server.post(CHAT, {}), 400) == "too long"
            asked = len(workers[0].asked)
            httpx.get(f"{server.url}/v1/models/x")
            httpx.get(f"{server.url}/v1/models/x")
            assert len(workers[0].asked) == asked


# Workers that are none, or others ---------------------------------------------------------------


LIKE_OURS = {**MODEL, "id": "other\x1b[2J"}


@dataclass
class Foreign:
    """What stands before a good worker and another, and what it has said."""

    good: Fake
    other: Fake
    server: Server
    said: list[str]


@pytest.fixture(scope="module")
def foreign() -> Iterator[Foreign]:
    said: list[str] = []
    with ExitStack() as stack:
        good, other = stack.enter_context(fakes(fine, fine))
        front = fronting(good.address, other.address, tell=said.append)
        server = stack.enter_context(front)
        wait_until(lambda: healthy(server) == 2)
        yield Foreign(good, other, server, said)


@pytest.mark.parametrize(
    ("path", "facts", "why"),
    [
        ("/health", b"SSH-2.0-OpenSSH\r\n", "does not answer as a server does"),
        ("/health", b"", "does not answer as a server does"),
        ("/health", head(200, {"X": "x" * 200_000}), "does not answer as a server does"),
        ("/health", head(200, {}) + b"x" * (2 << 20), "none of our servers"),
        ("/health", head(200, {}) + b"[" * 100_000, "none of our servers"),
        ("/health", head(302, {"Location": "http://127.0.0.1:1/"}), "none of our servers"),
        ("/health", head(200, {}) + b"\xff\xfe", "none of our servers"),
        ("/health", [], "none of our servers"),
        ("/health", {"status": "stopping"}, "it stops"),
        ("/health", {"status": "ok", "workers": ["ok"]}, "before workers itself"),
        ("/v1/models", {"data": []}, "none of our servers"),
        ("/v1/models", {"data": [5]}, "none of our servers"),
        ("/v1/models", written(401, {}), "wants another key"),
        ("/v1/models", {"data": [LIKE_OURS]}, "it serves other"),
        ("/v1/models", {"data": [{**MODEL, "canvas_length": 99}]}, "it serves tiny (canvas 99"),
        ("/v1/models", {"data": [MODEL, MODEL]}, "it serves tiny"),
    ],
)
def test_what_is_no_worker_of_these_is_left_out(
    foreign: Foreign, path: str, facts: Any, why: str
) -> None:
    server, other = foreign.server, foreign.other
    foreign.said.clear()
    other.asked.clear()
    if path == "/v1/models":  # which is looked at where a worker is new
        other.facts["/health"] = b""
        wait_until(lambda: healthy(server) == 1)
    other.facts |= {"/health": HEALTH, path: facts}
    wait_until(lambda: any(other.address in each and why in each for each in foreign.said))
    assert [server.post(CHAT, {}).status_code for _ in range(3)] == [200] * 3
    assert not other.asked
    other.facts |= {"/health": HEALTH, "/v1/models": {"data": [MODEL]}}
    wait_until(lambda: healthy(server) == 2)


@pytest.mark.parametrize(
    "answer",
    [
        b"220 smtp ready\r\n",
        head(200, {"Content-Type": "text/html", "Content-Length": "2"}) + b"<>",
        head(200, {"Content-Type": "application/json"}) + b"{}",
        head(200, {"Content-Type": "application/json", "Content-Length": "2"})[:-2]
        + b"Content-Encoding: gzip\r\n\r\n{}",
        head(302, {"Location": "http://127.0.0.1:1/", "Content-Length": "0"}),
        head(200, {"X": "x" * 200_000}),
        head(101, {"Upgrade": "x", "Connection": "upgrade"}),
    ],
)
def test_an_answer_that_is_none(single: tuple[Fake, Server], answer: bytes) -> None:
    """HTML would be a page of our own origin; what has no length may have been cut anywhere."""
    worker, server = single
    worker.handle = lambda made, path, body: made.sendall(answer)
    assert told(server.post(CHAT, {}), 502)


def test_an_event_without_an_end_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_diffgemma.server.relayed.MOST_EVENT", 1 << 20)

    let_go = threading.Event()

    def endless(made: socket.socket, path: str, body: bytes) -> None:
        made.sendall(STREAM)
        try:
            while True:
                made.sendall(chunk("x" * 100_000))
        except OSError:
            let_go.set()

    with fakes(endless) as (worker,), fronting(worker.address) as server:
        wait_until(lambda: healthy(server) == 1)
        reply = server.post(CHAT, {})
        assert len(reply.content) < 1000
        assert "answer is none" in reply.text
        assert let_go.wait(10)


def test_only_what_a_worker_needs_reaches_it() -> None:
    with fakes(fine) as (worker,), fronting(worker.address, api_key="s3cret") as server:
        wait_until(lambda: healthy(server) == 1)
        headers = {
            "x-api-key": "s3cret",
            "Origin": server.url,
            "Cookie": "a=b",
            "X-Forwarded-For": "1.2.3.4",
            "Forwarded": "for=1.2.3.4",
            "X-Large": "x" * 30_000,
            "Accept-Encoding": "gzip",
            "Content-Type": "application/json",
        }
        body = b'{"a": "\xc3\xa4"}'
        reply = httpx.post(f"{server.url}{CHAT}?a=b&a=%2F", headers=headers, content=body)
        assert reply.json() == {"text": "fine"}
        assert worker.asked == [(f"{CHAT}?a=b&a=%2F", body)]
        lines = worker.heads[0].decode().lower().split("\r\n")[1:]
        names = {line.partition(":")[0] for line in lines}
        assert names == {
            "host", "accept", "accept-encoding", "connection", "user-agent", "authorization",
            "content-type", "content-length",
        }  # fmt: skip
        assert {"host: localhost", "authorization: bearer s3cret"} <= {*lines}


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("//evil.example/v1/models", 404),
        ("http://evil.example/v1/models", 404),
        ("/..%2fmetrics", 404),
        ("/v1/models/../../metrics", 404),
        ("/v1/models/%2e%2e/%2E%2E/metrics", 404),
        ("/v1/models/..%2f..%2fmetrics", 404),
        ("/v1/responses/..", 404),
        ("/v1/elsewhere", 404),
        ("/V1/models", 404),
        ("/v1/models/a%0d%0aX:%20y", 404),
        ("/v1/models/a%0dX:%20y", 200),
        ("/v1/models/%00%23%3f", 200),
        ("/v1/models/a?a=%0d%0ab#c", 200),
        ("/v1/models/" + ":" * 60_000, 404),
    ],
)
def test_a_path_leads_nowhere_else(single: tuple[Fake, Server], target: str, status: int) -> None:
    worker, server = single
    worker.handle = fine
    worker.asked.clear()
    with socket.create_connection(("127.0.0.1", server.port)) as made:
        made.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert made.recv(1000).split()[1] == str(status).encode()
    asked = target.replace("#", "%23").replace("%0dX:%20", "%0DX%3A%20").replace("%3f", "%3F")
    assert [path for path, _ in worker.asked] == [asked] * (status == 200)
    assert not any(b"\r\nX:" in each for each in worker.heads)


# As processes -----------------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as made:
        port: int = made.getsockname()[1]
    return port


def test_a_worker_is_killed_and_comes_back() -> None:
    """What it had under way gets an error, all else its answer, and then it is used again."""
    port, other, key = free_port(), free_port(), ("--api-key", "s3cret")
    arguments = ("-m", str(SUDOKU), *key)
    headers = {"Authorization": "Bearer s3cret"}

    def ask(text: str, most: int) -> str:
        messages = [{"role": "user", "content": text}]
        body = {"messages": messages, "max_tokens": most, "steps": 20, "stream": True}
        said = httpx.post(f"{server.url}{CHAT}", json=body, headers=headers, timeout=60).text
        return "lost" if "is lost" in said else "answered" if "[DONE]" in said else said

    def under_way() -> list[int]:
        text = CLIENT.get(f"{server.url}/metrics", headers=headers).text
        return [int(each) for each in re.findall(r"under_way{.*} (\d+)", text)]

    def starting(*more: str) -> Any:
        return process(*arguments, *more)

    workers = f"127.0.0.1:{port},127.0.0.1:{other}"
    with ThreadPoolExecutor(4) as pool, process("--workers", workers, *key) as server:
        assert httpx.get(f"{server.url}/health").status_code == 503
        with starting("--port", str(other)), starting("--port", str(port)) as lost:
            wait_until(lambda: healthy(server) == 2)
            asked = [pool.submit(ask, f"{i}", 200) for i in range(4)]
            wait_until(lambda: under_way() == [2, 2])
            lost.process.kill()
            assert sorted(each.result() for each in asked) == ["answered"] * 2 + ["lost"] * 2
            lost.process.wait()
            assert ask("5", 9) == "answered"
            with starting("--port", str(port)) as again:
                wait_until(lambda: healthy(server) == 2)
                assert [ask(f"{i}", 9) for i in (6, 7)] == ["answered"] * 2
                text = httpx.get(f"{again.url}/metrics", headers=headers).text
                assert re.search(r"^diffgemma_answered_total.* 1$", text, re.M)
