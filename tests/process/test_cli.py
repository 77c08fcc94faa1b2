"""The command line as a user types it. What a process does beside printing has a real one."""

import json
import os
import subprocess
import sys
import time
from inspect import signature
from pathlib import Path

import command
import paths
import pexpect
import pytest
from command import at_a_terminal, run

from mlx_diffgemma.cli import main as cli
from mlx_diffgemma.cli.options import Load, with_options
from mlx_diffgemma.tasks import fill
from mlx_diffgemma.text import schema, template

SUDOKU = str(paths.SUDOKU)
CELLS, SOLVED = (Path(SUDOKU) / "puzzles.txt").read_text().split()[2:4]
PUZZLE, ANSWER = ("\n".join(cells[i : i + 6] for i in range(0, 36, 6)) for cells in (CELLS, SOLVED))
COMMAND = [sys.executable, "-m", "mlx_diffgemma"]


def test_answer_on_stdout_everything_else_on_stderr() -> None:
    arguments = ["generate", "--model", SUDOKU, "--seed", "0", PUZZLE]
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == (ANSWER + "\n", 0)
    assert "tokens per forward pass" in done.stderr
    assert "finished: stop" in done.stderr


def test_a_prompt_from_a_pipe_and_a_model_from_the_environment() -> None:
    """The newline that echo adds used to be part of the prompt, and spoilt the answer."""
    for arguments in ([], ["-"]):
        done = run(
            "generate",
            *arguments,
            "--seed",
            "0",
            "-q",
            stdin=PUZZLE + "\n",
            MLX_DIFFGEMMA_MODEL=SUDOKU,
        )
        assert (done.stdout, done.stderr) == (ANSWER + "\n", "")


def test_without_a_model_the_small_one_answers_and_says_so() -> None:
    done = run("generate", "--seed", "0", stdin="hello")
    assert done.returncode == 0
    assert done.stdout.strip()
    first = done.stderr.splitlines()[0]
    assert "small demonstration model" in first
    assert "google/diffusiongemma-26B-A4B-it" in first
    named = run("generate", "-m", SUDOKU, "--seed", "0", PUZZLE)
    assert "small demonstration model" not in named.stderr


def test_json_and_flags() -> None:
    done = run("generate", "-m", SUDOKU, "--json", "--seed", "0", "--max-tokens", "6", PUZZLE)
    answer = json.loads(done.stdout)
    assert answer["text"] == ANSWER[:6]
    assert (answer["finish_reason"], answer["generated_tokens"]) == ("length", 6)
    done = run("generate", "-m", SUDOKU, "--json", "--seed", "0", "--steps", "1", PUZZLE)
    assert json.loads(done.stdout)["denoising_steps"] == 1
    flags = ["--sampler", "confidence", "--threshold", "0.6"]
    done = run("generate", "-m", SUDOKU, "-q", "--seed", "0", *flags, PUZZLE)
    assert done.stdout == ANSWER + "\n"


