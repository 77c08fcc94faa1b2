"""What strangers send: pages elsewhere, bodies that mean harm, connections that never end."""

import asyncio
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi.responses import JSONResponse, StreamingResponse
from gemma import gemma_tokenizer
from random_model import scripted
from servers import Server, address, listening, serving, wait_until, working, writing
from starlette.types import ASGIApp, Receive, Scope, Send

from mlx_diffgemma import ChatSession, SettingError, generate
from mlx_diffgemma.server.access import SMALL_BODY, Gate, Limits
from mlx_diffgemma.server.app import make_app
from mlx_diffgemma.server.connections import MOST_CONNECTIONS, Connection
from mlx_diffgemma.server.json_body import MOST_DEPTH, MOST_VALUES, JsonError, read_json

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def small() -> Iterator[Server]:
    """A template that knows tools, and a page's origin that may ask."""
    with serving(writing("Fine."), cors=["https://friend.example"]) as server:
        yield server


def refused(reply: httpx.Response, status: int, said: str = "") -> None:
    """The reply is an error in OpenAI's form."""
    assert reply.status_code == status, reply.text[:500]
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert said in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"),
        ("[1", "not JSON"),
        ("\ufeff{}", "not JSON"),
        (b'"\xff"', "UTF-8"),
        ('"a"'.encode("utf-16"), "UTF-8"),
        ("[" * 200_000, "nested"),
        ("[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1), "nested"),
        ('{"a":' * 900 + "1" + "}" * 900, "nested"),
        (f"[{'1,' * MOST_VALUES}1]", "values"),
        ("9" * 5000, "characters"),
        ("-" + "9" * 400, "characters"),
        ("0." + "1" * 400, "characters"),
        ("1e999", "too large"),
        ("NaN", "NaN"),
        ('{"a": -Infinity}', "Infinity"),
        ('{"a": 1, "a": 1}', "twice"),
        ('["\\ud800"]', "surrogate"),
        ('{"\\udfff": 1}', "surrogate"),
    ],
)
def test_json_that_is_not_read(text: str | bytes, said: str) -> None:
    with pytest.raises(JsonError, match=said):
        read_json(text)


def test_json_that_is_read() -> None:
    deep = "[" * MOST_DEPTH + "]" * MOST_DEPTH
    pair = '"\\ud83d\\ude00"'
    for text in (deep, pair, "0", "-1.5e300", '"\\u0000"', "1" * 300, "{}", '[{"a":1},{"a":1}]'):
        assert read_json(text.encode()) == json.loads(text)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


CALL: dict[str, Any] = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
MESSAGE: dict[str, Any] = {"role": "user", "content": "hello"}


def calling(arguments: Any) -> dict[str, Any]:
    call = {**CALL, "function": {"name": "f", "arguments": arguments}}
    return {"messages": [MESSAGE, {"role": "assistant", "content": None, "tool_calls": [call]}]}


def tool(**changes: Any) -> dict[str, Any]:
    function = {"name": "f", "parameters": {"type": "object"}, **changes}
    return {"messages": [MESSAGE], "tools": [{"type": "function", "function": function}]}


def schema(**keywords: Any) -> dict[str, Any]:
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": keywords}}
    return {"messages": [MESSAGE], "response_format": form}


