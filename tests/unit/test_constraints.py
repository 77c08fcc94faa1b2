"""Pins never move and allowed sets are never broken: any model, any pattern, every step."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_model import untrained
from slow import best_canvas
from unit.test_automaton import PAD, PATTERNS, VOCAB, padded

from mlx_diffgemma import ConfidenceThreshold, DiffusionGemma, EntropyBound
from mlx_diffgemma.diffusion.automaton import Pattern, PatternError, compile_pattern
from mlx_diffgemma.diffusion.decoding import drive
from mlx_diffgemma.diffusion.denoise import Start, denoise
from mlx_diffgemma.diffusion.draws import SeededDraws
from mlx_diffgemma.diffusion.plans import Plans
from mlx_diffgemma.diffusion.prompt_cache import prefill
from mlx_diffgemma.model.settings import Sampler

MODELS = [untrained(VOCAB, 8, seed=seed) for seed in range(5)]
MODEL = MODELS[0]
LENGTH = 8


@settings(max_examples=120, deadline=None)
@given(
    st.lists(PATTERNS, min_size=1, max_size=3),
    st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH),
    st.sampled_from([EntropyBound(0.1), ConfidenceThreshold(0.3)]),
    st.sampled_from(MODELS),
    st.integers(0, 2**31),
)
def test_pins_and_patterns_hold_at_every_step(
    patterns: list[Pattern],
    mask: list[bool],
    sampler: Sampler,
    model: DiffusionGemma,
    seed: int,
) -> None:
    machines = [compile_pattern(padded(pattern)) for pattern in patterns]
    try:
        plans = [machine.plan(LENGTH, LENGTH) for machine in machines]
    except PatternError:
        assume(False)
    constraint = Plans(plans, VOCAB)
    draws = SeededDraws(seed, VOCAB)
    # Pin, at random places, tokens of one canvas that is allowed.
    shape = (len(plans), LENGTH)
    allowed = best_canvas(constraint, draws.gumbel((*shape, VOCAB)))
    pinned = mx.broadcast_to(mx.array([mask]), shape)
    start = Start(
        mx.where(pinned, allowed, draws.tokens(shape)), pinned=pinned, constraint=constraint
    )
    cache = model.make_cache()
    prefill(model, [2, 3], cache)
    config = model.generation.override(max_denoising_steps=5, sampler=sampler)
    held = np.array(pinned)
    for state in drive(model, denoise(model, cache, config, draws, start)):
        canvas, argmax = np.array(state.canvas), np.array(state.argmax)
        assert (canvas[held] == np.array(allowed)[held]).all()
        assert (argmax[held] == np.array(allowed)[held]).all()
        assert (np.array(state.entropy)[held] == 0).all()
        open_to = np.array(constraint.allowed(0, VOCAB, mx.arange(LENGTH)))
        for row, machine in enumerate(machines):
            assert machine.accepts(argmax[row].tolist())
            for i in np.flatnonzero(np.array(state.accepted)[row]):
                assert open_to[row, i, canvas[row, i]]


def test_rows_that_have_converged_no_longer_change() -> None:
    """A finished canvas of a batch used to be rewritten while the others went on."""
    draws = SeededDraws(4, VOCAB)
    forced = mx.zeros((2, LENGTH), dtype=mx.int32) + PAD
    pinned = mx.array([[True] * LENGTH, [False] * LENGTH])
    start = Start(mx.where(pinned, forced, draws.tokens((2, LENGTH))), pinned=pinned)
    cache = MODEL.make_cache()
    prefill(MODEL, [2, 3], cache)
    config = MODEL.generation.override(max_denoising_steps=6)
    run = list(drive(MODEL, denoise(MODEL, cache, config, draws, start)))
    assert [s.converged[0].item() for s in run] == [False] + [True] * 5
    assert not run[-1].converged[1].item()
    assert len({str(s.canvas[0].tolist()) for s in run[1:]}) == 1
    assert len({str(s.canvas[1].tolist()) for s in run}) > 1


def test_a_batch_reads_a_context_of_one_row_like_each_canvas_alone() -> None:
    cache = MODEL.make_cache()
    prefill(MODEL, [2, 3, 4], cache)
    canvases = mx.random.randint(0, VOCAB, (3, LENGTH), key=mx.random.key(1))
    together = MODEL(canvases, cache)
    for i in range(3):
        alone = MODEL(canvases[i : i + 1], cache)
        assert together[i].flatten().tolist() == pytest.approx(
            alone.flatten().tolist(), rel=1e-4, abs=1e-4
        )
