"""Ours = the reference's, step by step, with the reference's own random draws."""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from reference import Replay, Run, random_checkpoint, record
from slow import soft_embedding
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import (
    DiffusionGemmaForBlockDiffusion,
)

from mlx_diffgemma.context import prefill
from mlx_diffgemma.denoise import Snapshot
from mlx_diffgemma.generation import Committed, generate_tokens
from mlx_diffgemma.loading import load_model
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.sampler import Draws, temperature
from mlx_diffgemma.tokenizer import Tokenizer

SUDOKU = Path(__file__).parent / "data" / "sudoku6"


@dataclass(frozen=True)
class Case:
    """A random checkpoint, a prompt length and how to run them."""

    name: str
    pattern: str
    prompt: int
    canvases: int = 1
    chunk: int = 10_000
    shipped_dialect: bool = True
    seed: int = 0  # chosen where the stop rule must fire before the last step
    text: dict[str, Any] = field(default_factory=dict)
    sampler: dict[str, Any] = field(default_factory=dict)


# Random weights are never sure of themselves: let the rule fire on a cold, quickly settled canvas.
STOPS = {
    "confidence_threshold": 1.0,
    "t_min": 0.05,
    "t_max": 0.1,
    "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 50.0},
}
CASES = [
    Case("one full layer", "f", 9),
    Case("two layers", "sf", 20),
    Case("re-saved dialect", "ssf", 20, shipped_dialect=False),
    Case("window smaller than the prompt", "ssf", 30, text={"sliding_window": 16}),
    Case("prompt of more than three windows", "ssfsf", 75, text={"sliding_window": 20}),
    Case("prompt ends at the window", "sf", 16, text={"sliding_window": 16}),
    Case("window of two tokens", "sf", 12, text={"sliding_window": 2}),
    Case("chunked prefill", "ssf", 75, chunk=7, text={"sliding_window": 20}),
    Case("chunks larger than the window", "sssf", 75, chunk=33, text={"sliding_window": 8}),
    Case("two key-value heads in full layers", "sfsf", 33, text={"num_global_key_value_heads": 2}),
    Case("one key-value head everywhere", "ssf", 33, text={"num_key_value_heads": 1}),
    Case("seven layers", "ssssssf", 40, text={"sliding_window": 24}),
    Case("three canvases", "ssf", 21, canvases=3, text={"sliding_window": 32}),
    Case(
        "three canvases, chunked, re-saved dialect",
        "sfsf",
        50,
        canvases=3,
        chunk=5,
        shipped_dialect=False,
        text={"sliding_window": 9},
    ),
    Case("stop rule fires", "ssf", 21, canvases=2, seed=13, sampler=STOPS),
    Case("stop after three", "sf", 21, seed=5, sampler={**STOPS, "stability_threshold": 3}),
    Case("stop without stability", "sf", 21, sampler={**STOPS, "stability_threshold": 0}),
    Case("loose entropy bound", "ssf", 21, sampler={
        "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 6.0}}),
    Case("all experts", "ssf", 21, text={"top_k_experts": 6}),
    Case("rope factors", "ssf", 40, text={"rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        "full_attention": {
            "rope_type": "proportional", "rope_theta": 2e4, "partial_rotary_factor": 0.5},
    }}),
]  # fmt: skip


def steps_of(
    model: DiffusionGemma, prompt: list[int], draws: Draws, chunk: int
) -> tuple[list[Snapshot], list[int]]:
    """Every snapshot of a run and all committed tokens."""
    snapshots, tokens = [], []
    for item in generate_tokens(model, prompt, model.generation, draws, prefill_chunk=chunk):
        if isinstance(item, Snapshot):
            snapshots.append(item)
        elif isinstance(item, Committed):
            tokens += item.tokens
    return snapshots, tokens


def assert_same(snapshots: list[Snapshot], tokens: list[int], run: Run) -> None:
    """Same number of steps; every step's accepted mask, canvas and argmax; same result."""
    assert len(snapshots) == len(run.argmax)
    for i, snapshot in enumerate(snapshots):
        assert np.array_equal(np.array(snapshot.accepted), run.accepted[i]), f"accepted, pass {i}"
        assert np.array_equal(np.array(snapshot.canvas), run.canvas[i]), f"canvas, pass {i}"
        assert np.array_equal(np.array(snapshot.argmax), run.argmax[i]), f"argmax, pass {i}"
    assert tokens == run.sequence[: len(tokens)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_random_checkpoint(case: Case, tmp_path: Path) -> None:
    reference = random_checkpoint(
        tmp_path,
        case.pattern,
        shipped_dialect=case.shipped_dialect,
        seed=case.seed,
        text=case.text,
        sampler={**case.sampler, "max_new_tokens": 24 * case.canvases},
    )
    model = load_model(tmp_path, dtype="float32")
    prompt = [random.Random(case.name).randrange(97) for _ in range(case.prompt)]
    run = record(reference, prompt, seed=1)

    # Every pass of the first canvas on its own: from the reference's canvas and last logits.
    cache = model.make_cache()
    prefill(model, prompt, cache, case.chunk)
    canvas, belief = run.token_draws[0], None
    config = model.generation
    for i in range(min(12, len(run.logits))):
        logits = np.array(model(mx.array(canvas.astype(np.int32)), cache, belief))
        error = np.abs(logits - run.logits[i]).max() / np.abs(run.logits[i]).max()
        assert error <= 1e-4, f"pass {i}: {error}"
        heat = temperature(12 - i, 12, config.t_min, config.t_max)
        belief = soft_embedding(model, mx.array(run.logits[i]) / heat)
        canvas = run.canvas[i]
        if "stop" in case.name:
            break  # the run may leave this canvas at any pass

    # And the whole loop, left to itself with the reference's draws.
    snapshots, tokens = steps_of(model, prompt, Replay(run), case.chunk)
    assert_same(snapshots, tokens, run)
    assert tokens == run.sequence
    if "stop" in case.name:
        assert len(snapshots) < 12 * case.canvases
    else:
        assert len(snapshots) == 12 * case.canvases


def test_trained_checkpoint() -> None:
    """The stop rule, the end token and confident acceptance, on a model that knows its task."""
    reference = DiffusionGemmaForBlockDiffusion.from_pretrained(SUDOKU, dtype="float32").eval()
    model = load_model(SUDOKU, dtype="float32")
    tokenizer = Tokenizer.from_directory(SUDOKU)
    passes = set()
    for line in (SUDOKU / "puzzles.txt").read_text().splitlines()[:8]:
        puzzle = line.split()[0]
        rows = "\n".join(puzzle[i : i + 6] for i in range(0, 36, 6))
        prompt = tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": rows}]))
        run = record(reference, prompt, seed=3)
        snapshots, tokens = steps_of(model, prompt, Replay(run), 10_000)
        assert_same(snapshots, tokens, run)
        assert len(tokens) / len(snapshots) == pytest.approx(run.tokens_per_forward)
        passes.add(len(snapshots))
    assert len(passes) > 1  # puzzles of several difficulties, not one lucky length
