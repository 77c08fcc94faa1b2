"""Tools for agents over MCP: the real process, asked by the SDK's client and by hand."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from mcp import StdioServerParameters
from mcp.client.client import Client
from mcp.client.stdio import stdio_client
from mcp.types import TextContent

from mlx_diffgemma import choose, edit, fill, generate, load

COMMAND = [sys.executable, "-m", "mlx_diffgemma", "mcp"]

CITY = "The capital of Norway is {{city:Oslo|Rome|Paris}}."
ASKED = "What is the capital of Norway?"
RECORD = "Record: 12 pears at 345 to Anna"
ITEM = {"enum": ["pears", "books"]}


def asked(do: Callable[[Client], Awaitable[None]], log: Path) -> str:
    """What the process says on stderr while a client does something with it."""

    async def main() -> None:
        with log.open("w") as file:
            server = StdioServerParameters(command=COMMAND[0], args=COMMAND[1:])
            async with Client(stdio_client(server, file), read_timeout_seconds=60) as client:
                await do(client)

    asyncio.run(main())
    return log.read_text()


async def called(client: Client, name: str, **given: Any) -> Any:
    """What a tool gives, which stands in its text too; of an error the sentence."""
    found = await client.call_tool(name, given)
    (content,) = found.content
    assert isinstance(content, TextContent)
    if found.is_error:
        return content.text
    assert json.loads(content.text) == found.structured_content
    return found.structured_content


MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ("extract", {"text": "x", "schema": {"type": "strin"}}, "type must be one of object"),
    ("extract", {"text": "x"}, "schema: it is missing"),
    ("edit", {"text": "a", "instruction": "Fix", "first_line": 7}, "there is no line 7"),
    ("edit", {"text": "", "instruction": "Fix"}, "text: String should have at least 1"),
    ("edit", {"text": "a" * 2_000_000, "instruction": "Fix"}, "text: String should have at most"),
    ("choose", {"prompt": "x", "labels": ["a"]}, "labels: List should have at least 2"),
    ("choose", {"prompt": "x", "labels": ["a", "b"], "draws": 65}, "draws: it should be less"),
    (
        "choose",
        {"prompt": "x" * 100_000, "labels": ["a", "b"]},
        "has 100,038 characters",
    ),
    ("fill", {"template": "no hole"}, "no hole"),
    ("fill", {"template": "{{}}", "temperature": 1}, "temperature: Extra inputs"),
    ("fill", {"template": "{{}}", "x" * 5000: 1}, "xxx"),
    ("write", {}, "there is no tool 'write'; there are fill, edit, choose, extract"),
]


def test_an_agent_uses_the_tools(tmp_path: Path) -> None:
    model, tokenizer = load()

    async def do(client: Client) -> None:
        listed = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert list(listed) == ["fill", "edit", "choose", "extract"]
        for tool in listed.values():
            jsonschema.Draft202012Validator.check_schema(tool.input_schema)
            assert tool.description
            assert tool.input_schema["additionalProperties"] is False
        filled, edited, chosen, read = await asyncio.gather(
            called(client, "fill", template=CITY, prompt=ASKED),
            called(client, "edit", text="a small hosue near the river", instruction="Fix"),
            called(client, "choose", prompt=ASKED, labels=["Oslo", "Rome"], template="{label}."),
            called(client, "extract", text=RECORD, schema=ITEM),
        )
        for name, found in (("fill", filled), ("edit", edited), ("choose", chosen)):
            jsonschema.validate(found, listed[name].output_schema or {})
        assert filled["text"] == fill(model, tokenizer, CITY, prompt=ASKED, seed=0).text
        assert filled["values"] == {"city": "Oslo"}
        fixed = edit(model, tokenizer, "a small hosue near the river", "Fix", seed=0)
        assert (edited["text"], edited["notes"]) == (fixed.text, [])
        likely = choose(model, tokenizer, ASKED, {"label": ["Oslo", "Rome"]}, template="{label}.")
        assert chosen["probabilities"]["label"] == pytest.approx(likely["label"], rel=1e-3)
        assert read["value"] == json.loads(generate(model, tokenizer, RECORD, schema=ITEM, seed=0))
        for name, given, said in MISTAKES:
            told = await called(client, name, **given)
            assert said in told
            assert "\n" not in told
            assert len(told) <= 1000

    said = asked(do, tmp_path / "log")
    assert said == "" or said.startswith("Model: the small demonstration model")


def test_a_call_that_is_cancelled_frees_its_place(tmp_path: Path) -> None:
    """Two such calls take all places that choices have; they would be computed for minutes."""
    long = {"prompt": "x", "labels": [f"{i:03}{i:03}" for i in range(8)], "draws": 64}

    async def do(client: Client) -> None:
        await called(client, "choose", prompt="x", labels=["a", "b"])
        calls = [asyncio.create_task(client.call_tool("choose", long)) for _ in range(2)]
        await asyncio.sleep(1)
        assert not any(each.done() for each in calls)
        for each in calls:
            each.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        found = await client.call_tool(
            "choose", {"prompt": "x", "labels": ["a", "b"]}, read_timeout_seconds=15
        )
        assert not found.is_error

    asked(do, tmp_path / "log")


FIRST = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {
        "protocolVersion": "2025-06-18",
        "capabilities": {},
        "clientInfo": {"name": "by hand", "version": "1"},
    },
}
CALL = {
    "jsonrpc": "2.0",
    "id": 2,
    "method": "tools/call",
    "params": {"name": "choose", "arguments": {"prompt": "x", "labels": ["a", "b"]}},
}


def started(*arguments: str, foreign: str = "") -> subprocess.Popen[str]:
    """A server that has been sent a greeting, foreign lines and a call."""
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin
    ready = {"jsonrpc": "2.0", "method": "notifications/initialized"}
    lines = [json.dumps(FIRST), json.dumps(ready), foreign or json.dumps(ready), json.dumps(CALL)]
    process.stdin.write("".join(f"{line}\n" for line in lines))
    process.stdin.flush()
    return process


def by_hand(*arguments: str, foreign: str = "") -> tuple[list[dict[str, Any]], str, int]:
    """Answers to a greeting, foreign lines and a call; what stderr says, and the exit code."""
    process = started(*arguments, foreign=foreign)
    assert process.stdout
    answers: list[dict[str, Any]] = []
    while not any(each.get("id") == 2 for each in answers):
        answers.append(json.loads(process.stdout.readline()))
    rest, said = process.communicate(timeout=60)
    assert rest == ""
    return answers, said, process.returncode


def test_foreign_lines_do_not_end_it() -> None:
    half = json.dumps(CALL).replace('"x"', '"\\ud800"').replace('"id": 2', '"id": 3')
    lines = f"nonsense\n\n{half}\n{'[' * 100_000}\n\x00\xff"
    answers, _, code = by_hand(foreign=lines)
    last = next(each for each in answers if each.get("id") == 2)
    assert set(last["result"]["structuredContent"]["probabilities"]["label"]) == {"a", "b"}
    assert code == 0


def test_an_agent_that_is_killed_while_it_waits() -> None:
    """Its end of the pipe is gone before an answer comes, and the model still loads: the process
    stayed for ever, with the model; with one that was loaded it ended in a traceback."""
    process = started()
    assert process.stdin
    assert process.stdout
    assert process.stderr
    process.stdout.readline()
    process.stdout.close()
    process.stdin.write(json.dumps({"jsonrpc": "2.0", "id": 9, "method": "tools/list"}) + "\n")
    process.stdin.flush()
    time.sleep(2)  # it is answered in a fraction of that, and ends once nothing more is sent
    process.stdin.close()
    assert process.wait(60) == 0
    assert "Traceback" not in process.stderr.read()


def test_a_model_that_is_not_there_is_told_to_each_call() -> None:
    answers, said, code = by_hand("-m", "no/such/place")
    told = answers[-1]["result"]
    assert told["isError"]
    assert "no/such/place" in told["content"][0]["text"]
    assert "error: " in said
    assert "no/such/place" in said
    assert "Traceback" not in said
    assert code == 1
