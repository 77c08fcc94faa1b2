"""A server, asked by the clients that exist and by some that misbehave."""

import asyncio
import json
import math
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from fastapi import APIRouter
from fastapi import Request as Http
from gemma import gemma_tokenizer
from servers import (
    SUDOKU,
    Process,
    Server,
    address,
    leave,
    listening,
    process,
    serving,
    sudoku_model,
    tiny,
    wait_until,
    working,
    writing,
)

from mlx_diffgemma import (
    DiffusionGemma,
    Draft,
    Guards,
    Request,
    SettingError,
    Text,
    Tokenizer,
    choose,
    edit,
    fill,
    generate,
    load,
    stream_generate,
)
from mlx_diffgemma.server.app import make_app
from mlx_diffgemma.server.service import Models, Service
from mlx_diffgemma.server.stream import Stream, gathered
from mlx_diffgemma.tasks.starts import Pieces

HELLO = [{"role": "user", "content": "hello"}]
PUZZLES = [line.split() for line in (SUDOKU / "puzzles.txt").read_text().splitlines()[1:60]]


@pytest.fixture(scope="module")
def sudoku() -> Iterator[Server]:
    with serving(sudoku_model, max_batch=8) as server:
        yield server


def puzzle(i: int) -> str:
    cells = PUZZLES[i % len(PUZZLES)][0]
    return "\n".join(cells[j : j + 6] for j in range(0, 36, 6))


def given_hold(i: int, answer: str) -> bool:
    """Whether an answer may be for this puzzle: six rows, with its clues where they were."""
    cells = PUZZLES[i % len(PUZZLES)][0]
    found = answer.replace("\n", "")
    return len(found) == 36 and all(a in (b, ".") for a, b in zip(cells, found, strict=True))


def test_the_openai_client_chats(small: Server) -> None:
    client = small.client()
    ask: dict[str, Any] = {
        "model": "any",
        "messages": [{"role": "user", "content": "hello"}],
        "seed": 0,
    }
    whole = client.chat.completions.create(**ask)
    text = whole.choices[0].message.content
    assert text
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    stream = client.chat.completions.create(
        **ask, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    parts = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(parts) == text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}  # type: ignore[union-attr]
    )
    drafted = client.chat.completions.create(**ask, stream=True, extra_body={"stream_drafts": True})
    chosen = [c.choices[0].delta.content or "" for c in drafted if getattr(c, "choices", None)]
    assert "".join(chosen) == text


@pytest.mark.parametrize("name", ["tiny", "google/diffusiongemma", "ein Größe?#%2F"])
def test_a_model_is_found_by_its_name(name: str) -> None:
    """`models.retrieve` of the official client was answered with 404."""
    with (
        working(tiny, name=name, aliases=["other/name"]) as thread,
        listening(make_app(thread)) as running,
    ):
        client = Server(address(running)).client()
        (listed,) = client.models.list().data
        assert listed.id == name
        assert client.models.retrieve("other/name") == listed
        found: Any = client.models.retrieve(name)
        assert found == listed
        assert (found.context_length, found.canvas_length) == (240, 24)
        assert (found.thinking, found.tools) == (False, False)
        with pytest.raises(openai.NotFoundError) as refused:
            client.models.retrieve("gpt-4")
        assert refused.value.code == "model_not_found"


NO_TOOLS = "this model's chat template knows no tools"
CALLED = {"function": {"name": "now"}}
NO_THINKING = "this model's chat template knows no thinking"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"tools": [{"type": "function", "function": {"name": "now"}}]}, NO_TOOLS),
        (
            {
                "tools": [{"type": "function", "function": {"name": "now"}}],
                "tool_choice": "required",
            },
            NO_TOOLS,
        ),
        ({"messages": [*HELLO, {"role": "assistant", "tool_calls": [CALLED]}]}, NO_TOOLS),
        ({"enable_thinking": True}, NO_THINKING),
        ({"reasoning_effort": "low"}, NO_THINKING),
    ],
)
def test_what_a_model_does_not_know_is_refused(small: Server, more: Any, said: str) -> None:
    """It was left out in silence, and a call that had to be made was nonsense with 200."""
    reply = small.post("/v1/chat/completions", {"messages": HELLO, **more})
    assert (reply.status_code, reply.json()["error"]["message"]) == (400, said)
    options: Any = {"enable_thinking": True}
    if "messages" in more:
        return
    if "tools" in more:
        options = {"tools": more["tools"]}
    with pytest.raises(SettingError, match=said):
        stream_generate(*load(), "hello", **options)
    with pytest.raises(SettingError, match=said):
        stream_generate(*load(), [2, 3], **options)
    off = {"tools": [], "enable_thinking": False, "reasoning_effort": "none", "steps": 1}
    assert small.post("/v1/chat/completions", {"messages": HELLO, **off}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "field", "reason"),
    [
        ("chat/completions", {}, "messages", "it is missing"),
        ("chat/completions", {"messages": [{"role": "me"}]}, "messages[0].role", "'user'"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": 5}]},
            "messages[0].content",
            "it should be a valid string or it should be a valid list",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            "messages[0].content[0].text",
            "it should be a valid string",
        ),
        ("chat/completions", {"messages": HELLO, "max_tokens": 0}, "max_tokens", "or equal to 1"),
        ("chat/completions", {"messages": HELLO, "tool_choice": "x"}, "tool_choice", "'auto'"),
        ("completions", {"prompt": ["a", ""]}, "prompt[1]", "at least 1 character"),
        ("choose", {"prompt": "a", "labels": {"x": 1}}, "labels.x", "it should be a valid list"),
        ("edit", [], None, "the body: it should be a JSON object"),
    ],
)
def test_a_wrong_body_is_told_field_and_reason(
    small: Server, path: str, body: Any, field: str | None, reason: str
) -> None:
    """Fields were named by how the code checks them, such as `content.list[ContentPart].0.text`,
    and of a field of several kinds only the first was told."""
    reply = small.post(f"/v1/{path}", body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, field)
    assert error["message"].startswith(field or "the body")
    assert reason in error["message"]


