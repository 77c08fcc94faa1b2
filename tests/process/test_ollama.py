"""Ollama's API, asked by its official client, and by some who mean harm."""

import base64
import json
from pathlib import Path
from typing import Any

import httpx
import ollama
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

HELLO: Any = [{"role": "user", "content": "hello"}]
SEED = {"seed": 0}


def test_the_ollama_client_chats(small: Server) -> None:
    client = small.ollama()
    whole = client.chat("any", HELLO, options=SEED)
    chat = small.post("/v1/chat/completions", {"messages": HELLO, "seed": 0}).json()
    assert whole.message.content == chat["choices"][0]["message"]["content"]
    counts = (whole.prompt_eval_count, whole.eval_count)
    assert counts == (chat["usage"]["prompt_tokens"], chat["usage"]["completion_tokens"])
    assert (whole.done, whole.done_reason, whole.model) == (True, "stop", "tiny")
    assert whole.total_duration
    assert whole.eval_duration
    assert 10**6 < whole.eval_duration <= whole.total_duration < 60 * 10**9
    parts = list(client.chat("any", HELLO, options=SEED, stream=True, keep_alive="5m"))
    assert "".join(each.message.content or "" for each in parts) == whole.message.content
    assert [each.done for each in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].eval_count == whole.eval_count
    asked = client.generate("any", "hello", options=SEED)
    assert asked.response == whole.message.content
    parts = client.generate("any", "hello", options=SEED, stream=True)
    assert "".join(each.response or "" for each in parts) == whole.message.content


def test_settings(small: Server) -> None:
    client = small.ollama()
    full = client.generate("x", "hello", options=SEED).response or ""
    few = client.generate("x", "hello", options={**SEED, "num_predict": 4})
    assert (few.eval_count, few.done_reason) == (4, "length")
    for given in (-1, -2):
        same = client.generate("x", "hello", options={"num_predict": given, **SEED})
        assert same.response == full
    cut = client.generate("x", "hello", options={**SEED, "stop": [full[5:8]]})
    assert cut.response == full[:5]
    told = client.chat("x", HELLO, options=SEED, logprobs=True, top_logprobs=2)
    weights = told.logprobs or []
    assert "".join(each.token for each in weights) == full
    assert all(len(each.top_logprobs or []) == 2 for each in weights)
    parts = client.chat("x", HELLO, options=SEED, logprobs=True, stream=True)
    assert "".join(each.token for part in parts for each in part.logprobs or []) == full
    words = "A small house stands near the old river; Anna buys twelve pears, nine books and a map."
    with serving(writing(words)) as server:  # which takes several canvases
        long: Any = {"options": {"num_predict": 200}, "stream": True}
        parts = server.ollama().chat("x", HELLO, logprobs=True, **long)
        assert "".join(each.token for part in parts for each in part.logprobs or []) == words
    more = {"temperature": 0.2, "num_ctx": 4096}
    body = {"messages": HELLO, "options": {**more, "num_predict": 1}, "stream": False}
    reply = small.post("/api/chat", body)
    assert reply.headers["x-ignored-parameters"] == "options.num_ctx,options.temperature"


def test_guaranteed_json(small: Server) -> None:
    schema: Any = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    few = {"steps": 4}
    done = small.ollama().chat("x", HELLO, format=schema, options={**few, "stop": ["x", "y"]})
    assert json.loads(done.message.content or "")["a"] in ("x", "y")
    free = small.ollama().generate("x", "Record: Anna Berg", format="json", options=few)
    assert isinstance(json.loads(free.response or ""), dict)


def test_infilling_and_raw_text(random_one: Server) -> None:
    small = random_one
    ask = {"prompt": "The old house ", "suffix": " near the river.", "seed": 0, "max_tokens": 6}
    wanted = small.post("/v1/completions", ask).json()
    given: Any = {"seed": 0, "num_predict": 6}
    for stream in (False, True):
        filled: Any = small.ollama().generate(
            "x", ask["prompt"], ask["suffix"], options=given, stream=stream
        )
        parts = list(filled) if stream else [filled]
        assert "".join(each.response for each in parts) == wanted["choices"][0]["text"]
        assert parts[-1].eval_count == wanted["usage"]["completion_tokens"]
    raw = small.ollama().generate("x", "hello", raw=True, options={"seed": 0, "num_predict": 5})
    same = small.post("/v1/completions", {"prompt": "hello", "seed": 0, "max_tokens": 5}).json()
    assert raw.response == same["choices"][0]["text"]
    assert raw.prompt_eval_count == same["usage"]["prompt_tokens"]


