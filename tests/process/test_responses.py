"""OpenAI's Responses, asked by its official client, and by some who mean harm."""

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from looking import PIXELS, content_checkpoint
from servers import (
    Breaking,
    Server,
    leave,
    reading,
    serving,
    sudoku_model,
    tiny,
    wait_until,
    writing,
)

from mlx_diffgemma import load
from mlx_diffgemma.server import responses_memory

SCHEMA: Any = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER: Any = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": False}
CALL = '<|tool_call>call:weather{city:<|"|>Oslo<|"|>}<tool_call|>'
PATH = "/v1/responses"
SEED: Any = {"extra_body": {"seed": 0}}


def test_the_openai_client_asks(small: Server) -> None:
    client = small.client()
    whole = client.responses.create(model="any", input="hello", **SEED)
    messages = [{"role": "user", "content": "hello"}]
    chat = small.post("/v1/chat/completions", {"messages": messages, "seed": 0}).json()
    assert whole.output_text == chat["choices"][0]["message"]["content"]
    assert (whole.status, whole.model, whole.error) == ("completed", "tiny", None)
    assert whole.usage
    told = (whole.usage.input_tokens, whole.usage.output_tokens, whole.usage.total_tokens)
    assert told == tuple(
        chat["usage"][f"{each}_tokens"] for each in ("prompt", "completion", "total")
    )
    with client.responses.stream(model="any", input="hello", **SEED) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == whole.output_text
    few = client.responses.create(model="any", input="hello", max_output_tokens=4, **SEED)
    assert (few.status, few.usage and few.usage.output_tokens) == ("incomplete", 4)
    assert few.incomplete_details
    assert few.incomplete_details.reason == "max_output_tokens"
    logprobs: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    weighed = client.responses.create(model="any", input="hello", **logprobs, **SEED)
    (part,) = weighed.output[0].content  # type: ignore[union-attr]
    assert "".join(each.token for each in part.logprobs) == whole.output_text  # type: ignore[union-attr]
    assert {len(each.top_logprobs) for each in part.logprobs} == {2}  # type: ignore[union-attr]


def test_the_events_of_a_stream_are_openais() -> None:
    """Their order, numbers and places; deltas are the text, and the end has all of it."""
    with serving(writing(f"<|channel>thought\nlook<channel|>Wait.{CALL}")) as server:
        body = {"input": "x", "stream": True, "tools": [WEATHER], "reasoning": {"effort": "low"}}
        told = server.post(PATH, body).text
    events = [each.split("\ndata: ") for each in told.strip().split("\n\n")]
    found = [(kind.removeprefix("event: response."), json.loads(data)) for kind, data in events]
    assert all(data["type"] == f"response.{kind}" for kind, data in found)
    assert [data["sequence_number"] for _, data in found] == list(range(len(found)))

    def item(kind: str) -> list[str]:
        part = ["content_part.added", f"{kind}.delta", f"{kind}.done", "content_part.done"]
        return ["output_item.added", *part, "output_item.done"]

    call = "function_call_arguments"
    called = ["output_item.added", f"{call}.delta", f"{call}.done", "output_item.done"]
    order = [*item("reasoning_text"), *item("output_text"), *called]
    assert [kind for kind, _ in found] == ["created", "in_progress", *order, "completed"]
    assert [data["output_index"] for _, data in found[2:-1]] == [0] * 6 + [1] * 6 + [2] * 4
    whole = found[-1][1]["response"]
    assert [each["type"] for each in whole["output"]] == ["reasoning", "message", "function_call"]
    done = [data["item"] for kind, data in found if kind == "output_item.done"]
    assert done == whole["output"]
    assert {each["status"] for each in done} == {"completed"}
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] > 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("remembered", [False, True])
def test_tools_and_thoughts_through_the_openai_client(stream: bool, remembered: bool) -> None:
    """The whole conversation is sent again, or only what is new behind an earlier response."""
    script = [f"<|channel>thought\nlook<channel|>Wait.{CALL}", "cold<channel|>It is 3 degrees."]
    with serving(writing(*script)) as server:
        client = server.client()

        def ask(said: Any, **more: Any) -> Any:
            given: Any = {"model": "x", "input": said, "tools": [WEATHER], **more}
            given["reasoning"] = {"effort": "high"}
            if not stream:
                return client.responses.create(**given)
            with client.responses.stream(**given) as events:
                return events.get_final_response()

        user = {"role": "user", "content": "How is Oslo?"}
        first = ask([user])
        thought, said, call = first.output
        assert thought.content[0].text.strip() == "look"
        assert (said.content[0].text, first.output_text) == ("Wait.", "Wait.")
        assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Oslo"})
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "3 C"}
        if remembered:
            second = ask([result], previous_response_id=first.id)
        else:
            second = ask([user, *(each.to_dict() for each in first.output), result])
        assert second.output_text == "It is 3 degrees."
        assert second.previous_response_id == (first.id if remembered else None)
        read = (first.usage.input_tokens, second.usage.input_tokens)
        assert read[1] > read[0] + len("Wait.")  # the call and its result are read