def test_drafts_say_how_sure_each_token_is() -> None:
    """They had a text and a count: nobody could show what was settled. Bytes of one character are
    told as the character."""
    with serving(writing("Größe \U0001f600 <b>")) as server:
        body = {"messages": HELLO, "stream": True, "stream_drafts": True}
        told = server.post("/v1/chat/completions", body).text
    drafts = [json.loads(each) for each in re.findall(r"event: draft\ndata: (.*)", told)]
    assert drafts[-1]["text"] == "Größe \U0001f600 <b>"
    for draft in drafts:
        assert "".join(each["text"] for each in draft["tokens"]) == draft["text"]
        assert len(draft["positions"]) == draft["length"] == 64
        assert draft["positions"].count("#") == draft["accepted"]
        assert all(0 <= each["probability"] <= 1 for each in draft["tokens"])
        assert draft["tokens"][0]["accepted"] is (draft["positions"][0] == "#")
    assert "\U0001f600" in {each["text"] for each in drafts[-1]["tokens"]}


def test_settings_of_a_chat(small: Server) -> None:
    ask: dict[str, Any] = {
        "messages": [{"role": "user", "content": "hello"}],
        "seed": 0,
        "steps": 12,
    }
    full = small.post("/v1/chat/completions", ask).json()["choices"][0]["message"]["content"]
    cut = small.post("/v1/chat/completions", {**ask, "stop": [full[5:8], "zzz"]}).json()
    assert cut["choices"][0]["message"]["content"] == full[:5]
    assert cut["choices"][0]["finish_reason"] == "stop"
    few = small.post("/v1/chat/completions", {**ask, "max_completion_tokens": 4}).json()
    assert few["usage"]["completion_tokens"] == 4
    assert few["choices"][0]["finish_reason"] == "length"
    several = small.post("/v1/chat/completions", {**ask, "n": 2}).json()["choices"]
    assert [c["index"] for c in several] == [0, 1]
    whole = small.post("/v1/chat/completions", {**ask, "max_tokens": -1}).json()["choices"]
    assert whole[0]["message"]["content"] == full  # what LM Studio sends was refused
    assert several[0]["message"]["content"] == full
    parts = {"role": "user", "content": [{"type": "text", "text": "hello"}]}
    same = small.post("/v1/chat/completions", {**ask, "messages": [parts]}).json()
    assert same["choices"][0]["message"]["content"] == full
    sent = {"top_p": 0.5, "frequency_penalty": 1, "presence_penalty": 0, "top_k": 3}
    tool = {"type": "function", "function": {"name": "f", "strict": True}}
    tools = {"tools": [tool], "tool_choice": "none"}
    reply = small.post("/v1/chat/completions", {**ask, **sent, **tools})
    told = "frequency_penalty,tools.function.strict,top_k,top_p"
    assert reply.headers["x-ignored-parameters"] == told
    streamed = {"template": "a {{x:1}}", "steps": 1, "stream_drafts": True, "temperature": 0.2}
    assert small.post("/v1/fill", streamed).headers["x-ignored-parameters"] == "temperature"


def test_logprobs_are_of_the_tokens_of_the_text(small: Server) -> None:
    ask: Any = {"model": "x", "messages": [{"role": "user", "content": "hello"}], "seed": 0}
    done = small.client().chat.completions.create(**ask, logprobs=True, stop=".")
    known = done.choices[0].logprobs
    assert known
    assert known.content
    assert "".join(each.token for each in known.content) == done.choices[0].message.content
    assert all(each.logprob <= 1e-6 for each in known.content)
    assert known.content[0].logprob > -1
    stream = small.client().chat.completions.create(**ask, logprobs=True, stop=".", stream=True)
    parts = [c.choices[0].logprobs for c in stream if c.choices and c.choices[0].logprobs]
    assert [e for part in parts for e in part.content or []] == known.content


def test_the_likeliest_tokens_of_each_place(small: Server) -> None:
    """`top_logprobs` were empty lists, and named as ignored."""
    ask: Any = {"model": "x", "messages": HELLO, "seed": 0, "logprobs": True, "max_tokens": 9}
    plain = small.client().chat.completions.create(**ask).choices[0]
    done = small.client().chat.completions.create(**ask, top_logprobs=20).choices[0]
    assert done.message == plain.message
    assert plain.logprobs
    assert done.logprobs
    for alone, each in zip(plain.logprobs.content or [], done.logprobs.content or [], strict=True):
        told = [other.logprob for other in each.top_logprobs]
        assert (len(told), alone.top_logprobs) == (20, [])
        assert told == sorted(told, reverse=True)
        assert sum(map(math.exp, told)) <= 1 + 1e-5
        assert each.top_logprobs[0].token == each.token == alone.token
        assert told[0] == pytest.approx(each.logprob, abs=1e-5)
    path = "/v1/chat/completions"
    begun = small.post(path, {**ask, "opening": "So ", "top_logprobs": 2}).json()["choices"][0]
    first = begun["logprobs"]["content"][0]  # what is given is certain
    assert [each["logprob"] for each in first["top_logprobs"]] == [0]
    for more in ({"logprobs": False}, {"top_logprobs": 21}, {"mode": "causal"}):
        refused = small.post(path, {**ask, "top_logprobs": 2, **more})
        assert refused.status_code == 400
        assert "top" in refused.json()["error"]["message"]


