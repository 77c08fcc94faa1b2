"""Ours = the reference's, step by step, with the reference's own random draws."""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from paths import SUDOKU
from reference import STEPS, Replay, random_checkpoint, record
from replaying import assert_same, steps_of
from slow import soft_embedding
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import (
    DiffusionGemmaForBlockDiffusion,
)

from mlx_diffgemma.checkpoint.load import load_model
from mlx_diffgemma.diffusion.prompt_cache import prefill
from mlx_diffgemma.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Case:
    """A random checkpoint, a prompt length and how to run them.

    The name says what fails the case when it is wrong: each was seen to, by breaking that.
    """

    name: str
    pattern: str
    prompt: int
    canvases: int = 1
    chunk: int = 10_000
    shipped_dialect: bool = True
    seed: int = 0  # chosen where the stop rule must fire before the last step
    stops: bool = False
    absent: tuple[str, ...] = ()
    text: dict[str, Any] = field(default_factory=dict)
    sampler: dict[str, Any] = field(default_factory=dict)


def bound(entropy: float) -> dict[str, Any]:
    """The entropy-bound sampler's settings."""
    return {"sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": entropy}}


def window(tokens: int) -> dict[str, Any]:
    """A short sliding window."""
    return {"sliding_window": tokens}


# Random weights are never sure of themselves: let the rule fire on a cold, quickly settled canvas.
STOPS = {"confidence_threshold": 1.0, "t_min": 0.05, "t_max": 0.1, **bound(50.0)}
CASES = [
    Case("attention scale of full layers", "ff", 9),
    Case("value norm and self-conditioning", "sf", 20),
    Case("encoder scalars, re-saved dialect", "ssf", 20, shipped_dialect=False),
    Case("causal", "sssf", 30),
    Case("causal in a window", "sssf", 30, text=window(12)),
    Case("window: prompt one shorter", "ssf", 15, text=window(16)),
    Case("window: prompt as long", "ssf", 16, text=window(16)),
    Case("window: prompt one longer", "ssf", 17, text=window(16)),
    Case("window: prompt of more than three", "ssfsf", 75, text=window(20)),
    Case("window of two tokens", "ssf", 12, text=window(2)),
    Case("window longer than a prompt of one token", "sf", 1, text=window(16)),
    Case("chunks smaller than the window", "ssf", 75, chunk=7, text=window(20)),
    Case("chunks larger than the window", "sssf", 75, chunk=33, text=window(8)),
    Case("chunks of one token", "ssf", 20, chunk=1, text=window(6)),
    Case("key-value heads, two in full layers", "sfsf", 33, text={
        "num_key_value_heads": 4, "num_global_key_value_heads": 2}),
    Case("key-value heads, one everywhere", "ssf", 33, text={"num_key_value_heads": 1}),
    Case("absent keys of config.json", "sssssf", 40, text=window(24), absent=(
        "rope_parameters", "rms_norm_eps", "final_logit_softcapping", "layer_types")),
    Case("last layer full, whatever layer_types says", "sss", 20, text=window(8)),
    Case("canvas offset, three canvases past the window", "ssf", 21, canvases=3, text=window(32)),
    Case("three canvases, chunks, re-saved dialect", "sfsf", 50, canvases=3, chunk=5,
         shipped_dialect=False, text=window(9)),
    Case("temperature", "ssf", 21, sampler={"t_min": 0.2, "t_max": 3.0, **bound(1e9)}),
    Case("entropy bound", "ssf", 21, sampler=bound(6.0)),
    Case("stop: stability", "ssf", 21, canvases=2, seed=12, stops=True, sampler=STOPS),
    Case("stop: stability of the best canvas, not the drawn one", "sf", 21, seed=18, stops=True,
         sampler={**STOPS, "t_min": 0.1, "t_max": 0.3}),
    Case("stop: stability of three", "sf", 21, seed=8, stops=True,
         sampler={**STOPS, "stability_threshold": 3}),
    Case("stop: confidence", "sf", 21, seed=9, stops=True,
         sampler={**STOPS, "confidence_threshold": 0.005}),
    Case("stop: confidence alone", "sf", 21, stops=True,
         sampler={**STOPS, "confidence_threshold": 0.05, "stability_threshold": 0}),
    Case("experts: top two, router scale, scale of each", "ssf", 21),
    Case("experts: all", "ssf", 21, text={"top_k_experts": 6}),
    Case("eps", "sfsf", 21, text={"rms_norm_eps": 3e-2}),
    Case("soft cap", "sf", 21, text={"final_logit_softcapping": 5.0}),
    Case("rope theta and share of a head", "ssf", 40, text={"rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        "full_attention": {
            "rope_type": "proportional", "rope_theta": 2e4, "partial_rotary_factor": 0.5},
    }}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_random_checkpoint(case: Case, tmp_path: Path) -> None:
    """Prompts used to be one token repeated, so that causality and windows hardly mattered."""
    reference = random_checkpoint(
        tmp_path,
        case.pattern,
        shipped_dialect=case.shipped_dialect,
        seed=case.seed,
        absent=case.absent,
        text=case.text,
        sampler={**case.sampler, "max_new_tokens": 24 * case.canvases},
    )
    model = load_model(tmp_path, dtype="float32")
    theirs = reference.config.text_config  # a wrong default of eps is too small to be seen below
    assert model.config.rms_norm_eps == theirs.rms_norm_eps
    assert model.config.final_logit_softcapping == theirs.final_logit_softcapping
    rng = random.Random(case.name)
    prompt = [rng.randrange(97) for _ in range(case.prompt)]
    run = record(reference, prompt, seed=1)

    # Every pass of the first canvas on its own: from the reference's canvas and last logits.
    cache = model.make_cache()
    prefill(model, prompt, cache, case.chunk)
    canvas, self_conditioning = run.token_draws[0], None
    for i in range(run.ends[0]):
        logits = np.array(model(mx.array(canvas.astype(np.int32)), cache, self_conditioning))
        error = np.abs(logits - run.logits[i]).max() / np.abs(run.logits[i]).max()
        assert error <= 1e-4, f"pass {i}: {error}"
        self_conditioning = soft_embedding(model, mx.array(run.tempered[i]))
        canvas = run.canvas[i]

    # And the whole loop, left to itself with the reference's draws.
    snapshots, tokens = steps_of(model, prompt, Replay(run), case.chunk)
    assert_same(snapshots, tokens, run)
    assert tokens == run.sequence
    assert len(run.ends) == case.canvases
    assert (len(snapshots) < STEPS * case.canvases) == case.stops


