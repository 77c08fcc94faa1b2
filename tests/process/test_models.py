"""`models`: what is in the hub's cache, fetched and removed, and nothing else touched."""

import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import command
import pytest
from command import run
from hub import COMMIT, Hub, asked_here
from paths import SUDOKU

from mlx_diffgemma.cli import models


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with asked_here(SUDOKU, cache, monkeypatch) as hub:
        yield hub


def foreign(cache: Path, name: str, config: str | None) -> Path:
    """A repository in the cache that is not ours."""
    root = cache / f"models--{name.replace('/', '--')}"
    snapshot = root / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("a" * 40)
    if config is not None:
        (snapshot / "config.json").write_text(config)
    (snapshot / "model.safetensors").write_bytes(b"\0" * 1000)
    return root


def listed(*options: str) -> dict[str, Any]:
    rows = json.loads(run("models", "list", "--json", *options).stdout)
    return {row["name"]: row for row in rows}


def test_what_is_here_and_what_runs(hub: Hub, cache: Path) -> None:
    assert list(listed()) == ["tiny", "tiny-puzzles"]  # no cache at all
    foreign(cache, "org/llama", '{"model_type": "llama"}')
    foreign(cache, "org/nothing", None)
    foreign(cache, "org/damaged", "{")
    (cache / "datasets--org--data" / "snapshots").mkdir(parents=True)
    assert run("info", "org/model").returncode == 0  # which fetches the small files
    assert listed()["org/model"]["here"] == "its weights were not fetched"
    done = run("models", "pull", "org/model")
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / "model.safetensors").exists()
    assert "of it to be fetched" in done.stderr
    found = listed()
    assert list(found) == ["tiny", "tiny-puzzles", "org/model"]
    row = found["org/model"]
    assert row["revision"] == f"main, {COMMIT[:8]}"
    assert row["runs"] is True
    assert row["here"] == "runs here with a context of 4,096"
    assert row["bytes"] > 2_900_000
    small = listed("--max-memory", "1MB")["org/model"]
    assert small["runs"] is False
    assert small["here"].startswith("too large: the model needs")
    shown = run("models")
    assert "org/model" in shown.stdout
    assert "org/llama" not in shown.stdout
    assert shown.stderr == "4 other repositories in the hub's cache: no models of this package\n"


def test_only_ours_are_fetched(hub: Hub, cache: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(SUDOKU, tmp_path / "other"))
    (other / "config.json").write_text('{"model_type": "llama"}')
    hub.directory = other
    done = run("models", "pull", "org/model")
    assert done.returncode == 1
    assert "model_type is 'llama'" in done.stderr
    assert list(cache.rglob("*.safetensors")) == []
    assert "is on this machine already" in run("models", "pull", "tiny").stderr
    assert "neither a directory nor a name" in run("models", "pull", "x y").stderr


def test_room_is_looked_for_first(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(models.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    done = run("models", "pull", "org/model")
    assert done.returncode == 1
    assert "has too little room: 3.0 MB are needed, 1.0 kB are free" in done.stderr
    assert list(cache.rglob("*.safetensors")) == []


def test_only_ours_are_removed(
    hub: Hub, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing goes before all names are known to be ours, and nobody is taken to agree."""
    root = foreign(cache, "org/llama", '{"model_type": "llama"}')
    assert run("models", "pull", "org/model").returncode == 0
    ours = cache / "models--org--model"
    for names, said in (
        (["org/model"], "give --yes"),
        (["--yes", "org/model", "org/llama"], "is no model of this package; `hf cache rm` removes"),
        (["--yes", "org/model", "org/none"], "org/none is not in the hub's cache"),
        (["--yes", "../../x"], "is not in the hub's cache"),
        (["--yes", "tiny"], "is not in the hub's cache"),
    ):
        done = run("models", "rm", *names)
        assert done.returncode == 1
        assert said in done.stderr
        assert ours.exists()
    done = run("models", "rm", "--yes", "org/model")
    assert done.returncode == 0
    assert done.stderr.startswith("removed org/model: ")
    assert not ours.exists()
    assert root.exists()
    assert "not in the hub's cache" in run("models", "rm", "--yes", "org/model").stderr


def test_removing_asks(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("models", "pull", "org/model").returncode == 0
    ours = cache / "models--org--model"
    monkeypatch.setattr(command, "io", SimpleNamespace(StringIO=Terminal))
    for answer in ("n\n", "\n", "", "yesterday\n"):
        done = run("models", "rm", "org/model", stdin=answer)
        assert (done.returncode, done.stdout) == (0, "")
        assert done.stderr.startswith("Remove org/model, 3.0 MB in ")
        assert ours.exists()
    assert run("models", "rm", "org/model", stdin="Y\n").returncode == 0
    assert not ours.exists()


def test_what_cannot_be_removed_is_said(hub: Hub, cache: Path) -> None:
    """The library only logs it, and says how much would have been freed."""
    if os.geteuid() == 0:
        pytest.skip("root may remove everything")
    assert run("models", "pull", "org/model").returncode == 0
    cache.chmod(0o500)
    try:
        done = run("models", "rm", "--yes", "org/model")
    finally:
        cache.chmod(0o700)
    assert done.returncode == 1
    assert "could not be removed" in done.stderr


def test_a_link_in_the_cache_is_not_followed(hub: Hub, cache: Path, tmp_path: Path) -> None:
    """A directory of somebody's, linked into the cache, must not be emptied."""
    precious = foreign(tmp_path / "elsewhere", "org/linked", '{"model_type": "diffusion_gemma"}')
    cache.mkdir()
    (cache / "models--org--linked").symlink_to(precious)
    done = run("models", "rm", "--yes", "org/linked")
    # Versions of the library differ in whether the link goes.
    assert "removed" in done.stderr
    assert "Traceback" not in done.stderr
    assert (precious / "snapshots" / ("a" * 40) / "model.safetensors").exists()


def test_a_cache_that_is_none(hub: Hub, cache: Path) -> None:
    cache.write_text("a file")
    assert list(listed()) == ["tiny", "tiny-puzzles"]