def test_an_answer_with_a_given_opening(small: Server) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "opening": "Well, ", "seed": 0}
    answer = small.post("/v1/chat/completions", body).json()["choices"][0]["message"]
    assert answer["content"].startswith("Well, ")


NOW = {"type": "function", "function": {"name": "now"}}


@pytest.mark.parametrize(
    ("choice", "names", "begins", "goes_on", "name", "arguments"),
    [
        ("required", ["now"], "now{", 'zone:<|"|>CET<|"|>}', "now", {"zone": "CET"}),
        ("required", ["now", "later"], "", "later{}", "later", {}),
        (NOW, ["later", "now"], "now{", "}", "now", {}),
    ],
)
def test_a_tool_call_that_has_to_be_made(
    choice: Any, names: list[str], begins: str, goes_on: str, name: str, arguments: Any
) -> None:
    """The model would write digits where the call has to begin; of several tools that may be
    called it chooses one itself."""
    forced = len(gemma_tokenizer().encode("<|tool_call>call:" + begins))
    tools = [{**NOW, "function": {"name": each}} for each in names]
    body = {"messages": HELLO, "tools": tools, "seed": 0}
    with serving(writing("1" * forced + goes_on + "<tool_call|>")) as server:
        path = "/v1/chat/completions"
        said = server.post(path, {**body, "tool_choice": choice}).json()["choices"][0]
        assert said["finish_reason"] == "tool_calls"
        assert said["message"]["content"] is None
        (call,) = said["message"]["tool_calls"]
        assert call["function"]["name"] == name
        assert json.loads(call["function"]["arguments"]) == arguments
        free = server.post(path, body).json()["choices"][0]
        assert free["message"]["content"].startswith("1" * forced)
        other = {"type": "function", "function": {"name": "never"}}
        refused = server.post(path, {**body, "tool_choice": other})
        assert refused.status_code == 400
        assert "never" in refused.json()["error"]["message"]


def test_tools_and_thoughts_through_the_openai_client() -> None:
    call = '<|channel>thought\nlook<channel|>Wait.<|tool_call>call:weather{city:<|"|>Oslo<|"|>}'
    script = [call + "<tool_call|>", "cold<channel|>It is 3 degrees."] * 2
    tools: Any = [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
            },
        }
    ]
    with serving(writing(*script)) as server:
        client = server.client()
        for stream in (False, True):
            messages: Any = [{"role": "user", "content": "How is Oslo?"}]
            ask: Any = {"model": "x", "tools": tools, "extra_body": {"enable_thinking": True}}
            if stream:
                chunks = list(client.chat.completions.create(**ask, messages=messages, stream=True))
                deltas = [c.choices[0].delta for c in chunks if c.choices]
                (asked,) = [d.tool_calls[0] for d in deltas if d.tool_calls]
                thought = "".join(getattr(d, "reasoning_content", "") for d in deltas)
                said = "".join(d.content or "" for d in deltas)
                reason = [c.choices[0].finish_reason for c in chunks if c.choices][-1]
            else:
                choice = client.chat.completions.create(**ask, messages=messages).choices[0]
                message: Any = choice.message
                (asked,), thought = message.tool_calls, message.reasoning_content
                said, reason = message.content, choice.finish_reason
            assert (thought.strip(), said, reason) == ("look", "Wait.", "tool_calls")
            assert (asked.function.name, json.loads(asked.function.arguments)) == (
                "weather",
                {"city": "Oslo"},
            )
            function = {"name": "weather", "arguments": asked.function.arguments}
            calls = [{"id": asked.id, "type": "function", "function": function}]
            messages += [
                {"role": "assistant", "content": None, "tool_calls": calls},
                {"role": "tool", "tool_call_id": asked.id, "content": "3 C"},
            ]
            done: Any = client.chat.completions.create(**ask, messages=messages).choices[0]
            assert done.message.content == "It is 3 degrees."
            assert done.message.reasoning_content == "cold"
            assert done.finish_reason == "stop"


def test_guaranteed_json(small: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"item": {"enum": ["pears", "books"]}, "count": {"type": "integer"}},
        "required": ["item", "count"],
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    few = {"steps": 8}
    for prompt in ("Record: 12 pears at 345 to Anna", "nonsense"):
        done = small.client().chat.completions.create(
            model="x",
            messages=[{"role": "user", "content": prompt}],
            response_format=form,
            extra_body=few,
        )
        answer = json.loads(done.choices[0].message.content or "")
        assert answer["item"] in ("pears", "books")
        assert isinstance(answer["count"], int)
    asked = {"messages": [{"role": "user", "content": "x"}], "response_format": form, **few}
    cut = small.post("/v1/chat/completions", {**asked, "stop": '"', "reasoning_effort": "high"})
    assert cut.headers["x-ignored-parameters"] == "reasoning_effort,stop"
    assert json.loads(cut.json()["choices"][0]["message"]["content"])
    done = small.client().chat.completions.create(
        model="x",
        messages=[{"role": "user", "content": "Record: Anna Berg"}],
        response_format={"type": "json_object"},
        extra_body=few,
    )
    assert isinstance(json.loads(done.choices[0].message.content or ""), dict)


