"""What scripts/roofline.py models, by hand; what scripts/positions.py measures, in proportion."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT, SUDOKU

sys.path.insert(0, str(ROOT / "scripts"))
from make_checkpoint import TEXT
from roofline_model import (
    Answers,
    Assumed,
    Chip,
    Part,
    ahead,
    encoding,
    seconds,
    step,
    token,
    touched,
)

from mlx_diffgemma.model.config import Config

REAL = {
    "model_type": "diffusion_gemma",
    "canvas_length": 256,
    "text_config": {**TEXT, "num_hidden_layers": 30},
}
CONFIG = Config.from_dict(REAL)
ASSUMED = Assumed(bits=8, expert_bits=4, vocabulary_gb=2.15)
CHIP = Chip("one", 400, 10)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(REAL))
    return path


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def rows(text: str) -> dict[str, list[str]]:
    """Lines of tables by their first cell; the last of a name stands."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {line[0]: line[1:] for line in lines}


def by_name(parts: list[Part]) -> dict[str, Part]:
    return {part.name: part for part in parts}


def test_experts_touched_by_hand() -> None:
    assert touched(128, 8, 1) == pytest.approx(8)
    assert touched(128, 8, 2) == pytest.approx(128 * (1 - (15 / 16) ** 2))
    assert touched(4, 4, 3) == pytest.approx(4)
    # Two of three experts a token, popular as 1 : 1/4 : 1/9: all take the first, and one of two.
    first, second = 1 / 4 / (1 / 4 + 1 / 9), 1 / 9 / (1 / 4 + 1 / 9)
    assert touched(3, 2, 1, 2.0) == pytest.approx(2)
    assert touched(3, 2, 2, 2.0) == pytest.approx(3 - (1 - first) ** 2 - (1 - second) ** 2)
    for concentration in (0.0, 0.5, 1.0, 4.0):
        assert touched(128, 8, 1, concentration) == pytest.approx(8)
        assert touched(8, 8, 5, concentration) == pytest.approx(8)
    assert touched(128, 8, 32, 1.0) < touched(128, 8, 32) < 128


def test_fewer_positions_compute_less_and_read_the_same_cache() -> None:
    """Keys and values of settled positions are read, not computed."""
    whole, some = (by_name(step(CONFIG, ASSUMED, 4096, count)) for count in (256, 32))
    for name, part in whole.items():
        assert some[name].flops == pytest.approx(part.flops / 8), name
        if name not in ("experts", "sampler, vocabulary arrays"):
            assert some[name].bytes == part.bytes, name
    vocabulary = "sampler, vocabulary arrays"
    assert some[vocabulary].bytes == pytest.approx(whole[vocabulary].bytes / 8)
    share = touched(128, 8, 32) / touched(128, 8, 256)
    assert some["experts"].bytes == pytest.approx(whole["experts"].bytes * share)


def test_a_token_by_hand() -> None:
    """The same backbone one by one: 8 of 128 experts, the cache, the head, no self-conditioning."""
    parts = by_name(token(CONFIG, ASSUMED, 100))
    assert "self-conditioning" not in parts
    assert parts["experts"].bytes == pytest.approx(30 * 8 * 3 * 2816 * 704 * 4.5 / 8)
    sliding, full = 25 * 2 * 8 * 256, 5 * 2 * 2 * 512
    assert parts["attention, scores and cache"].bytes == 2 * (sliding + full) * 101
    assert parts["head"].flops == 2 * 2816 * 262144


def test_an_answer_pays_for_whole_canvases() -> None:
    answers = Answers(CONFIG, ASSUMED, 4096, {256: 2.0, 32: 4.0})
    diffusion, single = answers.compare(CHIP, 2)
    assert len(diffusion) == len(single) == 512
    first, second = (
        sum(n * seconds(step(CONFIG, ASSUMED, at, rows), CHIP) for rows, n in ((256, 2), (32, 4)))
        for at in (4096, 4352)
    )
    assert diffusion[0] == diffusion[255] == pytest.approx(first)
    between = seconds(encoding(CONFIG, ASSUMED, 4096), CHIP)
    assert diffusion[256] == pytest.approx(first + between + second)
    one = sum(part.seconds(CHIP) for part in token(CONFIG, ASSUMED, 4096))
    assert single[0] == pytest.approx(one)
    assert single[1] > 2 * one  # its own first token is read, too
    crossing = ahead(diffusion, single)
    assert crossing is not None
    assert single[crossing - 2] < first <= single[crossing - 1]
    assert ahead([9.0, 9.0], [1.0, 2.0]) is None


def test_the_documented_tables_are_what_is_printed(config: Path) -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    recorded = [
        ROOT / "tests" / "data" / "passes" / f"{name}.json" for name in ("faithful", "settled")
    ]
    own = ["--vocabulary-gb", "2.15"]
    for asked in (
        ["--chip", "M1 Max"],
        ["--positions", "256,128,64,32"],
        ["--recorded", *recorded],
        ["--recorded", *recorded, "--stretch", "2.8", "--chip", "M2 Max"],
    ):
        done = run("roofline.py", config, *own, *asked)
        assert done.returncode == 0, done.stderr
        assert "Modelled, not measured" in done.stdout
        lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
        assert len(lines) > 4
        assert [line for line in lines if line not in page] == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[1, 0.5], [1]", "is not JSON"),
        ("[1, 0.5]", "canvas 0 is not a list"),
        ("[]", "is not a list of canvases"),
        ('{"a": 1}', "is not a list of canvases"),
        ("[[1], []]", "canvas 1 is not a list"),
        ("[[1, 64]]", "canvas 0 has a share"),
        ("[[1, 0]]", "canvas 0 has a share"),
        ("[[true]]", "canvas 0 has a share"),
        ("[[NaN]]", "is not JSON"),
    ],
)
def test_recordings_that_are_none(config: Path, text: str, says: str) -> None:
    path = config.with_name("recorded.json")
    path.write_text(text)
    done = run("roofline.py", config, "--recorded", path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert says in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "needs --chip"),
        (["--chip", "M5"], "needs --tflops"),
        (["--positions", "257"], "a canvas has 256 positions"),
        (["--chip", "M1", "--context", "262144"], "leaves no room"),
        (["--recorded", "missing.json"], "cannot be read"),
    ],
)
def test_what_cannot_be_modelled(config: Path, arguments: list[str], says: str) -> None:
    done = run("roofline.py", config, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert says in done.stderr


def test_measured_positions() -> None:
    """At a small width only the rows are looked at, and that no peak grows as positions fall."""
    asked = SUDOKU / "config.json", "--positions", "48,12", "--repeats", "1", "--context", "64"
    done = run("positions.py", *asked)
    assert done.returncode == 0, done.stderr
    cells = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    parts = ["sliding", "full", "readout", "2 sliding, 2 full, readout"]
    assert [(line[0], line[1]) for line in cells] == [(p, n) for p in parts for n in ("48", "12")]
    for line in cells:
        assert float(line[2]) == int(line[1]) / 48
        assert float(line[8]) <= 1