def test_show_in_a_pipe_prints_a_line_a_step() -> None:
    done = run("generate", "-m", SUDOKU, "--seed", "0", "--show", PUZZLE)
    steps = [line for line in done.stderr.splitlines() if line.startswith("canvas 1, step")]
    assert len(steps) >= 2
    assert done.stdout == ANSWER + "\n"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["generate", "-m", "nowhere", "hi"], 1, "nowhere is neither a directory nor a name"),
        (["generate", "-m", SUDOKU, ""], 2, "the prompt is empty"),
        (["generate", "-m", SUDOKU, "1" * 5000], 1, "does not fit into the context of 4096"),
        (["generate", "-m", SUDOKU, "--steps", "0", "hi"], 2, "--steps"),
        (["generate", "-m", SUDOKU, "--threshold", "0.5", "hi"], 2, "--sampler confidence"),
        (["eval", "--tasks", "nowhere.jsonl"], 1, "nowhere.jsonl cannot be read"),
        (["eval", "--steps", "1,x"], 2, "--steps takes numbers"),
        (["eval", "--recipes", "none,huge"], 2, "no recipe huge"),
        (["info", "/tmp"], 1, "config.json is missing"),
        (["convert", "nowhere", "out"], 1, "neither a directory nor a name"),
        (["convert", SUDOKU, SUDOKU], 1, "exists already"),
        (["convert", SUDOKU, "out", "--recipe", "huge"], 2, "no recipe huge"),
        (["convert", SUDOKU, "out", "--q-bits", "9"], 1, "affine takes"),
        (["convert", SUDOKU, "out", "-d", "-q"], 2, "neither"),
        (["generate", "-q", "--thinking", "hi"], 1, "this model's chat template knows no thinking"),
        (["chat", "-m", "/dev/null"], 1, "/dev/null is neither"),
    ],
)
def test_expected_failures_are_one_sentence(
    arguments: list[str], code: int, said: str, tmp_path: Path
) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == code
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert said in done.stderr
    if code == 1:
        assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_a_terminal_would_obey_is_spelled_out(tmp_path: Path) -> None:
    """A file used to write the clipboard (OSC 52), a name in an error to move the cursor, also in
    those of click, which quote the command line."""
    hostile, shown = "\x1b]52;c;eHh4\x07\x9b2J\u202e\x7f", r"\x1b]52;c;eHh4\x07\x9b2J\u202e\x7f"
    file = tmp_path / "text"
    file.write_text(f"one {hostile}\ntwo\n")
    template = f"{hostile} {{{{a:yes|no}}}}"
    editing = ("edit", str(file), "-i", "change", "--lines", "2:2", "--steps", "1", "--seed", "0")
    changing = ("--strength", "1", "-q")
    for arguments in (
        ("fill", template, "--seed", "0"),
        (*editing, *changing),
        ("generate", "-m", f"{tmp_path}/{hostile}", "x"),
        ("generate", "--guards", hostile, "x"),
        (hostile,),
        ("generate", f"--{hostile}"),
        ("recipes", hostile),
    ):
        said = at_a_terminal(*arguments)
        assert not set(said) & set("\x1b\x07\x9b\u202e\x7f"), arguments
        assert shown in said, arguments
    # A pipe gets the bytes as they are.
    assert run(*editing, "--text").stdout.startswith(f"one {hostile}\n")
    assert run("fill", template, "--seed", "0").stdout.startswith(hostile)


