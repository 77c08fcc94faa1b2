"""The model against slow, obviously right versions of itself, and what it refuses."""

import copy
import functools
import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from held import active_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import SUDOKU
from slow import soft_embedding

from mlx_diffgemma import GenerationConfig
from mlx_diffgemma.checkpoint.load import load_model
from mlx_diffgemma.diffusion.prompt_cache import prefill
from mlx_diffgemma.model import layers
from mlx_diffgemma.model.cache import LayerCache
from mlx_diffgemma.model.config import Config, ConfigError, LayerConfig
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.model.feed_forward import ExpertLinear, Experts, Router
from mlx_diffgemma.model.layers import Attention, attention, scale_and_rotate
from mlx_diffgemma.model.merged import MergedLinear

CONFIG = json.loads((SUDOKU / "config.json").read_text())
PROMPT = random.Random(0).choices(range(128), k=90)
CANVAS = mx.array([random.Random(1).choices(range(128), k=48)])
trained = functools.cache(lambda: load_model(SUDOKU, dtype="float32"))


def windowed(window: int) -> DiffusionGemma:
    """The trained weights under a shorter window: any window must be exact, good or not."""
    config = copy.deepcopy(CONFIG)
    config["text_config"]["sliding_window"] = window
    model = DiffusionGemma(Config.from_dict(config), trained().generation)
    model.update(trained().parameters())
    return model


@settings(max_examples=25, deadline=None)
@given(window=st.integers(2, 100), chunk=st.integers(1, 100))
def test_chunks_change_nothing(window: int, chunk: int) -> None:
    model = windowed(window)
    whole, parts = model.make_cache(), model.make_cache()
    prefill(model, PROMPT, whole, 10_000)
    prefill(model, PROMPT, parts, chunk)
    for one, other in zip(whole, parts, strict=True):
        assert one.length == other.length == len(PROMPT)
        assert one.size == other.size == min(len(PROMPT), (one.window or 10_000) - 1)
    difference = mx.abs(model(CANVAS, whole) - model(CANVAS, parts)).max().item()
    assert difference < 2e-4


def test_attention_in_blocks_of_queries_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """All scores used to exist at once: at 128k tokens they would take 17 GB."""
    model = windowed(30)
    results = []
    for scores in (layers.SCORE_BYTES, 4 * 4 * 150 * 7):  # 7 queries or a few more
        monkeypatch.setattr(layers, "SCORE_BYTES", scores)
        cache = model.make_cache()
        prefill(model, PROMPT, cache, 50)
        results.append(model(CANVAS, cache))
    assert mx.abs(results[0] - results[1]).max().item() < 2e-4


def test_a_canvas_is_written_behind_the_context_in_place() -> None:
    """The context used to be copied in every layer at every step."""
    cache = LayerCache(None)
    held = mx.random.normal((1, 4, 20_000, 16), key=mx.random.key(0))
    cache.append(held)
    new = mx.ones((1, 4, 8, 16))
    mx.eval(cache.read(new))
    del held
    before = active_memory()
    mx.reset_peak_memory()
    seen = cache.read(2 * new)
    mx.eval(seen)
    assert mx.get_peak_memory() - before < 1e5
    assert (seen[:, :, -8:] == 2).all()


def test_a_long_prompt_is_not_copied_at_each_chunk() -> None:
    """Each chunk used to copy all that was read into a larger buffer: two of them at a time."""
    cache = LayerCache(None)
    chunk = mx.random.normal((1, 4, 1000, 16), key=mx.random.key(0))
    mx.eval(chunk)
    cache.reserve(20_000 + 8)
    mx.reset_peak_memory()
    before = active_memory()
    for _ in range(20):
        cache.append(chunk)
        mx.eval(cache.state)
    mx.eval(cache.read(chunk[:, :, :8]))
    assert cache.state is not None
    assert cache.state.shape[2] == cache.length == 20_000
    assert mx.get_peak_memory() - before < 1.15 * 20_008 * 4 * 16 * 4


