"""Losses and an adapter's gradients = the reference's, for the same noise, blocks and adapter."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear
from paths import FIRST
from reference import random_checkpoint
from torch.nn.functional import cross_entropy
from transformers import DynamicCache
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import (
    DiffusionGemmaForBlockDiffusion,
)

from mlx_diffgemma import DiffusionGemma
from mlx_diffgemma.checkpoint.load import load_model
from mlx_diffgemma.convert import convert
from mlx_diffgemma.convert.recipes import RECIPES, uniform
from mlx_diffgemma.training.objective import Noised, Objective, Sample, losses, noised

RANK, SCALE = 3, 2.0
KEYS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
END = 1


class Adapted(torch.nn.Module):
    """A linear layer of the reference with a low-rank term; encoder and decoder share it."""

    def __init__(self, linear: torch.nn.Module, a: torch.Tensor, b: torch.Tensor):
        super().__init__()
        self.linear, self.a, self.b = linear, a, b

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + SCALE * (x @ self.a @ self.b)


def put_adapter(model: DiffusionGemma) -> dict[str, np.ndarray]:
    """Freeze a model and put a random adapter in place; answers its numbers by name."""
    model.freeze()
    rng = np.random.default_rng(5)
    made = {}
    for i, block in enumerate(model.model.decoder.layers):
        for key in KEYS:
            part, name = key.split(".")
            if name not in block[part]:
                continue  # a full layer has no v_proj
            adapted = LoRALinear.from_base(block[part][name], RANK, scale=SCALE)
            for leaf in ("lora_a", "lora_b"):
                numbers = rng.normal(0, 0.1, adapted[leaf].shape).astype(np.float32)
                adapted[leaf] = mx.array(numbers)
                made[f"model.decoder.layers.{i}.{key}.{leaf}"] = numbers
            block[part][name] = adapted
    return made


def adapt_reference(
    reference: DiffusionGemmaForBlockDiffusion, numbers: dict[str, np.ndarray]
) -> dict[str, torch.Tensor]:
    """Put the same adapter into the reference's encoder and its decoder."""
    reference.requires_grad_(False)
    made = {name: torch.tensor(array, requires_grad=True) for name, array in numbers.items()}
    for place in (name.removesuffix(".lora_a") for name in made if name.endswith(".lora_a")):
        *_, layer, part, name = place.split(".")
        for stack in (reference.model.encoder.language_model, reference.model.decoder):
            owner = getattr(stack.layers[int(layer)], part)
            term = (made[f"{place}.{leaf}"] for leaf in ("lora_a", "lora_b"))
            setattr(owner, name, Adapted(getattr(owner, name), *term))
    return made


def capped(reference: DiffusionGemmaForBlockDiffusion, hidden: torch.Tensor) -> torch.Tensor:
    cap = reference.final_logit_softcapping
    return torch.tanh(reference.lm_head(hidden).float() / cap) * cap