HALF = "a\ud800"
HOSTILE: list[tuple[str, Any]] = [
    ("chat/completions", calling(nested(400))),
    ("chat/completions", calling(json.dumps(nested(400)))),
    ("chat/completions", calling('{"a":' * 20_000 + "1" + "}" * 20_000)),
    ("chat/completions", calling('{"a": NaN}')),
    ("chat/completions", calling('{"a": ' + "9" * 5000 + "}")),
    ("chat/completions", calling(json.dumps({"a": HALF}))),
    ("chat/completions", calling("[1]")),
    ("chat/completions", calling("{" + "x" * 100_000)),
    ("chat/completions", tool(name=HALF)),
    ("chat/completions", tool(description=HALF)),
    ("chat/completions", tool(parameters=nested(400))),
    ("chat/completions", {"messages": [{"role": "user", "content": HALF}]}),
    ("chat/completions", {"messages": [MESSAGE], "opening": HALF}),
    ("chat/completions", {"messages": [MESSAGE], "stop": HALF}),
    ("chat/completions", schema(const=float("nan"))),
    ("chat/completions", schema(**{HALF: 1})),
    ("chat/completions", schema(enum=[HALF])),
    ("chat/completions", schema(title=nested(400))),
    ("chat/completions", {"messages": [1] * 40_000}),
    ("completions", {"prompt": HALF}),
    ("completions", {"prompt": "a", "suffix": HALF}),
    ("completions", {"prompt": "a", "opening": HALF}),
    ("fill", {"template": HALF + "{{x}}"}),
    ("fill", {"canvas": [{"text": HALF}]}),
    ("fill", {"template": "{{x}}", "prompt": HALF}),
    ("edit", {"text": HALF, "instruction": "x"}),
    ("edit", {"text": "a", "instruction": HALF}),
    ("edit", {"text": "a", "instruction": "x", "lines": [1, 10**20]}),
    ("edit", {"text": "a", "instruction": "x", "lines": [True, 1]}),
    ("edit", {"text": "a", "instruction": "x", "strength": float("nan")}),
    ("edit", {"text": "a", "instruction": "x", "steps": 10**9}),
    ("edit", {"text": "a", "instruction": "x", "seed": 1 << 63}),
    ("edit", {"text": "\n" * 2_000_000, "instruction": "x"}),
    ("edit", {"text": {"a": "b"}, "instruction": ["x"]}),
    ("choose", {"prompt": HALF, "labels": ["a", "b"]}),
    ("choose", {"prompt": "a", "labels": {HALF: ["a", "b"]}}),
    ("choose", {"prompt": "a", "labels": {"x" * 3_000_000: 1}}),
]


@pytest.mark.parametrize(("path", "body"), HOSTILE)
def test_hostile_values_are_refused_in_openais_form(small: Server, path: str, body: Any) -> None:
    """Nested arguments, halves of surrogate pairs and long numbers were answers of 500, some of
    them not JSON; a name of 3 MB came back in full."""
    reply = httpx.post(f"{small.url}/v1/{path}", content=json.dumps(body), headers=JSON, timeout=60)
    refused(reply, 400)
    assert len(reply.content) < 2000


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"3",
        b'"x"',
        b"{}",
        b"[" * 200_000,
        b"\xff\xfe{\x00}\x00",
        b'{"messages": ' + b"9" * 5000 + b"}",
        b'{"seed": 1e999, "prompt": "x", "messages": [{"role": "user", "content": "x"}]}',
        b'{"prompt": "x", "prompt": "y", "template": "{{x}}", "template": "{{y}}"}',
    ],
)
@pytest.mark.parametrize("path", ["chat/completions", "completions", "fill", "edit", "choose"])
def test_no_body_of_any_route_is_a_crash(small: Server, path: str, content: bytes) -> None:
    refused(httpx.post(f"{small.url}/v1/{path}", content=content, headers=JSON, timeout=60), 400)


def test_ignored_names_fit_into_a_header(small: Server) -> None:
    """A name of 3 MB came back as a header, and clients gave up on the whole answer; names that
    are not plain ASCII were not told at all."""
    names = {"x" * 3_000_000: 1, "größe": 1, "a\r\nSet-Cookie: b": 1}
    names |= {f"{i:09}" * 30: 1 for i in range(80)}
    reply = small.post("/v1/chat/completions", {"messages": [MESSAGE], "steps": 1, **names})
    assert reply.status_code == 200
    assert len(reply.headers["x-ignored-parameters"]) < 4000
    reply = small.post("/v1/chat/completions", {"messages": [MESSAGE], "größe\n": 1, "z": 1})
    assert reply.headers["x-ignored-parameters"] == "gr\\xf6\\xdfe\\n,z"
    assert "set-cookie" not in reply.headers


