"""generate --batch: a file of prompts in, a file of answers out, gone on with after a kill."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

SUDOKU = Path(__file__).parent / "data" / "sudoku6"
PUZZLES = [line.split() for line in (SUDOKU / "puzzles.txt").read_text().splitlines()[1:]]
COMMAND = [sys.executable, "-m", "mlx_diffgemma", "generate", "-m", str(SUDOKU)]


def rows(cells: str) -> str:
    return "\n".join(cells[i : i + 6] for i in range(0, 36, 6))


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def prompts(path: Path, count: int) -> Path:
    lines = [{"prompt": rows(puzzle)} for puzzle, _ in PUZZLES[:count]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path: Path) -> dict[int, dict[str, object]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["index"] for line in lines}) == len(lines)
    return {line["index"]: line for line in lines}


def test_answers_are_those_of_single_runs(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    file = prompts(tmp_path / "in.jsonl", 5)
    done = run("--batch", file, "--output", out, "--seed", "4", "--max-batch", "3")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "5 answered, 0 failed" in done.stderr
    answers = read(out)
    for i in (0, 4):
        single = run("--seed", str(4 + i), "--json", rows(PUZZLES[i][0]))
        wanted = json.loads(single.stdout)
        for key in ("text", "denoising_steps", "finish_reason", "generated_tokens"):
            assert answers[i][key] == wanted[key]
    assert sum(answers[i]["text"] == rows(PUZZLES[i][1]) for i in range(5)) >= 3
    plain = run("--batch", file, "--seed", "4", "-q")
    printed = [json.loads(line) for line in plain.stdout.splitlines()]
    assert {line["index"]: line for line in printed} == answers
    assert plain.stderr == ""


def test_a_killed_run_is_gone_on_with(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    file = prompts(tmp_path / "in.jsonl", 40)
    process = subprocess.Popen(
        [*COMMAND, "--batch", str(file), "--output", str(out), "--seed", "0"],
        stderr=subprocess.DEVNULL,
    )
    while not out.exists() or out.read_text().count("\n") < 3:
        time.sleep(0.02)
    process.kill()
    process.wait()
    with out.open("a") as half:
        half.write('{"index": 39, "te')
    before = out.read_text().splitlines()[:-1]
    assert 3 <= len(before) < 40
    done = run("--batch", file, "--output", out, "--seed", "0")
    assert f"{len(before)} of 40 are answered already" in done.stderr
    assert out.read_text().splitlines()[: len(before)] == before
    assert sorted(read(out)) == list(range(40))
    again = run("--batch", file, "--output", out)
    assert "0 answered, 0 failed" in again.stderr


def test_lines_have_settings_and_errors_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    lines = [
        {"prompt": "1.", "max_tokens": 3, "id": "a"},
        {"messages": [{"role": "user", "content": "1" * 5000}]},
        {"prompt": "2.", "seed": 1, "steps": 1, "schema": {"enum": ["12"]}},
    ]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    done = run("--batch", file)
    assert done.returncode == 1
    answers = {line["index"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert answers[0]["generated_tokens"] == 3
    assert answers[0]["id"] == "a"
    assert "does not fit" in answers[1]["error"]
    assert "2 answered, 1 failed" in done.stderr
    assert json.loads(answers[2]["text"]) == "12" or "error" in answers[2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ("[]", "line 1: not an object"),
        ("{}", "either a prompt or messages"),
        ('{"prompt": 3}', "the prompt is no text"),
        ('{"prompt": "x", "temperature": 1}', "temperature is not known"),
        ('{"prompt": "x", "seed": "1"}', "seed has the wrong type"),
        ('{"messages": "x"}', "no list of objects"),
    ],
)
def test_mistakes_are_one_sentence(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(line)
    done = run("--batch", file, "--output", tmp_path / "out")
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert run("--batch", file, "prompt").returncode == 2
