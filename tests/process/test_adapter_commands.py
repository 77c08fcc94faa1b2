"""`--adapter` and `fuse` as commands, and what the server says of an adapter."""

import json
from pathlib import Path

import httpx
import mlx.core as mx
import pytest
from command import run
from servers import process

from mlx_diffgemma.checkpoint.adapter import AdapterConfig, add_adapter, save_adapter, trained
from mlx_diffgemma.checkpoint.load import EMBEDDED, load_model
from mlx_diffgemma.convert import RECIPES, convert

ASKED = ("generate", "hello", "--seed", "0", "--max-tokens", "24", "--steps", "4", "-q")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that makes the small model write something else."""
    directory = tmp_path_factory.mktemp("adapter")
    model, config = load_model(EMBEDDED, dtype="float32"), AdapterConfig(rank=2, scale=20.0)
    add_adapter(model, config)
    keys = iter(mx.random.split(mx.random.key(2), 999))
    weights = {
        name: 0.1 * mx.random.normal(array.shape, key=next(keys))
        for name, array in trained(model).items()
    }
    save_adapter(directory, weights, config, model="tiny")
    return directory


def test_each_command_takes_an_adapter(adapter: Path) -> None:
    plain, beside = run(*ASKED), run(*ASKED, "--adapter", adapter)
    assert beside.returncode == 0
    assert beside.stdout != plain.stdout
    assert run(*ASKED, "--adapter-path", adapter).stdout == beside.stdout
    for command in ("chat", "serve", "fill", "edit", "score", "choose", "eval", "bench", "info"):
        assert "--adapter-path" in run(command, "--help", COLUMNS="200").stdout, command
    told = run("info", "tiny", "--adapter", adapter)
    assert told.stdout.startswith("adapter: LoRA of rank 2, scale 20, all layers, 0.")
    needed = [
        json.loads(run("info", "tiny", "--json", *more).stdout)["loaded_bytes"]
        for more in ((), ("--adapter", adapter))
    ]
    assert needed[0] < needed[1]
    failed = run(*ASKED, "-m", "tiny-puzzles", "--adapter", adapter)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.count("\n") == 1
    assert "it says that it was trained on 'tiny'" in failed.stderr


def test_fuse(adapter: Path, tmp_path: Path) -> None:
    out, base = tmp_path / "fused", tmp_path / "base"
    convert(EMBEDDED, base, recipe=RECIPES["none"], dtype="float32")
    asked = ("fuse", "--model", base, "--adapter-path", adapter, "--save-path", out)
    done = run(*asked)
    assert (done.returncode, done.stdout) == (0, f"{out}\n")
    assert "39 tensors changed; 14.0 MB, 1 file" in done.stderr
    assert done.stderr.endswith("at 0.0 % of a sample's positions\n")
    assert "fine-tuned with mlx-diffgemma: LoRA of rank 2" in (out / "README.md").read_text()
    beside = run(*ASKED, "-m", base, "--adapter", adapter).stdout
    assert run(*ASKED, "-m", out).stdout == beside
    again = run(*asked)
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr == f"error: {out} exists already\n"
    assert "safetensors" in run(*asked, "--export-gguf").stderr


def test_a_loss_by_packing_again_is_told(adapter: Path, tmp_path: Path) -> None:
    convert(EMBEDDED, tmp_path / "base", recipe=RECIPES["4bit"])
    asked = ("fuse", "--model", tmp_path / "base", "--adapter-path", adapter, "--save-path")
    assert "--q-bits 8 or --dequantize loses less\n" in run(*asked, tmp_path / "fused").stderr
    assert "--q-bits" not in run(*asked, tmp_path / "exact", "--dequantize").stderr


def test_the_server_answers_with_it(adapter: Path) -> None:
    asked = {"messages": [{"role": "user", "content": "hello"}], "seed": 0, "max_tokens": 24}
    with process("--adapter", str(adapter)) as server:
        (told,) = httpx.get(f"{server.url}/v1/models").json()["data"]
        answer = server.post("/v1/chat/completions", {**asked, "steps": 4}).json()
    assert told["adapter"] == "LoRA of rank 2, scale 20, all layers"
    written = run(*ASKED, "--adapter", adapter).stdout.removesuffix("\n")
    assert answer["choices"][0]["message"]["content"] == written
