"""Anthropic's API, asked by its official client, and by some who mean harm."""

import base64
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from looking import PIXELS, content_checkpoint
from servers import (
    Breaking,
    Server,
    process,
    reading,
    serving,
    sudoku_model,
    tiny,
    wait_until,
    writing,
)

from mlx_diffgemma import load
from mlx_diffgemma.server import anthropic_routes

HELLO: Any = [{"role": "user", "content": "hello"}]
ASK: dict[str, Any] = {"model": "any", "max_tokens": 200, "messages": HELLO}
PATH = "/v1/messages"

SCHEMA: Any = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER: Any = {"name": "weather", "description": "Tells it.", "input_schema": SCHEMA}
CALL = '<|tool_call>call:weather{city:<|"|>Oslo<|"|>}<tool_call|>'


def test_the_anthropic_client_chats(small: Server) -> None:
    client = small.anthropic()
    whole = client.messages.create(**ASK, extra_body={"seed": 0})
    (block,) = whole.content
    assert block.type == "text"
    assert (whole.stop_reason, whole.model, whole.role) == ("end_turn", "tiny", "assistant")
    chat = small.post("/v1/chat/completions", {"messages": HELLO, "seed": 0}).json()
    assert block.text == chat["choices"][0]["message"]["content"]
    usage = whole.usage
    read = usage.input_tokens + (usage.cache_read_input_tokens or 0)
    told = (read, usage.output_tokens)
    assert told == (chat["usage"]["prompt_tokens"], chat["usage"]["completion_tokens"])
    assert client.messages.count_tokens(model="x", messages=HELLO).input_tokens == read
    with client.messages.stream(**ASK, extra_body={"seed": 0}) as stream:
        assert "".join(stream.text_stream) == block.text
        final = stream.get_final_message()
    assert final.content[0].text == block.text
    assert final.usage.cache_read_input_tokens
    assert final.usage.input_tokens + final.usage.cache_read_input_tokens == read
    assert (final.stop_reason, final.usage.output_tokens) == ("end_turn", usage.output_tokens)
    assert [each.id for each in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").display_name == "tiny"


def test_the_events_of_a_stream_are_anthropics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their order, their names and indices, with pings between them where nothing else comes."""
    monkeypatch.setattr(anthropic_routes, "PING_SECONDS", 0)
    with serving(writing(f"<|channel>thought\nlook<channel|>Wait.{CALL}")) as server:
        body = {**ASK, "stream": True, "tools": [WEATHER], "thinking": {"type": "adaptive"}}
        told = server.post(PATH, body).text
    events = [each.split("\ndata: ") for each in told.strip().split("\n\n")]
    found = [(kind.removeprefix("event: "), json.loads(data)) for kind, data in events]
    assert all(kind == data["type"] for kind, data in found)
    assert sum(kind == "ping" for kind, _ in found) > 1
    assert [kind for kind, _ in found][:2] == ["message_start", "ping"]
    rest = [(kind, data) for kind, data in found[2:] if kind != "ping"]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    thought = [*block[:2], *block[1:]]
    assert [kind for kind, _ in rest] == [*thought, *block, *block, "message_delta", "message_stop"]
    assert [data["index"] for _, data in rest[:-2]] == [0] * 4 + [1] * 3 + [2] * 3
    deltas = [data["delta"]["type"] for kind, data in rest if kind == "content_block_delta"]
    assert deltas == ["thinking_delta", "signature_delta", "text_delta", "input_json_delta"]
    assert rest[7][1]["content_block"]["input"] == {}
    assert rest[-2][1]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}


@pytest.mark.parametrize("stream", [False, True])
def test_tools_and_thoughts_through_the_anthropic_client(stream: bool) -> None:
    script = [f"<|channel>thought\nlook<channel|>Wait.{CALL}", "cold<channel|>It is 3 degrees."]
    with serving(writing(*script)) as server:
        client = server.anthropic()
        thinking: Any = {"type": "enabled", "budget_tokens": 1024}

        def ask(messages: Any) -> anthropic.types.Message:
            given: Any = {**ASK, "messages": messages, "tools": [WEATHER], "thinking": thinking}
            if not stream:
                return client.messages.create(**given)
            with client.messages.stream(**given) as events:
                return events.get_final_message()

        asked = ask(HELLO)
        thought, said, call = asked.content
        assert (thought.type, said.type, call.type) == ("thinking", "text", "tool_use")
        assert (thought.thinking.strip(), said.text) == ("look", "Wait.")
        assert (call.name, call.input, asked.stop_reason) == (
            "weather",
            {"city": "Oslo"},
            "tool_use",
        )
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "3 C"}
        told = {"role": "assistant", "content": asked.content}
        done = ask([*HELLO, told, {"role": "user", "content": [result]}])
        assert [each.type for each in done.content] == ["thinking", "text"]
        assert done.content[-1].text == "It is 3 degrees."  # type: ignore[union-attr]


def prompt_of(server: Server, monkeypatch: pytest.MonkeyPatch, body: Any) -> str:
    """What the model reads of a request."""
    with reading(monkeypatch) as texts:
        reply = server.post(f"{PATH}/count_tokens", body)
    assert reply.status_code == 200, reply.text
    return texts[0]


def test_what_a_request_says_is_what_the_model_reads(
    fine: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of the system, text, results of tools (errors, too) and thoughts, in their order."""
    calls = [
        {"type": "tool_use", "id": name, "name": "weather", "input": {"city": name}}
        for name in ("a", "b")
    ]
    results = [
        {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "3 C"}]},
        {"type": "tool_result", "tool_use_id": "b", "content": "no such", "is_error": True},
    ]
    cached = {"cache_control": {"type": "ephemeral"}}
    messages = [
        {
            "role": "user",
            "content": [{"type": "text", "text": t, **cached} for t in ("one", "two")],
        },
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, *calls]},
        {"role": "user", "content": [*results, {"type": "text", "text": "Now?"}]},
    ]
    system = [{"type": "text", "text": "Be brief.", **cached}, {"type": "text", "text": "Be kind."}]
    text = prompt_of(
        fine, monkeypatch, {"system": system, "tools": [WEATHER], "messages": messages}
    )
    order = ["Be brief.\n\nBe kind.", "declaration:weather{", "one\n\ntwo", 'city:<|"|>a<|"|>']
    order += ['city:<|"|>b<|"|>', "response:weather{value:", "3 C", "error: no such", "Now?"]
    places = [text.find(each) for each in order]
    assert -1 not in places, text
    assert places == sorted(places)
    none = {"tools": [WEATHER], "tool_choice": {"type": "none"}, "messages": HELLO}
    assert "declaration" not in prompt_of(fine, monkeypatch, none)
    assert "<|think|>" not in prompt_of(fine, monkeypatch, {"messages": HELLO})
    adaptive = {"messages": HELLO, "thinking": {"type": "adaptive"}}
    assert "<|think|>" in prompt_of(fine, monkeypatch, adaptive)