def reference_losses(
    reference: DiffusionGemmaForBlockDiffusion, batch: Noised
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both losses, a row at a time: its cache holds nothing behind the canvas's prefix."""
    denoising, reading, pairs = [], [], sum(batch.lengths) - len(batch.lengths)
    for row, prefix in enumerate(batch.prefixes):
        ids = torch.tensor(np.array(batch.tokens)[row : row + 1, : batch.lengths[row]]).long()
        canvas, target = (
            torch.tensor(np.array(each)[row : row + 1]).long()
            for each in (batch.canvas, batch.target)
        )
        cache = DynamicCache(config=reference.config.text_config)
        reference.model.encoder(ids[:, :prefix], past_key_values=cache)
        asked = {"decoder_input_ids": canvas, "past_key_values": cache}
        if batch.conditioned[row]:
            with torch.no_grad():
                hidden = reference.model.decoder(**asked).last_hidden_state
                asked["self_conditioning_logits"] = capped(reference, hidden)
        logits = capped(reference, reference.model.decoder(**asked).last_hidden_state)
        count = batch.supervised[row]
        each = cross_entropy(logits[0, :count], target[0, :count], reduction="sum")
        denoising.append(each / sum(batch.supervised))
        logits = capped(reference, reference.model.encoder(ids).last_hidden_state)
        each = cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
        reading.append(each / pairs)
    return sum(denoising), sum(reading)  # type: ignore[return-value]


# Layers, window, canvas, and lengths of prompts and answers in a batch.
@pytest.mark.parametrize(
    ("pattern", "window", "canvas", "lengths"),
    [
        ("sf", 64, 24, [(20, 30)]),
        ("ssf", 7, 8, [(30, 20), (5, 3), (17, 9)]),
        ("fs", 10, 12, [(9, 40), (11, 12)]),
        ("sff", 20, 24, [(60, 25), (1, 70), (19, 1), (20, 24)]),
    ],
)
def test_losses_and_gradients(
    tmp_path: Path, pattern: str, window: int, canvas: int, lengths: list[tuple[int, int]]
) -> None:
    reference = random_checkpoint(tmp_path, pattern, canvas=canvas, text={"sliding_window": window})
    model = load_model(tmp_path, dtype="float32")
    theirs = adapt_reference(reference, put_adapter(model))
    rng = np.random.default_rng(3)
    samples = [
        Sample(*(tuple(map(int, rng.integers(97, size=count))) for count in pair), i == 1)
        for i, pair in enumerate(lengths)
    ]
    objective = Objective(encoder_weight=0.7)
    conditioned = set()
    for _ in range(3):
        batch = noised(samples, rng, model.config, END, objective)
        conditioned |= set(batch.conditioned)
        denoising, reading = reference_losses(reference, batch)
        wanted = torch.autograd.grad(denoising + 0.7 * reading, list(theirs.values()))

        def total(model: DiffusionGemma, batch: Noised = batch) -> mx.array:
            return losses(model, batch, objective, checkpointed=True).total

        ours = losses(model, batch, objective)
        assert abs(ours.denoising.item() - denoising.item()) <= 1e-4
        assert abs(ours.reading.item() - reading.item()) <= 1e-4
        value, found = nn.value_and_grad(model, total)(model)
        assert value.item() == pytest.approx(ours.total.item(), abs=1e-6)
        gradients = dict(tree_flatten(found))
        assert gradients.keys() == theirs.keys()
        for name, gradient in zip(theirs, wanted, strict=True):
            largest = gradient.abs().max().item()
            assert largest > 0
            difference = np.abs(np.array(gradients[name]) - gradient.numpy()).max()
            assert difference <= 1e-3 * largest, name
    assert conditioned == {False, True}


@pytest.mark.parametrize("recipe", ["8bit", "4bit", "mxfp4"])
def test_gradients_of_a_packed_model_are_its_unpacked_ones(tmp_path: Path, recipe: str) -> None:
    """Through packed matrices, experts and the embedding table, of a trained model."""
    chosen = RECIPES[recipe] if recipe != "mxfp4" else uniform(4, 32, "mxfp4")
    packed = convert(FIRST / "tiny", tmp_path / "packed", recipe=chosen).directory
    plain = convert(packed, tmp_path / "plain", dequantize=True, dtype="float32").directory
    samples = [Sample((5, 9, 30), tuple(range(40, 50))), Sample((7,), (8, 9, 3), True)]
    found = []
    for directory in (packed, plain):
        model = load_model(directory, dtype="float32")
        put_adapter(model)
        rng = np.random.default_rng(1)
        batch = noised(samples, rng, model.config, END, Objective(self_conditioned=1.0))

        def total(model: DiffusionGemma, batch: Noised = batch) -> mx.array:
            return losses(model, batch, Objective(), checkpointed=True).total

        value, slopes = nn.value_and_grad(model, total)(model)
        found.append({"loss": value, **dict(tree_flatten(slopes))})
    for name, wanted in found[1].items():
        difference = abs(found[0][name] - wanted).max().item()
        assert difference <= 1e-3 * abs(wanted).max().item(), name