ASK = json.dumps({"messages": [MESSAGE], "max_tokens": 1})


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "https://evil.example", **JSON}, 403),
        ({"Origin": "null", **JSON}, 403),
        ({"Origin": "http://localhost.evil.example", **JSON}, 403),
        ({"Origin": "http://127.0.0.1:1", **JSON}, 403),
        ({"Origin": "OWN", **JSON}, 200),
        ({"Origin": "https://friend.example", **JSON}, 200),
        ({"Origin": "https://friend.example", "Sec-Fetch-Site": "cross-site", **JSON}, 200),
        ({"Sec-Fetch-Site": "cross-site", **JSON}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", **JSON}, 403),
        ({"Sec-Fetch-Site": "same-site", **JSON}, 403),
        ({"Sec-Fetch-Site": "same-origin", **JSON}, 200),
        ({}, 415),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "text/plain; application/json"}, 415),
        ({"Content-Type": "Application/JSON; charset=utf-8"}, 200),
        ({"Content-Type": "application/vnd.api+json"}, 200),
    ],
)
def test_pages_of_other_origins_may_not_ask(
    small: Server, headers: dict[str, str], status: int
) -> None:
    """A page anywhere could post without a Content-Type, which no browser asks about, and was
    answered where FastAPI is old enough to read such a body as JSON."""
    headers = {name: small.url if value == "OWN" else value for name, value in headers.items()}
    before = small.metric("answered_total")
    reply = httpx.post(f"{small.url}/v1/chat/completions", content=ASK, headers=headers, timeout=60)
    assert reply.status_code == status
    if status == 200:
        assert reply.json()["choices"]
    else:
        refused(reply, status)
        assert small.metric("answered_total") == before


def test_links_may_be_followed_and_nothing_else_be_taken(small: Server) -> None:
    """An image or a script of a page elsewhere could ask for everything that GET gives."""
    foreign = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    page = httpx.get(small.url, headers=foreign)
    assert page.status_code == 200
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
    refused(httpx.get(f"{small.url}/page/app.js", headers={"Sec-Fetch-Site": "cross-site"}), 403)
    refused(
        httpx.get(f"{small.url}/metrics", headers={**foreign, "Sec-Fetch-Mode": "no-cors"}), 403
    )


def test_no_page_has_scripts_from_elsewhere(small: Server) -> None:
    """/docs and /redoc had the browser fetch scripts of a CDN."""
    for path in ("/docs", "/redoc"):
        refused(httpx.get(f"{small.url}{path}"), 404)
    for file in re.findall(r'(?:src|href)="([^"#]+)"', httpx.get(small.url).text):
        assert file.startswith("/page/")
        script = httpx.get(f"{small.url}{file}")
        policy = script.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "unsafe" not in policy
        assert script.headers["x-content-type-options"] == "nosniff"
    assert httpx.get(f"{small.url}/openapi.json").json()["paths"]


def test_the_page_needs_no_key_and_gives_away_no_other_file() -> None:
    with serving(writing("Fine."), api_key="s3cret") as server:
        page = httpx.get(f"{server.url}/page/app.js")
        assert page.status_code == 200
        known = httpx.get(
            f"{server.url}/page/app.js", headers={"If-None-Match": page.headers["etag"]}
        )
        assert (known.status_code, known.content) == (304, b"")
        paths = ["/page/", "/page/vendor", "/page/x", "/page/../tiny/config.json", "/page/%00"]
        paths += ["/page/..%2ftiny%2fconfig.json", "/page/vendor/..%2f..%2fheldout.jsonl"]
        paths += ["/page//etc/passwd", "/page/%2fetc%2fpasswd", "/page/" + "x" * 5000]
        for path in paths:
            refused(raw(server.url, f"GET {path}"), 404)
        for path in ("/page/../v1/models", "/page/%2e%2e/v1/models", "//page/../v1/models"):
            assert raw(server.url, f"GET {path}").status_code in (401, 404)
        refused(raw(server.url, "DELETE /page/app.js"), 405)


