"""Adapters beside a model that ranks share: each reads its slices, and all give what one gives."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from sharing import CONFIG, on_all, write_model

from mlx_diffgemma import DiffusionGemma, PromptCache
from mlx_diffgemma.checkpoint.adapter import (
    AdapterConfig,
    Stored,
    add_adapter,
    fingerprint,
    read_adapter,
    save_adapter,
    trained,
    with_adapter,
)
from mlx_diffgemma.checkpoint.files import read_headers
from mlx_diffgemma.checkpoint.info import info_of
from mlx_diffgemma.checkpoint.load import model_of, part_of
from mlx_diffgemma.diffusion import cache_file
from mlx_diffgemma.distributed.share import ALONE, Share
from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.model.adapters import ScaledRows, SidedLinear
from mlx_diffgemma.model.diffusion_gemma import Pass

OUTSIDE = tuple(f"model.decoder.self_conditioning.{each}_proj" for each in ("gate", "down"))
EVERYWHERE = ("experts.gate_up_proj", "experts.down_proj", "router.proj", *OUTSIDE)
PACKED = (64, 4, "affine")


def numbers(shapes: dict[str, tuple[int, ...]]) -> dict[str, mx.array]:
    keys = mx.random.split(mx.random.key(2), len(shapes))
    made = zip(shapes.items(), keys, strict=True)
    return {name: 0.1 * mx.random.normal(shape, key=key) for (name, shape), key in made}


def ours(directory: Path, model: Path, config: AdapterConfig) -> Path:
    whole = model_of(read_headers(model), "float32")
    add_adapter(whole, config)
    weights = numbers({name: array.shape for name, array in trained(whole).items()})
    save_adapter(directory, weights, config)
    return directory


def pefts(directory: Path, model: Path) -> Path:
    """One map for both sides, one for the decoder alone, one that the two apply in two ways."""
    sides = {"decoder": "decoder", "encoder": "encoder.language_model"}
    maps = [
        (f"model.{sides[side]}.layers.{layer}.{name}_proj", outputs, inputs)
        for side, layer, name, outputs, inputs in (
            ("decoder", 0, "self_attn.q", 256, 128),
            ("encoder", 0, "self_attn.q", 256, 128),
            ("decoder", 1, "self_attn.o", 128, 512),
            ("encoder", 2, "mlp.down", 128, 448),
            ("decoder", 2, "mlp.down", 128, 448),
        )
    ]
    maps.append(("model.decoder.self_conditioning.up_proj", 448, 128))
    found: dict[str, tuple[int, ...]] = {}
    for name, outputs, inputs in maps:
        found[f"base_model.model.{name}.lora_A.weight"] = (3, inputs)
        found[f"base_model.model.{name}.lora_B.weight"] = (outputs, 3)
    tensors = numbers(found)
    one, other = (n for n in tensors if "layers.0" in n and n.endswith("A.weight"))
    tensors[other] = tensors[one]
    b = {n.replace("lora_A", "lora_B"): n for n in (one, other)}
    tensors[next(iter(b))] = tensors[list(b)[1]]
    directory.mkdir()
    mx.save_safetensors(str(directory / "adapter_model.safetensors"), tensors)
    about = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(about))
    return directory


def loaded(model: Path, adapter: Path, share: Share) -> DiffusionGemma:
    headers = read_headers(model)
    return model_of(headers, "float32", read_adapter(adapter), part_of(headers, share))


def states(model: DiffusionGemma) -> np.ndarray:
    """What encoder and decoder make of a prompt and a canvas that expects something."""
    prompt_cache = PromptCache(model)
    (read,) = prompt_cache.encoding(list(range(100, 109)), 64)
    believed = mx.random.normal((1, 8, 128), key=mx.random.key(9))
    (seen,) = model.decode([Pass(mx.arange(8)[None] * 3, prompt_cache.cache, believed)])
    return np.array(mx.concatenate([read, seen], axis=1))


@pytest.mark.parametrize(
    ("packed", "config", "size"),
    [
        (PACKED, AdapterConfig(rank=3), 4),
        (None, AdapterConfig(rank=2, num_layers=2, keys=EVERYWHERE), 3),
        (PACKED, AdapterConfig("dora", rank=2, scale=0.5), 4),
        ((32, 4, "mxfp4"), AdapterConfig("dora", rank=2, keys=("self_attn.q_proj",)), 2),
        (None, AdapterConfig("full"), 2),
        (PACKED, None, 2),
    ],
    ids=str,
)
def test_ranks_give_what_one_gives(
    tmp_path: Path, packed: Any, config: AdapterConfig | None, size: int
) -> None:
    """All kinds, beside rows that are cut and columns; DoRA's norms are those of whole rows."""
    model = write_model(tmp_path / "model", packed)
    adapter = tmp_path / "adapter"
    made = pefts(adapter, model) if config is None else ours(adapter, model, config)
    alone = loaded(model, made, ALONE)
    wanted, identity = states(alone), cache_file.fingerprint(alone)
    assert np.abs(wanted - states(model_of(read_headers(model), "float32"))).max() > 0.1

    def run(share: Share) -> tuple[np.ndarray, str]:
        part = loaded(model, made, share)
        return states(part), cache_file.fingerprint(part)

    for found, whose in on_all(size, run)[0]:
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
        assert whose == identity  # so what one has saved, the others can go on with


