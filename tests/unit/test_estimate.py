"""What recipes would make of the real model: the tables that people decide by."""

import json
import re
import runpy
from math import prod
from pathlib import Path

import pytest
from command import run
from paths import ROOT, SUDOKU
from rich.filesize import decimal

from mlx_diffgemma.checkpoint.files import Headers, Tensor
from mlx_diffgemma.checkpoint.fit import MACS
from mlx_diffgemma.checkpoint.info import info_of, inspect
from mlx_diffgemma.cli.checkpoints import _tell_recipes
from mlx_diffgemma.convert import RECIPES, convert, estimates


@pytest.fixture(scope="module")
def real() -> Headers:
    """The real model's headers, from the shapes that scripts/make_checkpoint.py knows."""
    make = runpy.run_path(str(ROOT / "scripts" / "make_checkpoint.py"))
    config = make["config"](30, vision=True)
    shapes = make["shapes"](config)
    file = Path("model.safetensors")
    tensors = {n: Tensor(n, "BF16", s, file, 0, 2 * prod(s)) for n, s in shapes.items()}
    return Headers(Path("real"), config, tensors)


def test_the_tables_are_what_is_computed(real: Headers, capsys: pytest.CaptureFixture[str]) -> None:
    _tell_recipes(real, None, as_json=False)
    assert capsys.readouterr().out in (ROOT / "docs" / "checkpoints.md").read_text()
    found = {each.recipe: each for each in estimates(real)}
    source = decimal(info_of(real).bytes)
    rows = re.findall(
        r"^\| (.*`.*) \| (.+) \| (.+) \| (.+) \| (\d+) GB and more \|$", readme(), re.M
    )
    assert len(rows) == 6
    for made_by, download, disk, memory, mac in rows:
        recipe = re.search(r"--recipe (\w+)", made_by)
        each = found[recipe[1] if recipe else "mixed-4-8"]
        assert (disk, memory) == (decimal(each.disk), decimal(each.memory)), made_by
        assert int(mac) == each.macs[0]
        assert download == (disk if "nothing" in made_by else source)
    assert "No recipe fits 16 GB" in readme()
    assert not any(16 in each.macs for each in found.values())


def readme() -> str:
    return (ROOT / "README.md").read_text()


def test_an_estimate_is_what_a_conversion_has(tmp_path: Path) -> None:
    headers = json.loads(run("info", SUDOKU, "--recipes", "--json").stdout)
    assert [each["recipe"] for each in headers] == list(RECIPES)
    for each in headers:
        out = convert(SUDOKU, tmp_path / each["recipe"], recipe=RECIPES[each["recipe"]]).directory
        made = inspect(out)
        assert (each["disk"], each["memory"]) == (made.bytes, made.memory_needed(4096))
        assert each["context"] == 4096
    done = run("info", tmp_path / "8bit", "--recipes")
    assert done.returncode == 1
    assert "quantized already" in done.stderr


def test_memory_of_macs() -> None:
    """As Metal's recommendedMaxWorkingSetSize stands in logs of machines with 24 to 64 GB."""
    known = {24: 17179.87, 36: 28991.03, 48: 38654.71, 64: 51539.61}
    for size, megabytes in known.items():
        assert MACS[size] / 1e6 == pytest.approx(megabytes, abs=0.03)