def test_what_does_not_go_with_a_schema_is_named(small: Server) -> None:
    """A budget for thoughts was dropped in silence."""
    form = {"type": "json_schema", "json_schema": {"schema": {"enum": ["a", "b"]}}}
    asked = {"messages": HELLO, "response_format": form}
    for more in ({"opening": "So"}, {"tools": [NOW], "tool_choice": "required"}):
        reply = small.post("/v1/chat/completions", {**asked, **more})
        assert reply.status_code == 400
        said = "response_format goes with neither an opening nor a forced tool call"
        assert reply.json()["error"]["message"] == said
    told = {
        "thinking_budget": 9,
        "stop": "x",
        "shrink": True,
        "start": "x",
        "enable_thinking": True,
    }
    reply = small.post("/v1/chat/completions", {**asked, **told})
    assert reply.headers["x-ignored-parameters"] == ",".join(sorted(told))
    assert reply.json()["choices"][0]["message"]["content"] in ('"a"', '"b"')


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"opening": "So"}, "a schema does not go with opening"),
        ({"shrink": True}, "a schema does not go with shrink"),
        ({"start": Pieces((("a", True),))}, "a schema does not go with start"),
        ({"guards": Guards()}, "a schema does not go with guards"),
    ],
)
def test_another_api_is_a_router_over_the_service(more: Any, said: str) -> None:
    """And what it asks for that makes no sense is refused as in the APIs that there are."""

    def router(service: Service) -> APIRouter:
        routes = APIRouter()

        @routes.post("/other")
        async def other(http: Http) -> Any:
            given = await http.json()
            request = Request(
                "x", schema=given["schema"], steps=1, **(more if given["more"] else {})
            )
            work, patience = await service.prepare(http, request)
            events = await gathered(http, service.stream([work], patience))
            return "".join(event.text for _, event in events if isinstance(event, Text))

        return routes

    with working(tiny) as thread:
        app = make_app(thread)
        app.include_router(router(Models(thread.workers).services[0]))
        with listening(app) as running:
            server = Server(address(running))
            schema = {"enum": ["a", "b"]}
            reply = server.post("/other", {"schema": schema, "more": True})
            assert (reply.status_code, reply.json()["error"]["message"]) == (400, said)
            assert json.loads(server.post("/other", {"schema": schema, "more": False}).json()) in (
                "a",
                "b",
            )


def test_completions_and_infilling(random_one: Server) -> None:
    small = random_one
    client = small.client()
    done = client.completions.create(model="x", prompt="hello", max_tokens=5, seed=0, echo=True)
    assert done.choices[0].text.startswith("hello")
    assert done.usage
    assert done.usage.completion_tokens <= 5
    filled = client.completions.create(
        model="x", prompt="The old house ", suffix=" near the river.", max_tokens=6, seed=0
    )
    assert filled.choices[0].text
    best = client.completions.create(
        model="x", prompt=["a", "b"], best_of=3, n=1, max_tokens=8, extra_body={"steps": 8}
    )
    assert [c.index for c in best.choices] == [0, 1]
    stream = client.completions.create(
        model="x", prompt="hello", stream=True, max_tokens=5, seed=0, echo=True
    )
    assert "".join(c.choices[0].text for c in stream if c.choices) == done.choices[0].text
    two = [small.post("/v1/completions", {"prompt": p, "steps": 1}) for p in ("a", "b", ["a", "b"])]
    read = [reply.json()["usage"]["prompt_tokens"] for reply in two]
    assert read[2] == read[0] + read[1]


def test_the_best_of_several_is_the_likeliest(small: Server) -> None:
    """It was the one with the lowest mean entropy, which is right less often."""
    ask = {"prompt": "The capital of", "steps": 4, "max_tokens": 12, "seed": 0}
    kept = small.post("/v1/completions", {**ask, "best_of": 6, "n": 5}).json()["choices"]
    known = [choice["diffusion"]["mean_log_probability"] for choice in kept]
    assert known == sorted(known, reverse=True)
    entropies = [choice["diffusion"]["mean_entropy"] for choice in kept]
    assert entropies != sorted(entropies)
    every = small.post("/v1/completions", {**ask, "n": 6}).json()["choices"]
    assert {choice["diffusion"]["mean_log_probability"] for choice in every} == {None}
    best = small.post("/v1/completions", {**ask, "best_of": 6}).json()["choices"]
    assert [choice["text"] for choice in best] == [kept[0]["text"]]