def test_trained_checkpoint() -> None:
    """The stop rule, the end token and confident acceptance, on a model that knows its task."""
    reference = DiffusionGemmaForBlockDiffusion.from_pretrained(SUDOKU, dtype="float32").eval()
    model = load_model(SUDOKU, dtype="float32")
    tokenizer = Tokenizer.from_directory(SUDOKU)
    passes = set()
    for line in (SUDOKU / "puzzles.txt").read_text().splitlines()[:8]:
        puzzle = line.split()[0]
        rows = "\n".join(puzzle[i : i + 6] for i in range(0, 36, 6))
        prompt = tokenizer.encode(
            tokenizer.apply_chat_template([{"role": "user", "content": rows}])
        )
        run = record(reference, prompt, seed=3)
        snapshots, tokens = steps_of(model, prompt, Replay(run), 10_000)
        assert_same(snapshots, tokens, run)
        assert len(tokens) / len(snapshots) == pytest.approx(run.tokens_per_forward)
        passes.add(len(snapshots))
    assert len(passes) > 1  # puzzles of several difficulties, not one lucky length


def test_embedding_scale_is_rounded_first() -> None:
    """In half precision the factor sqrt(hidden) is rounded before the product, as in training."""
    reference = DiffusionGemmaForBlockDiffusion.from_pretrained(SUDOKU, dtype="bfloat16")
    model = load_model(SUDOKU, dtype="bfloat16")
    tokens = list(range(model.config.vocab_size))
    theirs = reference.model.encoder.get_input_embeddings()(torch.tensor([tokens]))
    ours = model.embed(mx.array([tokens])).astype(mx.float32)
    assert np.array_equal(np.array(ours), theirs.detach().float().numpy())