def prompt_of(server: Server, monkeypatch: pytest.MonkeyPatch, body: Any) -> tuple[str, Any]:
    """What the model reads of a request, and the answer."""
    with reading(monkeypatch) as texts:
        reply = server.post(PATH, body)
    assert reply.status_code == 200, reply.text
    return texts[0], reply.json()


def test_what_was_said_before_is_read_again(fine: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for instructions, which are those of one response; two may go on with the same one."""
    body = {"input": "My name is Ada.", "instructions": "Be brief.", "max_output_tokens": 9}
    text, first = prompt_of(fine, monkeypatch, body)
    assert "Be brief." in text
    said = [{"type": "message", "role": "developer", "content": "Be kind."}]
    said.append({"role": "user", "content": [{"type": "input_text", "text": "And?"}]})  # type: ignore[dict-item]
    for _ in range(2):
        more = {"input": said, "previous_response_id": first["id"]}
        text, second = prompt_of(fine, monkeypatch, more)
        order = ["My name is Ada.", "Fine.", "Be kind.", "And?"]
        assert sorted(map(text.find, order)) == [text.find(each) for each in order] != [-1] * 4
        assert "Be brief." not in text
    client = fine.client()
    assert client.responses.retrieve(second["id"]).output_text == "Fine."
    client.responses.delete(second["id"])
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(second["id"])
    with pytest.raises(openai.BadRequestError, match="or no longer") as refused:
        client.responses.create(model="x", input="x", previous_response_id=second["id"])
    assert refused.value.code == "previous_response_not_found"
    unkept = client.responses.create(model="x", input="x", store=False)
    assert not unkept.store
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """By responses and by characters; what was asked for last stays."""
    monkeypatch.setattr(responses_memory, "MOST_RESPONSES", 3)
    monkeypatch.setattr(responses_memory, "MOST_REMEMBERED", 1000)
    memory = responses_memory.Memory()

    def keep(name: str, text: str = "x", tools: str = "") -> None:
        said = [{"role": "user", "content": text}]
        memory.keep(said, {"id": name, "output": [], "tools": [tools]})

    for name in ("a", "b", "c"):
        keep(name)
    assert memory.find("a")
    keep("d")
    assert [each for each in "abcd" if memory.find(each)] == ["a", "c", "d"]
    keep("large", "x" * 950)
    assert [each for each in ("a", "c", "d", "large") if memory.find(each)] == ["large"]
    keep("huge", "x" * 1001)
    keep("tooled", tools="x" * 1001)
    assert memory.find("huge") is memory.find("tooled") is None
    assert memory.forget("large")
    assert not memory.forget("large")
    keep("e", "x" * 900)
    assert memory.find("e")


def test_guaranteed_json(small: Server) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    form: Any = {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}}
    few: Any = {"extra_body": {"steps": 4}}
    done = small.client().responses.create(model="x", input="hello", text=form, **few)
    assert json.loads(done.output_text)["a"] in ("x", "y")
    free: Any = {"format": {"type": "json_object"}}
    done = small.client().responses.create(model="x", input="Record: Anna", text=free, **few)
    assert isinstance(json.loads(done.output_text), dict)


@pytest.mark.parametrize("stream", [False, True])
def test_custom_tools_take_text(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One stands in a namespace; the client gets its name and the text, and sends both again."""
    grammar = {"type": "grammar", "syntax": "lark", "definition": "start: LINE+"}
    patch = {"type": "custom", "name": "patch", "description": "Changes.", "format": grammar}
    tools: Any = [WEATHER, {"type": "namespace", "name": "files", "tools": [patch]}]
    call = 'Now.<|tool_call>call:files.patch{input:<|"|>- a\n+ "b"<|"|>}<tool_call|>'
    with serving(writing(call, "Done.")) as server, reading(monkeypatch) as texts:
        client = server.client()
        ask: Any = {"model": "x", "tools": tools, "input": [{"role": "user", "content": "Change."}]}
        ask["tool_choice"] = "auto"
        if stream:
            with client.responses.stream(**ask) as events:
                kinds = [each.type for each in events]
                first = events.get_final_response()
            assert "response.custom_tool_call_input.delta" in kinds
        else:
            first = client.responses.create(**ask)
        made: Any = first.output[1]
        told = (made.type, made.namespace, made.name, made.input)
        assert told == ("custom_tool_call", "files", "patch", '- a\n+ "b"')
        result = {"type": "custom_tool_call_output", "call_id": made.call_id, "output": "changed"}
        ask["input"] += [*(each.to_dict() for each in first.output), result]
        assert client.responses.create(**ask).output_text == "Done."
        chosen = {"type": "custom", "name": "patch"}
        client.responses.create(**{**ask, "tool_choice": chosen})
    assert "declaration:files.patch{" in texts[0]
    assert 'call:files.patch{input:<|"|>- a\n+ "b"<|"|>}' in texts[1]
    assert "response:files.patch{" in texts[1]


def test_an_answer_whose_length_nobody_sets_is_whole() -> None:
    """It ended after as many tokens as the checkpoint says, which coding agents did not expect."""
    story = " ".join(str(i**3) for i in range(50))
    with serving(writing(story)) as server:
        asked = {"model": "x", "messages": [{"role": "user", "content": "x"}]}
        whole = [
            server.client().responses.create(model="x", input="x").output_text,
            server.client().chat.completions.create(**asked).choices[0].message.content,  # type: ignore[call-overload]
            server.ollama().chat(**asked).message.content,
            server.post("/v1/messages", asked).json()["content"][0]["text"],
        ]
        assert set(whole) == {story}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_call_that_has_to_be_made(choice: Any) -> None:
    with serving(writing('<|tool_call>call:weather{city:<|"|>Bergen<|"|>}<tool_call|>')) as server:
        ask: Any = {"model": "x", "input": "x", "tools": [WEATHER], "tool_choice": choice}
        (call,) = server.client().responses.create(**ask).output
        assert call.type == "function_call"
        assert json.loads(call.arguments) == {"city": "Bergen"}


def output(identity: str) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": identity, "output": "x"}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "input: it is missing"),
        ({"input": []}, "input: "),
        ({"input": 5}, "input: "),
        ({"input": [{"content": "x"}]}, "input[0].role: it is missing"),
        ({"input": [{"role": "me", "content": "x"}]}, "input[0].role: "),
        ({"input": [{"role": "user", "content": [{"text": "x"}]}]}, "input[0].content[0].type: "),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file"}]}]},
            "input[0].content[0]: only text",
        ),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]: only messages"),
        ({"input": [output("never")]}, "input[0].call_id: no call"),
        ({"input": [{"type": "function_call", "name": "x"}]}, "input[0]: a function_call needs"),
        (
            {"input": [{"type": "function_call", "name": "x", "call_id": "a", "arguments": "[1]"}]},
            "the arguments of x are no JSON object",
        ),
        ({"input": "x", "previous_response_id": "resp_x"}, "previous_response_id: there is no"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens: "),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0]: only functions"),
        ({"input": "x", "tools": [{"type": "namespace"}]}, "tools[0].name: it is missing"),
        (
            {"input": "x", "tools": [{"type": "namespace", "name": "n", "tools": [{"type": "x"}]}]},
            "tools[0].tools[0]: a namespace has functions",
        ),
        ({"input": "x", "tools": [{"type": "function"}]}, "tools[0].name: it is missing"),
        ({"input": "x", "tool_choice": "required"}, "there are no tools"),
        ({"input": "x", "tool_choice": {"type": "mcp"}}, "tool_choice: "),
        ({"input": "x", "background": True}, "background: "),
        ({"input": "x", "conversation": "c"}, "conversation: "),
        ({"input": "x", "prompt": {"id": "p"}}, "prompt: "),
        ({"input": "x", "text": {"format": {"type": "json_schema"}}}, "needs a schema"),
        ({"input": "x", "top_logprobs": 21}, "top_logprobs: "),
        ({"input": "1" * 90_000}, "have room for"),
    ],
)
def test_mistakes_are_told_in_openais_form(fine: Server, body: Any, said: str) -> None:
    reply = fine.post(PATH, body)
    assert reply.status_code == 400
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert said in reply.json()["error"]["message"]


