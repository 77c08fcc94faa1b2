"""The vision tower is loaded by itself, and what is wrong with it is one sentence."""

import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from held import active_memory
from mlx.utils import tree_flatten

from mlx_diffgemma.arguments import SettingError
from mlx_diffgemma.checkpoint.load import load_model
from mlx_diffgemma.checkpoint.vision import load_vision
from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.model import vision, vision_config
from mlx_diffgemma.model.config import ConfigError
from mlx_diffgemma.model.vision import Vision
from mlx_diffgemma.model.vision_config import VisionConfig

TOWER: dict[str, Any] = {
    "model_type": "gemma4_vision",
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "patch_size": 4,
    "pooling_kernel_size": 3,
    "position_embedding_size": 30,
    "standardize": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}
TEXT = {"hidden_size": 40}


def tower(**changes: Any) -> VisionConfig:
    found = VisionConfig.from_dict({"vision_config": {**TOWER, **changes}, "text_config": TEXT})
    assert found is not None
    return found


def published(name: str) -> str:
    """The checkpoint's name of a parameter."""
    inner = name.startswith("vision_tower.encoder.") and "_proj." in name
    return "model.encoder." + (name.replace("_proj.", "_proj.linear.") if inner else name)


def write(directory: Path, bits: int | None = None, **changes: Any) -> dict[str, mx.array]:
    """A checkpoint of a random tower, its projection packed if `bits`; the text model is absent."""
    vision = Vision(tower())
    keys = iter(mx.random.split(mx.random.key(5), 99))
    weights = {
        published(name): mx.random.normal(array.shape, key=next(keys))
        for name, array in tree_flatten(vision.parameters())
    }
    config: dict[str, Any] = {
        "model_type": "diffusion_gemma",
        "text_config": TEXT,
        "vision_config": {**TOWER, **changes},
    }
    stored = dict(weights)
    if bits is not None:
        module = "model.encoder.embed_vision.embedding_projection"
        packed = mx.quantize(weights[f"{module}.weight"], 64, bits)
        names = ("weight", "scales", "biases")
        stored |= {f"{module}.{n}": array for n, array in zip(names, packed, strict=True)}
        config["quantization"] = {"group_size": 64, "bits": bits}
    directory.mkdir(exist_ok=True)
    mx.save_safetensors(str(directory / "model.safetensors"), stored)
    (directory / "config.json").write_text(json.dumps(config))
    return weights


def test_a_packed_projection_is_near_the_whole_one(tmp_path: Path) -> None:
    """The layout of published 4-bit files: the tower as it was, the projection packed."""
    write(tmp_path / "whole")
    write(tmp_path / "packed", bits=8)
    patches = mx.random.uniform(shape=(54, 48), key=mx.random.key(1))
    whole, packed = (load_vision(tmp_path / name)(patches, 6, 9) for name in ("whole", "packed"))
    assert whole.shape == (6, 40)
    assert 0 < mx.abs(whole - packed).max().item() < 0.05 * mx.abs(whole).max().item()
    half = load_vision(tmp_path / "whole", dtype="bfloat16")
    assert {each.dtype for _, each in tree_flatten(half.parameters())} == {mx.bfloat16}
    assert half(patches, 6, 9).dtype == mx.bfloat16


def test_text_and_tower_are_loaded_without_each_other(tmp_path: Path) -> None:
    """Whole files of the other part are not opened."""
    write(tmp_path)
    loaded = load_vision(tmp_path)
    assert loaded.vision_tower.std_scale.shape == (64,)
    with pytest.raises(CheckpointError, match="there is no vocab_size"):
        load_model(tmp_path)