def test_infilling_as_editors_ask(random_one: Server) -> None:
    """More than a canvas used to be refused, a backslash before the hole hid it, `stop` and
    `stream_options` were dropped."""
    small = random_one
    ask: dict[str, Any] = {"prompt": 'path = "C:\\', "suffix": '"\n{{x}}', "seed": 0, "steps": 4}
    whole = small.post("/v1/completions", {**ask, "max_tokens": 500}).json()["choices"][0]["text"]
    assert whole
    assert (
        small.post("/v1/completions", {**ask, "max_tokens": 1}).json()["usage"]["completion_tokens"]
        == 1
    )
    cut = small.post("/v1/completions", {**ask, "max_tokens": 500, "stop": whole[:1]}).json()
    assert cut["choices"][0]["text"] == ""
    wanted = {"steps": ask.pop("steps")}
    stream = small.client().completions.create(
        model="x",
        **ask,
        max_tokens=500,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=wanted,
    )
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole
    assert chunks[-1].usage
    assert small.post("/v1/completions", {**ask, "best_of": 2}).status_code == 400


def test_filling_and_choosing(small: Server) -> None:
    body = {"template": '{"item":"{{item:pears|books}}"}', "prompt": "Record: 3 pears", "seed": 0}
    filled = small.post("/v1/fill", body).json()
    assert filled["text"] == f'{{"item":"{filled["values"]["item"]}"}}'
    drafts = small.post("/v1/fill", {**body, "stream_drafts": True}).text
    assert drafts.count("event: draft") >= 1
    assert json.dumps(filled["values"])[1:-1] in drafts
    given = {"text": '{"item":"', "pinned": True}, {"text": "books"}, {"text": '"}', "pinned": True}
    canvas = small.post("/v1/fill", {"canvas": given, "prompt": "Record: 3 pears", "seed": 0})
    assert canvas.json()["text"].startswith('{"item":"')
    assert canvas.json()["text"].endswith('"}')
    chances = small.post("/v1/choose", {"prompt": "Record: 3 pears", "labels": ["yes", "no"]})
    assert sum(chances.json()["probabilities"]["label"].values()) == pytest.approx(1)


EDIT: dict[str, Any] = {
    "text": "line one\na smal hosue near the river\nline three\n",
    "instruction": "Repair",
    "lines": [2, 2],
    "seed": 0,
}


def test_editing(small: Server) -> None:
    reply = small.post("/v1/edit", {**EDIT, "temperature": 2})
    assert reply.headers["x-ignored-parameters"] == "temperature"
    edited = reply.json()
    alone = edit(*load(), EDIT["text"], EDIT["instruction"], lines=(2, 2), seed=0)
    told = {
        "text": alone.text,
        "denoising_steps": alone.steps,
        "positions_decoded": alone.positions_decoded,
        "notes": list(alone.notes),
    }
    assert edited == told
    assert alone.text != EDIT["text"]
    events = small.post("/v1/edit", {**EDIT, "stream_drafts": True}).text.strip().split("\n\n")
    assert len(events) == alone.steps + 2
    assert all(event.startswith("event: draft\ndata: {") for event in events[:-2])
    first = json.loads(events[0].partition("data: ")[2])
    assert first["canvas"] == 0
    assert first["length"] == 64
    assert json.loads(events[-2].removeprefix("data: ")) == told
    assert events[-1] == "data: [DONE]"
    # All of it is noised, and all lines are asked for.
    whole = {"text": "a smal hosue", "instruction": "Repair", "strength": 1, "steps": 4, "seed": 1}
    given = edit(*load(), "a smal hosue", "Repair", strength=1, steps=4, seed=1)
    assert small.post("/v1/edit", whole).json()["text"] == given.text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"strength": 0}, "strength"),
        ({"strength": 1.01}, "strength"),
        ({"strength": -0.1}, "strength"),
        ({"strength": "0.4"}, "strength"),
        ({"strength": None}, "strength"),
        ({"lines": [2, 1]}, "no range"),
        ({"lines": [0, 1]}, "no range"),
        ({"lines": [1, 9]}, "no line 9"),
        ({"lines": [1]}, "lines"),
        ({"lines": [1, 2, 3]}, "lines"),
        ({"lines": "1:2"}, "lines"),
        ({"text": ""}, "text"),
        ({"text": "\n\n", "lines": None}, "nothing to edit"),
        ({"instruction": ""}, "instruction"),
        ({"text": "1" * 50, "lines": None}, "tokens long"),
        ({"steps": 0}, "steps"),
        ({"seed": -1}, "seed"),
        ({"instruction": "1" * 9000, "stream_drafts": True}, "fit into the context"),
    ],
)
def test_edits_that_are_refused(small: Server, changes: Any, said: str) -> None:
    reply = small.post("/v1/edit", {**EDIT, **changes})
    assert reply.status_code == 400
    assert said in reply.json()["error"]["message"]


class Gated(DiffusionGemma):
    """Decodes once the gate is open, and notes how many passes go through the model together."""

    def decode(self, passes: Any, evaluate: Any = None) -> Any:
        assert self.gate.wait(60)
        self.together.append(len(passes))
        return super().decode(passes, evaluate)


