"""Distillation: what the teacher answers, and the canvases that the student comes to."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from paths import SUDOKU

from mlx_diffgemma import DiffusionGemma, PromptCache, Tokenizer, load
from mlx_diffgemma.diffusion.decoding import drive
from mlx_diffgemma.diffusion.denoise import denoise
from mlx_diffgemma.diffusion.draws import SeededDraws
from mlx_diffgemma.tasks.canvases import Committed, generate_tokens
from mlx_diffgemma.training.distill import SEEDS, along_schedule, taught
from mlx_diffgemma.training.objective import Objective, Sample, losses, noised

END = 1
STEPS = 4


@pytest.fixture(scope="module")
def loaded() -> tuple[DiffusionGemma, Tokenizer]:
    return load(SUDOKU)


@pytest.fixture(scope="module")
def prompts(loaded: tuple[DiffusionGemma, Tokenizer]) -> list[list[int]]:
    _, tokenizer = loaded
    found = []
    for line in (SUDOKU / "puzzles.txt").read_text().splitlines()[:3]:
        grid = "\n".join(line[i : i + 6] for i in range(0, 36, 6))
        asked = tokenizer.apply_chat_template([{"role": "user", "content": grid}])
        found.append(tokenizer.encode(asked))
    return found


def test_the_teacher_answers_as_it_would_alone(
    loaded: tuple[DiffusionGemma, Tokenizer], prompts: list[list[int]]
) -> None:
    """Two answers a prompt, side by side; what has not converged is left out."""
    model, _ = loaded
    found = list(taught(model, prompts, answers=2, seed=5, side_by_side=4))
    assert sorted(i for i, _ in found) == [0, 0, 1, 1, 2, 2]
    for i, prompt in enumerate(prompts):
        alone = []
        for seed in (5 + 2 * i, 6 + 2 * i):
            draws = SeededDraws(seed, model.config.vocab_size)
            told = generate_tokens(model, prompt, model.generation, draws)
            tokens = [
                token for each in told if isinstance(each, Committed) for token in each.tokens
            ]
            alone.append(Sample(tuple(prompt), tuple(tokens)))
        assert sorted(s.response for j, s in found if j == i) == sorted(s.response for s in alone)
        assert all(s.prompt == tuple(prompt) and not s.truncated for j, s in found if j == i)
    hasty = model.generation.override(max_denoising_steps=1)
    assert list(taught(model, prompts, config=hasty)) == []


def test_the_student_meets_what_the_sampler_would_write(
    loaded: tuple[DiffusionGemma, Tokenizer], prompts: list[list[int]]
) -> None:
    """Noise at first, then after each step what it has accepted, conditioned on what it expects.

    The puzzle is cut short, so that the model is unsure and its temperature counts.
    """
    model, _ = loaded
    prompt = prompts[0][:20]
    sample = Sample(tuple(prompt), (5, 6, 7))
    config = replace(
        model.generation, max_denoising_steps=STEPS, confidence_threshold=0.0, stability_threshold=9
    )
    met = set()
    for seed in range(16):
        rng = np.random.default_rng(seed)
        batch = noised([sample], rng, model.config, END, Objective())
        rng = np.random.default_rng(seed)
        found = along_schedule(model, batch, np.random.default_rng(seed), STEPS)
        (taken,) = rng.integers(STEPS, size=1).tolist()
        draws = SeededDraws(int(rng.integers(SEEDS)), model.config.vocab_size)
        met.add(taken)
        assert found.conditioned == (taken > 0,)
        assert (found.self_conditioning is not None) == (taken > 0)
        assert mx.array_equal(found.target, batch.target)
        if not taken:
            wanted = draws.tokens((1, model.config.canvas_length))
        else:
            cache = PromptCache(model)
            cache.read(prompt)
            states = drive(model, denoise(model, cache.cache, config, draws))
            wanted = next(state.canvas for state in states if state.step == taken)
        assert mx.array_equal(found.canvas, wanted)
    assert met == set(range(STEPS))


def test_a_batch_of_canvases_at_different_steps(
    loaded: tuple[DiffusionGemma, Tokenizer], prompts: list[list[int]]
) -> None:
    """Each stands behind its own prompt; gradients go through, and the same numbers are drawn."""
    model, _ = loaded
    samples = [Sample(tuple(prompt[: len(prompt) - i]), (9, 8)) for i, prompt in enumerate(prompts)]
    objective = Objective(encoder_weight=0.0)
    once, again = (
        along_schedule(
            model,
            noised(samples * 3, np.random.default_rng(1), model.config, END, objective),
            np.random.default_rng(2),
            STEPS,
        )
        for _ in range(2)
    )
    assert len(set(once.levels)) > 2
    assert mx.array_equal(once.canvas, again.canvas)
    assert once.self_conditioning is not None
    given = abs(once.self_conditioning).max(axis=(1, 2)) > 0
    assert tuple(given.tolist()) == once.conditioned
    zeros = replace(once, self_conditioning=mx.zeros_like(once.self_conditioning))
    both = [losses(model, each, objective).denoising.item() for each in (once, zeros)]
    assert both[0] != both[1]