@pytest.mark.parametrize(("side", "block"), [(48, 1 << 20), (24, 1 << 23), (24, 1 << 25)])
def test_what_a_picture_takes_is_not_more_than_is_told(
    monkeypatch: pytest.MonkeyPatch, side: int, block: int
) -> None:
    """Blocks bound it: without them scores and the insides of an MLP all existed at once. Where
    one block is enough they do, which was not told: small pictures took twice what was said."""
    monkeypatch.setattr(vision_config, "SCORE_BYTES", block)
    monkeypatch.setattr(vision, "SCORE_BYTES", block)
    numbers = tower(hidden_size=144, head_dim=72, intermediate_size=538, position_embedding_size=48)
    seen = Vision(numbers)
    patches = mx.zeros((side * side, 48))
    mx.eval(seen.parameters(), patches)
    before = active_memory()
    mx.reset_peak_memory()
    mx.eval(seen(patches, side, side, mx.eval))
    taken = mx.get_peak_memory() - before
    told = numbers.working_bytes((side // numbers.pool) ** 2, 4)
    assert taken < 1.1 * told < 2 * taken
    if side == 48:
        assert told < 4 * 2 * 2 * 2304**2


def test_a_checkpoint_without_a_tower_says_so(tmp_path: Path) -> None:
    write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vision_config": None}))
    with pytest.raises(CheckpointError, match="has no vision_config"):
        load_vision(tmp_path)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"model.x": mx.zeros(1)})
    with pytest.raises(CheckpointError, match="has no vision tower: it reads text alone"):
        load_vision(tmp_path)


def test_damaged_towers_are_one_sentence(tmp_path: Path) -> None:
    weights = write(tmp_path)
    bias = "model.encoder.vision_tower.std_bias"
    for change, said in (
        ({bias: None}, "the checkpoint lacks vision_tower.std_bias"),
        ({bias: mx.zeros(7)}, r"shape \[7\], where the config asks for \[64\]"),
        ({bias: mx.zeros(64, mx.int32)}, "has the type I32"),
        ({f"{bias}.input_min": mx.zeros(1)}, "tensors that the config does not ask for"),
    ):
        changed = {n: a for n, a in {**weights, **change}.items() if a is not None}
        mx.save_safetensors(str(tmp_path / "model.safetensors"), changed)
        with pytest.raises(CheckpointError, match=said):
            load_vision(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 5000)
    with pytest.raises(CheckpointError, match="cut off"):
        load_vision(tmp_path)


def refusal(vision: dict[str, Any]) -> str:
    """What is said of a config; of one that a tower can be built of, nothing."""
    try:
        numbers = VisionConfig.from_dict({"vision_config": vision, "text_config": TEXT})
        assert numbers is not None
        Vision(numbers)
    except ConfigError as error:
        return str(error)
    return ""


def test_no_value_of_a_vision_config_ends_in_anything_but_a_refusal() -> None:
    values = [None, True, 0, -1, 2.5, "x\n", [], {}, 1 << 40, 7, float("nan"), {"rope_type": []}]
    for key in [*TOWER, "use_clipped_linears", "attention_bias", "hidden_activation"]:
        said = [refusal({**TOWER, key: value}) for value in values]
        assert any(said)
        assert all(not each or "config.json: vision_config" in each for each in said)
        assert not any("\n" in each for each in said)
    for key in ("hidden_size", "num_hidden_layers", "head_dim"):
        lacking = {name: each for name, each in TOWER.items() if name != key}
        assert refusal(lacking) == f"config.json: vision_config: there is no {key}"
    assert refusal({**TOWER, "num_key_value_heads": 1}).endswith("heads do not go with 2")
    for value in (True, 0, "x", [], [1]):
        with pytest.raises(ConfigError, match="is not a JSON object"):
            VisionConfig.from_dict({"vision_config": value, "text_config": TEXT})


def test_no_position_is_read_beyond_the_table() -> None:
    vision = Vision(tower())
    for rows, columns in ((3, 33), (33, 3), (0, 3), (3, 4), (-3, 3)):
        with pytest.raises(SettingError, match="a multiple of 3 patches, 30 at most"):
            vision(mx.zeros((max(rows * columns, 1), 48)), rows, columns)
    with pytest.raises(SettingError, match="patches of this picture are"):
        vision(mx.zeros((9, 47)), 3, 3)