@pytest.mark.parametrize("stream", [False, True])
def test_tools_and_thoughts_through_the_ollama_client(stream: bool) -> None:
    call = '<|channel>thought\nlook<channel|>Wait.<|tool_call>call:weather{city:<|"|>Oslo<|"|>}'
    script = [call + "<tool_call|>", "cold<channel|>It is 3 degrees."]

    def weather(city: str) -> str:
        """Tells the weather of a city."""
        return f"3 C in {city}"

    with serving(writing(*script)) as server:
        client = server.ollama()

        def ask(messages: Any) -> ollama.Message:
            given: Any = {"messages": messages, "tools": [weather], "think": True}
            if not stream:
                return client.chat("x", **given).message
            parts = [each.message for each in client.chat("x", **given, stream=True)]
            return ollama.Message(
                role="assistant",
                content="".join(each.content or "" for each in parts),
                thinking="".join(each.thinking or "" for each in parts),
                tool_calls=[each for part in parts for each in part.tool_calls or []],
            )

        asked = ask(HELLO)
        assert ((asked.thinking or "").strip(), asked.content) == ("look", "Wait.")
        (called,) = asked.tool_calls or []
        assert (called.function.name, called.function.arguments) == ("weather", {"city": "Oslo"})
        result = {"role": "tool", "tool_name": "weather", "content": weather("Oslo")}
        done = ask([*HELLO, asked, result])
        assert (done.thinking, done.content) == ("cold", "It is 3 degrees.")