def test_all_kinds_of_requests_side_by_side() -> None:
    """Each gets what it gets alone."""
    bodies: dict[str, Any] = {
        "chat/completions": {"messages": HELLO, "seed": 3},
        "fill": {"template": "a {{x:pears|books}} b {{}} c", "prompt": "x", "seed": 3},
        "edit": {**EDIT, "text": "one\na hosue\nthree\n"},
        "choose": {"prompt": "x", "labels": ["12", "13", "4"], "template": "{label}."},
    }
    gate, together = threading.Event(), list[int]()

    def gated() -> tuple[DiffusionGemma, Tokenizer]:
        model, tokenizer = tiny(Gated)
        model.gate, model.together = gate, together
        return model, tokenizer

    with serving(gated, max_batch=8) as server, ThreadPoolExecutor(4) as pool:
        replies = {path: pool.submit(server.post, f"/v1/{path}", bodies[path]) for path in bodies}
        counts = ("requests_waiting", "requests_running")
        wait_until(lambda: sum(map(server.metric, counts)) == 4)
        gate.set()
        found = {path: reply.result().json() for path, reply in replies.items()}
    assert max(together) >= 3
    model, tokenizer = tiny()
    answer = found["chat/completions"]["choices"][0]["message"]["content"]
    assert answer == generate(model, tokenizer, HELLO, seed=3, guards=Guards())
    filled = fill(model, tokenizer, bodies["fill"]["template"], prompt="x", seed=3)
    assert (found["fill"]["text"], found["fill"]["values"]) == (filled.text, filled.values)
    text = bodies["edit"]["text"]
    edited = edit(model, tokenizer, text, EDIT["instruction"], lines=(2, 2), seed=0)
    assert found["edit"]["text"] == edited.text != text
    labels = {"label": bodies["choose"]["labels"]}
    chances = choose(model, tokenizer, "x", labels, template="{label}.")
    assert found["choose"]["probabilities"]["label"] == pytest.approx(chances["label"], rel=1e-3)


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("chat/completions", {"messages": []}, 400, "messages"),
        ("chat/completions", {"messages": [{"role": "user", "content": 3}]}, 400, "content"),
        ("chat/completions", {"messages": [{"role": "cat", "content": "x"}]}, 400, "role"),
        ("chat/completions", {"messages": [{"role": "user", "content": "1" * 9000}]}, 400, "fit"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "image_url are supported",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "x"}], "tool_choice": "required"},
            400,
            "there are no tools",
        ),
        ("completions", {"prompt": ""}, 400, "prompt"),
        ("fill", {"template": "no holes"}, 400, "hole"),
        ("fill", {}, 400, "either a template or a canvas"),
        ("fill", {"canvas": [{"text": "1" * 500}]}, 400, "more than a canvas"),
        ("fill", {"template": "{{x}}", "prompt": "1" * 9000, "stream_drafts": True}, 400, "fit"),
        ("completions", {"prompt": ["x"] * 300}, 400, "prompt"),
        ("choose", {"prompt": "x", "labels": ["a" * 50, "b"] * 9, "draws": 65}, 400, "draws"),
        ("choose", {"prompt": "x", "labels": [f"{i:050}" for i in range(99)]}, 400, "together"),
        ("fill", {"template": "{{a}} {{a}}"}, 400, "two holes"),
        ("choose", {"prompt": "x", "labels": ["a"]}, 400, "two labels"),
        ("nothing", {}, 404, "Not Found"),
    ],
)
def test_mistakes_are_told_in_openais_form(
    small: Server, path: str, body: object, status: int, said: str
) -> None:
    reply = small.post(f"/v1/{path}", body)
    assert reply.status_code == status
    assert said in reply.json()["error"]["message"]
    messages: Any = [{"role": "user", "content": "1" * 9000}]
    with pytest.raises(openai.BadRequestError, match="fit into the context"):
        small.client().chat.completions.create(model="x", messages=messages, stream=True)


MUCH = "1" * 3_900_000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": MUCH}]}),
        ("chat/completions", {"messages": HELLO, "opening": MUCH}),
        ("chat/completions", {"messages": HELLO, "stop": MUCH}),
        ("completions", {"prompt": MUCH}),
        ("fill", {"template": MUCH + "{{x}}"}),
        ("fill", {"template": "{{x}}", "prompt": MUCH}),
        ("fill", {"canvas": [{"text": MUCH}]}),
        ("edit", {"text": MUCH, "instruction": "x"}),
        ("edit", {"text": "a\n" + MUCH, "instruction": "x", "lines": [1, 1]}),
        ("edit", {"text": "a", "instruction": MUCH}),
        ("choose", {"prompt": MUCH, "labels": ["a", "b"]}),
        ("choose", {"prompt": "x", "labels": ["a", "b"], "template": MUCH + "{label}"}),
    ],
)
def test_much_text_is_refused_by_its_characters(small: Server, path: str, body: Any) -> None:
    """All of it was encoded first, on the thread of all answers or holding the interpreter: ten
    seconds and 1.7 GB, in which /health waited, too."""
    reply = small.post(f"/v1/{path}", body)
    assert reply.status_code == 400
    assert "characters" in reply.json()["error"]["message"]


def test_each_of_many_clients_gets_its_own_answer(sudoku: Server) -> None:
    """Eight at once; `scripts/stress_server.py` does it for a minute."""
    client = sudoku.client()

    def ask(i: int) -> str:
        done = client.chat.completions.create(
            model="x", messages=[{"role": "user", "content": puzzle(i)}], seed=i
        )
        return done.choices[0].message.content or ""

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, range(24)))
    assert sum(given_hold(i, answer) for i, answer in enumerate(together)) >= 22
    assert [ask(i) for i in (0, 11, 23)] == [together[i] for i in (0, 11, 23)]


