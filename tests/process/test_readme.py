"""What the README tells a newcomer to type works."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
BIN = str(Path(sys.executable).parent)
# These need a download, a checkpoint of the reader's, or minutes.
NEEDS = ("pip install", "convert google", "diffusiongemma-4bit", "--model DIR", "--recipes")


@pytest.mark.parametrize("code", [code for kind, code in BLOCKS if kind == "python"])
def test_python(code: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize(
    "line",
    [
        line
        for kind, code in BLOCKS
        if kind == "bash"
        for line in code.splitlines()
        if "mlx-diffgemma" in line and not any(part in line for part in NEEDS)
    ],
)
def test_shell(line: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", f'PATH="{BIN}:$PATH"; {line}'], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_file_tree_is_the_tree() -> None:
    tree = next(
        code for kind, code in re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL) if not kind
    )
    named = set(re.findall(r"^  (\S+)", tree, re.MULTILINE))
    for folder, pattern in (("mlx_diffgemma", "*.py"), ("convert", "*.py"), ("scripts", "*")):
        there = {p.name for p in (ROOT / folder).glob(pattern) if not p.name.startswith("_")}
        assert there <= named, folder
    for name in named:
        assert list(ROOT.glob(f"*/{name}")), name
