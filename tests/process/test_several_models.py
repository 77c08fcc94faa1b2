"""`serve --models`: several models by name, through the clients that people use."""

import time
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import httpx
import openai
import pytest
from command import run
from servers import Process, Server, process

from mlx_diffgemma.checkpoint.load import EMBEDDED
from mlx_diffgemma.server.thread import RETRY_SECONDS

HELLO: Any = [{"role": "user", "content": "hello"}]

ASK: Any = {"messages": HELLO, "max_tokens": 16, "extra_body": {"seed": 0}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints in a directory that is none, beside something else."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("first", "second"):
        copytree(EMBEDDED, folder / name)
    (folder / "notes").mkdir()
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Process]:
    with process("--models", str(folder), "--models", "tiny-puzzles", "-m", "second") as running:
        yield running


def loads(server: Server) -> dict[str, int]:
    """How often each model has been loaded."""
    text = httpx.get(f"{server.url}/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("diffgemma_loaded_total")]
    return {line.split('"')[1]: int(line.split()[-1]) for line in lines}


def test_each_client_asks_for_models_by_name(server: Process) -> None:
    client, names = server.client(), ["second", "first", "tiny-puzzles"]
    assert [each.id for each in client.models.list()] == names
    assert [each.id for each in server.anthropic().models.list()] == names
    assert [each.model for each in server.ollama().list().models] == names
    assert server.ollama().show("first").capabilities == ["completion", "insert"]
    assert not server.ollama().ps().models
    with pytest.raises(openai.BadRequestError, match="fit into the context"):  # no load for it
        client.completions.create(model="first", prompt=[5] * 4090)
    assert server.anthropic().messages.count_tokens(model="first", messages=HELLO).input_tokens > 9
    assert loads(server) == dict.fromkeys(names, 0)

    said = client.chat.completions.create(model="first", **ASK)
    assert (said.model, loads(server)["first"]) == ("first", 1)
    text = said.choices[0].message.content
    told = server.ollama().chat("first:latest", HELLO, options={"seed": 0, "num_predict": 16})
    assert told.message.content == text
    done = server.anthropic().messages.create(
        model="first",
        max_tokens=16,
        **{key: value for key, value in ASK.items() if key != "max_tokens"},
    )
    assert done.content[0].text == text  # type: ignore[union-attr]
    assert loads(server) == {"second": 0, "first": 1, "tiny-puzzles": 0}
    assert [each.model for each in server.ollama().ps().models] == ["first"]

    assert server.ollama().generate(model="second", prompt="").done_reason == "load"
    assert [each.model for each in server.ollama().ps().models] == ["second", "first"]
    unnamed = server.post("/v1/fill", {"template": "{{a:x|y}}", "seed": 0})
    assert unnamed.status_code == 200
    assert loads(server) == {"second": 1, "first": 1, "tiny-puzzles": 0}
    named = {"model": "tiny-puzzles", "prompt": "1", "labels": ["1", "2"]}
    assert server.post("/v1/choose", named).status_code == 200
    assert set(loads(server).values()) == {1}


@pytest.mark.parametrize(
    ("path", "body", "place"),
    [
        ("/v1/chat/completions", {"messages": HELLO}, ["error", "code"]),
        ("/v1/completions", {"prompt": "x"}, ["error", "code"]),
        ("/v1/responses", {"input": "x"}, ["error", "code"]),
        ("/v1/fill", {"template": "{{a}}"}, ["error", "code"]),
        ("/infill", {"input_prefix": "a", "input_suffix": "b"}, ["error", "code"]),
        ("/v1/fim/completions", {"prompt": "a", "suffix": "b"}, ["error", "code"]),
        ("/v1/edit", {"text": "a", "instruction": "b"}, ["error", "code"]),
        ("/v1/choose", {"prompt": "a", "labels": ["b", "c"]}, ["error", "code"]),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 9}, ["error", "type"]),
        ("/v1/messages/count_tokens", {"messages": HELLO}, ["error", "type"]),
        ("/api/chat", {"messages": HELLO}, ["error"]),
        ("/api/generate", {"prompt": "x"}, ["error"]),
        ("/api/show", {}, ["error"]),
    ],
)
def test_an_unknown_model_is_404_in_the_form_of_the_clients(
    server: Process, path: str, body: dict[str, Any], place: list[str]
) -> None:
    reply = server.post(path, {**body, "model": "nobody"})
    assert reply.status_code == 404
    told: Any = reply.json()
    for key in place:
        told = told[key]
    known = "there is no model 'nobody' here; there are second, first, tiny-puzzles"
    assert told in ("model_not_found", "not_found_error", known)


def test_a_response_is_gone_on_with_by_the_model_that_wrote_it(server: Process) -> None:
    client = server.client()
    seed = {"extra_body": {"seed": 0}, "max_output_tokens": 16}
    first = client.responses.create(model="first", input="hello", **seed)
    unnamed = {"input": "again", "previous_response_id": first.id, "max_output_tokens": 16}
    assert server.post("/v1/responses", unnamed).json()["model"] == "first"
    other = server.post("/v1/responses", {**unnamed, "model": "second"})
    assert other.status_code == 400
    assert "was written by first" in other.json()["error"]["message"]


def test_a_model_whose_directory_is_gone(folder: Path, tmp_path: Path) -> None:
    """Others are answered, and it is again once it is back; no path is told to clients."""
    copytree(folder, tmp_path / "models")
    with process("--models", str(tmp_path / "models"), "--keep-alive", "0") as server:
        client = server.client()
        (tmp_path / "models/first").rename(tmp_path / "away")
        with pytest.raises(openai.InternalServerError) as failed:
            client.chat.completions.create(model="first", **ASK)
        assert (failed.value.status_code, failed.value.code) == (503, "model_not_loaded")
        assert str(tmp_path) not in str(failed.value)
        assert client.chat.completions.create(model="second", **ASK).choices
        (tmp_path / "away").rename(tmp_path / "models/first")
        body = {"messages": HELLO, "max_tokens": 16, "model": "first"}
        time.sleep(RETRY_SECONDS)
        assert server.post("/v1/chat/completions", body).status_code == 200


def test_mistakes_are_told_before_anything_is_loaded(folder: Path, tmp_path: Path) -> None:
    copytree(folder, tmp_path / "models")
    damaged = tmp_path / "models" / "second" / "tokenizer.json"
    damaged.write_text("{")
    (tmp_path / "empty").mkdir()
    two = ["--models", folder, "--models"]
    for arguments, code, said in (
        ([*two, tmp_path / "models" / "first"], 1, "two models are called first"),
        ([*two, "tiny", "--adapter", "x"], 2, "--adapter goes with one model"),
        ([*two, "tiny", "--revision", "x"], 2, "--revision goes with one model"),
        ([*two, tmp_path / "empty"], 1, "is no checkpoint, and there is none in it"),
        ([*two, "tiny", "--max-memory", "9MB"], 1, "the model needs"),
        (["--models", tmp_path / "models"], 1, "tokenizer.json"),
        (["--keep-alive", "5"], 2, "--keep-alive goes with --models"),
    ):
        done = run("serve", "--port", "0", *map(str, arguments))
        assert (done.returncode, done.stdout) == (code, "")
        assert said in done.stderr
        assert "Traceback" not in done.stderr