LONG: dict[str, Any] = {"messages": [{"role": "user", "content": "1" * 900}], "max_tokens": 3000}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", LONG),
        ("/v1/chat/completions", {**LONG, "stream": True}),
        ("/v1/fill", {"template": "a {{x}} b {{y}} c {{z}} d {{u}} e {{v}} f {{w}}"}),
        ("/v1/edit", {"text": "12\n" * 300, "instruction": "x"}),
        ("/v1/choose", {"prompt": "x", "labels": ["12", "13", "4"], "draws": 64}),
    ],
)
def test_a_client_that_goes_away_frees_its_place(sudoku: Server, path: str, body: Any) -> None:
    """The answer used to be written to its end for nobody; labels, and the scoring of a fill,
    were one piece."""
    before = sudoku.metric("cancelled_total")
    leave(sudoku, path, body, lambda: sudoku.metric("requests_running") == 1)
    wait_until(lambda: sudoku.metric("requests_running") == 0)
    assert sudoku.metric("cancelled_total") == before + 1


def test_a_slow_reader_misses_drafts_and_no_text() -> None:
    """All of them waited in memory, however long the answer."""

    class Given:
        """A worker that has said everything before anybody listens."""

        def submit(self, work: Any, listen: Callable[[object], None], patience: Any) -> None:
            for canvas in range(20):
                for step in range(48):
                    listen(Draft(canvas, step, 48, (), (), (), (), (), 0, 0, (), ""))
                listen(Text(f"{canvas},"))
            listen(None)

    async def read() -> list[object]:
        given: Any = Given()
        return [event async for _, event in Stream(given, [given], given)]

    events = asyncio.run(read())
    assert "".join(e.text for e in events if isinstance(e, Text)) == "".join(
        f"{i}," for i in range(20)
    )
    drafts = [event for event in events if isinstance(event, Draft)]
    assert [draft.step for draft in drafts] == [47] * 20


def test_the_prefix_of_another_request_is_not_read_again(sudoku: Server) -> None:
    messages = [{"role": "user", "content": "123.\n" * 100}]
    first, second = (
        sudoku.post("/v1/chat/completions", {"messages": messages, "max_tokens": 3, "steps": 1})
        for _ in range(2)
    )
    assert first.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    usage = second.json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"]


def test_hostile_requests_leave_it_healthy() -> None:
    """Malformed, mistyped, oversized, badly encoded, cut off: 200 or more in random order."""
    with process("-m", str(SUDOKU), "--max-batch", "8") as server:
        _be_hostile(server)


def _be_hostile(sudoku: Process) -> None:
    rng = random.Random(5)
    good = {"messages": [{"role": "user", "content": puzzle(0)}], "seed": 0, "stream": True}
    wanted = sudoku.post("/v1/chat/completions", {**good, "stream": False}).json()["choices"]

    def raw(body: bytes, cut: float = 1.0) -> bytes:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", sudoku.port), timeout=30) as made:
            made.sendall(head.encode() + body[: int(len(body) * cut)])
            if cut < 1:
                return b""
            return made.recv(200)

    def hostile(kind: int) -> None:
        body = json.dumps(good).encode()
        if kind == 0:  # goes away somewhere in the answer
            with httpx.stream(
                "POST", f"{sudoku.url}/v1/chat/completions", json=good, timeout=60
            ) as reply:
                for _ in zip(range(rng.randrange(3)), reply.iter_lines(), strict=False):
                    pass
        elif kind == 1:
            assert b" 400 " in raw(body[: rng.randrange(len(body) - 1)])
        elif kind == 2:
            wrong = {
                **good,
                rng.choice(["seed", "n", "stream", "messages"]): rng.choice([[], "x", {}]),
            }
            assert b" 400 " in raw(json.dumps(wrong).encode())
        elif kind == 3:
            assert b" 400 " in raw(b'{"messages": "\xff\xfe\xc3"}')
        elif kind == 4:
            assert sudoku.post("/v1/fill", {"template": "x" * 5_000_000}).status_code == 413
        elif kind == 5:
            raw(body, cut=rng.random())
        elif kind == 6:
            deep = b'{"messages": ' + b"[" * 30_000
            assert b" 400 " in raw(deep)
        else:
            huge = {**good, "seed": 10**30, "max_tokens": -1}
            assert b" 400 " in raw(json.dumps(huge).encode())

    def some(count: int) -> None:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(hostile, [rng.randrange(8) for _ in range(count)]))

    def endless() -> Iterator[bytes]:  # a body that does not say its length
        yield b'{"template": "'
        for _ in range(50):
            yield b"x" * 100_000

    def sent(content: Iterator[bytes]) -> httpx.Response:
        kind = {"Content-Type": "application/json"}
        return httpx.post(f"{sudoku.url}/v1/edit", content=content, headers=kind)

    assert sent(endless()).status_code == 413
    some(100)  # buffers and caches find their size
    memory, active = [sudoku.memory()], sudoku.metric("memory_active_bytes")
    # Where large bodies meet, a thread asks for memory of its own, once, and that may be late. What
    # leaks goes on doing so.
    while len(memory) < 3 or (memory[-1] > memory[-2] + 10e6 and len(memory) < 10):
        some(50)
        memory.append(sudoku.memory())
    ends = time.monotonic() + 10
    while sudoku.metric("requests_running") and time.monotonic() < ends:
        time.sleep(0.05)
    state = httpx.get(f"{sudoku.url}/health").json()
    bounds = {"max_batch": 8, "max_queue": 64}
    assert state == {"status": "ok", "waiting": 0, "running": 0, **bounds}
    answer = sudoku.post("/v1/chat/completions", {**good, "stream": False}).json()["choices"]
    assert answer[0]["message"] == wanted[0]["message"]
    then = sudoku.metric("memory_active_bytes")
    print(f"resident {' -> '.join(f'{each / 1e6:.1f}' for each in memory)} MB, ", end="")
    print(f"MLX {active / 1e6:.2f} -> {then / 1e6:.2f} MB")
    assert memory[-1] <= memory[-2] + 10e6
    assert then < active + 10e6