def test_a_fork_is_not_written_by_the_other() -> None:
    cache = LayerCache(None)
    first = mx.ones((1, 2, 3, 4))
    cache.append(first)
    cache.read(first)  # room for three
    fork = cache.fork()
    fork.append(5 * first)
    cache.append(7 * first)
    assert fork.state is not None
    assert cache.state is not None
    assert fork.state[0, 0, :, 0].tolist() == [1, 1, 1, 5, 5, 5]
    assert cache.state[0, 0, :, 0].tolist() == [1, 1, 1, 7, 7, 7]


def test_a_canvas_does_not_write_the_cache() -> None:
    model = windowed(30)
    cache = model.make_cache()
    prefill(model, PROMPT, cache)
    first = model(CANVAS, cache)
    assert mx.array_equal(first, model(CANVAS, cache))
    assert [layer.length for layer in cache] == [len(PROMPT)] * 4


def test_a_copy_of_the_cache_is_a_checkpoint() -> None:
    model = windowed(30)
    cache = model.make_cache()
    prefill(model, PROMPT, cache)
    saved = [copy.copy(layer) for layer in cache]
    before = model(CANVAS, cache)
    prefill(model, PROMPT[:50], cache)
    assert not mx.allclose(before, model(CANVAS, cache), atol=1e-3)
    assert mx.array_equal(before, model(CANVAS, saved))


def test_encoder_mask_by_hand() -> None:
    cache = LayerCache(window=3)
    assert cache.encoder_mask(3) == "causal"
    cache.append(mx.zeros((1, 2, 2, 4)))
    # Two kept keys, then two new tokens; each sees itself and the two before it.
    mask = cache.encoder_mask(2)
    assert isinstance(mask, mx.array)
    assert mask.tolist() == [[True, True, True, False], [False, True, True, True]]


def slow_experts(
    layer: Experts, x: mx.array, top: mx.array, weights: mx.array, scales: mx.array
) -> np.ndarray:
    """A token at a time, an expert at a time."""

    def dense(linear: ExpertLinear, expert: int) -> mx.array:
        if "scales" not in linear:
            return linear.weight[expert]
        parts = [linear[part][expert] for part in ("weight", "scales", "biases") if part in linear]
        group_size, bits, mode = linear._group_size, linear._bits, linear._mode
        return mx.dequantize(*parts, group_size=group_size, bits=bits, mode=mode)

    out = np.zeros(x.shape, dtype=np.float32)
    for at in np.ndindex(*x.shape[:-1]):
        for expert, weight in zip(top[at].tolist(), weights[at].tolist(), strict=True):
            gate, up = mx.split(dense(layer.gate_up_proj, expert) @ x[at], 2)
            weight *= scales[expert].item()
            out[at] += weight * np.array(
                dense(layer.down_proj, expert) @ (nn.gelu_approx(gate) * up)
            )
    return out


@pytest.mark.parametrize(
    "quantization", [None, (64, 4, "affine"), (64, 8, "affine"), (32, 4, "mxfp4")]
)
def test_experts_equal_one_token_at_a_time(quantization: tuple[int, int, str] | None) -> None:
    model = load_model(SUDOKU, dtype="float32")
    layer, router = model.model.decoder.layers[1].experts, model.model.decoder.layers[1].router
    x = mx.random.normal((2, 9, 128), key=mx.random.key(3))
    if quantization:
        layer.gate_up_proj.to_quantized(*quantization)
        layer.down_proj.to_quantized(*quantization)
    routes = *router(x), mx.linspace(0.5, 2, 8)
    assert np.abs(np.array(layer(x, *routes)) - slow_experts(layer, x, *routes)).max() < 1e-4


