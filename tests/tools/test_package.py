"""What is published holds what it needs, and nothing called `convert` beside it."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from paths import ROOT

BUILD = """
import sys
from setuptools import build_meta
(_, out) = sys.argv  # a build changes it
build_meta.build_wheel(out)
build_meta.build_sdist(out)
"""


def files(folder: Path) -> set[str]:
    """Names below a folder, of a link's target too."""
    return {
        str(path.relative_to(ROOT))
        for pattern in ("*", "*/*", "*/*/*", "*/*/*/*")
        for path in folder.glob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel and a source distribution."""
    source, out = tmp_path_factory.mktemp("source") / "a", tmp_path_factory.mktemp("built")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    command = [sys.executable, "-c", BUILD, str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def test_the_wheel_holds_the_package_and_nothing_beside_it(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    held = {name for name in names if ".dist-info/" not in name}
    assert held == files(ROOT / "mlx_diffgemma")
    assert "mlx_diffgemma/convert/__init__.py" in held
    assert "mlx_diffgemma/data/tiny/model.safetensors" in held


def test_the_source_distribution_holds_its_tests(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert all(member.isfile() or member.isdir() for member in members)  # no link
    held = {member.name.partition("/")[2] for member in members}
    for folder in ("mlx_diffgemma", "tests", "scripts", "docs"):
        assert files(ROOT / folder) <= held
    assert {"README.md", "CONTRIBUTING.md", "pyproject.toml", "LICENSE", "NOTICE"} <= held
