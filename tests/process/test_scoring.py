"""`score`, and what `generate` says of its answer, as commands."""

import json
from pathlib import Path

import pytest
from command import run

QUESTION, ANSWER = "What is the capital of Norway?", "The capital of Norway is Oslo."


def test_the_prompt_of_a_score_may_be_a_file(tmp_path: Path) -> None:
    """@NAME was scored as the prompt itself, though every other command reads the file."""
    (tmp_path / "question").write_text(f"{QUESTION}\n")
    told = run("score", ANSWER, "--quiet", "--prompt", f"@{tmp_path / 'question'}")
    assert told.stdout == run("score", ANSWER, "--quiet", "--prompt", QUESTION).stdout
    lost = run("score", ANSWER, "--quiet", "--prompt", f"@{tmp_path / 'none'}")
    assert (lost.returncode, lost.stdout) == (1, "")
    assert "cannot be read" in lost.stderr


def test_score_of_an_argument_and_of_stdin() -> None:
    done = run("score", ANSWER, "--prompt", QUESTION)
    assert done.returncode == 0, done.stderr
    *tokens, mean, least, perplexity = (line.split("\t") for line in done.stdout.splitlines())
    assert "".join(json.loads(piece) for _, piece in tokens) == ANSWER
    chances = [float(chance) for chance, _ in tokens]
    assert mean == ["mean", f"{sum(chances) / len(chances):.4f}"]
    assert least == ["least", f"{min(chances):.4f}"]
    assert perplexity[0] == "perplexity"
    assert 1 < float(perplexity[1]) < 1.1
    piped = run("score", "--json", "--quiet", "--top", "2", "--prompt", QUESTION, stdin=ANSWER)
    known = json.loads(piped.stdout)
    assert piped.stderr == ""
    assert [round(each["log_probability"], 4) for each in known["tokens"]] == chances
    assert [each["top"][0]["text"] for each in known["tokens"]] == [
        each["text"] for each in known["tokens"]
    ]
    assert {len(each["top"]) for each in known["tokens"]} == {2}
    assert known["greedy"]
    alone = json.loads(run("score", ANSWER, "--json").stdout)
    assert alone["mean_log_probability"] < known["mean_log_probability"]


def test_control_characters_are_spelled_out() -> None:
    assert "\x1b" not in run("score", "a\x1b[2Jb\n").stdout


def test_mistakes_of_score_are_one_sentence() -> None:
    for arguments, code, message in (
        (["x", "--prompt", " "], 2, "the prompt is empty"),
        (["x", "--system", "Be brief."], 2, "--system goes with --prompt"),
        ([""], 2, "the text is empty"),
        (["x", "--top", "21"], 2, "Invalid value for '--top'"),
        (["a" * 200_000], 1, "no more fits into the context"),
        (["x", "-m", "/nowhere"], 1, "/nowhere"),
    ):
        done = run("score", *arguments)
        assert (done.returncode, done.stdout) == (code, ""), arguments
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_an_answer_says_how_likely_it_is() -> None:
    flags = ("generate", QUESTION, "--seed", "0", "--json")
    done = run(*flags, "--likelihood")
    known = json.loads(done.stdout)
    scored = json.loads(
        run("score", known["text"] + "<turn|>", "--prompt", QUESTION, "--json").stdout
    )
    for name in ("mean_log_probability", "least_log_probability"):
        assert known[name] == pytest.approx(scored[name], abs=1e-4)
        assert json.loads(run(*flags).stdout)[name] is None
    assert "log-probability of a token" in done.stderr