def held(model: DiffusionGemma) -> int:
    return sum(each.nbytes for _, each in tree_flatten(model.parameters()))


def test_each_rank_holds_its_slices(tmp_path: Path) -> None:
    """And is told before that it will need no more."""
    model = write_model(tmp_path / "model", PACKED)
    adapter = ours(tmp_path / "adapter", model, AdapterConfig(rank=8, keys=EVERYWHERE[:2]))
    headers, stored = read_headers(model), read_adapter(adapter)

    def taken(share: Share, given: Stored | None) -> int:
        return held(model_of(headers, "float32", given, part_of(headers, share)))

    for share in (ALONE, Share(0, 2), Share(1, 2)):
        part = part_of(headers, share)
        cuts = stored.cuts(part, loaded(model, adapter, ALONE).config)
        found = info_of(headers, "float32", part)
        more = with_adapter(found, stored, cuts).loaded_bytes - found.loaded_bytes
        assert more == taken(share, stored) - taken(share, None)


def test_what_peft_applies_in_two_ways_stays_so(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    whole = loaded(model, pefts(tmp_path / "adapter", model), Share(1, 2))
    kinds = dict(whole.named_modules())
    assert isinstance(kinds["model.decoder.layers.2.mlp.down_proj"], SidedLinear)
    assert not isinstance(kinds["model.decoder.layers.0.self_attn.q_proj"], SidedLinear)


def test_norms_are_put_together_once(tmp_path: Path) -> None:
    """Not with each pass: one exchange while loading, and the same ones as without an adapter."""
    model = write_model(tmp_path / "model")
    adapter = ours(tmp_path / "adapter", model, AdapterConfig("dora", rank=2))

    def run(share: Share) -> bool:
        found = loaded(model, adapter, share)
        states(found)
        return isinstance(found.layers[0].self_attn.o_proj, ScaledRows)

    kinds, with_it = on_all(2, run)
    headers = read_headers(model)
    _, without = on_all(
        2, lambda share: states(model_of(headers, "float32", part=part_of(headers, share)))
    )
    assert all(kinds)
    assert len(with_it.bytes) == len(without.bytes) + 1
    assert with_it.bytes[0] == 4 * CONFIG["text_config"]["hidden_size"] * 2 * 3  # o and down


def test_another_models_adapter_is_one_sentence(tmp_path: Path) -> None:
    """Found by its shapes, before slices that are not there are read."""
    model = write_model(tmp_path / "model")
    for number, adapter in enumerate(
        (ours(tmp_path / "a", model, AdapterConfig()), pefts(tmp_path / "b", model))
    ):
        stored = read_adapter(adapter)
        ends = ("A.weight", "lora_a")
        name = next(n for n in stored.tensors if "s.1.self_attn.o_proj" in n and n.endswith(ends))
        tensor = stored.tensors[name]
        wrong = replace(tensor, shape=tuple(7 if d > 99 else d for d in tensor.shape))
        stored.tensors[name] = wrong
        if stored.sided is not None:
            terms = stored.sided.maps["model.decoder.layers.1.self_attn.o_proj"]
            terms["decoder"] = replace(terms["decoder"], a=wrong)
        headers = read_headers(model)
        with pytest.raises(CheckpointError, match=r"has the shape .*7.*where this model has .*512"):
            model_of(headers, "float32", stored, part_of(headers, Share(number, 2)))


def test_adapters_are_told_apart_by_their_numbers(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    one = ours(tmp_path / "a", model, AdapterConfig(rank=2))
    before = fingerprint(one)
    assert before == fingerprint(ours(tmp_path / "b", model, AdapterConfig(rank=2)))
    weights = {n: mx.load(str(one / "adapters.safetensors"))[n] for n in read_adapter(one).tensors}
    some = next(iter(weights))
    mx.save_safetensors(str(one / "adapters.safetensors"), {**weights, some: weights[some] + 1})
    assert fingerprint(one) != before
