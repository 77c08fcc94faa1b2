"""What README.md and docs/ tell a reader to type prints what they say.

A block of code is followed by its output, a block of its own in `text` or `json`, by comments such
as `<!-- prints: Oslo -->`, which are invisible where the page is read and name a part of the output
each, or by `<!-- not run: why -->`. Commands run in this process, with models that are loaded once.
"""

import ast
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient
from servers import serving

import mlx_diffgemma
from mlx_diffgemma.checkpoint import load as loading
from mlx_diffgemma.cli.lora_config import asked_for, read_config
from mlx_diffgemma.cli.main import main
from mlx_diffgemma.server.app import make_app
from mlx_diffgemma.server.thread import MlxThread
from mlx_diffgemma.server.worker import Resident, Worker

ROOT = next(each for each in Path(__file__).parents if (each / "pyproject.toml").exists())
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = Path(mlx_diffgemma.__file__).parent

# A block, and the block of output or the comments that follow it.
FENCE = re.compile(
    r"^```(?P<kind>bash|python|http)\n(?P<code>.*?)^```\n"
    r"(?:\n*^```(?:text|json)\n(?P<output>.*?)^```$)?"
    r"(?P<comments>(?:\n*^<!-- [^\n]*? -->$)*)",
    re.DOTALL | re.MULTILINE,
)

# Where examples of clients find a server.
SERVED = "http://127.0.0.1:8080"


@dataclass(frozen=True)
class Example:
    kind: str
    code: str
    output: str | None
    prints: list[str]
    not_run: list[str]


def examples(page: Path) -> list[Example]:
    """The blocks of a page that can be run, in their order."""
    found = []
    for block in FENCE.finditer(page.read_text()):
        comments = block["comments"]
        prints = re.findall(r"<!-- prints: (.*) -->", comments)
        not_run = re.findall(r"<!-- not run: (.+) -->", comments)
        found.append(Example(block["kind"], block["code"], block["output"], prints, not_run))
    return found


ALL = [
    pytest.param(each, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, each in enumerate(examples(page), 1)
]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLX_DIFFGEMMA_MODEL", raising=False)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setattr(loading, "load", load_once)
    monkeypatch.setattr(mlx_diffgemma, "load", load_once)


@cache
def shipped(name: str | None) -> Any:
    return real_load(name)


real_load = loading.load


def load_once(name: str | None = None, **settings: Any) -> Any:
    """As `load`; models that ship with the package, used as they are, are loaded once."""
    given = {key: value for key, value in settings.items() if value not in (None, "faithful")}
    if given or name not in (None, "tiny", "tiny-puzzles"):
        return real_load(name, **settings)
    return shipped(name)


def run_bash(code: str) -> str:
    """What the commands print; those of ours run in this process, behind their pipes."""
    told = ""
    for line in code.replace("\\\n", " ").splitlines():
        before, ours, given = line.partition("mlx-diffgemma ")
        shell = subprocess.run(
            ["bash", "-c", before.rstrip(" |") if ours else line],
            capture_output=True,
            text=True,
            check=True,
        )
        if ours:
            assert before.endswith("| ") or not before, line
            told += run_command(shlex.split(given, comments=True), shell.stdout)
        else:
            told += shell.stdout
    return told


def run_command(given: list[str], stdin: str) -> str:
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        patch.setattr("sys.argv", ["mlx-diffgemma", *given])
        patch.setattr("sys.stdin", io.StringIO(stdin))
        code: object = None
        try:
            main()
        except SystemExit as end:
            code = end.code
    assert not code, given
    return out.getvalue()


def run_python(code: str) -> str:
    with redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "<example>", "exec"), {"__name__": "example"})
    return out.getvalue()


