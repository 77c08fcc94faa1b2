"""What editors send, as their source has it, and what they read of the answers.

Checked against llama.vim `autoload/llama.vim`, Continue `core/llm/llms/{Mistral,OpenAI,Ollama}.ts`,
Zed `crates/codestral/src/codestral.rs` and minuet-ai.nvim `lua/minuet/backends/common.lua`.
"""

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from servers import Process, Server, process, wait_until

BEFORE, LINE, BEHIND = "def add(a, b):\n", "    return ", "\n\nprint(add(1, 2))\n"

TIMINGS = [f"timings/{kind}_{what}" for kind in ("prompt", "predicted") for what in ("n", "ms")]
TIMINGS += [f"timings/{kind}_per_second" for kind in ("prompt", "predicted")]

# What llama.vim sends with each move of the cursor, and before that when it has seen another file.
LLAMA_VIM: dict[str, Any] = {
    "id_slot": 0,
    "input_prefix": BEFORE,
    "input_suffix": BEHIND,
    "input_extra": [{"text": "x = 1\n", "time": [1, 2], "filename": "a.py"}],
    "prompt": LINE,
    "n_predict": 2,
    "stop": [],
    "n_indent": 4,
    "top_k": 40,
    "top_p": 0.9,
    "samplers": ["top_k", "top_p", "infill"],
    "stream": False,
    "cache_prompt": True,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 250,
    "response_fields": ["content", *TIMINGS, "truncated", "tokens_cached"],
}

WARMING = {
    **LLAMA_VIM,
    "input_prefix": "",
    "input_suffix": "",
    "prompt": "",
    "n_predict": 0,
    "samplers": [],
    "t_max_prompt_ms": 1,
    "t_max_predict_ms": 1,
    "response_fields": [""],
}

ZED = {
    "model": "codestral-latest",
    "prompt": BEFORE + LINE,
    "suffix": BEHIND,
    "max_tokens": 1,
    "temperature": 0.2,
    "top_p": 1.0,
    "stream": False,
}

