"""Numbers of a run: batches, the learning rate, optimizers, and settings that make no sense."""

import math
from itertools import pairwise
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_diffgemma import SettingError
from mlx_diffgemma.training.batches import Batches, in_order
from mlx_diffgemma.training.optimizers import make_optimizer, make_schedule
from mlx_diffgemma.training.settings import Settings


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 60), st.integers(0, 9))
def test_every_example_once_an_epoch_among_its_likes(
    lengths: list[int], size: int, epoch: int
) -> None:
    batches = Batches(lengths, size, seed=3)
    packed = [batches.at(epoch * batches.count + i + 1) for i in range(batches.count)]
    assert sorted(i for batch in packed for i in batch) == list(range(len(lengths)))
    assert sum(len(batch) < size for batch in packed) <= 1
    ends = sorted((min(lengths[i] for i in b), max(lengths[i] for i in b)) for b in packed)
    assert all(one[1] <= other[0] for one, other in pairwise(ends))
    measured = in_order(lengths, size, 2)
    assert sorted(i for b in measured for i in b) == list(range(min(len(lengths), 2 * size)))


def test_epochs_differ_and_seeds_do() -> None:
    orders = {
        str([Batches([7] * 30, 4, seed).at(first + i) for i in range(8)])
        for seed in (0, 1)
        for first in (1, 9)
    }
    assert len(orders) == 4


def test_the_learning_rate_rises_and_falls_to_a_tenth() -> None:
    """mlx-lm's own warm-up begins at 0: the first update would do nothing."""
    schedule = make_schedule(Settings(learning_rate=1.0, iters=100))
    rates = [schedule(mx.array(i)).item() for i in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.1, abs=1e-3)
    assert make_schedule(Settings(learning_rate=0.0, iters=1))(mx.array(0)).item() == 0
    own = {"name": "cosine_decay", "arguments": [1e-5, 1000, 1e-7], "warmup": 100}
    theirs = make_schedule(Settings(lr_schedule={**own, "warmup_init": 1e-7}))
    assert theirs(mx.array(0)).item() == pytest.approx(1e-7)


def test_every_optimizer_follows_the_learning_rate() -> None:
    """Adafactor's own default ignores it."""
    for name in ("adam", "adamw", "muon", "sgd", "adafactor"):
        moved = []
        for rate in (1.0, 0.5):
            settings = Settings(optimizer=name, learning_rate=rate)  # type: ignore[arg-type]
            optimizer = make_optimizer(settings)
            weights = {"a": mx.zeros((4, 4))}
            after = optimizer.apply_gradients({"a": mx.ones((4, 4))}, weights)
            moved.append(mx.abs(after["a"]).max().item())
        assert moved[0] == pytest.approx(2 * moved[1], rel=1e-3), name


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"iters": 0}, "iters must be at least 1|iters must be from 1"),
        ({"seed": 1 << 64}, "seed must be from 0"),
        ({"iters": 3, "grad_accumulation_steps": 4}, "the weights would never change"),
        ({"batch_size": True}, "batch_size must be a whole number"),
        ({"learning_rate": math.nan}, "learning_rate must be a number from 0 on"),
        ({"learning_rate": "1e-5"}, "learning_rate must be a number from 0 on"),
        ({"learning_rate": -1.0}, "learning_rate must be a number from 0 on"),
        ({"optimizer": "lion"}, "optimizer is one of adam, adamw"),
        ({"lr_schedule": {"name": "join_schedules", "arguments": [1, 2]}}, "lr_schedule has a"),
        ({"lr_schedule": {"name": "cosine_decay", "arguments": 3}}, "a list of two or three"),
        ({"lr_schedule": {"name": "cosine_decay", "arguments": [1, "a"]}}, "'a' is no number"),
        ({"lr_schedule": {"name": "cosine_decay", "arguments": [1, 0]}}, "lr_schedule: decay_st"),
        ({"lr_schedule": {"name": "linear_schedule", "arguments": [1, 2]}}, "lr_schedule: .*steps"),
        ({"optimizer_config": {"adamw": {"speed": 3}}}, "adamw has no 'speed'; it has betas"),
        ({"optimizer_config": {"lion": {}}}, "there is no optimizer 'lion'"),
        ({"optimizer_config": {"adamw": {"eps": [[1]]}}}, "optimizer_config: adamw"),
        ({"optimizer_config": []}, "optimizer_config must be names"),
    ],
)
def test_settings_that_make_no_sense(given: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        make_optimizer(Settings(**given))