def test_what_a_chat_says_is_what_the_model_reads(
    fine: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        *HELLO,
        {"role": "assistant", "thinking": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_name": "weather", "content": "3 C"},
    ]
    with reading(monkeypatch) as texts:
        fine.post("/api/chat", {"messages": messages})
        fine.post("/api/generate", {"prompt": "hello", "system": "Be kind.", "think": True})
    order = ["Be brief.", "hello", "hm", 'call:weather{city:<|"|>Oslo', "response:weather{", "3 C"]
    places = [texts[0].find(each) for each in order]
    assert -1 not in places, texts[0]
    assert places == sorted(places)
    assert "Be kind." in texts[1]
    assert "<|think|>" in texts[1]


def test_what_the_model_is(fine: Server, small: Server) -> None:
    client = fine.ollama()
    (model,) = client.list().models
    assert model.model == "tiny"
    for name in ("tiny", "tiny:latest"):
        shown = client.show(name)
        assert shown.capabilities == ["completion", "insert", "tools", "thinking"]
        assert (shown.modelinfo or {})["diffusion_gemma.context_length"] == 4096
    assert small.ollama().show("tiny").capabilities == ["completion", "insert"]
    assert [each.context_length for each in client.ps().models] == [4096]
    with pytest.raises(ollama.ResponseError, match="no model 'other'") as refused:
        client.show("other")
    assert refused.value.status_code == 404
    assert httpx.get(f"{fine.url}/api/version").json()["version"] >= "0.12"


def test_nothing_asked_is_answered_at_once(fine: Server) -> None:
    """Clients load and unload so."""
    before = fine.metric("answered_total")
    client = fine.ollama()
    assert client.generate("x").done_reason == "load"
    assert client.generate("x", keep_alive=0).done_reason == "unload"
    assert client.chat("x", []).done_reason == "load"
    (only,) = client.chat("x", [], stream=True)
    assert only.done
    assert fine.metric("answered_total") == before


def test_pictures(tmp_path: Path) -> None:
    directory = content_checkpoint(tmp_path / "looking")
    with serving(lambda: load(directory, dtype="float32"), most_bytes=500) as server:
        url = f"data:image/png;base64,{base64.b64encode(PIXELS).decode()}"
        parts = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "What?"}]
        body = {"messages": [{"role": "user", "content": parts}], "seed": 1, "max_tokens": 16}
        wanted = server.post("/v1/chat/completions", body).json()["choices"][0]["message"]
        client, given = server.ollama(), {"seed": 1, "num_predict": 16}
        message: Any = {"role": "user", "content": "What?", "images": [PIXELS]}
        assert client.chat("x", [message], options=given).message.content == wanted["content"]
        asked = client.generate("x", "What?", images=[PIXELS], options=given)
        assert asked.response == wanted["content"]
        assert "vision" in (client.show("tiny").capabilities or [])
        data = base64.b64encode(PIXELS).decode() + " " * 3000
        large = {"prompt": "What?", "images": [data], "stream": False, "options": given}
        assert server.post("/api/generate", large).status_code == 200
        assert server.post("/api/generate", {"prompt": "x" * 3000}).status_code == 413
        bad = server.post("/api/generate", {"prompt": "What?", "images": ["AAAA"]})
        assert bad.status_code == 400
        assert bad.json()["error"].startswith("images[0]: ")


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("chat", {"messages": 5}, "messages: "),
        ("chat", {"messages": [{"content": "x"}]}, "messages[0].role: it is missing"),
        ("chat", {"messages": [{"role": "me", "content": "x"}]}, "messages[0].role: "),
        ("chat", {"messages": [{"role": "user", "content": []}]}, "messages[0].content: "),
        ("chat", {"messages": [{"role": "user", "content": "1" * 90_000}]}, "fit"),
        ("chat", {"messages": [{"role": "user", "images": [5]}]}, "messages[0].images[0]: "),
        ("chat", {"messages": [{"role": "user", "images": ["AAAA"]}]}, "images"),
        ("chat", {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "function"),
        ("chat", {"messages": HELLO, "options": {"num_predict": "x"}}, "options.num_predict: "),
        ("chat", {"messages": HELLO, "options": {"num_predict": 0}}, "options.num_predict: "),
        ("chat", {"messages": HELLO, "options": {"seed": 10**30}}, "options.seed: "),
        ("chat", {"messages": HELLO, "options": {"stop": ["x" * 1001]}}, "options.stop: "),
        ("chat", {"messages": HELLO, "options": 5}, "options: "),
        ("chat", {"messages": HELLO, "format": "xml"}, "format: "),
        ("chat", {"messages": HELLO, "think": "x" * 9}, "think: "),
        ("chat", {"messages": HELLO, "format": {"type": 5}}, "type"),
        ("chat", {"messages": HELLO, "tools": [{"type": "function"}]}, "tools[0].function: "),
        ("chat", {"messages": HELLO, "top_logprobs": 2}, "top_logprobs goes with logprobs"),
        ("chat", {"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs: "),
        ("generate", {"prompt": 5}, "prompt: "),
        ("generate", {"suffix": "x"}, "a suffix goes with a prompt"),
        (
            "generate",
            {"prompt": "x", "suffix": "y", "format": "json"},
            "a suffix goes with neither",
        ),
        ("generate", {"prompt": "x", "raw": True, "system": "y"}, "raw goes with neither"),
        ("generate", {"prompt": "1" * 90_000, "raw": True}, "fit"),
        ("show", {}, "model: it is missing"),
        ("nothing", {}, "Not Found"),
    ],
)
def test_mistakes_are_told_in_ollamas_form(fine: Server, path: str, body: Any, said: str) -> None:
    reply = fine.post(f"/api/{path}", body)
    assert reply.status_code == (404 if path == "nothing" else 400)
    assert set(reply.json()) == {"error"}
    assert said in reply.json()["error"]


def test_a_model_without_tools_or_thoughts_refuses_them(small: Server) -> None:
    tool: Any = {"type": "function", "function": {"name": "now"}}
    for more, said in (({"tools": [tool]}, "tools"), ({"think": True}, "thinking")):
        with pytest.raises(ollama.ResponseError, match=f"template knows no {said}"):
            small.ollama().chat("x", HELLO, **more)
    few = {"num_predict": 1}
    assert small.ollama().chat("x", HELLO, think=False, tools=[], options=few).done


def test_an_error_behind_the_first_byte_is_a_line() -> None:
    schema: Any = {"type": "array", "items": {"type": "string"}}
    with serving(lambda: tiny(Breaking)) as server:
        for more in ({}, {"format": schema}):
            with pytest.raises(ollama.ResponseError, match="a defect of the server"):
                list(server.ollama().chat("x", HELLO, stream=True, **more))
        told = server.post("/api/chat", {"messages": HELLO}).text
        assert json.loads(told.splitlines()[-1]) == {"error": "a defect of the server"}


def test_a_client_that_leaves_frees_its_place() -> None:
    with serving(sudoku_model) as server:
        long = {"model": "x", "prompt": "1" * 900, "options": {"num_predict": 3000}}
        leave(server, "/api/generate", long, lambda: server.metric("requests_running") == 1)
        wait_until(lambda: server.metric("requests_running") == 0)
        assert server.metric("cancelled_total") == 1
