"""An adapter that PEFT has trained gives the logits of the reference that PEFT has wrapped."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from reference import random_checkpoint

from mlx_diffgemma.checkpoint.adapter import load_adapter
from mlx_diffgemma.checkpoint.load import load_model
from mlx_diffgemma.model.adapters import SidedLinear

BOTH = r".*(language_model|decoder)\.layers.*(self_attn|mlp)\.[a-z]+_proj"
ENCODER = r".*language_model\.layers.*\.[qkv]_proj"
DECODER = r".*decoder\.layers.*(\.o_proj|router\.proj)"


def trained(directory: Path, targets: str, **settings: Any) -> PeftModel:
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


def both_logits(
    directory: Path, wrapped: PeftModel, adapter: Path
) -> tuple[np.ndarray, np.ndarray, Any]:
    """Theirs and ours, of one canvas behind a prompt; and our model."""
    prompt, canvas = list(range(5, 80)), [7 * i % 97 for i in range(24)]
    with torch.no_grad():
        found = wrapped(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([canvas]))
    model = load_model(directory, dtype="float32")
    load_adapter(model, adapter)
    cache = model.make_cache()
    model.encode(mx.array([prompt]), cache)
    mx.eval([layer.state for layer in cache])
    return found.logits.numpy(), np.array(model(mx.array([canvas]), cache)), model


@pytest.mark.parametrize(
    ("targets", "settings"),
    [(BOTH, {}), (ENCODER, {"use_rslora": True}), (DECODER, {"lora_dropout": 0.5})],
)
def test_each_side_has_its_own_terms(
    tmp_path: Path, targets: str, settings: dict[str, Any]
) -> None:
    wrapped = trained(tmp_path, targets, **settings)
    wrapped.save_pretrained(tmp_path / "adapter")
    theirs, ours, model = both_logits(tmp_path, wrapped, tmp_path / "adapter")
    assert any(isinstance(module, SidedLinear) for module in model.modules())
    assert np.abs(theirs - ours).max() < 1e-3
    with wrapped.disable_adapter():
        plain, _, _ = both_logits(tmp_path, wrapped, tmp_path / "adapter")
    assert np.abs(theirs - plain).max() > 0.1


def test_terms_that_agree_become_one(tmp_path: Path) -> None:
    wrapped = trained(tmp_path, BOTH)
    with torch.no_grad():
        named = dict(wrapped.named_parameters())
        for name, parameter in named.items():
            if "lora_" in name and "language_model" in name:
                parameter.copy_(named[name.replace("encoder.language_model", "decoder")])
    wrapped.save_pretrained(tmp_path / "adapter")
    theirs, ours, model = both_logits(tmp_path, wrapped, tmp_path / "adapter")
    assert not any(isinstance(module, SidedLinear) for module in model.modules())
    assert np.abs(theirs - ours).max() < 1e-3
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["r"] == 3