@pytest.mark.parametrize("change", ["nothing", "weight", "module", "type"])
def test_joined_products_are_the_products(change: str) -> None:
    """Queries, keys and values of one product; a part that is replaced must not go unnoticed."""
    apart, joined = (load_model(SUDOKU, dtype="float32") for _ in range(2))
    for model in (apart, joined):
        attention, mlp = model.model.decoder.layers[0].self_attn, model.model.decoder.layers[1].mlp
        if change == "weight":
            attention.k_proj.weight = attention.k_proj.weight * 2
            model.update({"model": {"decoder": {"layers": [{}, {"mlp": {"up_proj": {
                "weight": mlp.up_proj.weight * 3}}}]}}})  # fmt: skip
        elif change == "module":
            attention.q_proj = nn.Linear(128, 128, bias=False)
            attention.q_proj.weight = mx.eye(128)
        elif change == "type":
            attention.v_proj = attention.v_proj.to_quantized(32, 8)
        if model is apart:
            for block in model.model.decoder.layers:
                block.self_attn._merged = block.mlp._merged = MergedLinear([])
    caches = [model.make_cache() for model in (apart, joined)]
    for model, cache in zip((apart, joined), caches, strict=True):
        prefill(model, PROMPT, cache)
    assert mx.allclose(apart(CANVAS, caches[0]), joined(CANVAS, caches[1]), atol=1e-4)


def printed(*lines: str) -> float:
    """What a Python of its own prints: memory counts from an empty process."""
    script = "\n".join(
        [
            "import mlx.core as mx, gc",
            "from mlx_diffgemma.checkpoint.load import EMBEDDED, load_model",
            *lines,
        ]
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(out.stdout)


def test_joining_takes_no_memory() -> None:
    share = printed(
        "from mlx.utils import tree_flatten",
        "model = load_model(EMBEDDED, dtype='float32')",
        "held = sum(array.nbytes for _, array in tree_flatten(model.parameters()))",
        "print(mx.get_active_memory() / held)",
    )
    assert share < 1.02


def test_a_model_is_freed_at_once() -> None:
    """Nothing in it refers back to it, so its memory does not wait for the garbage collector."""
    share = printed(
        "gc.disable()",
        "model = load_model(EMBEDDED)",
        "mx.eval(model(mx.array([[1, 2]]), model.make_cache()))",
        "held = mx.get_active_memory()",
        "del model",
        "print(mx.get_active_memory() / held)",
    )
    assert share < 0.02


def test_router_takes_the_best_and_weighs_them_to_one() -> None:
    config = Config.from_dict(CONFIG)
    router = Router(config)
    x = mx.random.normal((5, 128), key=mx.random.key(0))
    top, weights = router(x)
    scores = np.array(x) @ np.array(router.proj.weight).T
    assert (np.sort(np.array(top)) == np.sort(np.argsort(-scores)[:, :2])).all()
    assert np.array(weights).sum(-1) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_heads_turn_as_rotary_embedding_does(dtype: Any) -> None:
    """One kernel for scale and rotation; the last two heads are values, which do neither."""
    attention = Attention(Config.from_dict(CONFIG), LayerConfig(16, 2, 4, 1e4, 5))
    x = mx.random.normal((2, 3, 8, 16), key=mx.random.key(0)).astype(dtype)
    scales = mx.concatenate([mx.random.normal((6, 16), key=mx.random.key(1)), mx.ones((2, 16))])
    offsets = [70_000, 9]
    rotation = attention.rotation(mx.array([[float(o + i) for i in range(3)] for o in offsets]))
    still = (mx.arange(8) >= 6)[:, None, None]
    turned = scale_and_rotate(x, scales.astype(dtype), rotation, still)
    wavelengths = [1e4 ** (i / 8) for i in range(5)] + [math.inf] * 3
    expected = mx.fast.rope(
        (x * scales.astype(dtype))[:, :, :6].swapaxes(1, 2),
        16,
        traditional=False,
        base=None,
        scale=1.0,
        offset=mx.array(offsets),
        freqs=mx.array(wavelengths),
    ).swapaxes(1, 2)
    assert turned.dtype == dtype
    within = 0.02 if dtype == mx.bfloat16 else 1e-4
    assert mx.allclose(turned[:, :, :6], expected, rtol=within, atol=within)
    assert mx.array_equal(turned[:, :, 6:], x[:, :, 6:])


def test_attention_is_softmax_of_products() -> None:
    queries, keys, values = (
        mx.random.normal((2, heads, 5, 16), key=mx.random.key(heads + i))
        for i, heads in enumerate((6, 3, 3))
    )
    expected = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0)
    assert mx.allclose(attention(queries, keys, values), expected, atol=1e-5)


