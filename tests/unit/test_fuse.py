"""Fused weights give what the model with its adapter beside it gives; nothing is half written."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma import load
from mlx_diffgemma.checkpoint.adapter import AdapterConfig, add_adapter, save_adapter, trained
from mlx_diffgemma.checkpoint.load import EMBEDDED, load_model
from mlx_diffgemma.convert import (
    RECIPES,
    ConvertError,
    Fused,
    changed_argmax,
    convert,
    stream_fuse,
    workspace_of,
)
from mlx_diffgemma.convert import write as writing
from mlx_diffgemma.errors import CheckpointError

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
KINDS = {
    "lora": AdapterConfig(rank=3),
    "experts": AdapterConfig(
        rank=2,
        num_layers=3,
        keys=(*EXPERTS, "router.proj", "model.decoder.self_conditioning.up_proj"),
    ),
    "dora": AdapterConfig("dora", rank=2),
    "full": AdapterConfig("full"),
    "full, one block": AdapterConfig("full", num_layers=1),
}


def adapter_for(source: Path, directory: Path, config: AdapterConfig) -> Path:
    """An adapter of small random numbers."""
    model = load_model(source, dtype="float32")
    mx.random.seed(0)  # which terms begin with
    add_adapter(model, config)
    keys = iter(mx.random.split(mx.random.key(2), 999))
    weights = {
        name: array + 0.02 * mx.random.normal(array.shape, key=next(keys))
        for name, array in trained(model).items()
    }
    save_adapter(directory, weights, config)
    return directory


def logits(source: Path, adapter: Path | None = None) -> np.ndarray:
    model, _ = load(source, adapter=adapter, dtype="float32")
    cache = model.make_cache()
    model.encode(mx.array([[3 * i % 700 for i in range(40)]]), cache)
    mx.eval([layer.state for layer in cache])
    believed = mx.random.normal((1, 64, model.config.hidden_size), key=mx.random.key(9))
    return np.array(model(mx.array([[7 * i % 700 for i in range(64)]]), cache, believed))


def fuse(*where: Path, **settings: Any) -> Fused:
    *_, report = stream_fuse(*where, **settings)
    assert isinstance(report, Fused)
    return report


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model in float32."""
    made = tmp_path_factory.mktemp("plain") / "model"
    convert(EMBEDDED, made, recipe=RECIPES["none"], dtype="float32")
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_fused_is_unfused(tmp_path: Path, plain: Path, kind: str) -> None:
    adapter = adapter_for(plain, tmp_path / "adapter", KINDS[kind])
    report = fuse(plain, adapter, tmp_path / "fused")
    with_it, fused = logits(plain, adapter), logits(tmp_path / "fused")
    assert np.abs(with_it - logits(plain)).max() > 0.1
    assert np.abs(with_it - fused).max() < 1e-3
    assert 0 < report.changed == len(_others(plain, tmp_path / "fused"))
    assert config_of(plain) == config_of(tmp_path / "fused")


def _others(one: Path, other: Path) -> list[str]:
    """Tensors of two checkpoints that are not the same numbers; the names have to be."""
    a, b = (mx.load(str(each / "model.safetensors")) for each in (one, other))
    assert isinstance(a, dict)
    assert isinstance(b, dict)
    assert {n: (x.shape, x.dtype) for n, x in a.items()} == {
        n: (x.shape, x.dtype) for n, x in b.items()
    }
    return [name for name in a if not mx.array_equal(a[name], b[name], equal_nan=True)]


# How far the logits are off; unpacked, formats of 8-bit scales are written in bfloat16.
@pytest.mark.parametrize(
    ("recipe", "exact"), [("8bit", 1e-4), ("6bit", 1e-4), ("mxfp4", 0.05), ("nvfp4", 0.05)]
)
def test_a_packed_base(tmp_path: Path, plain: Path, recipe: str, exact: float) -> None:
    """It is packed again as it was; unpacked it gives what the adapter beside it does."""
    packed = tmp_path / "packed"
    convert(plain, packed, recipe=RECIPES[recipe])
    adapter = adapter_for(packed, tmp_path / "adapter", KINDS["experts"])
    with_it = logits(packed, adapter)
    fuse(packed, adapter, tmp_path / "again")
    assert _others(packed, tmp_path / "again")
    assert config_of(packed) == config_of(tmp_path / "again")
    fuse(packed, adapter, tmp_path / "unpacked", dequantize=True)
    assert "quantization" not in config_of(tmp_path / "unpacked")
    # Not of all: where experts are nearly equal, rounding chooses another for a position.
    assert np.quantile(np.abs(with_it - logits(tmp_path / "unpacked")), 0.9) < exact
    if recipe != "6bit":
        return
    fuse(packed, adapter, tmp_path / "eight", bits=8)
    module = "model.decoder.layers.5.experts.down_proj"
    assert config_of(tmp_path / "eight")["quantization"][module]["bits"] == 8
    off = [np.abs(with_it - logits(tmp_path / name)).mean() for name in ("again", "eight")]
    assert off[1] < off[0] / 2


