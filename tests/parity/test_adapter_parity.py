"""Adapters beside the reference: what PEFT has trained gives its logits, and what we fuse ours."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from reference import random_checkpoint
from safetensors.torch import save_file
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import (
    DiffusionGemmaForBlockDiffusion,
)

from mlx_diffgemma import DiffusionGemma
from mlx_diffgemma.checkpoint.adapter import (
    KEYS,
    AdapterConfig,
    add_adapter,
    load_adapter,
    read_adapter,
    save_adapter,
    trained,
)
from mlx_diffgemma.checkpoint.load import load_model
from mlx_diffgemma.convert import ConvertError, Fused, stream_fuse
from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.model.adapters import SidedLinear

BOTH = r".*(language_model|decoder)\.layers.*(self_attn|mlp)\.[a-z]+_proj"
ENCODER = r".*language_model\.layers.*\.[qkv]_proj"
DECODER = r".*decoder\.layers.*(\.o_proj|router\.proj)"


def trained_by_peft(directory: Path, targets: str, **settings: Any) -> PeftModel:
    """A checkpoint and, in a folder of it, an adapter of random terms; the wrapped reference."""
    reference = random_checkpoint(directory, "ssf", seed=4)
    config = LoraConfig(r=3, lora_alpha=8, target_modules=targets, **settings)
    wrapped = get_peft_model(reference, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    return wrapped.eval()


PROMPT, CANVAS = list(range(5, 80)), [7 * i % 97 for i in range(24)]


def their_logits(reference: Any) -> np.ndarray:
    """Of a canvas behind a prompt."""
    with torch.no_grad():
        found = reference(
            input_ids=torch.tensor([PROMPT]), decoder_input_ids=torch.tensor([CANVAS])
        )
    logits: np.ndarray = found.logits.numpy()
    return logits


def our_logits(directory: Path, adapter: Path) -> tuple[np.ndarray, DiffusionGemma]:
    """The same of our model, which comes too."""
    model = load_model(directory, dtype="float32")
    load_adapter(model, adapter)
    cache = model.make_cache()
    model.encode(mx.array([PROMPT]), cache)
    mx.eval([layer.state for layer in cache])
    return np.array(model(mx.array([CANVAS]), cache)), model


@pytest.mark.parametrize(
    ("targets", "settings"),
    [(BOTH, {}), (ENCODER, {"use_rslora": True}), (DECODER, {"lora_dropout": 0.5})],
)
def test_each_side_has_its_own_terms(
    tmp_path: Path, targets: str, settings: dict[str, Any]
) -> None:
    wrapped = trained_by_peft(tmp_path, targets, **settings)
    wrapped.save_pretrained(tmp_path / "adapter")
    theirs = their_logits(wrapped)
    ours, model = our_logits(tmp_path, tmp_path / "adapter")
    assert any(isinstance(module, SidedLinear) for module in model.modules())
    assert np.abs(theirs - ours).max() < 1e-3
    with wrapped.disable_adapter():
        assert np.abs(theirs - their_logits(wrapped)).max() > 0.1
    with pytest.raises(ConvertError, match="in two ways, one for the encoder and one for"):
        list(stream_fuse(tmp_path, tmp_path / "adapter", tmp_path / "fused"))
    assert not (tmp_path / "fused").exists()


def test_terms_that_agree_become_one(tmp_path: Path) -> None:
    wrapped = trained_by_peft(tmp_path, BOTH)
    with torch.no_grad():
        named = dict(wrapped.named_parameters())
        for name, parameter in named.items():
            if "lora_" in name and "language_model" in name:
                parameter.copy_(named[name.replace("encoder.language_model", "decoder")])
    wrapped.save_pretrained(tmp_path / "adapter")
    theirs = their_logits(wrapped)
    ours, model = our_logits(tmp_path, tmp_path / "adapter")
    assert not any(isinstance(module, SidedLinear) for module in model.modules())
    assert np.abs(theirs - ours).max() < 1e-3
    *_, report = stream_fuse(tmp_path, tmp_path / "adapter", tmp_path / "fused")
    assert isinstance(report, Fused)
    merged = DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path / "fused").eval()
    assert np.abs(their_logits(merged) - ours).max() < 1e-3


def test_the_reference_reads_a_fused_checkpoint(tmp_path: Path) -> None:
    """Experts and all: its logits are those of our model with the adapter beside it."""
    random_checkpoint(tmp_path, "ssf", seed=4)
    experts = ("experts.gate_up_proj", "experts.down_proj")
    config = AdapterConfig(rank=2, num_layers=2, keys=(*KEYS, *experts, "router.proj"))
    model = load_model(tmp_path, dtype="float32")
    add_adapter(model, config)
    keys = iter(mx.random.split(mx.random.key(2), 999))
    weights = {
        name: 0.1 * mx.random.normal(array.shape, key=next(keys))
        for name, array in trained(model).items()
    }
    save_adapter(tmp_path / "adapter", weights, config)
    ours, _ = our_logits(tmp_path, tmp_path / "adapter")
    *_, report = stream_fuse(tmp_path, tmp_path / "adapter", tmp_path / "fused")
    assert isinstance(report, Fused)
    fused = DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path / "fused").eval()
    plain = DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path).eval()
    assert np.abs(their_logits(fused) - ours).max() < 1e-3
    assert np.abs(their_logits(plain) - ours).max() > 0.1
    seen = {name: p for name, p in fused.named_parameters() if "vision" in name}
    assert seen
    assert all(torch.equal(p, plain.get_parameter(name)) for name, p in seen.items())


# What a config may say, and what is said then.
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', and only LORA is read"),
        ({"use_dora": True}, "'use_dora' is True, and only plain low-rank terms are read"),
        ({"bias": "all"}, "'bias' is 'all'"),
        ({"modules_to_save": ["embed_tokens"]}, "'modules_to_save' is"),
        ({"rank_pattern": {"q_proj": 4}}, "'rank_pattern' is"),
        ({"invented_later": {"x": 1}}, "'invented_later' is"),
        ({"init_lora_weights": "pissa"}, "'init_lora_weights' is 'pissa'"),
        ({"r": 0}, "r must be from 1 to 4096, not 0"),
        ({"r": 4}, r"has the shape \[3, 48\], and the rank is 4"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number, not nan"),
    ],
)
def test_what_is_not_plain_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    wrapped = trained_by_peft(tmp_path, DECODER)
    wrapped.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=said):
        read_adapter(tmp_path / "adapter")


# A tensor by its name behind "base_model.model.model.", its shape, and what is said.
@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("decoder.layers.0.self_attn.o_proj.lora_B.weight", (3, 3), "has no counterpart"),
        ("decoder.layers.9.self_attn.o_proj.lora_A.weight", (3, 64), "has no such map"),
        ("decoder.layers.0.experts.lora_A.weight", (3, 48), "has no such map"),
        ("decoder.layers.0.self_attn.o_proj.lora_A.weight", (3, 63), r"this model has \[3, 128\]"),
        ("decoder.layers.0.self_attn.o_proj.lora_magnitude_vector", (48,), "no low-rank term"),
        ("encoder.vision_tower.x.lora_A.weight", (3, 48), "adapts what is not adapted here"),
        ("decoder.embed_tokens.lora_embedding_A", (3, 97), "no low-rank term"),
    ],
)
def test_terms_that_fit_nothing(
    tmp_path: Path, name: str, shape: tuple[int, ...], said: str
) -> None:
    random_checkpoint(tmp_path, "s")
    name = f"base_model.model.model.{name}"
    terms = {name: torch.ones(shape)}
    if "lora_A" in name:
        terms[name.replace("lora_A", "lora_B")] = torch.ones(48, 3)
    (tmp_path / "adapter").mkdir()
    save_file(terms, tmp_path / "adapter" / "adapter_model.safetensors")
    config = LoraConfig(r=3, target_modules=["o_proj"]).to_dict()
    config["target_modules"] = ["o_proj"]
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=said):
        load_adapter(load_model(tmp_path, dtype="float32"), tmp_path / "adapter")