def test_a_full_queue_says_when_to_come_again() -> None:
    one = process("-m", str(SUDOKU), "--max-batch", "1", "--max-queue", "1")
    with one as server:
        body = {"messages": [{"role": "user", "content": "1" * 900}], "max_tokens": 128}
        with ThreadPoolExecutor(4) as pool:
            replies = [pool.submit(server.post, "/v1/chat/completions", body) for _ in range(4)]
            while sum(reply.done() for reply in replies) < 2:
                time.sleep(0.01)
            refused = next(reply.result() for reply in replies if reply.done())
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) > 0
            # Asked to stop, it tells those who wait and ends.
            server.process.terminate()
            assert server.process.wait(30) in (0, -15)
            codes = [reply.result().status_code for reply in replies]
            assert codes.count(429) == 2
            assert set(codes) <= {200, 429, 503}


def test_a_stream_that_waits_and_goes_away_frees_its_place() -> None:
    """Nobody noticed before its first event: it kept its place in the queue until then."""
    one = serving(sudoku_model, max_batch=1, max_queue=1)
    with ThreadPoolExecutor(1) as pool, one as server:
        path = "/v1/chat/completions"
        pool.submit(server.post, path, LONG)
        wait_until(lambda: server.metric("requests_running") == 1)
        leave(
            server,
            path,
            {**LONG, "stream": True},
            lambda: server.metric("requests_waiting") == 1,
        )
        wait_until(lambda: server.metric("requests_waiting") == 0)
        assert server.metric("requests_running") == 1


def test_what_runs_is_finished_when_the_server_is_asked_to_stop() -> None:
    with process("-m", str(SUDOKU)) as server, ThreadPoolExecutor(1) as pool:
        # Sixteen answers: one took 0.2 s, which was over between two looks on a busy machine.
        body = {"messages": [{"role": "user", "content": puzzle(0)}], "n": 16}
        reply = pool.submit(server.post, "/v1/chat/completions", body)
        wait_until(lambda: server.metric("requests_running") > 0)
        server.process.terminate()
        assert reply.result().status_code == 200
        assert server.process.wait(30) in (0, -15)


def test_slow_requests_end() -> None:
    with serving(sudoku_model, timeout=1) as server:
        body = {"messages": [{"role": "user", "content": "1" * 900}], "max_tokens": 3000}
        reply = server.post("/v1/chat/completions", body)
        assert reply.status_code == 504
        assert "longer than 1 seconds" in reply.json()["error"]["message"]
        stream = server.post("/v1/chat/completions", {**body, "stream": True})
        assert "longer than 1 seconds" in stream.text


def test_the_options_of_the_command_reach_the_server() -> None:
    """Who may ask, at which names, how long and how much: everything that `serve` hands on."""
    options = {
        "--host": "0.0.0.0",
        "--allowed-host": "mac.example",
        "--api-key": "s3cret",
        "--cors": "https://a.example",
        "--timeout": "1",
        "--max-body-mb": "0.01",
    }
    given = [part for option in options.items() for part in option]
    with process("-m", str(SUDOKU), *given) as server:
        url = f"{server.url}/v1/models"
        assert httpx.get(url).status_code == 401
        assert httpx.get(url, headers={"Authorization": "Bearer s3cre"}).status_code == 401
        key = {"Authorization": "Bearer s3cret"}
        assert httpx.get(url, headers={"x-api-key": "s3cret"}).status_code == 200
        assert httpx.get(url, headers=key).json()["data"][0]["id"] == "sudoku6"
        assert httpx.get(f"{server.url}/health").status_code == 200
        for host in ("localhost:1", "[::1]", "mac.example:80"):
            assert httpx.get(url, headers={**key, "Host": host}).status_code == 200
        # A page that points its own name at this machine, and one behind a proxy with TLS.
        evil = httpx.get(url, headers={**key, "Host": "evil.example"})
        assert evil.status_code == 403
        assert "--allowed-host" in evil.json()["error"]["message"]
        own = {"Host": "mac.example", "Origin": "https://mac.example"}
        assert httpx.get(url, headers={**key, **own}).status_code == 200
        unreadable: Any = [*key.items(), ("Host", b"\xff]")]
        broken = httpx.get(url, headers=unreadable)  # used to be a crash
        assert broken.status_code in (400, 403)
        preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
        allowed = httpx.options(url, headers=preflight)
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        other = httpx.options(url, headers={**preflight, "Origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers
        path = f"{server.url}/v1/chat/completions"
        late = httpx.post(path, json=LONG, headers=key, timeout=60)
        assert late.status_code == 504
        large = {"messages": [{"role": "user", "content": "1" * 10_000}]}
        assert httpx.post(path, json=large, headers=key).status_code == 413
