"""The loss in blocks of the vocabulary, what a step asks, and gradients of a checkpointed layer."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from held import active_memory
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.lora import LoRALinear
from random_model import untrained

from mlx_diffgemma import DiffusionGemma, PromptCache
from mlx_diffgemma.model.diffusion_gemma import Pass
from mlx_diffgemma.training import cross_entropy as in_blocks
from mlx_diffgemma.training.cross_entropy import cross_entropy, expected_embedding
from mlx_diffgemma.training.forward import decode, encode
from mlx_diffgemma.training.objective import Losses, Noised, Objective, Sample, losses, noised

WINDOWS = (None, 6, None)
SAMPLES = (
    Sample(tuple(range(3, 14)), tuple(range(20, 31))),
    Sample((2, 3), (4, 5, 6), truncated=True),
    Sample((), (7,)),
    Sample(tuple(range(40, 49)), tuple(range(50, 58))),
)


def adapted(dropout: float = 0.0, **options: Any) -> DiffusionGemma:
    """A frozen random model with a low-rank term that is not zero in two matrices of a block."""
    model: DiffusionGemma = untrained(97, 8, windows=WINDOWS, **options)
    model.merge()
    put_adapter(model, dropout)
    return model


def put_adapter(model: DiffusionGemma, dropout: float = 0.0) -> None:
    model.freeze()
    keys = iter(mx.random.split(mx.random.key(1), 99))
    for block in model.model.decoder.layers:
        for part, name in ((block.self_attn, "k_proj"), (block.mlp, "up_proj")):
            term = LoRALinear.from_base(part[name], 4, dropout, 2.0)
            for leaf in ("lora_a", "lora_b"):
                term[leaf] = mx.random.normal(term[leaf].shape, key=next(keys)) * 0.1
            part[name] = term


def step(model: DiffusionGemma, seed: int = 4, **options: Any) -> Noised:
    rng = np.random.default_rng(seed)
    return noised(SAMPLES, rng, model.config, 1, replace(Objective(), **options))


def gradients(model: DiffusionGemma, loss: Callable[[DiffusionGemma], mx.array]) -> dict[str, Any]:
    """By name; under "loss" the loss."""
    value, found = nn.value_and_grad(model, loss)(model)
    mx.eval(value, found)
    return {"loss": value, **dict(tree_flatten(found))}


def close(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> bool:
    """Whether they differ by at most this share of the largest number of each array, or of 1e-3."""
    assert one.keys() == other.keys()
    worst = max(
        (abs(one[name] - other[name]).max() / (abs(other[name]).max() + 1e-3)).item()
        for name in one
    )
    return worst <= tolerance


@pytest.mark.parametrize("kind", ["trained", "frozen", "affine", "mxfp4"])
@pytest.mark.parametrize("tokens", [1, 7, 97, 1000])
def test_loss_in_blocks_is_that_of_all_logits(
    kind: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where each position has a weight of its own, and no block divides the vocabulary."""
    model: DiffusionGemma = untrained(97, 8, width=64)
    embed = model.model.decoder.embed_tokens
    if kind in ("affine", "mxfp4"):
        model.model.decoder.embed_tokens = embed = nn.QuantizedEmbedding.from_embedding(
            embed, 32, 4, kind
        )
    elif kind == "frozen":
        embed.freeze()
    monkeypatch.setattr(in_blocks, "tokens_at_once", lambda model, rows: tokens)
    hidden = mx.random.normal((11, 64), key=mx.random.key(0))
    wanted = mx.random.randint(0, 97, (11,), key=mx.random.key(1))
    weights = mx.random.normal((11,), key=mx.random.key(2))

    def whole(model: DiffusionGemma, hidden: mx.array, wanted: mx.array) -> mx.array:
        logits = model.logits(hidden)
        own = mx.take_along_axis(logits, wanted[:, None], -1)[:, 0]
        return mx.logsumexp(logits, axis=-1) - own

    found = []
    for loss in (cross_entropy, whole):

        def total(parameters: Any, hidden: mx.array, loss: Any = loss) -> mx.array:
            model.update(parameters)
            return (loss(model, hidden, wanted) * weights).sum()

        value, slopes = mx.value_and_grad(total, argnums=(0, 1))(
            tree_unflatten(tree_flatten(model.trainable_parameters())), hidden
        )
        found.append({"loss": value, "hidden": slopes[1], **dict(tree_flatten(slopes[0]))})
    assert close(*found, 1e-5)
    assert ("model.decoder.embed_tokens.weight" in found[0]) == (kind == "trained")

    probabilities = mx.softmax(model.logits(hidden), axis=-1)
    expected = model.scaled(probabilities @ model.embedding(mx.arange(97)))
    assert mx.allclose(expected_embedding(model, hidden[None])[0], expected, atol=1e-4)