@pytest.fixture(scope="module")
def ask() -> Iterator[Callable[[str], str]]:
    """Gives a server's answer to `POST /route` and a body behind it."""
    source = Resident(lambda: shipped(None))
    worker = Worker(source, name="tiny", max_batch=4, max_queue=16, timeout=600)
    thread = MlxThread([worker], cache_bytes=1 << 28)
    thread.start()
    with TestClient(make_app(thread), "http://localhost") as client:

        def answer(code: str) -> str:
            head, _, body = code.partition("\n")
            method, path = head.split()
            reply = client.request(method, path, json=json.loads(body) if body else None)
            reply.raise_for_status()
            return reply.text

        yield answer


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Where a server answers."""
    with serving(lambda: shipped(None)) as server:
        yield server.url


def without_steps(told: str) -> str:
    """Output without counts of steps, which depend on how a device rounds."""
    return re.sub(r'"denoising_steps":\d+', "", told).strip()


@pytest.mark.parametrize("example", [each for each in ALL if not each.values[0].not_run])
def test_examples(
    example: Example, ask: Callable[[str], str], request: pytest.FixtureRequest
) -> None:
    """Lines of README were judged only by "stdout not empty", so wrong answers stood there."""
    assert example.output is not None or example.prints, "it says nowhere what it prints"
    code = example.code
    if example.kind != "http" and SERVED in code:
        code = code.replace(SERVED, request.getfixturevalue("url"))
    told = {"bash": run_bash, "python": run_python, "http": ask}[example.kind](code)
    if example.output is not None:
        assert without_steps(told) == without_steps(example.output)
    for part in example.prints:
        assert part in told


FINE_TUNING = ROOT / "docs" / "finetune.md"

# What makes its worked example short; the page says how long it takes as it stands.
SHORTER = {
    r"--iters \d+": "--iters 4",
    r"--batch-size \d+": "--batch-size 2",
    r"--steps-per-eval \d+": "--steps-per-eval 4",
    r"--success-cases \d+": "--success-cases 1",
    r"--success-steps \d+": "--success-steps 1",
    r"--val-batches \d+": "--val-batches 1",
    r"--test-batches \d+": "--test-batches 1",
    r"--test-cases \d+": "--test-cases 1 --success-steps 1",
    r"orders_data\.py orders": "orders_data.py orders --train 8 --valid 2 --test 2",
    r"--seed 0": "--seed 0 --steps 2",
    r"python scripts": f"{sys.executable} {ROOT / 'scripts'}",
}


def test_the_example_of_fine_tuning_runs() -> None:
    """All its commands in their order; what is fused answers as what stands beside the model."""
    code = next(each.code for each in examples(FINE_TUNING) if "orders_data.py" in each.code)
    for long, short in SHORTER.items():
        assert re.search(long, code), long
        code = re.sub(long, short, code)
    *_, beside, fused, answered = [run_bash(line) for line in code.splitlines()]
    assert fused == "orders-fused\n"
    assert beside == answered != ""
    kept = {each.name for each in Path("orders-lora").iterdir()}
    assert {"adapters.safetensors", "adapter_config.json", "log.jsonl"} <= kept


def test_the_file_of_settings_is_one() -> None:
    text = FINE_TUNING.read_text()
    (block,) = re.findall(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    Path("lora.yaml").write_text(block)
    values, notes = read_config(Path("lora.yaml"))
    asked = asked_for({}, values, {})
    assert notes == []
    assert values == yaml.safe_load(block)
    assert asked.train
    assert asked.adapter.rank == 16
    assert asked.settings.updates == 2000


def test_what_is_not_run_uses_what_there_is() -> None:
    """Commands and options of blocks that need a download or minutes."""
    from typer.main import get_command

    from mlx_diffgemma.cli.main import app

    commands: Any = get_command(app)
    code = "\n".join(each.values[0].code for each in ALL)
    for line in re.findall(r"mlx-diffgemma (?!\[)([a-z].*)", code.replace("\\\n", " ")):
        name, *given = shlex.split(line, comments=True)
        options = commands.commands[name].params
        known = {each for option in options for each in (*option.opts, *option.secondary_opts)}
        assert {each for each in given if re.match("--?[a-z]", each)} <= known, line


def test_links_scripts_files_and_tests_are_there() -> None:
    """README's file tree had to be kept by hand, and named files that had moved."""
    for page in PAGES:
        text = page.read_text()
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (page.parent / link).exists(), (page.name, link)
        for link in re.findall(r"mlx-diffgemma/mlx-diffgemma/(?:blob/)?main/([\w./-]+\w)", text):
            assert (ROOT / link).exists(), (page.name, link)
        for script in re.findall(r"(?<![\w/])scripts/[\w/]+(?:\.py)?", text):
            assert (ROOT / script).exists(), (page.name, script)
        for file, name in re.findall(r"`(test_\w+\.py)::(\w+)`", text):
            (where,) = (ROOT / "tests").rglob(file)
            assert re.search(rf"def {name}\b", where.read_text()), (page.name, file, name)


def test_readme_is_a_front_page() -> None:
    """An index of packages shows README alone: its links have to be absolute."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 190
    assert re.findall(r"\]\((?!https://|#)([^)]+)", text) == []


def constants(room: str) -> dict[str, set[float]]:
    """Numbers of a room of the package by the names of their constants."""
    found: dict[str, set[float]] = {}
    for path in [*SOURCES.glob(f"{room}.py"), *(SOURCES / room).glob("*.py")]:
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
                continue
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = [*zip(target.elts, node.value.elts, strict=True)]
            for name, value in pairs:
                number = _number(value)
                if isinstance(name, ast.Name) and number is not None:
                    found.setdefault(name.id, set()).add(number)
    return found


def _number(node: ast.expr) -> float | None:
    """An expression of numbers alone, such as `1 << 16`."""
    arithmetic = ast.BinOp | ast.UnaryOp | ast.operator | ast.unaryop
    for each in ast.walk(node):
        if not isinstance(each, arithmetic | ast.Constant):
            return None
        if isinstance(each, ast.Constant) and not isinstance(each.value, int | float):
            return None
    return float(eval(compile(ast.Expression(node), "<constant>", "eval")))


def test_bounds_are_those_of_the_code() -> None:
    """Rows such as `| holes of a template | 1,000 | MOST_HOLES, text |` of docs/security.md."""
    page = (ROOT / "docs" / "security.md").read_text()
    rows = re.findall(r"^\| .+ \| ([\d,.]+) \| `([A-Z_]+)`, `(\w+)` \|$", page, re.MULTILINE)
    assert len(rows) > 20
    for told, name, room in rows:
        assert float(told.replace(",", "")) in constants(room)[name], (name, room, told)


def test_every_room_is_on_the_map() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    rooms = {each.name for each in SOURCES.iterdir() if (each / "__init__.py").exists()}
    files = {each.name for each in SOURCES.glob("[!_]*.py")}
    assert {f"{room}/" for room in rooms} | files <= set(re.findall(r"^  ([\w./]+)", page, re.M))