def test_convert_then_info(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    done = run("convert", SUDOKU, out)
    assert (done.stdout, done.returncode) == (out + "\n", 0)
    assert "bits per weight" in done.stderr
    shown = run("info", out).stdout
    assert "4-bit affine, group 64" in shown
    assert "8-bit affine, group 64" in shown
    assert "needs about" in shown
    facts = json.loads(run("info", out, "--json").stdout)
    experts = next(part for part in facts["parts"] if part["name"] == "experts")
    assert experts["parameters"] == 4 * 8 * 128 * 3 * 64
    assert experts["bytes"] == experts["parameters"] * 4.5 / 8  # a scale and a bias for 64 weights
    assert sum(part["bytes"] for part in facts["parts"]) < os.path.getsize(
        f"{out}/model.safetensors"
    )
    done = run("convert", SUDOKU, out + "2", "-q", "--q-bits", "4", "--q-group-size", "32")
    assert (
        json.loads(Path(out + "2", "config.json").read_text())["quantization"]["group_size"] == 32
    )


def test_help_is_quick_and_loads_nothing() -> None:
    script = (
        "import sys; sys.argv = ['x', '--help']\n"
        "from mlx_diffgemma.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'mlx', 'numpy', 'huggingface_hub', 'tokenizers', 'jinja2', 'torch'}\n"
        "heavy |= {'prompt_toolkit', 'rich.markdown'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_answering_needs_neither_torch_nor_transformers() -> None:
    script = (
        "import sys; from mlx_diffgemma import generate, load\n"
        "generate(*load(sys.argv[1]), 'x', steps=1)\n"
        "print(sorted({'transformers', 'torch', 'mlx_lm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script, SUDOKU], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_a_reader_that_leaves_is_no_error() -> None:
    process = subprocess.Popen(
        [*COMMAND, "generate", "-m", SUDOKU, PUZZLE],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.wait(60)


def test_chat_in_a_pipe() -> None:
    done = run(
        "chat", "-m", SUDOKU, "--guards", "none", stdin="hello\n/reset\n/dance\n\n/quit\nunread\n"
    )
    assert done.returncode == 0
    assert "Started over." in done.stderr
    assert "/dance is not a command" in done.stderr
    assert done.stdout.strip()


def test_chat_in_a_terminal_draws_the_canvas_and_leaves_the_answer() -> None:
    """Two turns, /reset and /quit, typed at a pseudo-terminal."""
    child = pexpect.spawn(
        COMMAND[0],
        [*COMMAND[1:], "chat", "-m", SUDOKU, "--seed", "1"],
        env={**os.environ, "TERM": "xterm-256color"},
        dimensions=(40, 100),
        encoding="utf-8",
        timeout=60,
    )
    child.expect("leaves.*>")
    child.sendline("12.456")
    child.expect("step 1/48")  # the live canvas
    child.expect("finished: .*>")
    child.sendline("/reset")
    child.expect("Started over.*>")
    child.sendintr()
    child.expect("Ctrl-D leaves.*>")
    child.sendline("/quit")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_ctrl_c_ends_generate_without_a_traceback() -> None:
    process = subprocess.Popen(
        [*COMMAND, "generate", "-m", SUDOKU, "--max-tokens", "100000", "--show", "1" * 3000],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr
    assert "step 1/48" in process.stderr.readline()
    time.sleep(0.05)
    process.send_signal(2)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in said


def test_schema_fill_and_choose(tmp_path: Path) -> None:
    schema = tmp_path / "record.json"
    schema.write_text(
        json.dumps(
            {
                "type": "object",
                "properties": {
                    "item": {"enum": ["pears", "books"]},
                    "count": {"type": "integer", "minimum": 1, "maximum": 99},
                    "price": {"type": "integer", "minimum": 1, "maximum": 999},
                    "to": {"type": "string", "maxLength": 10},
                },
                "required": ["item", "count", "price", "to"],
            }
        )
    )
    prompt = "Record: 12 pears at 345 to Anna"
    done = run("generate", "--schema", str(schema), "--seed", "0", "-q", prompt)
    wanted = ("item", "count", "price", "to")
    answer = json.loads(done.stdout)
    assert list(answer) == list(wanted)
    assert (answer["item"], answer["count"]) == ("pears", 12)

    text = '{"item":"{{item:pears|books}}","count":12,"price":345,"to":"Anna"}'
    template = tmp_path / "template.txt"
    template.write_text(text)
    for given in (text, template, "-"):
        done = run("fill", given, "--prompt", prompt, "--seed", "0", "--json", stdin=text)
        assert json.loads(done.stdout) == {"item": "pears"}, done.stderr

    labels = ("--labels", "item=pears,books", "--labels", "to=Anna,Berta")
    shape = '{"item":"{item}","count":12,"price":345,"to":"{to}"}'
    done = run("choose", prompt, *labels, "--template", shape, "--json", "-q")
    chances = json.loads(done.stdout)
    assert chances["item"]["pears"] > 0.5
    assert chances["to"]["Anna"] > 0.5
    done = run("choose", prompt, "--labels", "yes,no", "-q")
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] in (
        ["yes", "no"],
        ["no", "yes"],
    )


def test_mistakes_in_schemas_templates_and_labels_are_one_sentence(tmp_path: Path) -> None:
    pattern = tmp_path / "pattern.json"
    pattern.write_text('{"type": "string", "pattern": "a+"}')
    broken = tmp_path / "broken.json"
    broken.write_text('{"type": ')
    for arguments, message in (
        (("generate", "--schema", str(pattern), "x"), "pattern is not supported"),
        (("generate", "--schema", str(broken), "x"), "is not JSON"),
        (("generate", "--schema", str(tmp_path / "none"), "x"), "cannot be read"),
        (("fill", "{{a}}{{a}}"), "two holes are called a"),
        (("fill", "nothing here"), "cannot be read"),
        (("choose", "x", "--labels", "yes"), "at least two labels"),
    ):
        done = run(*arguments)
        assert done.returncode == 1, arguments
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_loading_waits_until_cheap_mistakes_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A schema beside a guard, or a --max-memory that is none, was refused by the loaded model."""
    monkeypatch.setattr(command, "_load", lambda *given, **settings: pytest.fail("loaded"))
    schema = str(Path(SUDOKU) / "config.json")  # refused too, but not before these
    for arguments, message in (
        (("generate", "--max-memory", "much", "x"), "much"),
        (("fill", "{{a}}", "--max-memory", "much"), "much"),
        (("serve", "--max-memory", "much"), "much"),
        (("chat", "--threshold", "0.5"), "--sampler confidence"),
        (("generate", "--schema", schema, "x"), "not supported"),
        (("fill", "{{a:0}}"), "after the colon"),
        (("edit", __file__, "-i", "x", "--lines", "2:1"), "no range"),
    ):
        done = run(*arguments)
        assert done.returncode in (1, 2), arguments
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("flags", [("--shrink",), ("--guards", "all")])
def test_a_schema_and_what_it_excludes_need_no_model(
    flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_load", lambda *given, **settings: pytest.fail("loaded"))
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": [1]}')
    done = run("generate", "--schema", schema, *flags, "x")
    assert done.stderr == f"error: a schema does not go with {flags[0].removeprefix('--')}\n"
    assert done.returncode == 1


def test_a_schema_and_a_template_are_parsed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both were parsed before the model was loaded, thrown away, and parsed again."""
    parsed: list[str] = []
    reader, parse = schema._Reader.pattern, template.parse_template

    def pattern(self: schema._Reader) -> object:
        parsed.append("schema")
        return reader(self)

    def parts(text: str) -> object:
        parsed.append("template")
        return parse(text)

    monkeypatch.setattr(schema._Reader, "pattern", pattern)
    monkeypatch.setattr(template, "parse_template", parts)
    monkeypatch.setattr(fill, "parse_template", parts)
    file = tmp_path / "schema.json"
    file.write_text('{"$ref": "#/$defs/a", "$defs": {"a": {"enum": [1]}}}')
    done = run("generate", "--schema", file, "-q", "--steps", "1", "x")
    assert (done.stdout, parsed) == ("1\n", ["schema"])
    done = run("fill", "{{a:yes|yes}}", "-q", "--steps", "1")
    assert (done.stdout, parsed) == ("yes\n", ["schema", "template"])


def test_a_group_of_options_stands_where_the_command_names_it() -> None:
    seen: list[object] = []

    @with_options
    def command(first: str, *, load: Load, last: bool = False) -> None:
        seen.append((first, load, last))

    options = ["model", "revision", "dtype", "max_memory", "adapter", "shard", "speed"]
    assert list(signature(command).parameters) == ["first", *options, "last"]
    values = dict.fromkeys(options[:5]) | {"model": "there", "shard": False, "speed": "fast"}
    command(first="x", last=True, **values)
    assert seen == [("x", Load(model="there", speed="fast"), True)]


def test_every_file_of_commands_is_listed() -> None:
    folder = Path(cli.__file__).parent
    having = {path.stem for path in folder.glob("*.py") if "\napp = " in path.read_text()}
    assert having == {*cli.FILES, "main"}


def test_a_prompt_cache_is_read_and_kept(tmp_path: Path) -> None:
    file = str(tmp_path / "cache")
    flags = ["-m", SUDOKU, "--seed", "0", "--prompt-cache", file]
    first, second = (run("generate", *flags, PUZZLE) for _ in range(2))
    assert first.stdout == second.stdout == ANSWER + "\n"
    assert "47 prompt tokens in" in first.stderr
    assert "47 prompt tokens (47 of them cached)" in second.stderr
    assert json.loads(run("generate", *flags, "--json", PUZZLE).stdout)["cached_tokens"] == 47
    done = run("generate", "--prompt-cache", file, "hello")
    assert done.returncode == 1
    assert "saved with another model" in done.stderr


def test_guards_are_off_unless_asked_for() -> None:
    """The reference has none, and `generate` answers as it does."""
    flags = ["-m", SUDOKU, "--seed", "3", "--steps", "48", "--max-tokens", "30"]
    plain = run("generate", *flags, "1111")
    assert "[" not in plain.stderr
    assert run("generate", *flags, "--guards", "nothing", "1111").returncode == 2
    watched = run("generate", *flags, "--guards", "all", "--shrink", "1111")
    assert watched.returncode == 0, watched.stderr