def raw(url: str, line: str) -> httpx.Response:
    """Send a line of request as it is: clients tidy paths up."""
    with connected(url) as sent:
        sent.sendall(f"{line} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        said = b""
        while more := sent.recv(1 << 16):
            said += more
    head, _, body = said.partition(b"\r\n\r\n")
    return httpx.Response(int(head.split()[1]), content=body)


def test_every_method_and_path_has_an_answer(small: Server) -> None:
    """HEAD was refused; a preflight for a foreign page, an unknown name and what is no HTTP were
    answered in words that are not JSON."""
    refused(httpx.get(f"{small.url}/v1/nothing"), 404)
    refused(small.post("/", {}), 405)
    refused(httpx.delete(f"{small.url}/v1/models"), 405)
    refused(httpx.options(f"{small.url}/v1/models"), 405)
    refused(httpx.get(f"{small.url}/%00%ff/../x?%7f=%ed%a0%80"), 404)
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "a"}
    path = f"{small.url}/v1/chat/completions"
    refused(httpx.options(path, headers={**asked, "Origin": "https://evil.example"}), 403)
    friend = httpx.options(path, headers={**asked, "Origin": "https://friend.example"})
    assert friend.headers["access-control-allow-origin"] == "https://friend.example"
    error = httpx.post(path, content=b"{", headers={**JSON, "Origin": "https://friend.example"})
    refused(error, 400)
    assert error.headers["access-control-allow-origin"] == "https://friend.example"
    head = httpx.head(f"{small.url}/health")
    assert (head.status_code, head.content) == (200, b"")
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    upgrade["Sec-WebSocket-Key"] = "dGhlIHNhbXBsZSBub25jZQ=="
    refused(httpx.get(f"{small.url}/v1/chat/completions", headers=upgrade), 405)


@pytest.mark.parametrize(
    "said",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /" + b"x" * 100_000,
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"PRI * HTTP/2.0\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    ],
)
def test_what_is_no_http_is_refused(small: Server, said: bytes) -> None:
    """It was refused in words that are not JSON."""
    with connected(small.url) as raw:
        raw.sendall(said)
        answer = b""
        while b"}}" not in answer:
            more = raw.recv(4096)
            assert more, answer
            answer += more
    head, _, body = answer.partition(b"\r\n\r\n")
    assert int(head.split()[1]) in (400, 403, 413, 415)
    assert json.loads(body)["error"]["message"]


def connected(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=30)


def test_half_open_connections_leave_room(small: Server) -> None:
    """They were kept for ever: as many as a process may have files, and nobody else got in."""
    held = []
    try:
        for i in range(200):
            raw = connected(small.url)
            raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" if i % 2 else b"")
            held.append(raw)
        for _ in range(5):
            assert httpx.get(f"{small.url}/health", timeout=30).status_code == 200
        gone = 0
        for raw in held:
            raw.setblocking(False)
            try:
                gone += raw.recv(1) == b""
            except ConnectionError:
                gone += 1
            except BlockingIOError:
                pass
        assert gone >= 200 - MOST_CONNECTIONS
    finally:
        for raw in held:
            raw.close()


class Hasty(Connection):
    head_seconds = 0.5
    stall_seconds = 0.5


async def answering(scope: Scope, receive: Receive, send: Send) -> None:
    """100 MB at /endless, `{}` elsewhere."""

    async def much() -> Any:
        for _ in range(1000):
            yield b"x" * 100_000

    answer = StreamingResponse(much()) if scope["path"] == "/endless" else JSONResponse({})
    await answer(scope, receive, send)


