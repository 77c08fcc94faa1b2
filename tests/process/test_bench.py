"""The command as a user runs it, on the small model; no time is tested, only what all obey."""

import json
from typing import Any

import pytest
from command import Done
from command import run as run_command

from mlx_diffgemma.checkpoint.load import EMBEDDED
from mlx_diffgemma.measure.bench import Measurement, middle, prompt_of
from mlx_diffgemma.text.tokenizer import Tokenizer

SMALL = ["--prompt-tokens", "40", "--steps", "3", "--max-tokens", "64", "--repeats", "2"]


def bench(*arguments: str) -> Done:
    return run_command("bench", *arguments, COLUMNS="120")


@pytest.fixture(scope="module")
def twice() -> dict[str, Any]:
    """The small model and itself."""
    done = bench(*SMALL, "--compare", str(EMBEDDED), "--json")
    assert done.returncode == 0, done.stderr
    made: dict[str, Any] = json.loads(done.stdout)
    return made


def test_one_object_says_what_was_measured_on_what(twice: dict[str, Any]) -> None:
    assert {"mlx", "mlx_diffgemma", "python", "system", "device", "device_info"} <= twice.keys()
    assert [model["model"] for model in twice["models"]] == ["the small model", str(EMBEDDED)]
    assert all(len(model["runs"]) == 2 for model in twice["models"])


def test_numbers_obey_each_other(twice: dict[str, Any]) -> None:
    for model in twice["models"]:
        assert model["load_peak_memory"] >= model["weights"] > 0
        for run in [*model["runs"], model["median"]]:
            assert run["prompt_tokens"] == 40
            assert 0 < run["generated_tokens"] <= 64
            assert run["canvases"] == 1
            assert 0 < run["steps_per_canvas"] <= 3
            assert run["peak_memory"] > model["weights"]
            assert all(value > 0 for value in run.values())
        for run in model["runs"]:
            passes = run["steps_per_canvas"] * run["canvases"]
            assert run["tokens_per_forward"] == pytest.approx(run["generated_tokens"] / passes)
            prompt_seconds = run["prompt_tokens"] / run["prefill_tokens_per_second"]
            assert run["first_draft_seconds"] > prompt_seconds


def test_a_checkpoint_does_the_same_as_itself(twice: dict[str, Any]) -> None:
    """And its memory does not count the other's weights, which used to be loaded beside it."""
    first, second = (model["runs"] for model in twice["models"])
    for a, b in zip(first, second, strict=True):
        for key in ("generated_tokens", "steps_per_canvas", "tokens_per_forward"):
            assert a[key] == b[key]
        assert a["peak_memory"] == pytest.approx(b["peak_memory"], rel=0.1)


def test_the_table_is_on_stdout_and_all_else_on_stderr() -> None:
    done = bench(*SMALL[:-1], "1", "--compare", str(EMBEDDED))
    assert done.returncode == 0, done.stderr
    for row in ("prefill", "first draft", "steps per canvas", "peak memory", "ratio"):
        assert row in done.stdout
    assert "warming up" in done.stderr
    assert "warming up" not in done.stdout
    quiet = bench(*SMALL[:-1], "1", "--quiet")
    assert quiet.stderr == ""
    assert "ratio" not in quiet.stdout


def test_speed_is_measured_as_asked() -> None:
    """`bench` used to know `faithful` alone."""
    seen = []
    short = ["--prompt-tokens", "40", "--max-tokens", "64", "--repeats", "1", "--json"]
    for speed in ("faithful", "fast"):
        done = bench(*short, "--speed", speed)
        seen.append(json.loads(done.stdout)["models"][0]["median"]["steps_per_canvas"])
    assert seen[1] < seen[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt-tokens", "100000"], "does not fit"),
        (["--compare", "no/such/place"], "no/such/place"),
        (["--max-memory", "5MB"], "the model needs"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(arguments: list[str], said: str) -> None:
    done = bench(*arguments, "--quiet")
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("tokens", [1, 10, 40, 500])
def test_a_prompt_has_exactly_the_wanted_length(tokens: int) -> None:
    assert len(prompt_of(Tokenizer.from_directory(EMBEDDED), tokens)) == tokens


def test_medians_by_hand() -> None:
    runs = [Measurement(*[value] * 12) for value in (3, 1, 2, 9)]
    assert middle(runs) == Measurement(*[2] * 12)


def test_a_short_hole_is_measured() -> None:
    short = ("--fill", "--max-tokens", "2", "--steps", "3", "--repeats", "1", "-q")
    found = json.loads(bench(*short, "--json").stdout)["fill"]
    assert found["most_tokens"] == 2
    assert 0 < found["first_draft_seconds"] <= found["whole_seconds"]
    assert found["steps"] > 0
    assert found["canvases"] > 0
    shown = bench(*short).stdout.splitlines()
    assert [line.split("\t")[0] for line in shown] == ["first draft", "whole", "steps", "canvases"]
    refused = bench("--fill", "--compare", "x")
    assert (refused.returncode, "neither --compare" in refused.stderr) == (2, True)
