"""Ranks that share one model: --shard under `mlx.launch`, and what ends them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest
from command import run
from paths import SUDOKU
from ranks import COMMAND, launched, started, variables_of
from servers import Server, serving, sudoku_model
from sharing import write_checkpoint
from terminal import Terminal

from mlx_diffgemma import load
from mlx_diffgemma.checkpoint.adapter import AdapterConfig, add_adapter, save_adapter, trained
from mlx_diffgemma.cli.options import LoadFaithful
from mlx_diffgemma.cli.sharing import MIXED, check_equal, facts_of
from mlx_diffgemma.convert import RECIPES, convert
from mlx_diffgemma.distributed.launch import LaunchError

PROGRAM = Path(__file__).parent.parent / "shared_program.py"
PUZZLE = (SUDOKU / "puzzles.txt").read_text()[:36]
SECONDS = 10  # in which all have ended once one has


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In full layers four heads look at each of two of keys; weights are several groups wide."""
    return write_checkpoint(tmp_path_factory.mktemp("wide") / "model")


@pytest.mark.parametrize(("ranks", "recipe"), [(2, "4bit"), (4, "mxfp4")])
def test_ranks_do_all_tasks_as_one(wide: Path, tmp_path: Path, ranks: int, recipe: str) -> None:
    """Fill, schema, a batch of unequal prompts, an edit; and an answer nobody waits for.

    Of weights in groups of 64, of which two have unequal parts, or of 32, where in full layers two
    of four ranks each have the same keys; with an adapter beside them.
    """
    packed, adapter = tmp_path / "packed", tmp_path / "adapter"
    convert(wide, packed, recipe=RECIPES[recipe])
    model, config = load(packed)[0], AdapterConfig("dora", rank=2, keys=("mlp.down_proj",))
    add_adapter(model, config)
    terms = {name: mx.random.normal(each.shape) for name, each in trained(model).items()}
    save_adapter(adapter, terms, config)
    program = [sys.executable, PROGRAM, packed, adapter]
    shared = launched(ranks, *program)
    alone = subprocess.run([*map(str, program)], capture_output=True, text=True, check=True)
    assert shared.stdout == alone.stdout, shared.stderr
    assert "does not fit" in alone.stdout


def test_pictures_are_seen_by_all_ranks(tmp_path: Path) -> None:
    vision = SUDOKU.parent / "tiny_vision"
    seen = ["--image", vision / "pictures.png", "--steps", "2", "--max-tokens", "64", "--json"]
    asked = ["generate", "-m", vision, *seen, "--seed", "1", "How many circles are there?"]
    first, _ = started(2, tmp_path, *COMMAND, *asked, "--shard")
    found, wanted = json.loads(first.communicate(timeout=60)[0]), json.loads(run(*asked).stdout)
    for key in ("text", "denoising_steps", "prompt_tokens"):
        assert found[key] == wanted[key]


def under_way(folder: Path) -> "list[subprocess.Popen[str]]":
    """Two ranks in the midst of long work."""
    command = [*COMMAND, "bench", "-m", SUDOKU, "--shard", "--repeats", "1000", "--steps", "2"]
    ranks = started(2, folder, *command)
    said = ranks[0].stderr
    assert said is not None
    next(line for line in said if line.startswith("run 1 "))
    return ranks


@pytest.mark.parametrize("killed", [0, 1])
def test_all_end_with_one_that_is_killed(tmp_path: Path, killed: int) -> None:
    """A collective of theirs may wait for ever."""
    ranks = under_way(tmp_path)
    ranks[killed].kill()
    begun = time.monotonic()
    other = ranks[1 - killed]
    said = other.communicate(timeout=30)[1]
    assert time.monotonic() - begun < SECONDS
    assert other.returncode == 1
    sentences = (
        "rank 1 ends, as rank 0 is lost",
        "rank 1 is lost, and with it a part of the model",
    )
    assert f"error: {sentences[killed]}" in said
    assert "Traceback" not in said


def test_interrupted_all_end_without_a_word(tmp_path: Path) -> None:
    """A terminal interrupts all; a rank that ended by itself was taken for lost."""
    ranks = under_way(tmp_path)
    for each in ranks:
        each.send_signal(signal.SIGINT)
    begun = time.monotonic()
    said = [each.communicate(timeout=30)[1] for each in ranks]
    assert time.monotonic() - begun < SECONDS
    assert ranks[0].returncode == 130
    # MLX's ring may tell of its sockets.
    assert not any("error: " in each or "Traceback" in each for each in said), said


def test_ranks_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = facts_of(SUDOKU, speed="faithful")
    check_equal(mine, 1, dict(mine))
    with pytest.raises(LaunchError, match="the speed of rank 0 is faithful, that of rank 1 fast"):
        check_equal(mine, 1, {**mine, "speed": "fast"})
    other = {**mine, "chip": "Apple M9"}
    with pytest.raises(LaunchError, match=r"chip of rank 0 .* different experts"):
        check_equal(mine, 1, other)
    monkeypatch.setenv(MIXED, "1")
    check_equal(mine, 1, other)