CONTINUE = {**ZED, "frequency_penalty": 0, "stop": ["\n\n", "/src/"], "stream": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    with process() as running:
        yield running


def events(reply: httpx.Response) -> list[str]:
    assert reply.headers["content-type"].startswith("text/event-stream")
    return [line[6:] for line in reply.text.splitlines() if line.startswith("data: ")]


def test_llama_vim(server: Server) -> None:
    assert server.post("/infill", WARMING).json() == {}
    reply = server.post("/infill", {**LLAMA_VIM, "seed": 0})
    assert '"content":"' in reply.text  # so the plugin looks for it, before it decodes
    answer = reply.json()
    assert set(answer) == {*LLAMA_VIM["response_fields"]}
    assert answer["content"]
    assert 0 < answer["timings/predicted_n"] <= 2
    assert all(type(answer[each]) in (int, float) and answer[each] >= 0 for each in TIMINGS)
    assert answer["truncated"] is False
    assert "t_max_predict_ms" in reply.headers["X-Ignored-Parameters"]
    again = server.post("/infill", {**LLAMA_VIM, "seed": 0, "stream": True, "response_fields": []})
    text, end = map(json.loads, events(again))
    assert (text["content"], text["stop"]) == (answer["content"], False)
    assert (end["content"], end["stop"], end["stop_type"]) == ("", True, "eos")
    assert end["timings"]["prompt_n"] == 0  # what was read is kept


def test_zed(server: Server) -> None:
    """Every field that its structures name is there, of its type."""
    answer = server.post("/v1/fim/completions", {**ZED, "random_seed": 0}).json()
    kinds = {"id": str, "object": str, "model": str, "created": int, "usage": dict}
    assert all(type(answer[name]) is kind for name, kind in kinds.items())
    choice = answer["choices"][0]
    assert (choice["index"], choice["finish_reason"]) == (0, "stop")
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    counts = [answer["usage"][f"{each}_tokens"] for each in ("prompt", "completion", "total")]
    assert counts[0] + counts[1] == counts[2]


def test_continue(server: Server) -> None:
    whole = server.post("/v1/fim/completions", {**ZED, "random_seed": 0}).json()
    *chunks, end = events(server.post("/v1/fim/completions", {**CONTINUE, "random_seed": 0}))
    assert end == "[DONE]"
    told = [json.loads(chunk)["choices"][0]["delta"]["content"] for chunk in chunks]
    assert "".join(told) == whole["choices"][0]["message"]["content"]
    # By Ollama's API it first looks whether the model's template has a suffix.
    assert ".Suffix" in server.post("/api/show", {"name": "tiny"}).json()["template"]
    ask = {"model": "tiny", "prompt": BEFORE + LINE, "suffix": BEHIND, "raw": True, "stream": True}
    given = {"num_predict": 1, "stop": ["\n"], "temperature": 0.01, "num_ctx": 4096, "seed": 0}
    lines = server.post("/api/generate", {**ask, "options": given, "keep_alive": 1800}).text
    parts = [json.loads(line) for line in lines.splitlines()]
    assert "".join(part["response"] for part in parts)
    assert parts[-1]["done"]


def test_minuet(server: Server) -> None:
    ask = {**ZED, "prompt": BEFORE + LINE, "stream": True, "stop": ["\n"], "seed": 0}
    *chunks, end = events(server.post("/v1/completions", ask))
    text = "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)
    assert end == "[DONE]"
    assert text
    assert "\n" not in text


@pytest.mark.parametrize("marks", [("<|fim_%s|>",), ("<fim_%s>",)])
def test_marks_in_a_prompt_are_a_suffix(random_one: Server, marks: tuple[str]) -> None:
    """Zed's `open_ai_compatible_api` and Continue's `openai` write them, for other models."""
    first, second, third = (marks[0] % each for each in ("prefix", "suffix", "middle"))
    stop = ["<|endoftext|>", "<|file_separator|>", first, second, third]
    ask = {"model": "x", "max_tokens": 4, "stop": stop, "seed": 0, "steps": 2}
    plain = {**ask, "prompt": BEFORE + LINE, "suffix": BEHIND}
    wanted = random_one.post("/v1/completions", plain).json()
    marked = {**ask, "prompt": f"{first}{BEFORE}{LINE}{second}{BEHIND}{third}"}
    found = random_one.post("/v1/completions", marked).json()
    assert found["choices"] == wanted["choices"]
    assert found["usage"]["prompt_tokens"] == wanted["usage"]["prompt_tokens"]
    for before, behind in (("", BEHIND), (BEFORE, ""), (BEFORE, " \n"), ("", "")):
        given = {**ask, "prompt": first + before + second + behind + third}
        assert random_one.post("/v1/completions", given).status_code == 200


MUCH = "word = 1\r\n\t" * 80_000


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ({"input_prefix": "", "prompt": "", "input_suffix": ""}, 0),
        ({"input_prefix": "", "prompt": " \n", "input_suffix": "\n"}, 0),
        ({"input_prefix": "", "prompt": ""}, 4),
        ({"input_suffix": ""}, 4),
        ({"input_suffix": MUCH}, 4),
        ({"input_prefix": MUCH, "n_predict": 1}, 1),
        ({"input_extra": [{"text": MUCH[:3000]}] * 200, "n_predict": 1}, 1),
        ({"prompt": "\U0001f9d1", "input_suffix": "\u200d\U0001f680\r\n\t)"}, 4),
        ({"n_predict": 0}, 0),
        ({"n_predict": -1}, 32),
        ({"n_predict": 100_000}, 32),
        ({"stop": ["\n"], "input_suffix": ")\n"}, 4),
    ],
)
def test_all_that_an_editor_may_send(random_one: Server, given: Any, written: int) -> None:
    """A text that is far too long used to be refused, where the nearest of it is what counts."""
    reply = random_one.post(
        "/infill", {**LLAMA_VIM, "response_fields": [], "n_predict": 4, "steps": 2, **given}
    )
    assert reply.status_code == 200, reply.text
    answer = reply.json()
    assert answer["tokens_predicted"] <= written
    assert (answer["content"] == "") <= (written == 0 or given.get("input_suffix") == "")
    assert reply.elapsed.total_seconds() < 20


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("infill", {"prompt": [1, 2]}, "prompt: "),
        ("infill", {"n_predict": 1 << 21}, "n_predict: "),
        ("infill", {"input_extra": [{"text": ""}] * 257}, "input_extra: "),
        ("infill", {"response_fields": ["x"] * 65}, "response_fields: "),
        ("infill", {"stop": "x" * 1001}, "stop: "),
        ("infill", {"input_prefix": "\ud83d", "input_suffix": "x"}, "half of a surrogate pair"),
        ("v1/fim/completions", {"suffix": "x"}, "prompt: "),
        ("v1/fim/completions", {"prompt": "x", "suffix": 3}, "suffix: "),
    ],
)
def test_mistakes_are_named(random_one: Server, path: str, body: Any, said: str) -> None:
    reply = random_one.post(f"/{path}", body)
    assert (reply.status_code, said in reply.json()["error"]["message"]) == (400, True), reply.text


def test_requests_that_the_next_keystroke_cancels(random_one: Server) -> None:
    """Each is left after 20 ms; the last is answered as if it had been alone."""
    ask = {**LLAMA_VIM, "n_predict": 32, "input_suffix": BEHIND * 9}
    random_one.post("/infill", ask)
    started = time.monotonic()
    alone = random_one.post("/infill", ask)
    seconds = time.monotonic() - started
    for i in range(50):
        data = json.dumps({**ask, "prompt": LINE + "x" * i}).encode()
        head = "POST /infill HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", random_one.port)) as raw:
            raw.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(data) + data)
            time.sleep(0.02)
    started = time.monotonic()
    last = random_one.post("/infill", ask)
    assert (alone.status_code, last.status_code) == (200, 200)
    assert time.monotonic() - started < 10 * seconds + 2
    wait_until(lambda: random_one.metric("requests_running") == 0)
    assert random_one.metric("requests_waiting") == 0
    assert random_one.metric("cancelled_total") > 0
    assert random_one.metric("failed_total") == 0