@contextmanager
def running(app: ASGIApp) -> Iterator[tuple[str, uvicorn.Server]]:
    """A server in a thread, in a hurry."""
    with listening(app, Hasty) as server:
        yield address(server), server


def ended(raw: socket.socket) -> bool:
    """Whether the other side closes the connection, before our own 30 seconds are over."""
    try:
        while raw.recv(1 << 16):
            pass
    except ConnectionError:
        return True
    return True


HEAD = b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "first",
    [
        b"",
        b"P",
        HEAD,
        b"GET /x HTTP/1.1\r\nHost: localhost\r\n\r\nGET /x HT",  # the second of two
        HEAD + b"Content-Length: 999999999\r\n\r\nx",  # refused unread, and never sent
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n",
        HEAD + b"Content-Length: 50\r\n\r\n{",
    ],
)
def test_a_client_that_drips_is_left(first: bytes) -> None:
    """A byte now and then kept a connection open for ever."""
    app = Limits(answering, most_bytes=1000, api_key=None, seconds=0.5)
    with running(app) as (url, server), connected(url) as raw:
        raw.sendall(first)
        stop = threading.Event()

        def drip() -> None:
            while not stop.wait(0.1):
                try:
                    raw.send(b"1\r\n1\r\n" if b"chunked" in first else b"x")
                except OSError:
                    return

        dripping = threading.Thread(target=drip)
        if first:
            dripping.start()
        try:
            wait_until(lambda: bool(server.server_state.connections))
            wait_until(lambda: not server.server_state.connections)
        finally:
            stop.set()
            if first:
                dripping.join()
        assert ended(raw)


def test_a_slow_body_is_told_so() -> None:
    app = Limits(answering, most_bytes=1000, api_key=None, seconds=0.3)
    with running(app) as (url, _), connected(url) as raw:
        raw.sendall(HEAD + b"Content-Length: 50\r\n\r\n{")
        said = b""
        while b"}}" not in said:
            said += raw.recv(4096)
        assert b" 408 " in said
        assert b"longer than 0.3 seconds" in said


def test_a_client_that_does_not_read_is_left() -> None:
    """What it did not read stayed in memory, and its connection open, for ever."""
    with running(answering) as (url, server), connected(url) as raw:
        raw.sendall(b"GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_until(lambda: bool(server.server_state.connections))
        wait_until(lambda: not server.server_state.connections)


def test_patient_clients_are_served() -> None:
    """A head in pieces, an answer that is read slowly, two requests over one connection."""
    app = Limits(answering, most_bytes=1000, api_key=None)
    with running(app) as (url, _), httpx.Client(base_url=url) as client:
        with connected(url) as raw:
            for piece in (HEAD[:9], HEAD[9:], b"Content-Length: 2\r\n\r\n", b"{", b"}"):
                raw.sendall(piece)
                time.sleep(0.05)
            assert raw.recv(4096).startswith(b"HTTP/1.1 200 ")
        assert client.get("/x").status_code == 200
        time.sleep(1)  # longer than a head may take
        assert client.post("/x", json={}).status_code == 200


def asked(app: ASGIApp, method: str = "GET", path: str = "/x", **given: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **given)

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("host", "alone", "open_", "named", "any_"),
    [
        ("localhost:8080", True, True, True, True),
        ("LOCALHOST", True, True, True, True),
        ("[::1]:8080", True, True, True, True),
        ("192.168.1.5:8080", False, True, True, True),
        ("[fe80::1]", False, True, True, True),
        (socket.gethostname(), False, True, True, True),
        ("mac.example:8080", False, False, True, True),
        ("evil.example", False, False, False, True),
        ("192.168.1.5.evil.example", False, False, False, True),
        ("", False, False, False, True),
        ("[", False, False, False, True),
        ("\xff]", False, False, False, True),
    ],
)
def test_names_that_the_server_answers_to(
    host: str, alone: bool, open_: bool, named: bool, any_: bool
) -> None:
    """With `--host 0.0.0.0` it answered to any name, which a page can point at it."""

    def status(loopback: bool, *allowed: str) -> int:
        gate = Gate(answering, loopback=loopback, allowed_hosts=allowed, origins=())
        return asked(gate, headers={"Host": host.encode("latin-1")}).status_code  # type: ignore[dict-item]

    assert (status(True) == 200) is alone
    assert (status(False) == 200) is open_
    assert (status(False, "Mac.example") == 200) is named
    assert (status(False, "*") == 200) is any_
    assert status(True, "mac.example") == (200 if alone or host.startswith("mac") else 403)