def test_ranks_with_other_adapters_are_refused(tmp_path: Path) -> None:
    """Also where only their numbers differ: each would add its part of another model."""
    facts = []
    for number in (1.0, 2.0):
        adapter = tmp_path / str(number)
        save_adapter(adapter, {"weight": mx.array([number])}, AdapterConfig("full"))
        facts.append(LoadFaithful(str(SUDOKU), adapter=str(adapter))._facts())
    with pytest.raises(LaunchError, match=r"the adapter of rank 0 is \w+, that of rank 1 \w+$"):
        check_equal(facts[0], 1, facts[1])


def test_a_mistake_of_all_is_said_once(tmp_path: Path) -> None:
    """Another rank's end hid what rank 0 had found."""
    ranks = started(2, tmp_path, *COMMAND, "generate", "-m", tmp_path / "none", "--shard", "x")
    said = [each.communicate(timeout=60)[1] for each in ranks]
    assert said[0].count("error: ") == 1
    assert "is neither a directory nor a name on the hub" in said[0]
    assert said[1] == ""


def test_what_does_not_go_with_shard() -> None:
    assert "--shard goes with mlx.launch" in run("generate", "hello", "--shard").stderr


def test_a_chat_at_rank_0_is_one_of_one(tmp_path: Path) -> None:
    """Ranks that were started by hand: who talks to them sits at rank 0. An answer is stopped, then
    three turns, of which one is forgotten; files are those of one process, and cross."""
    asked = ["chat", "-m", str(SUDOKU), "--seed", "3", "--max-tokens", "60"]
    one, ranks = tmp_path / "one", tmp_path / "ranks"
    turns = ["/steps 2", "1.2.", "/undo", "3.45", "7."]
    run(*asked, "--session", one, stdin="\n".join(turns))
    first, second = variables_of(2, tmp_path)
    other = subprocess.Popen([*COMMAND, *asked, "--shard"], env={**os.environ, **second})
    chat = Terminal(*asked[1:], "--shard", **first)
    assert "does not go with --shard" in "".join(chat.type("/model tiny"))
    chat.press("1.\r")
    chat.wait(r"step \d", drawing=True)
    chat.child.sendintr()
    chat.wait(r"Stopped; .*\n>$")
    for line in ("/undo", *turns, f"/save {ranks}"):
        chat.type(line)
    assert "4 messages" in "".join(chat.type(f"/load {one}"))
    chat.type("6.")
    chat.child.sendline("/quit")
    assert [chat.leaves(), other.wait(SECONDS)] == [0, 0]
    assert metadata(one) == metadata(ranks)
    assert "4 messages" in run(*asked, stdin=f"/load {ranks}\n6.\n").stderr


def metadata(file: Path) -> dict[str, str]:
    """All that a file of a session says beside its arrays."""
    found = mx.load(str(file), format="safetensors", return_metadata=True)
    return found[1]


def asked(server: Server) -> list[object]:
    """What comes of requests at once, and of one that is repeated, once a stream was left."""
    chat = partial(
        server.client().chat.completions.create,
        model="tiny",
        max_tokens=60,
        extra_body={"steps": 2},
    )
    message = [{"role": "user", "content": "1.2.3."}]
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["12", "345"]}}}
    with ThreadPoolExecutor() as pool:
        works = [
            pool.submit(chat, messages=message, seed=1, n=2),
            pool.submit(chat, messages=message, seed=2, response_format=form),
            pool.submit(chat, messages=[{"role": "user", "content": "1" * 9000}]),
            pool.submit(
                server.post, "/v1/fill", {"template": "12{{a:1|2}}", "seed": 1, "steps": 2}
            ),
        ]
        with chat(messages=message, stream=True, extra_body={"stream_drafts": True}) as stream:
            next(stream)
    first, schema, long, fill = works
    assert long.exception() is not None
    again = chat(messages=message, seed=1)
    return [
        [choice.message.content for choice in first.result().choices],
        schema.result().choices[0].message.content,
        str(long.exception()),
        fill.result().json()["text"],
        again.choices[0].message.content,
        again.usage.prompt_tokens_details.cached_tokens > 0,
    ]


def test_ranks_serve_as_one(tmp_path: Path) -> None:
    """One of them is killed then, and with it goes the server."""
    with serving(sudoku_model) as server:
        wanted = asked(server)
    ranks = started(2, tmp_path, *COMMAND, "serve", "-m", SUDOKU, "--port", "0", "--shard")
    assert ranks[0].stderr
    begun = (re.search(r"running on (http://\S+)", line) for line in ranks[0].stderr)
    assert asked(Server(next(filter(None, begun))[1])) == wanted
    assert wanted[-1]
    ranks[1].kill()
    assert ranks[0].wait(SECONDS) == 1
    assert "error: rank 1 is lost" in ranks[0].stderr.read()