def test_a_model_without_tools_or_thoughts_refuses_them(small: Server) -> None:
    for more, said in (
        ({"tools": [WEATHER]}, "tools"),
        ({"reasoning": {"effort": "low"}}, "thinking"),
    ):
        reply = small.post(PATH, {"input": "x", **more})
        assert reply.status_code == 400
        assert f"template knows no {said}" in reply.json()["error"]["message"]


def test_pictures_of_users_and_of_tools(tmp_path: Path, fine: Server) -> None:
    directory = content_checkpoint(tmp_path / "looking")
    url = f"data:image/png;base64,{base64.b64encode(PIXELS).decode()}"
    with serving(lambda: load(directory, dtype="float32")) as server:
        parts = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "What?"}]
        body = {"messages": [{"role": "user", "content": parts}], "seed": 1, "max_tokens": 16}
        wanted = server.post("/v1/chat/completions", body).json()["choices"][0]["message"]
        shown = {"type": "input_image", "image_url": url, "detail": "auto"}
        said = [{"role": "user", "content": [shown, {"type": "input_text", "text": "What?"}]}]
        ask = {"input": said, "seed": 1, "max_output_tokens": 16}
        done = server.post(PATH, ask).json()
        assert done["output"][0]["content"][0]["text"] == wanted["content"]
        again = {"input": "And?", "previous_response_id": done["id"], "max_output_tokens": 1}
        more = server.post(PATH, again).json()["usage"]["input_tokens"]
        assert more > done["usage"]["input_tokens"]
    call = {"type": "function_call", "name": "f", "call_id": "a", "arguments": "{}"}
    given = {**output("a"), "output": [{"type": "input_image", "image_url": url}]}
    refused = fine.post(PATH, {"input": [call, given]})
    assert "vision tower" in refused.json()["error"]["message"]


def test_an_error_behind_the_first_byte_is_an_event() -> None:
    with serving(lambda: tiny(Breaking)) as server:
        events: Any = list(server.client().responses.create(model="x", input="hello", stream=True))
        assert [each.type for each in events[:2]] == ["response.created", "response.in_progress"]
        assert [each.type for each in events[-2:]] == ["error", "response.failed"]
        assert events[-1].response.error.message == "a defect of the server"
        identity = events[-1].response.id
        assert (
            server.post(PATH, {"input": "x", "previous_response_id": identity}).status_code == 400
        )


def test_a_client_that_leaves_frees_its_place() -> None:
    with serving(sudoku_model) as server:
        long = {"input": "1" * 900, "max_output_tokens": 3000, "stream": True}
        leave(server, PATH, long, lambda: server.metric("requests_running") == 1)
        wait_until(lambda: server.metric("requests_running") == 0)
        assert server.metric("cancelled_total") == 1


def test_two_clients_at_once(small: Server) -> None:
    def ask(word: str) -> Any:
        body = {"input": word, "seed": 1, "max_output_tokens": 30, "steps": 8}
        return small.post(PATH, body).json()["output"][0]["content"]

    words = ["hello", "river"]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(ask, words))
    assert together == [ask(word) for word in words]
