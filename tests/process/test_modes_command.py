"""Modes as a user asks for them: commands, and bodies of the server."""

import json
from pathlib import Path

import pytest
from command import run

from mlx_diffgemma.server.body import ignored
from mlx_diffgemma.server.openai import (
    ChatBody,
    CompletionBody,
    chat_request,
    continuations,
    infill,
)
from mlx_diffgemma.server.refused import Refused

QUESTION, ANSWER = "What is the capital of Norway?", "The capital of Norway is Oslo."


def test_generate_in_each_mode() -> None:
    found = {}
    for mode in ("causal", "speculative"):
        done = run("generate", QUESTION, "--mode", mode, "--json", "--quiet")
        assert done.returncode == 0, done.stderr
        found[mode] = json.loads(done.stdout)
        assert found[mode]["text"] == ANSWER
    assert found["causal"]["denoising_steps"] == 0 < found["speculative"]["denoising_steps"]
    refused = run("generate", QUESTION, "--mode", "causal", "--verify")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.strip() == "error: --mode causal does not go with --verify"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--temperature", "0.7"], "--temperature goes with --mode causal or speculative"),
        (["--mode", "causal", "--acceptance", "typical"], "--acceptance goes with --mode specul"),
        (["--mode", "causal", "--temperature", "3"], "a temperature is 0 or from 0.001 to 2, not"),
    ],
)
def test_what_means_nothing_is_refused(flags: list[str], said: str) -> None:
    done = run("generate", QUESTION, *flags)
    assert (done.returncode, done.stdout) == (2 if "goes" in said else 1, "")
    assert done.stderr.startswith(f"error: {said}")


def test_generate_draws_the_same_in_both_modes() -> None:
    flags = ["--temperature", "2", "--seed", "3", "--max-tokens", "24", "--quiet"]
    texts = [
        run("generate", QUESTION, "--mode", mode, *flags).stdout
        for mode in ("causal", "speculative")
    ]
    assert texts[0] == texts[1] != ANSWER
    typical = run("generate", QUESTION, "--mode", "speculative", "--acceptance", "typical", "-q")
    assert typical.stdout


def test_eval_and_bench_compare_modes(tmp_path: Path) -> None:
    tasks = tmp_path / "mine.jsonl"
    tasks.write_text(json.dumps({"prompt": QUESTION, "regex": "Oslo"}) + "\n")
    wanted = ["denoise", "verify", "causal", "speculative"]
    flags = ["--steps", "24", "--seeds", "1", "--tasks", str(tasks), "--quiet"]
    done = run("eval", *flags, "--mode", ",".join(wanted), "--json")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["mode"] for row in rows] == wanted
    assert rows[2]["success"] == rows[3]["success"] == 1
    assert rows[2]["positions_per_token"] < 1 < rows[0]["positions_per_token"]
    more = ["--temperature", "0.5", "--acceptance", "typical", "--mode"]
    done = run("eval", *flags, *more, "causal,speculative", "--json")
    names = [json.loads(line)["mode"] for line in done.stdout.splitlines()]
    assert names == ["causal", "speculative (typical)"]
    said = "an acceptance goes with mode speculative"
    assert said in run("eval", *flags, *more, "verify,causal").stderr
    assert said in run("bench", "--acceptance", "exact").stderr
    assert run("eval", *flags, "--mode", "greedy").stderr.startswith("error: a mode is one of")
    flags = ["--prompt-tokens", "16", "--max-tokens", "8", "--repeats", "1", "--quiet"]
    done = run("bench", *flags, "--modes", "causal,denoise", COLUMNS="120")  # 0 steps: no ratio
    assert done.returncode == 0, done.stderr
    assert "small model, causal" in " ".join(done.stdout.split())


def test_bodies_say_the_mode() -> None:
    messages = [{"role": "user", "content": "Hello"}]
    asked = chat_request(ChatBody.model_validate({"messages": messages, "verify": True}))
    assert (asked.mode, asked.verify) == ("denoise", True)
    # Clients send a temperature whatever they talk to: it counts where the encoder draws.
    sent = {"messages": messages, "temperature": 0.7}
    for body, drawn in (
        (ChatBody.model_validate(sent), None),
        (ChatBody.model_validate({**sent, "mode": "causal"}), 0.7),
    ):
        assert chat_request(body).temperature == drawn
        assert ("temperature" in ignored(body)) == (drawn is None)
    assert not ignored(ChatBody.model_validate({**sent, "temperature": 1}))
    sent = {"prompt": "Hello", "mode": "speculative", "acceptance": "typical", "temperature": 0}
    (each,) = continuations(CompletionBody.model_validate(sent))
    assert (each.request.acceptance, each.request.temperature) == ("typical", 0)
    body = CompletionBody.model_validate({"prompt": "Hello", "mode": "causal"})
    assert [each.request.mode for each in continuations(body)] == ["causal"]
    body = CompletionBody.model_validate({"prompt": "Hello", "suffix": "!", "mode": "causal"})
    with pytest.raises(Refused, match="a suffix goes with neither mode nor verify nor acceptance"):
        infill(body)
