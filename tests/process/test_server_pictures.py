"""Pictures that clients send: read as in Python, refused in OpenAI's form, and nobody held up."""

import base64
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from looking import content_checkpoint
from PIL import Image
from servers import Server, serving, tiny, wait_until

from mlx_diffgemma import generate, load
from mlx_diffgemma.server import access, pictures
from mlx_diffgemma.tasks import pictures as shown


def noise(seed: int, size: tuple[int, int] = (60, 80)) -> Image.Image:
    drawn = np.random.default_rng(seed).integers(0, 256, (*size, 3))
    return Image.fromarray(drawn.astype(np.uint8))


def file_of(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def asked(*urls: Any, text: str = "What?", **more: Any) -> dict[str, Any]:
    """A chat of pictures and a question."""
    parts = [{"type": "image_url", "image_url": each} for each in urls]
    content = [*parts, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}], "seed": 1, **more}


CHAT = "/v1/chat/completions"

ONE, OTHER = file_of(noise(1)), file_of(noise(2))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return content_checkpoint(tmp_path_factory.mktemp("looking"))


@pytest.fixture(scope="module")
def seeing(checkpoint: Path) -> Iterator[Server]:
    with serving(lambda: load(checkpoint, dtype="float32")) as server:
        yield server


def content(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def refused(answer: httpx.Response, said: str, status: int = 400) -> None:
    error = answer.json()["error"]
    assert (answer.status_code, said in error["message"]) == (status, True), answer.text
    assert error["type"] == "invalid_request_error" or status == 429
    assert "\n" not in error["message"]
    assert len(error["message"]) < 400


def test_the_official_client_sends_a_picture(seeing: Server, checkpoint: Path) -> None:
    """The answer is Python's to the same picture, and another one's is another."""
    found = []
    for data in (ONE, OTHER):
        body = asked({"url": url(data)})
        answer = seeing.client().chat.completions.create(
            model="tiny", messages=body["messages"], seed=1
        )
        parts = [{"type": "image", "image": data}, {"type": "text", "text": "What?"}]
        chat = [{"role": "user", "content": parts}]
        text = "".join(generate(*load(checkpoint, dtype="float32"), chat, seed=1))
        assert answer.choices[0].message.content == text
        found.append(text)
    assert found[0] != found[1]


def test_detail_is_a_budget_of_tokens(seeing: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """`high` is the largest one; here no larger than a CPU can do."""
    monkeypatch.setattr(pictures, "BUDGETS", (70, 140))
    square = url(file_of(noise(3, (90, 90))))

    def read(*details: str | None) -> int:
        urls = [{"url": square, **({"detail": each} if each else {})} for each in details]
        answer = seeing.post(CHAT, asked(*urls))
        assert answer.status_code == 200, answer.text
        return int(answer.json()["usage"]["prompt_tokens"])

    low = read("low")
    assert read(None) == read("auto") == low  # the checkpoint's own is 70, of which 64 are used
    assert read("high") - low == 11 * 11 - 64
    refused(seeing.post(CHAT, asked({"url": square, "detail": "x"})), "detail")


def test_high_detail_is_the_most_that_all_have_room_for(checkpoint: Path) -> None:
    sight = load(checkpoint)[0].sight
    assert sight is not None

    def high(room: int, *details: Any) -> int:
        return pictures._high([pictures.Sent("", each, "") for each in details], sight, room)

    assert high(9999, "high") == 1120
    assert high(9999, *["high"] * 9) == 280  # of a context of 4,096
    assert high(1259, "high", "low", None) == 560
    assert high(1260, "high", "low", None) == 1120
    assert high(10, "high") == 70  # which is refused as too long


def test_clients_whose_ids_are_equal_get_their_own_answers(seeing: Server) -> None:
    """Side by side and one after another, through the cache that all share."""
    alone = [content(seeing.post(CHAT, asked(url(data)))) for data in (ONE, OTHER)]
    assert alone[0] != alone[1]
    found: dict[int, str] = {}

    def ask(i: int) -> None:
        found[i] = content(seeing.post(CHAT, asked(url((ONE, OTHER)[i % 2]))))

    threads = [threading.Thread(target=ask, args=[i]) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(6)] == alone * 3
    again = seeing.post(CHAT, asked(url(ONE))).json()
    cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > 60  # the picture was not read anew


def header(width: int, height: int) -> bytes:
    """A PNG that says it is so large, with next to nothing in it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    said = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", said), chunk(b"IDAT", zlib.compress(b"\0")), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


SVG = b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>"

BLANK = file_of(Image.new("1", (6000, 6000)))  # a few kilobytes

WRONG: dict[str, tuple[list[Any], str]] = {
    "http": (["http://127.0.0.1:1/x.png"], "the server fetches nothing"),
    "https": (["https://example.org/x.png"], "the server fetches nothing"),
    "a file": (["FILE:///etc/passwd"], "the server fetches nothing"),
    "a path": (["/etc/passwd"], "a picture is sent as it is"),
    "nothing": ([""], "a picture is sent as it is"),
    "no base64": (["data:image/png;base64,@@@@"], "is not in base64"),
    "cut base64": ([url(ONE)[:-1]], "is not in base64"),
    "other letters": (["data:image/png;base64,é"], "is not in base64"),
    "not in base64": (["data:image/png,abc"], "is not in base64"),
    "SVG": ([url(SVG, "image/svg+xml")], "'image/svg+xml' is none of image/png"),
    "SVG as PNG": ([url(SVG)], "is not a picture in PNG"),
    "HTML": ([url(b"<p>", "text/html")], "'text/html' is none of"),
    "a long kind": (["data:image/" + "x" * 9000 + ";base64,AA=="], "a picture is sent as it is"),
    "0 bytes": (["data:image/png;base64,"], "the picture is empty"),
    "truncated": ([url(ONE[:3000])], "cannot be read: image file is truncated"),
    "20,000 x 20,000": ([url(header(20_000, 20_000))], "has more than 67,108,864 pixels"),
    "too many pixels together": ([url(BLANK), url(BLANK)], "67,108,864 pixels together at most"),
    "the second": ([url(ONE), url(b"GIF89a")], "messages[0].content[1].image_url: the picture"),
    "500": ([url(ONE)] * 500, "at most 64 pictures, not 500"),
    "no address": ([{"detail": "low"}], "messages[0].content[0].image_url"),
    "a number": ([5], "messages[0].content[0].image_url"),
    "null": ([None], "only text content and image_url"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_picture_is_one_sentence(
    seeing: Server, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any picture of the request is decoded, but for those whose pixels are damaged."""
    read: list[object] = []
    monkeypatch.setattr(pictures, "show", lambda *given: read.append(given) or shown.show(*given))
    urls, said = WRONG[case]
    refused(seeing.post(CHAT, asked(*urls)), said)
    assert bool(read) == (case == "truncated")


def test_ways_to_send_one(seeing: Server) -> None:
    """As an address alone, in lines, under another type than it has; an animation's first frame."""
    said = content(seeing.post(CHAT, asked({"url": url(ONE)})))
    lines = "data:image/png;base64,\n" + base64.encodebytes(ONE).decode()
    for each in (url(ONE), lines, url(ONE, "IMAGE/JPEG"), url(ONE, "image/png;charset=utf-8")):
        assert content(seeing.post(CHAT, asked(each))) == said
    frames = [noise(seed).quantize(16) for seed in (1, 2, 3)]
    moving = file_of(frames[0], "GIF", save_all=True, append_images=frames[1:])
    first = content(seeing.post(CHAT, asked(url(file_of(frames[0], "GIF"), "image/gif"))))
    assert content(seeing.post(CHAT, asked(url(moving, "image/gif")))) == first


def test_pictures_stand_in_any_message(seeing: Server) -> None:
    part = {"type": "image_url", "image_url": {"url": url(ONE)}}
    for role in ("system", "assistant", "tool"):
        said = {"role": role, "content": [part], "tool_call_id": "c", "name": "f"}
        body = {"messages": [said, {"role": "user", "content": "What?"}]}
        assert seeing.post(CHAT, body).json()["usage"]["prompt_tokens"] > 60


def test_a_model_without_a_tower_refuses_them() -> None:
    with serving(tiny) as server:
        for path, body in (
            (CHAT, asked(url(ONE))),
            ("/v1/choose", {"prompt": "x", "labels": ["a", "b"], "images": [url(ONE)]}),
            ("/v1/fill", {"template": "{{a:int}}", "images": [url(ONE)]}),
        ):
            refused(server.post(path, body), "has no vision tower")
        assert server.client().models.list().data[0].images is False  # type: ignore[attr-defined]


def test_our_own_routes_take_pictures(seeing: Server) -> None:
    """Another picture, another answer; `canvas`, too."""
    assert seeing.client().models.list().data[0].images is True  # type: ignore[attr-defined]
    canvas = [{"text": "A: ", "pinned": True}, {"text": "xxxxxxxx"}]
    for path, body in (
        ("/v1/choose", {"prompt": "x", "labels": ["a", "b"]}),
        ("/v1/fill", {"template": "It is {{what:6}}.", "seed": 1}),
        ("/v1/fill", {"canvas": canvas, "prompt": "x", "seed": 1}),
    ):
        found = []
        for images in ([url(ONE)], [{"url": url(OTHER)}], []):
            answer = seeing.post(path, {**body, "images": images})
            assert answer.status_code == 200, answer.text
            found.append(json.dumps(answer.json()))
        assert len({*found}) > 1  # of one step, which is mostly noise
        refused(seeing.post(path, {**body, "images": ["http://x"]}), "images[0]: the server fetch")
        refused(seeing.post(path, {**body, "images": [url(ONE)] * 65}), "at most 64 pictures")


def test_bodies_have_room_for_pictures_and_not_for_text(checkpoint: Path) -> None:
    """On the routes that take them alone, and where the model sees."""
    settings = {"most_bytes": 5000, "picture_bytes": 30_000}
    with serving(lambda: load(checkpoint, dtype="float32"), **settings) as server:
        assert 5000 < len(url(ONE)) < 30_000
        content(server.post(CHAT, asked(url(ONE))))
        refused(server.post(CHAT, asked(url(ONE), url(ONE))), "bodies may have 35000 bytes", 413)
        said = "5000 bytes beside their pictures"
        refused(server.post(CHAT, asked(url(ONE), text="x" * 5000)), said, 413)
        long = {"prompt": url(ONE)}
        refused(server.post("/v1/completions", long), "bodies may have 5000 bytes", 413)
    with serving(tiny, **settings) as server:
        refused(server.post(CHAT, asked(url(ONE))), "bodies may have 5000 bytes", 413)


def test_large_bodies_together_are_bounded(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is held counts until its answer has ended, also where the client leaves before."""
    monkeypatch.setattr(access, "MOST_HELD", 30_000)
    body = json.dumps(asked(url(ONE))).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with serving(lambda: load(checkpoint, dtype="float32"), most_bytes=5000) as server:
        waiting = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
        for each in waiting:
            each.sendall(head.encode() + body[:-2])
        time.sleep(0.3)
        answer = server.post(CHAT, asked(url(ONE)))
        refused(answer, "too many large bodies", 429)
        assert answer.headers["retry-after"]
        content(server.post(CHAT, {"messages": [{"role": "user", "content": "hello"}]}))
        for each in waiting:
            each.close()
        wait_until(lambda: server.post(CHAT, asked(url(ONE))).status_code == 200)


def test_a_client_leaves_while_its_picture_is_read(
    seeing: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pictures behind it are not read any more; others are answered meanwhile."""
    begun, go, read = threading.Event(), threading.Event(), []

    def slow(*given: Any) -> Any:
        read.append(threading.current_thread().name)
        begun.set()
        go.wait(20)
        return shown.show(*given)

    monkeypatch.setattr(pictures, "show", slow)
    with pytest.raises(openai.APITimeoutError):
        seeing.client().with_options(timeout=1).chat.completions.create(
            model="tiny", messages=asked(*[{"url": url(ONE)}] * 9)["messages"]
        )
    assert begun.is_set()
    content(seeing.post(CHAT, {"messages": [{"role": "user", "content": "hello"}]}))
    time.sleep(0.5)
    go.set()
    time.sleep(0.5)
    assert len(read) == 1
    assert read[0] not in ("mlx", "MainThread")  # neither the worker's nor the event loop's
