"""generate --batch: a file of prompts in, a file of answers out, gone on with after a kill."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command import Done
from command import run as run_command
from gemma import gemma_tokenizer
from paths import SUDOKU
from random_model import Scripted, scripted

from mlx_diffgemma import Request
from mlx_diffgemma.cli import batchfile
from mlx_diffgemma.cli.batch import answer_many
from mlx_diffgemma.cli.batchfile import BatchError, read_requests, writing

PUZZLES = [line.split() for line in (SUDOKU / "puzzles.txt").read_text().splitlines()[1:]]
ARGUMENTS = ["generate", "-m", str(SUDOKU)]
COMMAND = [sys.executable, "-m", "mlx_diffgemma", *ARGUMENTS]


def rows(cells: str) -> str:
    return "\n".join(cells[i : i + 6] for i in range(0, 36, 6))


def run(*arguments: str | Path) -> Done:
    return run_command(*ARGUMENTS, *arguments)


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
    file = prompts(tmp_path / "in.jsonl", 16)
    process = subprocess.Popen(
        [*COMMAND, "--batch", str(file), "--output", str(out), "--seed", "0"],
        stderr=subprocess.DEVNULL,
    )
    while not out.exists() or out.read_text().count("\n") < 3:
        time.sleep(0.02)
    process.kill()
    process.wait()
    with out.open("a") as half:
        half.write('{"index": 15, "te')
    before = out.read_text().splitlines()[:-1]
    assert 3 <= len(before) < 16
    done = run("--batch", file, "--output", out, "--seed", "0")
    assert f"{len(before)} of 16 are answered already" in done.stderr
    assert out.read_text().splitlines()[: len(before)] == before
    assert sorted(read(out)) == list(range(16))
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
    assert answers[2]["text"] == '"12"'


BAD = {
    b"{": "not JSON",
    b"[]": "not an object",
    b"{}": "either a prompt or messages",
    b'{"prompt": 3}': "the prompt is no text",
    b'{"prompt": "x", "temperature": 1}': "'temperature' is not known",
    b'{"prompt": "x", "seed": "1"}': "seed has the wrong type",
    b'{"prompt": "x", "max_tokens": false}': "max_tokens has the wrong type",
    b'{"messages": "x"}': "no list of objects",
    b'{"messages": [3]}': "no list of objects",
    b'{"messages": [{"content": "x"}]}': "no list of objects",
    b'{"messages": [{"role": "user", "content": 3}]}': "no list of objects",
    b'{"messages": [{"role": "assistant", "content": "", "tool_calls": 3}]}': "no list of objects",
    b'{"prompt": "\\ud800"}': "half a character",
    b'{"prompt": "x", "id": "\\udfff"}': "half a character",
    b'{"prompt": "x", "\\ud800": 1}': "half a character",
    b"[" * 200_000: "nested too deeply",
    b'{"messages": ' + b"[" * 300 + b"]" * 300 + b"}": "nested too deeply",
    b'{"prompt": "x", "seed": NaN}': "no number of JSON",
    b'{"prompt": "x", "seed": 1e999}': "too large",
    b'{"prompt": "x", "seed": ' + b"1" * 5000 + b"}": "more than 1000 digits",
    b'{"prompt": "\xff"}': "not UTF-8",
    b'{"prompt": "x", "id": "twice"}': "the id 'twice' is that of line 1",
    # What only the request itself finds out.
    b'{"prompt": "x", "seed": -1}': "a seed must be from 0",
    b'{"prompt": "x", "seed": 12345678901234567890123}': "a seed must be from 0",
    b'{"prompt": "x", "steps": 0}': "denoising steps must be at least 1",
    b'{"messages": []}': "the prompt is empty",
}


def answer(
    file: Path, output: Path, load: Any = lambda: (scripted_once(), gemma_tokenizer())
) -> None:
    answer_many(file, output, 1, load, True, Request("", steps=3), None)


def scripted_once() -> Scripted:
    model = scripted()
    model.begin(*[[*gemma_tokenizer().encode("fine"), 6]] * 9)
    return model


def test_a_bad_line_gets_its_error_and_the_others_go_on(tmp_path: Path) -> None:
    """The first of these lines used to end all, many of them with a traceback."""
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    good = [b'{"prompt": "one", "id": "twice"}', b"", b'{"prompt": "two", "seed": 7}\r']
    file.write_bytes(b"\xef\xbb\xbf" + b"\n".join([*good[:2], *BAD, good[2]]))
    with pytest.raises(SystemExit) as left:
        answer(file, out)
    assert left.value.code == 1
    answers = read(out)
    assert sorted(answers) == [*range(len(BAD) + 2)]
    assert answers[0] | {"id": "twice", "text": "fine"} == answers[0]
    assert answers[len(BAD) + 1]["text"] == "fine"
    for i, message in enumerate(BAD.values(), 1):
        assert message in str(answers[i]["error"])
        assert len(str(answers[i]["error"])) < 150
    assert str(answers[1]["error"]).startswith("line 3: ")


def test_a_file_of_bad_lines_loads_no_model(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text("nonsense\n")
    done = run("--batch", file)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "line 1: not JSON" in json.loads(done.stdout)["error"]
    assert "0 answered, 1 failed" in done.stderr
    assert run("--batch", file, "prompt").returncode == 2
    for content in (None, "line".encode("utf-16")):
        other = tmp_path / "other"
        if content is not None:
            other.write_bytes(content)
        with pytest.raises(BatchError, match=r"cannot be read|not UTF-8"):
            read_requests(other, Request(""), None)


DONE = b'{"index": 0, "text": "a", "finish_reason": "stop"}\n'
FOREIGN = {
    "a file without newlines": b"my notes",
    "notes": b"my notes\nand more\n",
    "notes behind answers": DONE + b"my notes",
    "a fragment that is not the last": DONE + b'{"index": 1, "te\n' + DONE,
    "JSON of another kind": b'{"name": "x"}',
    "JSON lines of another kind": b'{"name": "x"}\n',
    "half of JSON of another kind": DONE + b'{"name": "x", "ind',
    "no index": b'{"index": true, "text": "a"}',
    "an index and no answer": b'{"index": 1, "value": 3}\n',
    "begun like ours": b'{"index": 1, "value": ',
    "answers to other prompts": DONE + b'{"index": 2, "text": "a"}\n',
    "a list": b"[1, 2]\n",
    "binary": bytes(range(256)),
    "zeros behind answers": DONE + bytes(100),
    "UTF-16": '{"index": 0, "text": "a"}\n'.encode("utf-16"),
    "a long line": b"x" * 3_000_000,
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=list(FOREIGN))
def test_a_file_that_is_not_ours_is_left_as_it_is(content: bytes, tmp_path: Path) -> None:
    """What stood behind the last newline used to be cut off, of any file: all of it, of some."""
    file, out = prompts(tmp_path / "in.jsonl", 2), tmp_path / "out"
    out.write_bytes(content)
    with pytest.raises(BatchError, match="is left as it is"), writing(out, file, 2):
        pass
    assert out.read_bytes() == content


def test_a_line_too_long_to_be_ours_is_not_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batchfile, "MOST_LINE", 40)
    file, out = prompts(tmp_path / "in.jsonl", 2), tmp_path / "out"
    out.write_bytes(b'{"index": 0, "text": "' + b"x" * 100)
    with pytest.raises(BatchError, match="line 1 is no answer"), writing(out, file, 2):
        pass
    assert out.stat().st_size == 122


def test_what_a_killed_run_leaves_is_recovered(tmp_path: Path) -> None:
    """A whole answer that lacked only its newline used to be lost, with exit code 0."""
    file, out = prompts(tmp_path / "in.jsonl", 20), tmp_path / "out"
    lines = [
        '{"index": 12, "text": "\u00e4\u20ac", "finish_reason": "stop"}'.encode(),
        b'{"index": 12, "id": "x", "text": "a"}',
        b'{"index": 12, "error": "it did not fit"}',
    ]
    for line in lines:
        for cut in range(len(line) + 1):
            out.write_bytes(DONE + line[:cut])
            with writing(out, file, 20) as output:
                assert (12 in output.finished) == (cut == len(line) and b"error" not in line)
                assert 0 in output.finished
                output.write('{"index": 3, "text": ""}')
            kept = line + b"\n" if cut == len(line) else b""
            assert out.read_bytes() == DONE + kept + b'{"index": 3, "text": ""}\n'
    for ours in (b"", DONE.replace(b"\n", b"\r\n"), b"\n" + DONE + b"\n\n"):
        out.write_bytes(ours)
        with writing(out, file, 20) as output:
            assert output.finished == ({0} if ours else set())
        assert out.read_bytes() == ours


def test_places_where_no_answers_go(tmp_path: Path) -> None:
    file = prompts(tmp_path / "in.jsonl", 2)
    before = file.read_bytes()
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(file)
    for path, problem in (
        (tmp_path, "no regular file"),
        (pipe, "no regular file"),
        (Path("/dev/null"), "no regular file"),
        (file, "holds the prompts"),
        (link, "holds the prompts"),
        (tmp_path / "no" / "folder", "No such file"),
    ):
        with pytest.raises(BatchError, match=problem), writing(path, file, 2):
            pass
    assert file.read_bytes() == before


def test_two_runs_do_not_write_to_one_file(tmp_path: Path) -> None:
    """Both used to answer everything, and one cut off what the other was writing."""
    file, out = prompts(tmp_path / "in.jsonl", 2), tmp_path / "out"
    with writing(out, file, 2) as output:
        output.write('{"index": 1, "text": ""}')
        other = run("--batch", file, "--output", out)
        assert other.returncode == 1
        assert other.stderr.splitlines()[-1] == (
            f"error: {out} cannot be written: another process is writing to it"
        )
    with writing(out, file, 2) as output:
        assert output.finished == {1}


def test_a_full_disk_leaves_what_the_next_run_completes(tmp_path: Path) -> None:
    file, out = prompts(tmp_path / "in.jsonl", 6), tmp_path / "out"
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700));"
        "from mlx_diffgemma.cli.main import main; main()"
    )
    command = [sys.executable, "-c", limited, *COMMAND[3:], "--batch", str(file), "--steps", "2"]
    full = subprocess.run([*command, "--output", str(out)], capture_output=True, text=True)
    assert full.returncode == 1
    assert full.stderr.splitlines()[-1] == f"error: {out} cannot be written: File too large"
    assert out.stat().st_size == 700
    assert not out.read_text().endswith("\n")
    kept = out.read_text().splitlines()[:-1]
    assert kept
    done = run("--batch", file, "--output", out, "--steps", "2")
    assert done.returncode == 0
    assert out.read_text().splitlines()[: len(kept)] == kept
    assert sorted(read(out)) == [*range(6)]
    with (tmp_path / "stdout").open("wb") as stdout:
        full = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert full.returncode == 1
    assert full.stderr.splitlines()[-1] == "error: stdout cannot be written: File too large"