def test_logits_are_never_held_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them would be 65,536 x 256 numbers, and a derived gradient holds several copies."""
    model: DiffusionGemma = untrained(65536, 8)
    model.freeze()
    hidden = mx.random.normal((256, 32), key=mx.random.key(0))
    wanted = mx.random.randint(0, 65536, (256,), key=mx.random.key(1))
    mx.eval(model.parameters(), hidden, wanted)
    whole = 4 * 256 * 65536
    monkeypatch.setattr(in_blocks, "BLOCK_BYTES", whole // 128)
    for work in (
        mx.value_and_grad(lambda hidden: cross_entropy(model, hidden, wanted).sum()),
        lambda hidden: expected_embedding(model, hidden),
    ):
        before = active_memory()
        mx.reset_peak_memory()
        mx.eval(work(hidden))
        assert mx.get_peak_memory() - before < whole / 5


def test_what_a_step_asks() -> None:
    """One block of each, filled with the end token; the encoder reads what is clean, unfilled."""
    model = adapted()
    rng = np.random.default_rng(0)
    blocks, replaced, levels, conditioned = [], [], [], []
    for _ in range(400):
        batch = noised(SAMPLES, rng, model.config, 1, Objective())
        for row, sample in enumerate(SAMPLES):
            clean = [*sample.prompt, *sample.response]
            assert batch.lengths[row] == len(clean)
            assert batch.tokens[row].tolist()[: len(clean)] == clean
            rest = clean[batch.prefixes[row] :][:8]
            assert batch.target[row].tolist() == rest + [1] * (8 - len(rest))
            assert batch.supervised[row] == (len(rest) if sample.truncated else 8)
        blocks.append(batch.prefixes[0] - 11)
        replaced.append((batch.canvas != batch.target).mean(axis=1).tolist())
        levels.append(batch.levels)
        conditioned.append(batch.conditioned)
    assert set(blocks) == {0, 8}
    assert 150 < blocks.count(8) < 250  # uniform, though the second has three tokens
    assert np.abs(np.array(conditioned).mean() - 0.5) < 0.05
    assert np.corrcoef(np.ravel(replaced), np.ravel(levels))[0, 1] > 0.8
    assert 0 < np.min(levels) < 0.02 < 0.98 < np.max(levels) < 1


def test_noise_is_the_same_at_each_level() -> None:
    """So that validation at several compares them, and a run that goes on draws what it would."""
    model = adapted()
    rng = [np.random.default_rng(7) for _ in range(3)]
    low, high, all_ = (
        noised(SAMPLES, each, model.config, 1, Objective(), level=level)
        for each, level in zip(rng, (0.25, 0.75, 1.0), strict=True)
    )
    assert low.prefixes == high.prefixes == all_.prefixes
    changed = low.canvas != low.target
    assert 0 < changed.sum().item() < (high.canvas != high.target).sum().item()
    assert mx.where(changed, low.canvas == high.canvas, True).all().item()
    assert (all_.canvas != all_.target).mean().item() > 0.95
    assert len({each.random() for each in rng}) == 1


def test_denoising_is_what_generation_runs() -> None:
    """Behind a prompt cache of the prefix alone, and behind none; what follows is not seen."""
    model = adapted()
    batch = step(model)
    _, kept = encode(model, batch.tokens)
    found = decode(model, batch.canvas, kept, range(4), batch.prefixes)
    assert 0 in batch.prefixes
    for row, prefix in enumerate(batch.prefixes):
        cache = PromptCache(model)
        if prefix:
            cache.read(batch.tokens[row, :prefix].tolist())
        (wanted,) = model.decode([Pass(batch.canvas[row : row + 1], cache.cache)])
        assert mx.allclose(found[row], wanted[0], atol=1e-5)


def test_a_batch_is_its_rows_one_by_one() -> None:
    model = adapted()
    batch = step(model)
    whole = losses(model, batch, Objective())
    alone: list[tuple[Losses, int, int]] = []
    for row in range(4):
        length = max(batch.lengths[row], 1)
        one = Noised(
            tokens=batch.tokens[row : row + 1, :length],
            canvas=batch.canvas[row : row + 1],
            target=batch.target[row : row + 1],
            positions=batch.supervised[row],
            pairs=length - 1,
            **{
                name: getattr(batch, name)[row : row + 1]
                for name in ("lengths", "prefixes", "supervised", "conditioned", "levels")
            },
        )
        alone.append((losses(model, one, Objective()), batch.supervised[row], length - 1))
    assert set(batch.conditioned) == {False, True}
    denoising = sum(one.denoising.item() * count for one, count, _ in alone) / sum(batch.supervised)
    reading = sum(one.reading.item() * count for one, _, count in alone)
    assert whole.denoising.item() == pytest.approx(denoising, abs=1e-5)
    assert whole.reading.item() == pytest.approx(reading / sum(n for *_, n in alone), abs=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_gradients_are_the_same(dropout: float) -> None:
    """Exactly; dropout drops the same numbers when a layer is computed again."""
    model = adapted(dropout)
    batch, held = step(model), dict(tree_flatten(model.parameters()))
    found = []
    for checkpointed in (False, True):
        mx.random.seed(3)

        def total(model: DiffusionGemma, checkpointed: bool = checkpointed) -> mx.array:
            return losses(model, batch, Objective(), checkpointed=checkpointed).total

        found.append(gradients(model, total))
        found[-1]["what is drawn next"] = mx.random.uniform()
    assert close(*found, 0.0)
    now = dict(tree_flatten(model.parameters()))
    assert all(mx.array_equal(now[name], held[name]).item() for name in held)
    losses(model, batch, Objective(), checkpointed=True)
    assert all(array is now[name] for name, array in tree_flatten(model.parameters()))


def test_gradients_are_finite_differences() -> None:
    """Of all parameters, where every expert is chosen: routing that flips has no slope."""
    model: DiffusionGemma = untrained(97, 8, windows=WINDOWS)
    for block in model.model.decoder.layers:
        block.router.top_k = 2
    batch = step(model, self_conditioned=0.0)  # what the first pass says has no gradient

    def total(model: DiffusionGemma) -> mx.array:
        return losses(model, batch, Objective(), checkpointed=True).total

    slopes = gradients(model, total)
    del slopes["loss"]
    held = dict(tree_flatten(model.parameters()))
    assert slopes.keys() == held.keys()
    for part in ("q_proj", "k_proj", "o_proj", "mlp", "down_proj", "router", "embed", "scalar"):
        some = {name: slope for name, slope in slopes.items() if part in name}
        size = sum((slope**2).sum().item() for slope in some.values()) ** 0.5
        moved = []
        for sign in (1, -1):
            step_size = sign * 0.005 / size
            model.update(
                tree_unflatten([(n, held[n] + step_size * s / size) for n, s in some.items()])
            )
            moved.append(total(model).item())
        model.update(tree_unflatten([(name, held[name]) for name in some]))
        assert (moved[0] - moved[1]) / 0.01 == pytest.approx(1, abs=0.02), part
