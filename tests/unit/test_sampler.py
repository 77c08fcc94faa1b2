"""One rule, one case worked out by hand."""

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_diffgemma import ConfidenceThreshold, EntropyBound, GenerationConfig, SeededDraws
from mlx_diffgemma.arguments import SettingError
from mlx_diffgemma.diffusion import sampler as rules
from mlx_diffgemma.diffusion.draws import sub_block


def test_temperature_runs_from_t_max_to_one_step_above_t_min() -> None:
    heats = [rules.temperature(remaining, 4, 0.4, 0.8) for remaining in (4, 3, 2, 1)]
    assert heats == pytest.approx([0.8, 0.7, 0.6, 0.5])


def test_entropy_bound_counts_what_comes_before() -> None:
    # Sorted: 0.01, 0.04, 0.06, 0.2; sums before each: 0, 0.01, 0.05, 0.11. Only the last fails 0.1.
    accepted = rules.accept_by_entropy(mx.array([[0.2, 0.01, 0.06, 0.04]]), 0.1)
    assert accepted[0].tolist() == [False, True, True, True]
    # The most certain position passes however uncertain it is.
    assert rules.accept_by_entropy(mx.array([[5.0, 4.0]]), 0.1)[0].tolist() == [False, True]


def test_confidence_accepts_what_is_fixed_and_the_likely_or_else_the_best() -> None:
    confidence = mx.array([[0.95, 0.5, 0.99, 0.2]])
    fixed = mx.array([[False, False, True, False]])
    accepted = rules.accept_by_confidence(confidence, 0.9, fixed)
    assert accepted[0].tolist() == [True, False, True, False]
    accepted = rules.accept_by_confidence(confidence, 0.97, fixed)
    assert accepted[0].tolist() == [True, False, True, False]
    assert rules.accept_by_confidence(confidence, 0.97, None)[0].tolist() == [False] * 2 + [
        True,
        False,
    ]


def test_renoise_keeps_only_what_is_accepted() -> None:
    mask, tokens, noise = mx.array([[True, False]]), mx.array([[7, 8]]), mx.array([[1, 2]])
    assert rules.renoise(mask, tokens, noise)[0].tolist() == [7, 2]


def test_stable_means_equal_to_each_of_the_last_canvases() -> None:
    a, b = mx.array([[1, 2, 3]]), mx.array([[1, 2, 4]])
    assert rules.is_stable(a, [], 0).item()
    assert not rules.is_stable(a, [], 1).item()  # nothing to compare with yet
    assert rules.is_stable(a, [b, a], 1).item()
    assert not rules.is_stable(a, [b, a], 2).item()
    assert rules.is_stable(a, [b, a, a], 2).item()


def test_confident_does_not_count_pinned_positions() -> None:
    entropies = mx.array([[0.0, 0.0, 0.0, 0.012]])
    assert rules.is_confident(entropies, 0.005, None).item()  # mean of four: 0.003
    pinned = mx.array([[True, True, True, False]])
    assert not rules.is_confident(entropies, 0.005, pinned).item()


@pytest.mark.parametrize("block", [1, 2, 5])
def test_two_stage_draws_follow_the_weights_whatever_the_blocks(block: int) -> None:
    """Sub-blocks of four ids, the last of them cut short; ids beyond it are never drawn."""
    p = np.array([0.1, 0.0, 0.2, 0.05, 0.15, 0.1, 0.05, 0.05, 0.2, 0.1])
    count, width = 20_000, sub_block(len(p))
    assert width == 4
    drawn = []
    for whole in (True, False):
        categorical = SeededDraws(0, len(p)).categorical((1, count))
        step = len(p) if whole else block * width
        for first in range(0, len(p), step):
            part = mx.array(p[first : first + step], dtype=mx.float32)
            # Blocks are relative to peaks of their own.
            weights = mx.broadcast_to(part * math.exp(first), (1, count, part.size))
            total = categorical.add(weights, mx.full((1, count, 1), -float(first)), first)
            assert total[0, 0].item() == pytest.approx(part.sum().item() * math.exp(first))
        drawn.append(np.array(categorical.tokens()[0]))
    assert (drawn[0] == drawn[1]).mean() > 0.999  # but for rounding
    shares = np.bincount(drawn[1], minlength=len(p)) / count
    assert np.abs(shares - p).max() < 0.012  # four standard errors
    assert shares[1] == 0


@settings(deadline=None)  # the first call compiles
# A vocabulary is a constant of the kernel: each other one is built anew.
@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 3, 64, 1000]))
def test_seeded_draws_repeat_and_stay_in_the_vocabulary(seed: int, vocab: int) -> None:
    first, again = SeededDraws(seed, vocab), SeededDraws(seed, vocab)
    tokens = [first.tokens((1, 50)).tolist(), first.tokens((1, 50)).tolist()]
    assert tokens == [again.tokens((1, 50)).tolist(), again.tokens((1, 50)).tolist()]
    assert tokens[0] != tokens[1]  # a sequence, not one draw over and over
    assert all(0 <= t < vocab for row in tokens for t in row[0])


def test_generation_config_reads_the_checkpoint_and_yields_to_flags() -> None:
    shipped = {
        "confidence_threshold": 0.01,
        "eos_token_id": [1, 106, 50],
        "max_denoising_steps": 30,
        "max_new_tokens": 512,
        "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.2},
        "stability_threshold": 2,
        "t_max": 0.9,
        "t_min": 0.3,
    }
    config = GenerationConfig.from_dict(shipped)
    assert config == GenerationConfig(512, 30, 0.3, 0.9, 2, 0.01, EntropyBound(0.2), (1, 106, 50))
    assert config.override() == config
    assert config.override(max_denoising_steps=4).max_denoising_steps == 4
    assert config.override(sampler=ConfidenceThreshold()).sampler == ConfidenceThreshold(0.9)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"max_denoising_steps": 0}, "steps"),
        ({"t_min": 0.9, "t_max": 0.8}, "temperatures"),
        ({"sampler_config": {"_cls_name": "OtherConfig"}}, "OtherConfig"),
        ({"sampler_config": {"entropy_bound": -1.0}}, "entropy bound"),
        ({"max_new_tokens": -4}, "max tokens"),
    ],
)
def test_generation_config_refuses(values: dict[str, object], named: str) -> None:
    with pytest.raises(SettingError, match=named):
        GenerationConfig.from_dict(values)
