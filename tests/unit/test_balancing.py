"""Who gets a request of those behind one address: by what it has read, and what it has to do."""

import asyncio
import json
import logging
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from command import run

from mlx_diffgemma.cli import ranks
from mlx_diffgemma.cli.front import Front
from mlx_diffgemma.cli.serve import _is_told
from mlx_diffgemma.server.affinity import (
    BLOCK,
    MOST_BEGINNINGS,
    MOST_KNOWN,
    Beginnings,
    Readers,
    beginnings_of,
)
from mlx_diffgemma.server.backends import Backend, Backends, Patience
from mlx_diffgemma.server.refused import Refused


def backends(count: int = 2) -> Backends:
    found = Backends([f"mac-{i}:1" for i in range(count)], tell=lambda told: None)
    for each in found.all:
        found.let_in(each, "")
    return found


def load(backend: Backend, count: int) -> None:
    """Give a worker so many requests."""

    async def begin() -> None:
        for _ in range(count):
            backend.begin(Patience(1))

    asyncio.run(begin())


def asking(path: str, **body: Any) -> Beginnings:
    return beginnings_of(path, json.dumps(body).encode())


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


SYSTEM, HELLO, FINE = said("system", "Be brief."), said("user", "hello"), said("assistant", "Fine.")

MARK = {"cache_control": {"type": "ephemeral"}}

PART: dict[str, Any] = {"type": "text", "text": "hello"}

OLD, NEW = "x" * 3 * BLOCK, "x" * 3 * BLOCK + "y" * BLOCK

# A route, what was asked there, and what goes on with it.
GO_ON: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "/v1/chat/completions",
        {"messages": [SYSTEM, HELLO]},
        {"messages": [SYSTEM, HELLO, FINE, said("user", "Why?")], "temperature": 0},
    ),
    (
        "/v1/messages",
        {"system": "s", "messages": [said("user", [{**PART, **MARK}])]},
        {"system": "s", "messages": [HELLO, FINE, said("user", [{**PART, **MARK}])]},
    ),
    (
        "/v1/messages",
        {"messages": [said("user", [PART, {**PART, **MARK}])]},
        {"messages": [said("user", [PART, PART]), FINE, said("user", [{**PART, **MARK}])]},
    ),
    ("/api/chat", {"messages": [HELLO]}, {"messages": [HELLO, FINE, HELLO]}),
    ("/v1/responses", {"input": [HELLO]}, {"input": [HELLO, FINE, {"type": "reasoning"}, HELLO]}),
    ("/v1/completions", {"prompt": OLD}, {"prompt": NEW}),
    ("/api/generate", {"prompt": OLD, "system": "s"}, {"prompt": NEW, "system": "s"}),
    ("/v1/fill", {"prompt": OLD, "template": "{{a}}"}, {"prompt": OLD, "template": "{{b}}"}),
]


@pytest.mark.parametrize(("path", "before", "after"), GO_ON)
def test_a_conversation_goes_to_who_has_read_it(
    path: str, before: dict[str, Any], after: dict[str, Any]
) -> None:
    """Also where its text is written as a part now, and with Anthropic's marks, which move on."""
    all_of = backends(3)
    chosen = all_of.all[1]
    all_of.note(asking(path, **before), chosen)
    for each in (chosen, *all_of.all):  # whoever had none for longest would be another
        each.begun += 1
    assert all_of.choose(asking(path, **after), all_of.all) is chosen
    chosen.out = "gone"
    assert all_of.choose(asking(path, **after), all_of.all) is not chosen
    all_of.let_in(chosen, "anew")
    chosen.begun = 9
    assert all_of.choose(asking(path, **after), all_of.all) is not chosen


@pytest.mark.parametrize(
    ("path", "one", "other"),
    [
        (
            "/v1/chat/completions",
            {"messages": [SYSTEM, HELLO]},
            {"messages": [SYSTEM, said("user", "bye"), FINE, HELLO]},
        ),
        (
            "/v1/messages",
            {"system": "a", "messages": [HELLO]},
            {"system": "b", "messages": [HELLO]},
        ),
        ("/v1/completions", {"prompt": OLD}, {"prompt": "y" + OLD}),
        ("/v1/completions", {"prompt": "x"}, {"prompt": "x"}),
        ("/v1/edit", {"text": OLD, "instruction": "x"}, {"text": OLD, "instruction": "x"}),
        ("/v1/chat/completions", {"messages": []}, {"messages": []}),
        ("/v1/chat/completions", {"messages": 5}, {"messages": 5}),
        ("/v1/chat/completions", {"messages": [5, [], None]}, {"messages": [5, [], 1]}),
        ("/v1/completions", {"prompt": [1, 2]}, {"prompt": [1, 2]}),
    ],
)
def test_others_go_to_who_has_least_to_do(
    path: str, one: dict[str, Any], other: dict[str, Any]
) -> None:
    """A system message that all share made all of them one conversation."""
    all_of = backends()
    first, second = all_of.all
    all_of.note(asking(path, **one), first)
    first.begun = 1
    assert all_of.choose(asking(path, **other), all_of.all) is second
    assert beginnings_of(path, b"[1]") == beginnings_of(path, b"null") == Beginnings()


def test_load_counts_by_places() -> None:
    all_of = backends()
    small, large = all_of.all
    small.places, large.places = 2, 8
    load(small, 1)
    load(large, 3)
    assert all_of.choose(Beginnings(), all_of.all) is large
    load(large, 2)
    assert all_of.choose(Beginnings(), all_of.all) is small