def test_tools_come_and_go_within_a_chat(fine: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are deferred are declared once something names them; the model is told of it."""

    def tools_of(*blocks: Any) -> list[str]:
        tools = [WEATHER, *({**WEATHER, "name": n, "defer_loading": True} for n in ("a", "b"))]
        said = [{"role": "system", "content": [*blocks]}] if blocks else []
        text = prompt_of(fine, monkeypatch, {"tools": tools, "messages": [*HELLO, *said]})
        assert ("The tool " in text.split("<turn|>", 1)[1]) == bool(blocks)
        return re.findall("declaration:([^{]+)", text)

    def change(kind: str, name: str) -> Any:
        return {"type": f"tool_{kind}", "tool": {"type": "tool_reference", "name": name}}

    whole = {"type": "tool_definition", "definition": {**WEATHER, "name": "c"}}
    added = {"type": "tool_addition", "tool": whole}
    assert tools_of() == ["weather"]
    assert tools_of({"type": "tool_reference", "tool_name": "b"}) == ["weather", "b"]
    assert tools_of(change("addition", "b"), change("addition", "a")) == ["weather", "b", "a"]
    assert tools_of(added, change("removal", "weather")) == ["c"]
    assert tools_of(added, change("removal", "c"), change("addition", "c")) == ["weather", "c"]


@pytest.mark.parametrize("length", [4020, 9000, 90_000])
def test_a_chat_that_is_too_long_is_told_as_agents_know_it(fine: Server, length: int) -> None:
    """They shorten what was said when they read this sentence; any other ended the session."""
    body = {"messages": [{"role": "user", "content": "1" * length}]}
    told = fine.post(PATH, body).json()["error"]
    found = re.fullmatch(r"prompt is too long: (\d+) tokens > (\d+) maximum", told["message"])
    assert found
    assert int(found[1]) > int(found[2]) > 4000
    other = fine.post("/v1/chat/completions", body).json()["error"]
    assert other["code"] == "context_length_exceeded"
    assert "fit" in other["message"]


def test_an_answer_that_the_client_has_begun() -> None:
    """It goes on with the text, which is not told again."""
    begun = [*HELLO, {"role": "assistant", "content": "It is "}]
    with serving(writing("111111It is 3 degrees.", "It is 3 degrees.")) as server:
        client = server.anthropic()
        first = client.messages.create(**{**ASK, "messages": begun})  # its first six are given
        assert first.content[0].text.endswith("It is 3 degrees.")  # type: ignore[union-attr]
        assert not first.content[0].text.startswith("It is 1")  # type: ignore[union-attr]
        with client.messages.stream(**{**ASK, "messages": begun}) as stream:
            assert "".join(stream.text_stream) == "3 degrees."


@pytest.mark.parametrize(
    ("choice", "goes_on", "names"),
    [
        ({"type": "any"}, '{city:<|"|>Bergen<|"|>}', ["weather"]),
        ({"type": "tool", "name": "weather"}, '{city:<|"|>Bergen<|"|>}', ["weather", "other"]),
    ],
)
def test_a_call_that_has_to_be_made(choice: Any, goes_on: str, names: list[str]) -> None:
    tools: Any = [{**WEATHER, "name": name} for name in names]
    with serving(writing(f"<|tool_call>call:weather{goes_on}<tool_call|>")) as server:
        done = server.anthropic().messages.create(**ASK, tools=tools, tool_choice=choice)
        (call,) = done.content
        assert call.type == "tool_use"
        assert call.input == {"city": "Bergen"}


def test_why_an_answer_ends() -> None:
    """A stop sequence ends text, and is told; within the call of a tool it is part of it."""
    with serving(writing(f"One, two.{CALL}")) as server:
        client = server.anthropic()

        def ask(**more: Any) -> anthropic.types.Message:
            return client.messages.create(**{**ASK, "tools": [WEATHER], **more})

        cut = ask(stop_sequences=["Oslo", ", t", "wo"])
        assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", ", t")
        assert [each.to_dict() for each in cut.content] == [{"type": "text", "text": "One"}]
        whole = ask(stop_sequences=["Oslo", "weather"])
        assert (whole.stop_reason, whole.stop_sequence) == ("tool_use", None)
        assert whole.content[1].input == {"city": "Oslo"}  # type: ignore[union-attr]
        few = ask(max_tokens=3)
        assert (few.stop_reason, few.usage.output_tokens) == ("max_tokens", 3)


def test_guaranteed_json(small: Server) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    form = {"format": {"type": "json_schema", "schema": schema}}
    body = {**ASK, "steps": 4, "output_config": form, "stop_sequences": ["x"]}
    reply = small.post(PATH, body)
    assert json.loads(reply.json()["content"][0]["text"])["a"] in ("x", "y")
    assert reply.headers["x-ignored-parameters"] == "stop_sequences"


def result(identity: str, content: Any = "x") -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": identity, "content": content}


def of_user(*content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [*content]}]}


DEEP: Any = "x"
for _ in range(40):
    DEEP = [{"type": "tool_result", "content": DEEP}]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "messages: it is missing"),
        ({"messages": []}, "messages: "),
        ({"messages": HELLO, "max_tokens": 0}, "max_tokens: "),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role: "),
        ({"messages": [{"role": "user"}]}, "messages[0].content: it is missing"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content: "),
        (of_user({"text": "x"}), "messages[0].content[0].type: it is missing"),
        (of_user({"type": "text"}), "messages[0].content[0]: only text, image"),
        (of_user({"type": "text", "text": 5}), "messages[0].content[0].text: "),
        (of_user(result("never")), "messages[0].content[0].tool_use_id: no call"),
        (of_user({"type": "tool_result"}), "messages[0].content[0].tool_use_id: no call"),
        (of_user(result("never", DEEP)), "no call"),
        (of_user({"type": "image"}), "messages[0].content[0]: only text, image"),
        (
            of_user({"type": "image", "source": {"type": "url", "url": "https://a.example/b.png"}}),
            "images",
        ),
        (of_user({"type": "document", "source": {"type": "base64", "data": ""}}), "only text"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a"}]}]},
            "messages[0].content[0]: a tool_use needs id, name and input",
        ),
        ({"messages": [{"role": "assistant", "content": "alone"}]}, "is empty"),
        ({"messages": HELLO, "tools": [{"name": "bash", "type": "bash_20250124"}]}, "tools[0]: "),
        ({"messages": HELLO, "tools": [{"input_schema": {}}]}, "tools[0].name: it is missing"),
        ({"messages": HELLO, "tool_choice": {"type": "any"}}, "there are no tools"),
        (
            {"messages": HELLO, "tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}},
            "tool_choice asks for x",
        ),
        ({"messages": HELLO, "tools": [WEATHER], "tool_choice": {"type": "tool"}}, "asks for None"),
        ({"messages": HELLO, "stop_sequences": ["x" * 1001]}, "stop_sequences: "),
        ({"messages": HELLO, "stop_sequences": [""]}, "stop_sequences[0]: "),
        ({"messages": HELLO, "thinking": {"type": "enabled", "budget_tokens": 0}}, "budget_tokens"),
        ({"messages": HELLO, "system": [{"type": "image"}]}, "system[0].type: "),
        (of_user({"type": "tool_reference", "tool_name": "x"}), "content[0]: x is not among"),
        (of_user({"type": "tool_addition", "tool": {"type": "tool_reference"}}), "without a name"),
        ({"messages": HELLO, "output_config": {"format": {"type": "json_schema"}}}, "schema"),
    ],
)
def test_mistakes_are_told_in_anthropics_form(fine: Server, body: Any, said: str) -> None:
    before = fine.metric("answered_total")
    for path in (PATH, f"{PATH}/count_tokens"):
        if path != PATH and ("max_tokens" in body or "stop_sequences" in body):
            continue
        reply = fine.post(path, body)
        told = reply.json()
        assert (reply.status_code, told["type"]) == (400, "error"), told
        assert told["error"]["type"] == "invalid_request_error"
        assert said in told["error"]["message"]
        assert set(told["error"]) == {"type", "message"}
    assert fine.metric("answered_total") == before


def test_a_model_without_tools_or_thoughts_refuses_them(small: Server) -> None:
    thinking = {"type": "enabled", "budget_tokens": 1024}
    for more, said in (({"tools": [WEATHER]}, "tools"), ({"thinking": thinking}, "thinking")):
        with pytest.raises(anthropic.BadRequestError, match=f"template knows no {said}"):
            small.anthropic().messages.create(**ASK, **more)
    adaptive = {**ASK, "thinking": {"type": "adaptive"}, "max_tokens": 1}
    assert small.post(PATH, adaptive).status_code == 200


def test_a_key_as_anthropic_sends_it() -> None:
    with serving(writing("Fine."), api_key="s3cret") as server:
        assert server.anthropic("s3cret").messages.create(**ASK).content
        with pytest.raises(anthropic.AuthenticationError) as refused:
            server.anthropic("wrong").messages.create(**ASK)
        body: Any = refused.value.body
        assert body["error"]["type"] == "authentication_error"


def test_an_error_behind_the_first_byte_is_an_event() -> None:
    """The client raises it; the connection ends in order."""
    with serving(lambda: tiny(Breaking)) as server:
        with pytest.raises(anthropic.APIStatusError, match="a defect of the server"):
            list(server.anthropic().messages.create(**ASK, stream=True))
        told = server.post(PATH, {**ASK, "stream": True}).text.strip().split("\n\n")
        assert told[0].startswith("event: message_start\ndata: ")
        error = {"type": "api_error", "message": "a defect of the server"}
        assert json.loads(told[-1].removeprefix("event: error\ndata: "))["error"] == error


def test_a_client_that_leaves_a_stream_frees_its_place() -> None:
    with serving(sudoku_model) as server:
        ask = {**ASK, "messages": [{"role": "user", "content": "1" * 900}], "max_tokens": 3000}
        stream = server.anthropic().messages.create(**ask, stream=True)
        next(iter(stream))
        stream.close()
        wait_until(lambda: server.metric("requests_running") == 0)
        assert server.metric("cancelled_total") == 1


def test_pictures_in_base64_and_in_results(tmp_path: Path) -> None:
    """They are read as OpenAI's are, and are not counted as text."""
    directory = content_checkpoint(tmp_path / "looking")
    data = base64.b64encode(PIXELS).decode()
    picture = {"type": "base64", "media_type": "image/png", "data": data}
    shown: Any = {"type": "image", "source": picture}
    with serving(lambda: load(directory, dtype="float32"), most_bytes=600) as server:
        messages = [{"role": "user", "content": [shown, {"type": "text", "text": "What?"}]}]
        done = server.post(PATH, {"messages": messages, "seed": 1, "max_tokens": 16}).json()
        url = {"type": "image_url", "image_url": f"data:image/png;base64,{data}"}
        parts = [url, {"type": "text", "text": "What?"}]
        asked = {"messages": [{"role": "user", "content": parts}], "seed": 1, "max_tokens": 16}
        same = server.post("/v1/chat/completions", asked).json()
        assert done["content"][0]["text"] == same["choices"][0]["message"]["content"]
        large = {"type": "base64", "media_type": "image/png", "data": data + " " * 3000}
        body = of_user({"type": "image", "source": large}, {"type": "text", "text": "What?"})
        assert server.post(PATH, {**body, "seed": 1, "max_tokens": 16}).status_code == 200
        text = of_user({"type": "text", "text": "x" * 3000})
        assert server.post(PATH, text).status_code == 413
        bad = of_user({"type": "image", "source": {**picture, "data": "AAAA"}})
        reply = server.post(PATH, bad)
        assert reply.status_code == 400
        assert reply.json()["error"]["message"].startswith("messages[0].content[0].source.data: ")


def test_a_picture_that_a_tool_has_given(fine: Server) -> None:
    """It stands behind the results, where templates write pictures; this model sees none."""
    call = {"type": "tool_use", "id": "a", "name": "weather", "input": {}}
    picture = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
    given = [{"type": "text", "text": "a map"}, {"type": "image", "source": picture}]
    messages = [
        *HELLO,
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result("a", given)]},
    ]
    reply = fine.post(PATH, {"messages": messages})
    assert reply.status_code == 400
    assert "vision tower" in reply.json()["error"]["message"]


def test_two_clients_at_once(small: Server) -> None:
    def ask(word: str) -> Any:
        messages = [{"role": "user", "content": word}]
        body = {**ASK, "messages": messages, "seed": 1, "max_tokens": 30, "steps": 8}
        return small.post(PATH, body).json()["content"]

    words = ["hello", "river", "pears", "12"]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(ask, words))
    assert together == [ask(word) for word in words]


def test_the_command_serves_it() -> None:
    """A process of its own, asked by every client that there is, gives each the same text."""
    with process() as server:
        seed: dict[str, Any] = {"extra_body": {"seed": 0}}
        (block,) = server.anthropic().messages.create(**ASK, **seed).content
        chat = server.client().chat.completions.create(model="x", messages=HELLO, **seed)
        response = server.client().responses.create(model="x", input=HELLO, **seed)
        told = server.ollama().chat("x", HELLO, options={"seed": 0})
        texts = {chat.choices[0].message.content, response.output_text, told.message.content}
        assert texts == {block.text}  # type: ignore[union-attr]
        assert httpx.get(f"{server.url}/v1/messages").status_code == 405
