"""The model only builds graphs: gradients, compilation and other threads go through it."""

import threading
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from paths import SUDOKU

from mlx_diffgemma import DiffusionGemma, GenerationConfig, generate, load
from mlx_diffgemma.model.cache import LayerCache, Mask
from mlx_diffgemma.model.config import Config, LayerConfig
from mlx_diffgemma.model.diffusion_gemma import Pass

PROMPT, CANVAS = mx.array([[3, 14, 15, 9, 2, 6, 5, 35]]), mx.array([[8, 9, 7, 9, 3, 2]])


def tiny(joined: bool = True) -> DiffusionGemma:
    """A sliding and a full layer, two of four experts; the prompt is longer than the window."""
    layers = tuple(LayerConfig(16, 1, window, 1e4, 8) for window in (5, None))
    config = Config(64, 16, 32, 16, 2, 4, 2, 1e-6, 30.0, 4096, 6, layers)
    model = DiffusionGemma(config, GenerationConfig())
    keys = iter(mx.random.split(mx.random.key(3), 999))
    model.update(
        tree_map(lambda p: mx.random.normal(p.shape, key=next(keys)) * 0.5, model.parameters())
    )
    if joined:
        model.merge()
    mx.eval(model.parameters(), model.constants)
    return model


def logits(model: DiffusionGemma) -> mx.array:
    """Encoder and decoder, self-conditioning included."""
    cache = model.make_cache()
    encoded = model.encode(PROMPT, cache)
    decoded = model.decode([Pass(CANVAS, cache, model.embed(CANVAS))])[0]
    return model.logits(mx.concatenate([encoded, decoded], axis=1))


def loss(model: DiffusionGemma) -> mx.array:
    return nn.losses.cross_entropy(logits(model), mx.concatenate([PROMPT, CANVAS], axis=1)).mean()


def test_the_gradient_is_the_slope() -> None:
    """Expert ids asked for a gradient that there is none of, and evaluations ended the trace."""
    model = tiny()
    value, gradient = nn.value_and_grad(model, loss)(model)
    assert mx.allclose(value, loss(model), atol=1e-5)
    slopes: dict[str, mx.array] = dict(tree_flatten(gradient))
    for name in (
        "model.decoder.embed_tokens.weight",
        "model.decoder.layers.0.self_attn.k_norm.weight",
        "model.decoder.layers.0.experts.down_proj.weight",
        "model.decoder.layers.1.router.scale",
        "model.decoder.layers.1.router.per_expert_scale",
        "model.decoder.self_conditioning.down_proj.weight",
        "model.encoder.language_model.layers.0.layer_scalar",
    ):
        slope = slopes[name]
        assert mx.abs(slope).max() > 0, name
        # Along the gradient itself, by a step so short that no token changes its experts.
        step = 3e-5 / (slope * slope).sum().item()
        parameter = dict(tree_flatten(model.parameters()))[name]
        values = []
        for sign in (1, -1):
            model.load_weights([(name, parameter + sign * step * slope)], strict=False)
            values.append(loss(model).item())
        model.load_weights([(name, parameter)], strict=False)
        assert values[0] - values[1] == pytest.approx(6e-5, rel=0.1), name


def test_compiled_is_the_same_and_leaves_nothing_behind() -> None:
    """Scales made inside a trace were kept, as placeholders that nothing could evaluate later."""
    model = tiny(joined=False)
    expected = logits(model)
    compiled: Callable[[], mx.array] = mx.compile(lambda: logits(model))
    assert mx.allclose(compiled(), expected, atol=1e-4)
    assert mx.array_equal(logits(model), expected)


def test_a_compiled_training_step_learns() -> None:
    model = tiny()
    state = [model.state]
    step = nn.value_and_grad(model, loss)

    def descend() -> mx.array:
        value, gradient = step(model)
        flat = [(n, g) for n, g in tree_flatten(gradient)]
        old = dict(tree_flatten(model.parameters()))
        model.load_weights([(n, old[n] - 0.05 * g) for n, g in flat], strict=False)
        return value

    compiled = mx.compile(descend, inputs=state, outputs=state)
    losses = []
    for _ in range(8):
        value = compiled()
        mx.eval(value, state)
        losses.append(value.item())
    assert losses[-1] < losses[0] - 0.1


def test_embeddings_stand_for_ids() -> None:
    model = tiny()
    by_id, by_row = model.make_cache(), model.make_cache()
    expected = model.encode(PROMPT, by_id)
    assert mx.array_equal(model.encode(PROMPT, by_row, model.embed(PROMPT)), expected)
    for one, other in zip(by_id, by_row, strict=True):
        assert mx.array_equal(one.state, other.state)
    others = model.embed(PROMPT) + mx.eye(8, 16)
    assert not mx.allclose(model.encode(PROMPT, model.make_cache(), others), expected, atol=1e-3)


def test_a_mask_of_ones_own_says_what_is_seen() -> None:
    """Two tokens that see each other, as those of a picture do, behind a cache that holds some."""

    def paired(cache: LayerCache, count: int) -> Mask:
        ahead = mx.arange(cache.size, cache.size + count)[:, None] - mx.arange(cache.size + count)
        seen = (ahead >= 0) & (ahead < (cache.window or 99))
        new = mx.arange(cache.size + count) - cache.size
        return seen | ((mx.arange(count) < 2)[:, None] & (new >= 0) & (new < 2))

    model = tiny()

    def hidden(tokens: mx.array, mask: Callable[[LayerCache, int], Mask]) -> np.ndarray:
        cache = model.make_cache()
        model.encode(PROMPT[:, :3], cache)
        return np.array(model.encode(tokens, cache, mask=mask))

    tokens, changed = PROMPT[:, 3:], mx.array([[9, 40, 6, 5, 35]])
    causal = LayerCache.encoder_mask
    # Causally, the first token knows nothing of the second; paired, it does.
    assert np.array_equal(hidden(tokens, causal)[:, 0], hidden(changed, causal)[:, 0])
    assert not np.allclose(hidden(tokens, paired)[:, 0], hidden(changed, paired)[:, 0], atol=1e-4)


@pytest.mark.parametrize("source", [None, SUDOKU], ids=["tiny", "sudoku6"])
def test_a_model_answers_in_another_thread(source: Path | None) -> None:
    """What loading left lazy belonged to its thread: "There is no Stream(cpu, 0)"."""
    found: list[object] = []

    def elsewhere(work: Callable[[], object]) -> object:
        def run() -> None:
            try:
                found.append(work())
            except Exception as error:
                found.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return found.pop()

    loaded = elsewhere(lambda: load(source))
    assert isinstance(loaded, tuple), loaded
    here = generate(*loaded, "abc", seed=1, steps=2)
    assert elsewhere(lambda: generate(*loaded, "abc", seed=1, steps=2)) == here