@pytest.mark.parametrize("key", ["s3cret", "schlüssel", "\udcff\udcfe"])
def test_keys_of_any_bytes(key: str) -> None:
    """A key that is not UTF-8, as a command line may hold, was an answer of 500 each time."""
    app = Limits(answering, most_bytes=9, api_key=key)
    right = key.encode("utf-8", "surrogateescape")
    for given, status in (
        (b"Bearer " + right, 200),
        (b"Bearer ", 401),
        (b"Bearer " + right + b"\xff", 401),
        (b"\xff\xfe\x80", 401),
        (b"x" * 10_000, 401),
    ):
        assert asked(app, headers={b"Authorization": given}).status_code == status
        other = {b"x-api-key": given.removeprefix(b"Bearer ")}
        assert asked(app, headers=other).status_code == status
    refused(asked(app), 401)


def test_an_empty_key_is_no_key() -> None:
    """`--api-key ""` let everybody in who sent nothing."""
    command = [sys.executable, "-m", "mlx_diffgemma", "serve", "--api-key", ""]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "--api-key is empty" in done.stderr


def test_lengths_that_are_none_or_too_large() -> None:
    """5,000 digits were an answer of 500."""
    app = Limits(answering, most_bytes=9, api_key=None)
    for length in ("9" * 5000, "10", "-1", "x", "\u0661"):
        head = {b"Content-Length": length.encode()}
        refused(asked(app, "POST", headers={**head, b"Content-Type": b"application/json"}), 413)


@pytest.mark.parametrize("size", [10, SMALL_BODY + 10])
def test_small_and_large_bodies_are_checked_alike(size: int) -> None:
    app = Limits(answering, most_bytes=1 << 20, api_key=None)
    good = json.dumps({"a": "x" * size})
    assert asked(app, "POST", content=good, headers=JSON).status_code == 200
    refused(asked(app, "POST", content=good[:-1], headers=JSON), 400, "not JSON")


def test_a_defect_is_told_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was `Internal Server Error`, which no client of OpenAI's can read."""

    def fail(*given: object) -> None:
        raise RuntimeError("a secret")

    with working(writing("Fine.")) as thread:
        monkeypatch.setattr(thread.workers[0], "prepare", fail)
        app = make_app(thread)
        reply = asked(app, "POST", "/v1/chat/completions", content=ASK, headers=JSON)
        refused(reply, 500, "a defect of the server")
        assert "secret" not in reply.text


IMAGE = [{"type": "text", "text": "what is this?"}, {"type": "image", "url": "a.png"}]


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_images_are_refused_wherever_they_stand(small: Server, role: str) -> None:
    """In Python their parts went to the template, which wrote them down or put a placeholder for
    what was never there."""
    messages = [MESSAGE, {"role": role, "content": IMAGE, "name": "f", "tool_call_id": "c"}]
    said = "only text content and image_url are supported"
    refused(small.post("/v1/chat/completions", {"messages": messages}), 400, said)
    said = "only text content is supported"
    model, tokenizer = scripted(), gemma_tokenizer()
    with pytest.raises(SettingError, match=said):
        generate(model, tokenizer, messages)


def test_sessions_refuse_images_too() -> None:
    session = ChatSession(scripted(), gemma_tokenizer())
    content: Any = IMAGE
    with pytest.raises(SettingError, match="only text content is supported"):
        session.stream(content)