def test_who_has_read_it_may_have_more_to_do_but_not_much_more() -> None:
    """A repeated question has no more to lose, so it goes to whoever is free."""
    all_of = backends()
    reader, other = all_of.all
    whole = asking("/api/chat", messages=[HELLO])
    more = asking("/api/chat", messages=[HELLO, FINE, HELLO])
    all_of.note(whole, reader)
    other.begun, reader.begun = 1, 2
    assert all_of.choose(whole, all_of.all) is reader
    load(reader, 2)
    assert all_of.choose(more, all_of.all) is reader
    assert all_of.choose(whole, all_of.all) is other
    load(reader, 1)
    assert all_of.choose(more, all_of.all) is other


def test_no_room_and_nobody_there_are_told_apart() -> None:
    all_of = backends()
    first, second = all_of.all
    for each in all_of.all:
        each.places, each.queue = 1, 1
    load(first, 2)
    assert all_of.choose(Beginnings(), all_of.all) is second
    for left in ([first], []):
        with pytest.raises(Refused) as error:
            all_of.choose(Beginnings(), left)
        assert error.value.status == 429
    first.out = second.out = "gone"
    with pytest.raises(Refused) as error:
        all_of.choose(Beginnings(), all_of.all)
    assert error.value.status == 503


def test_what_is_known_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    long = [HELLO, FINE] * 500
    found = asking("/api/chat", messages=long)
    assert len(found.digests) == MOST_BEGINNINGS
    assert found.digests[0] == asking("/api/chat", messages=[HELLO]).digests[0]
    more = asking("/api/chat", messages=[*long, HELLO])
    assert found.digests[-1] in more.digests
    assert len(asking("/v1/completions", prompt="x" * 4_000_000).digests) == MOST_BEGINNINGS
    monkeypatch.setattr("mlx_diffgemma.server.affinity.MOST_KNOWN", 3)
    readers = Readers()
    for i in range(5):
        readers.note(Beginnings([b"old"]), 2)
        readers.note(Beginnings([bytes([i])]), 1)
    assert [readers.of(bytes([i])) for i in range(5)] == [set(), set(), set(), {1}, {1}]
    assert readers.of(b"old") == {2}
    assert MOST_KNOWN > 1000


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("mac-1:8080,MAC-2.local:8080", ["mac-1:8080", "mac-2.local:8080"]),
        (
            "10.0.0.2:80, localhost:81,[FE80:0::1]:82",
            ["10.0.0.2:80", "127.0.0.1:81", "[fe80::1]:82"],
        ),
        ("", "is no HOST:PORT"),
        ("mac-1", "is no HOST:PORT"),
        ("mac-1:", "is no HOST:PORT"),
        (":8080", "is no HOST:PORT"),
        ("mac-1:0", "is no HOST:PORT"),
        ("mac-1:65536", "is no HOST:PORT"),
        ("mac-1:²", "is no HOST:PORT"),
        ("mac-1:8080,", "is no HOST:PORT"),
        ("http://mac-1:8080", "is no HOST:PORT"),
        ("user@mac-1:8080", "is no HOST:PORT"),
        ("mac-1/x:8080", "is no HOST:PORT"),
        ("mac-1:80\r\nx:8080", "is no HOST:PORT"),
        ("::1:8080", "is no HOST:PORT"),
        ("[fe80::1%en0]:8080", "is no HOST:PORT"),
        ("mac-1:8080,mac-1:8080", "stands there twice"),
        ("localhost:81,127.0.0.1:81", "stands there twice"),
        ("mac-1:8080,localhost:9000", "is this server itself"),
        ("[::1]:9000", "is this server itself"),
        ("mac-0:9000", "is this server itself"),
        (",".join(f"mac-{i}:1" for i in range(65)), "takes 64 at most"),
    ],
)
def test_addresses_of_workers(
    given: str, wanted: list[str] | str, capsys: pytest.CaptureFixture[str]
) -> None:
    front = Front(given)
    if isinstance(wanted, list):
        assert front.addresses("mac-0", 9000) == wanted
        return
    with pytest.raises(SystemExit) as ended:
        front.addresses("mac-0", 9000)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: --workers")
    assert wanted in told


def test_a_launcher_is_not_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ranks, "place", lambda: SimpleNamespace(size=2))
    with pytest.raises(SystemExit):
        ranks.check_shared("serve")
    assert "serve --workers HOST:PORT,... needs no launcher" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["mlx-diffgemma", "serve", "--shard"])
    with pytest.raises(SystemExit):
        Front("mac-1:1")
    assert "--workers does not go with --shard" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given",
    [("--model", "x"), ("--dtype", "float32"), ("--max-batch", "3"), ("--cache-gb", "2")],
)
def test_options_of_a_model_belong_to_workers(given: tuple[str, str]) -> None:
    """But a model that is named for other commands stands in nobody's way."""
    done = run("serve", "--workers", "mac-1:1,x", MLX_DIFFGEMMA_MODEL="y")
    assert "'x' is no HOST:PORT" in done.stderr
    done = run("serve", "--workers", "mac-1:1", *given, MLX_DIFFGEMMA_MODEL="y")
    assert done.returncode == 2
    assert f"error: {given[0]} belongs to the workers" in done.stderr


def test_who_looks_each_second_fills_no_log() -> None:
    for path, wanted in (("/health", False), ("/v1/models", True)):
        access = logging.makeLogRecord({"args": ("127.0.0.1:1", "GET", path, "1.1", 200)})
        assert _is_told(access) is wanted


def test_it_needs_no_mlx() -> None:
    code = "import sys, mlx_diffgemma.server.balancer, mlx_diffgemma.server.connections; "
    code += "print({'mlx', 'fastapi', 'pydantic', 'numpy'} & {*sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert found.stdout == b"set()\n"