def test_what_is_made_of_weights_is_made_anew_with_them() -> None:
    """A scale replaced later, by training, must not go unnoticed; nor is it made at each step."""
    model = load_model(SUDOKU, dtype="float32")
    block = model.model.decoder.layers[0]

    def logits() -> mx.array:
        cache = model.make_cache()
        prefill(model, PROMPT, cache)
        return model(CANVAS, cache)

    before = logits()
    made = block.constants
    assert mx.array_equal(logits(), before)
    assert all(a is b for a, b in zip(made, block.constants, strict=True))
    norm, scale = block.pre_feedforward_layernorm, block.router.scale
    for change in (
        {"router": {"scale": scale[::-1]}},
        {"pre_feedforward_layernorm": {"weight": norm.weight * 2}},
        {"self_attn": {"k_norm": {"weight": block.self_attn.k_norm.weight * 2}}},
    ):
        model.update({"model": {"decoder": {"layers": [change]}}})
        after = logits()
        assert mx.abs(after - before).max() > 1e-3
        before = after


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close(dtype: Any) -> None:
    exact, half = load_model(SUDOKU, dtype="float32"), load_model(SUDOKU, dtype=dtype)
    results = []
    for model in (exact, half):
        cache = model.make_cache()
        prefill(model, PROMPT, cache)
        logits = model(CANVAS, cache)
        logits = model(CANVAS, cache, soft_embedding(model, logits))
        assert logits.dtype == mx.float32
        results.append(logits)
    assert mx.abs(results[0] - results[1]).mean().item() < 0.05 * mx.abs(results[0]).mean().item()


@pytest.mark.parametrize("quantization", [(64, 8, "affine"), (32, 4, "affine"), (32, 8, "mxfp8")])
def test_quantized_embedding_in_both_directions(quantization: tuple[int, int, str]) -> None:
    """A quantized tied embedding used to be easy to forget in self-conditioning (step 2)."""
    group_size, bits, mode = quantization
    model = load_model(SUDOKU, dtype="float32")
    embed = model.model.decoder.embed_tokens.to_quantized(group_size, bits, mode=mode)
    model.model.decoder.embed_tokens = embed
    table = mx.dequantize(
        embed.weight, embed.scales, embed.biases, group_size=group_size, bits=bits, mode=mode
    ).astype(mx.float32)
    hidden = mx.random.normal((1, 5, 128), key=mx.random.key(1))
    expected = mx.tanh(hidden @ table.T / 30.0) * 30.0
    assert mx.allclose(model.logits(hidden), expected, atol=1e-3)
    logits = mx.random.normal((1, 5, 128), key=mx.random.key(2)) * 3
    expected = mx.softmax(logits, axis=-1) @ table * 128**0.5
    assert mx.allclose(soft_embedding(model, logits), expected, atol=1e-3)
    rows = mx.concatenate([rows for _, rows in model.vocabulary(50)])
    assert mx.allclose(rows, table)
    assert mx.allclose(model.embed(CANVAS), table[CANVAS] * 128**0.5, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_activation": "silu"}, "hidden_activation"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers"),
        ({"layer_types": ["sliding_attention", "linear"] + ["full_attention"] * 2}, "linear"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"per_layer_config": {"1": {"sliding_window": 4}}}, "sliding_window"),
        ({"num_experts": None}, "num_experts"),
        ({"top_k_experts": 9}, "top_k_experts"),
        ({"num_key_value_heads": 3}, "key-value heads"),
        ({"sliding_window": 1}, "sliding_window"),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            },
            "yarn",
        ),
    ],
)
def test_config_that_would_give_wrong_output_is_refused(change: dict[str, Any], named: str) -> None:
    config = {**CONFIG, "text_config": {**CONFIG["text_config"], **change}}
    with pytest.raises(ConfigError, match=named):
        Config.from_dict(config)


