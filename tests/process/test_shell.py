"""The command line day by day: habits of other tools, mistakes that are found before a model is
loaded, and what is said of answers that did not converge."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import command
import paths
import pexpect
import pytest
from command import at_a_terminal, run

from mlx_diffgemma.cli.counting import spoken
from mlx_diffgemma.cli.seen import DAY, state_folder

SUDOKU = str(paths.SUDOKU)
COMMAND = [sys.executable, "-m", "mlx_diffgemma"]
FEW = ("-q", "--seed", "0", "--steps", "2")

# More than two steps for the small model.
HARD = "Record: Bartholomew Featherstone from Liechtenstein, born 1984-03-12"


@pytest.fixture
def never_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_load", lambda *given, **settings: pytest.fail("loaded"))


def test_version_and_short_help() -> None:
    assert run("--version").stdout == f"mlx-diffgemma {version('mlx-diffgemma')}\n"
    for arguments in (("-h",), ("generate", "-h")):
        assert run(*arguments).stdout.startswith("Usage: ")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("gen", "generate"), ("generate -m tiny-", "tiny-puzzles"), ("convert --recipe mix", "mixed")],
)
def test_a_shell_completes_commands_and_names(typed: str, offered: str) -> None:
    words = f"mlx-diffgemma {typed}"
    script = (
        "import sys; from mlx_diffgemma.cli.main import main\nsys.argv = ['mlx-diffgemma']; main()"
    )
    asked = {
        "_MLX_DIFFGEMMA_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **asked}
    )
    assert offered in done.stdout, done


@pytest.mark.parametrize("option", ["--temp", "--top-p", "--top-k", "--temperature"])
def test_sampling_of_other_models_is_answered_with_what_this_one_has(option: str) -> None:
    done = run("generate", option, "0.7", "hello")
    assert done.returncode == 2
    said = f"there is no {option}"
    if option == "--temperature":
        said = f"{option} goes with --mode causal or speculative"
    assert done.stderr.startswith(f"error: {said}: this model denoises")
    assert "--sampler confidence" in done.stderr


def test_a_prompt_as_mlx_lm_takes_it() -> None:
    plain = run("generate", *FEW, "hello")
    for option in ("-p", "--prompt"):
        assert run("generate", option, "hello", *FEW).stdout == plain.stdout != ""
    done = run("generate", "-p", "hello", "hello")
    assert (done.returncode, done.stdout) == (2, "")
    assert "given twice" in done.stderr


def test_convert_takes_the_paths_of_mlx_lm(tmp_path: Path) -> None:
    named = ("--hf-path", SUDOKU, "--mlx-path", str(tmp_path / "a"))
    for number, arguments in enumerate(
        (named, (SUDOKU, *named[2:3], str(tmp_path / "b")), (*named[:2], str(tmp_path / "c")))
    ):
        done = run("convert", *arguments)
        assert done.stdout == f"{tmp_path / 'abc'[number]}\n", done.stderr
    for arguments in ((), (SUDOKU,), ("x", "y", "--hf-path", "z")):
        done = run("convert", *arguments)
        assert done.returncode == 2
        assert "one source and one directory" in done.stderr


@pytest.mark.usefixtures("never_loads")
def test_paths_and_ports_are_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    """A minute of loading and answering was lost to a folder that is not there."""
    (tmp_path / "note").write_text("one\n")
    (tmp_path / "in.jsonl").write_text('{"prompt": "hello"}\n')
    away, note = str(tmp_path / "away" / "file"), str(tmp_path / "note")
    taken = socket.create_server(("127.0.0.1", 0))
    port = str(taken.getsockname()[1])
    for arguments, code, said in (
        (("chat", "--session", away), 1, "cannot be written: No such file"),
        (("chat", "--session", note), 1, "damaged, or no saved context"),
        (("chat", "--session", str(tmp_path)), 1, "is not a file"),
        (("generate", "hi", "--prompt-cache", away), 1, "cannot be written: No such file"),
        (("generate", "hi", "--prompt-cache", note), 1, "damaged, or no saved context"),
        (("generate", "hi", "--output", "out"), 2, "--output goes with --batch"),
        (("generate", "-q", "--batch", "in.jsonl", "--output", away), 1, "cannot be written"),
        (("edit", "-", "-i", "x", "--in-place"), 2, "not stdin"),
        (("edit", "two words", "-i", "x", "--in-place"), 2, "not text"),
        (("serve", "--port", port), 1, "in use; --port 0 takes a free one"),
        (("serve", "--host", "nohost.invalid"), 1, "cannot listen on nohost.invalid"),
        (("generate", "hi", "--max-memory", "12"), 1, "12GB was probably meant"),
        (("choose", "hi", "--labels", "yes,"), 1, "none of them empty"),
        (("choose", "hi", "--labels", "a,b", "--labels", "c,d"), 2, "given twice"),
        (("generate", "@"), 2, "names no file"),
        (("edit", "", "-i", "x"), 2, "names no file"),
        (("generate", "hi\udcff"), 1, "the prompt is not UTF-8 text"),
        (("edit", note, "-i", "x\udcff"), 1, "the instruction is not UTF-8 text"),
        (("generate", "@nowhere"), 1, "nowhere cannot be read"),
        (("generate", "hi", "--system", "@nowhere"), 1, "nowhere cannot be read"),
        (("fill", "@nowhere"), 1, "nowhere cannot be read"),
        (("edit", "@nowhere", "-i", "x"), 1, "nowhere cannot be read"),
        (("edit", note, "-i", "@nowhere"), 1, "nowhere cannot be read"),
    ):
        done = run(*arguments, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (code, ""), (arguments, done)
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
    taken.close()
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "note"]


def test_names_of_no_checkpoint_say_the_way_on(tmp_path: Path) -> None:
    llama = tmp_path / "llama"
    llama.mkdir()
    (llama / "config.json").write_text('{"model_type": "llama"}')
    (llama / "model.safetensors").write_bytes((paths.SUDOKU / "model.safetensors").read_bytes())
    (tmp_path / "x.gguf").touch()
    for name, said in (
        (llama, f"{llama}: config.json: model_type is 'llama'.* mlx-lm runs"),
        (tmp_path / "x.gguf", "is a GGUF file, which llama.cpp runs"),
        ("model.gguf", "is a GGUF file, which llama.cpp runs"),
        (llama / "model.safetensors", f"but a file; its directory is {llama}"),
        (tmp_path, f"{tmp_path}/config.json is missing; the directory holds a GGUF"),
        ("tiny-puzle", r"tiny and tiny-puzzles; did you mean tiny-puzzles\?"),
    ):
        for arguments in (("info", str(name)), ("generate", "-m", str(name), "hi")):
            done = run(*arguments)
            assert done.returncode == 1
            assert re.search(said, done.stderr), done.stderr
            assert done.stderr.count("\n") == 1


def test_a_text_is_a_file_stdin_or_itself_in_every_command(tmp_path: Path) -> None:
    (tmp_path / "ask").write_text("hello\n")
    (tmp_path / "how").write_text("Fix\n")
    (tmp_path / "holes").write_text("{{a:yes|yes}}\n")
    (tmp_path / "note").write_text("a smal house\n")

    def same(*several: tuple[str, ...], stdin: str = "") -> str:
        found = {run(*each, *FEW, stdin=stdin, cwd=tmp_path).stdout for each in several}
        (only,) = found
        return only

    assert same(
        ("generate", "hello"), ("generate", "@ask"), ("generate", "-p", "@ask"),
        ("generate", "-"), stdin="hello\n",
    )  # fmt: skip
    assert same(("fill", "holes"), ("fill", "@holes"), ("fill", "-"), stdin="{{a:yes|yes}}\n")
    assert same(("fill", "{{a:yes|yes}}")) == "yes\n"
    how = ("--text", "--strength", "1", "-i")
    assert same(
        ("edit", "note", *how, "Fix"), ("edit", "@note", *how, "@how"), ("edit", "-", *how, "Fix"),
        stdin="a smal house\n",
    )  # fmt: skip
    assert same(("edit", "a smal house", *how, "Fix"))
    assert same(("generate", "@@ask")) == same(("generate", "-"), stdin="@ask")


@pytest.mark.parametrize("stdin", ["<&-", "< bytes"])
def test_no_text_on_stdin_is_a_sentence(stdin: str, tmp_path: Path) -> None:
    """A closed stdin ended in a traceback, bytes in an answer to half characters."""
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    line = f"{' '.join(COMMAND)} generate - {stdin}"
    done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: the prompt is .*\n", done.stderr), done.stderr


def test_labels_are_trimmed() -> None:
    """`--labels "yes, no"` weighed " no", with its space."""
    for given in ("pears, books", " pears ,books ", "label = pears , books"):
        done = run("choose", "Record: 3 pears", "--labels", given, "-q")
        assert {line.split("\t")[0] for line in done.stdout.splitlines()} == {"pears", "books"}


def test_the_small_model_introduces_itself_once_a_day() -> None:
    """It did so before every answer."""
    banner = "small demonstration model"
    said = [run("generate", "--seed", "0", "--steps", "1", "x").stderr for _ in range(2)]
    assert [banner in each for each in said] == [True, False]
    (mark,) = state_folder().iterdir()
    for age, again in ((DAY + 60, True), (-3600, True)):  # a day ago; a clock that was wrong
        os.utime(mark, (time.time() - age, time.time() - age))
        assert (banner in run("generate", "--seed", "0", "--steps", "1", "x").stderr) == again
    mark.unlink()
    mark.parent.rmdir()
    mark.parent.touch()  # nothing can be kept there
    assert banner in run("generate", "--seed", "0", "--steps", "1", "x").stderr


def test_what_did_not_converge_is_said_and_strict_has_a_code(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": HARD}) + "\n")
    note = tmp_path / "note"
    note.write_text("a small hosue\n")
    edit = ("edit", str(note), "-i", "Fix", "--text")
    for arguments, what in (
        (("generate", HARD), "the answer"),
        (("generate", HARD, "--json"), "the answer"),
        (("generate", "--batch", "in.jsonl"), "1 of 1 answers"),
        (("fill", "The house {{a:8}}."), "the text"),
        (edit, "the edit"),
    ):
        for strict, code in (((), 0), (("--strict",), 3)):
            done = run(*arguments, *FEW, *strict, cwd=tmp_path)
            assert (done.returncode, bool(done.stdout)) == (code, True), done
            assert f"warning: {what} did not converge" in done.stderr
            assert done.stderr.count("\n") == 1
    certain = run("generate", "-m", "tiny-puzzles", "-q", "--seed", "0", "--strict", PUZZLE)
    assert (certain.returncode, certain.stderr) == (0, "")


PUZZLE = "12.4.6\n.56123\n2315.4\n5642.1\n3.2645\n645.12"


TYPO = "a small hosue near the river\n"

FIX = ("-i", "Fix", "--in-place", "--lines", "1-1", "-q", "--seed", "0")


def test_a_file_that_is_edited_stays_safe(tmp_path: Path) -> None:
    """The text before an edit was gone."""
    note = tmp_path / "note"
    for kept in (["note.bak"], ["note.bak", "note.bak2"]):
        note.write_text(TYPO)
        assert run("edit", str(note), *FIX).returncode == 0
        assert note.read_text() == TYPO.replace("hosue", "house")
        assert sorted(os.listdir(tmp_path)) == ["note", *kept]
        assert (tmp_path / kept[-1]).read_text() == TYPO
    note.write_text(TYPO)
    strict = run("edit", str(note), *FIX, "--strict", "--steps", "2")
    assert (strict.returncode, note.read_text()) == (3, TYPO)
    assert "the file is left as it is" in strict.stderr
    assert run("edit", str(note), *FIX, "--no-backup").returncode == 0
    assert note.read_text() != TYPO
    assert sorted(os.listdir(tmp_path)) == ["note", "note.bak", "note.bak2"]


def test_a_file_that_changed_meanwhile_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = tmp_path / "note"
    note.write_text(TYPO)
    real = command._load

    def load(*given: object, **settings: object) -> object:
        note.write_text("somebody else's\n")
        return real(*given, **settings)

    monkeypatch.setattr(command, "_load", load)
    done = run("edit", str(note), *FIX)
    assert done.returncode == 1
    assert "changed by somebody else meanwhile" in done.stderr
    assert note.read_text() == "somebody else's\n"
    assert os.listdir(tmp_path) == ["note"]


def test_eval_counts_runs_and_says_how_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It said nothing for minutes."""
    monkeypatch.setattr("mlx_diffgemma.cli.counting.BETWEEN_LINES", 0.0)
    flags = ("eval", "--limit", "1", "--steps", "1,2", "--seeds", "1", "--json")
    done = run(*flags)
    counted = re.findall(r"^(\d+) of (\d+) runs, about \d+ s left$", done.stderr, re.M)
    total = len(done.stdout.splitlines())
    assert [(int(a), int(b)) for a, b in counted] == [(n, total) for n in range(1, total + 1)]
    assert run(*flags, "-q").stderr == ""
    assert [spoken(each) for each in (4.4, 300, 7000)] == ["4 s", "5 min", "1 h 57 min"]


def test_a_row_of_eval_goes_to_stdout_also_beside_a_bar(tmp_path: Path) -> None:
    """Beside its bar, rich sends what is printed to stderr."""
    out = tmp_path / "rows"
    line = f"{' '.join(COMMAND)} eval --limit 1 --steps 1 --seeds 1 --json > {out}"
    child = pexpect.spawn("sh", ["-c", line], encoding="utf-8", timeout=120)
    child.expect(r"runs .*\d+/\d+")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert len(out.read_text().splitlines()) > 3


def test_errors_of_a_terminal_stay_visible() -> None:
    said = at_a_terminal("generate", "-m", "\x1b]52;c;eHh4\x07.gguf", "x")
    assert not set(said) & set("\x1b\x07")
    assert "GGUF" in said