def config_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return found


def test_dora_and_whole_parameters_of_a_packed_base(tmp_path: Path, plain: Path) -> None:
    packed = tmp_path / "packed"
    convert(plain, packed, recipe=RECIPES["6bit"])
    adapter = adapter_for(packed, tmp_path / "adapter", KINDS["dora"])
    fuse(packed, adapter, tmp_path / "fused", dequantize=True)
    assert np.abs(logits(packed, adapter) - logits(tmp_path / "fused")).max() < 1e-3
    whole = adapter_for(plain, tmp_path / "whole", KINDS["full"])
    with pytest.raises(CheckpointError, match="only where none is quantized"):
        fuse(packed, whole, tmp_path / "no")


def test_a_float_adapter_beside_an_8_bit_base(tmp_path: Path, plain: Path) -> None:
    """Trained beside one, it can be loaded and fused beside the other."""
    convert(plain, tmp_path / "packed", recipe=RECIPES["8bit"])
    adapter = adapter_for(plain, tmp_path / "adapter", KINDS["lora"])
    fuse(plain, adapter, tmp_path / "float")
    fuse(tmp_path / "packed", adapter, tmp_path / "fused")
    exact, near = logits(tmp_path / "float"), logits(tmp_path / "fused")
    assert np.mean(exact.argmax(-1) == near.argmax(-1)) > 0.9
    assert changed_argmax(plain, adapter, tmp_path / "float") == 0


def test_copies_of_tied_tensors_are_left_out(tmp_path: Path, plain: Path) -> None:
    """They would keep the old numbers, which other readers may take."""
    source = tmp_path / "source"
    shutil.copytree(plain, source)
    stored = mx.load(str(source / "model.safetensors"))
    assert isinstance(stored, dict)
    name = "layers.0.self_attn.q_proj.weight"
    copies = {
        f"model.encoder.language_model.{name}": stored[f"model.decoder.{name}"],
        "lm_head.weight": stored["model.decoder.embed_tokens.weight"],
    }
    mx.eval(stored)
    (source / "model.safetensors.index.json").unlink()
    mx.save_safetensors(str(source / "model.safetensors"), {**stored, **copies})
    fuse(source, adapter_for(plain, tmp_path / "adapter", KINDS["lora"]), tmp_path / "fused")
    fused = mx.load(str(tmp_path / "fused" / "model.safetensors"))
    assert isinstance(fused, dict)
    assert fused.keys() == stored.keys()


def test_nothing_is_half_written(
    tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, out = adapter_for(plain, tmp_path / "adapter", KINDS["lora"]), tmp_path / "fused"
    events = stream_fuse(plain, adapter, out)
    next(events)
    assert workspace_of(out).exists()
    with pytest.raises(ConvertError, match="another conversion is writing"):
        fuse(plain, adapter, out)
    events.close()  # as an interruption does
    assert not workspace_of(out).exists()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(writing, "_sync", full)
        with pytest.raises(ConvertError, match=r"fused failed: No space left on device$"):
            fuse(plain, adapter, out)
    assert not out.exists()
    assert not workspace_of(out).exists()
    (workspace_of(out) / "checkpoint").mkdir(parents=True)  # what a kill leaves
    (workspace_of(out) / "checkpoint" / "model.safetensors").write_bytes(b"half")
    fuse(plain, adapter, out)
    assert not workspace_of(out).exists()
    before = sorted(path.stat().st_mtime_ns for path in out.iterdir())
    with pytest.raises(ConvertError, match="exists already"):
        fuse(plain, adapter, out)
    assert before == sorted(path.stat().st_mtime_ns for path in out.iterdir())


def test_what_cannot_be_fused_is_said_before_anything_is_written(
    tmp_path: Path, plain: Path
) -> None:
    adapter, out = adapter_for(plain, tmp_path / "adapter", KINDS["lora"]), tmp_path / "fused"
    other = tmp_path / "other"
    convert("tiny-puzzles", other, recipe=RECIPES["none"])
    for given, settings, said in [
        ((tmp_path / "nope", adapter, out), {}, "neither a directory"),
        ((plain, tmp_path / "nope", out), {}, "neither a directory with an adapter"),
        ((plain, plain, out), {}, "adapter_config.json is missing"),
        ((other, adapter, out), {}, "no adapted parameter of this model"),
        ((plain, adapter, out), {"bits": 7}, "bits is one of 2, 3, 4, 5, 6, 8, not 7"),
        ((plain, adapter, out), {"bits": 8, "dequantize": True}, "goes with no bits"),
    ]:
        with pytest.raises((ConvertError, CheckpointError), match=said):
            fuse(*given, **settings)
        assert not out.exists()
        assert not workspace_of(out).exists()