BAD: list[Any] = [None, "", [], {}, -1, 0, 0.5, 1e15, 10**15, 10**400, math.inf, math.nan, True]
BAD += [False, "text", [1], {"1": 1}, {"9": {}}, [["full_attention"]] * 4, "\ud800"]
DIALECT = {
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "final_logit_softcapping": 30.0,
    "use_double_wide_mlp": False,
    "num_kv_shared_layers": 0,
}


def places(values: Any, *above: Any) -> Iterator[tuple[Any, ...]]:
    """The path of every value of a JSON object."""
    for key, value in values.items() if isinstance(values, dict) else ():
        yield (*above, key)
        yield from places(value, *above, key)


def test_no_value_of_a_config_ends_in_anything_but_a_refusal() -> None:
    """Widths of 1e15 or 1.5, heads of 0, true for 1, lists and texts were tracebacks, and a
    thousand million layers took a minute."""
    whole = {**CONFIG, "vision_config": None, "text_config": {**CONFIG["text_config"], **DIALECT}}
    shipped = copy.deepcopy(whole)
    del shipped["text_config"]["per_layer_config"]
    said = []
    for config in (whole, shipped):
        for *above, key in places(config):
            for bad in BAD:
                changed = copy.deepcopy(config)
                held = changed
                for step in above:
                    held = held[step]
                held[key] = bad
                try:
                    made = Config.from_dict(changed)
                except ConfigError as error:
                    said.append(str(error))
                else:
                    model = DiffusionGemma(made, GenerationConfig())
                    assert len(model.model.decoder.layers) == 4
    assert len(said) > 900
    assert all(sentence.isprintable() and len(sentence) < 200 for sentence in said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": 10**15}, "hidden_size = 1000000000000000 is not a whole number"),
        ({"hidden_size": 1.5}, "hidden_size = 1.5 is not a whole number"),
        ({"num_attention_heads": True}, "num_attention_heads = True is not a whole number"),
        ({"head_dim": 0}, "head_dim = 0 is not"),
        ({"num_key_value_heads": 0}, "num_key_value_heads = 0 is not"),
        ({"per_layer_config": [1]}, "per_layer_config = [1] is not a JSON object"),
        ({"per_layer_config": {"4": {}}}, "per_layer_config['4'] is no layer's"),
        ({"per_layer_config": {"1": {"head_dim": None}}}, "head_dim = None is not"),
        ({"sliding_window": "wide"}, "sliding_window = 'wide' is not"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000 is not a whole number"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers = 1000000 is more than 1000"),
        ({"layer_types": "full_attention"}, "layer_types = 'full_attention' is not a list"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps = nan is not a positive number"),
        ({"attention_bias": 0}, "text_config.attention_bias = 0 is not supported"),
        ({"rope_parameters": {"full_attention": 1, "sliding_attention": 1}}, "is not a JSON"),
        ({"max_position_embeddings": 40}, "canvas_length = 48 is more than"),
        ({"num_experts": 1 << 24, "hidden_size": 1 << 20}, "a matrix larger than any"),
    ],
)
def test_config_says_what_is_wrong_with_a_value(change: dict[str, Any], said: str) -> None:
    config = {**CONFIG, "text_config": {**CONFIG["text_config"], **change}}
    with pytest.raises(ConfigError, match=re.escape(said)):
        Config.from_dict(config)


def test_config_of_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="gemma4"):
        Config.from_dict({**CONFIG, "model_type": "gemma4"})
    text = {k: v for k, v in CONFIG["text_config"].items() if k != "hidden_size"}
    with pytest.raises(ConfigError, match="hidden_size"):
        Config.from_dict({**CONFIG, "text_config": text})


def test_dialects_agree() -> None:
    shipped = copy.deepcopy(CONFIG)
    shipped["text_config"].pop("per_layer_config")
    shipped["text_config"].update(global_head_dim=32, num_global_key_value_heads=1)
    assert Config.from_dict(shipped) == Config.from_dict(CONFIG)
