"""Coding agents at work: what two of them sent to a server of ours is sent again.

`tests/data/claude_code.json` and `codex.json` are recordings of the programs that they name, which
were told to write a module and its test in an empty repository: they read, wrote, ran and edited
files, looked for tools, asked an agent of their own, and one had the chat made shorter. What the
model wrote was written down beforehand. Their own texts are held by their length, as they are not
ours; names, schemas, fields and headers are as they were sent.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from paths import DATA
from servers import Server, reading, serving, writing

CLAUDE = json.loads((DATA / "claude_code.json").read_text())
CODEX = json.loads((DATA / "codex.json").read_text())

# Lists of a request whose entries stand in `parts` once.
LISTS = ("messages", "input", "tools", "system")


def body_of(agent: Any, request: Any) -> Any:
    """The body of a recorded request, put together."""
    whole = {
        name: [agent["parts"][i] if isinstance(i, int) else i for i in request["body"][name]]
        for name in LISTS
        if name in request["body"]
    }
    return {**request["body"], **whole}


@contextmanager
def working(agent: Any) -> Iterator[Server]:
    """A server whose model writes what it wrote in a recording."""
    writes = [each["writes"] for each in agent["requests"] if "writes" in each]
    with serving(writing(*writes, context=1 << 16)) as server:
        yield server


def sent(server: Server, agent: Any, request: Any) -> httpx.Response:
    """The answer to a recorded request, which is streamed if it was."""
    reply = httpx.post(
        f"{server.url}{request['path']}",
        headers=request["headers"],
        content=json.dumps(body_of(agent, request)),
        timeout=240,
    )
    assert reply.status_code == 200, reply.text
    return reply


def events_of(reply: httpx.Response) -> list[Any]:
    """The events of a stream, whose names are those of their kinds."""
    found = []
    for event in reply.text.strip().split("\n\n"):
        kind, data = event.removeprefix("event: ").split("\ndata: ")
        found.append(json.loads(data))
        assert found[-1]["type"] == kind
    return found


def message_of(events: list[Any]) -> list[Any]:
    """Anthropic's blocks, as a client puts them together; its ids are not told."""
    one = "content_block_start (content_block_delta )+content_block_stop "
    order = f"message_start ({one})*message_delta message_stop "
    kinds = "".join(f"{each['type']} " for each in events if each["type"] != "ping")
    assert re.fullmatch(order, kinds), kinds
    blocks: list[Any] = []
    for event in events:
        if event["type"] == "content_block_start":
            blocks.append(event["content_block"])
        if event["type"] == "content_block_delta":
            delta, block = event["delta"], blocks[event["index"]]
            for name in ("text", "thinking", "signature"):
                if name in delta:
                    block[name] += delta[name]
            if "partial_json" in delta:
                block["input"] = json.loads(delta["partial_json"])
    for block in blocks:
        block.pop("id", None)
    return blocks


def test_claude_code_works_for_twenty_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its chat ended when it had looked for a tool. A tool that it loads later is declared from
    then on, behind the others, so what was read before is not read again."""
    names, cached, prompts = [], [], []
    with working(CLAUDE) as server, reading(monkeypatch) as texts:
        for request in CLAUDE["requests"]:
            reply = sent(server, CLAUDE, request)
            if "answer" not in request:
                assert reply.json()["input_tokens"] > 0
                continue
            events = events_of(reply)
            blocks = message_of(events)
            assert blocks == request["answer"]
            names += [each["name"] for each in blocks if each["type"] == "tool_use"]
            reason = events[-2]["delta"]["stop_reason"]
            assert reason == ("tool_use" if blocks[-1]["type"] == "tool_use" else "end_turn")
            cached.append(events[-2]["usage"]["cache_read_input_tokens"])
            prompts.append(texts[-1])
    assert len(prompts) == 20
    assert {"Read", "Bash", "Write", "Edit", "ToolSearch", "Agent"} <= set(names)
    declared = [re.findall("declaration:([^{]+)", each) for each in prompts]
    assert not any("DeferredToolPlaceholder" in each for each in declared)
    first = next(i for i, each in enumerate(declared) if "WebFetch" in each)
    assert declared[first] == [*declared[first - 1], "WebFetch", "NotebookEdit"]
    assert all(more > 6000 for more in cached[1:first])
    # The system's turn has grown, so one request is read anew. All that followed were, too.
    assert all(more > 5000 for more in cached[first + 1 : 15])
    assert "<|turn>system\n(" in prompts[0].split("<turn|>", 1)[1]


def test_codex_works_for_fifteen_turns() -> None:
    """It was refused for tools in a namespace and for one that runs at OpenAI; its answers ended
    after as many tokens as the checkpoint gives one whose length nobody has set."""
    with working(CODEX) as server:
        for request in CODEX["requests"]:
            reply = sent(server, CODEX, request)
            assert "tools.web_search" in reply.headers["x-ignored-parameters"]
            events = events_of(reply)
            assert [each["sequence_number"] for each in events] == [*range(len(events))]
            assert events[-1]["type"] == "response.completed"
            items = [each["item"] for each in events if each["type"].endswith("item.done")]
            assert items == events[-1]["response"]["output"]
            told = [
                {name: value for name, value in each.items() if name not in ("id", "call_id")}
                for each in items
            ]
            assert told == request["answer"]
    assert len(CODEX["requests"]) == 15
