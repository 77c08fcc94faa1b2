"""One model on two sides: a plain reference, and what is tested against it.

The reference computes in float32, without compiled functions, with every product by itself, from
weights that are dequantized beforehand. The tested side is the model as it is loaded. Both hold the
same numbers: they are made on the reference's device and rounded to the tested type.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..checkpoint.files import Quantization
from ..convert import Recipe
from ..convert.recipes import fitting
from ..diffusion.draws import SeededDraws, sub_block
from ..model.config import Config
from ..model.diffusion_gemma import DiffusionGemma
from ..model.layers import Block, Router, View
from ..model.settings import GenerationConfig

Value = TypeVar("Value")

EMBEDDING = "model.decoder.embed_tokens"

# Rows of the embedding table that the reference multiplies with at once; bounds its memory.
ROWS = 1 << 14


@dataclass(frozen=True)
class Side:
    """A device, and whether it computes plainly: no function is compiled there."""

    device: mx.Device
    plain: bool

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Whatever is built in here is computed on this side. Sides do not nest."""
        with mx.stream(self.device):
            if self.plain:
                mx.disable_compile()
            try:
                yield
            finally:
                # Enabling would overrule what the user has set for all of MLX.
                if self.plain and "MLX_DISABLE_COMPILE" not in os.environ:
                    mx.enable_compile()

    def run(self, compute: Callable[[], Value]) -> tuple[Value, float]:
        """The result, with all arrays in it computed here, and the seconds that took."""
        with self.in_use():
            started = time.perf_counter()
            value = compute()
            mx.eval(value)
            return value, time.perf_counter() - started


# Weights -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """A model's arrays by name, and how those that are packed are stored, by module."""

    config: Config
    generation: GenerationConfig
    arrays: dict[str, mx.array]
    formats: dict[str, Quantization]

    def build(self) -> DiffusionGemma:
        """The model that computes with them as they are stored."""
        model = DiffusionGemma(self.config, self.generation)

        def stored(path: str, module: nn.Module) -> bool | dict[str, Any]:
            return path in self.formats and vars(self.formats[path])

        nn.quantize(model, class_predicate=stored)
        model.load_weights(list(self.arrays.items()))
        model.eval()
        return model


def weights_of(model: DiffusionGemma) -> Weights:
    """Those of a model that is not quantized."""
    return Weights(model.config, model.generation, dict(tree_flatten(model.parameters())), {})


def packed(weights: Weights, dtype: mx.Dtype, recipe: Recipe | None) -> Weights:
    """The same in another type, and quantized as `convert` would."""
    arrays: dict[str, mx.array] = {}
    formats = dict(weights.formats)
    for name, array in weights.arrays.items():
        module, _, leaf = name.rpartition(".")
        if module in weights.formats:
            arrays[name] = array if leaf == "weight" else array.astype(dtype)
            continue
        wanted = recipe.rule(module) if recipe and leaf == "weight" and array.ndim > 1 else None
        chosen = fitting(wanted, array.shape[-1]) if wanted else None
        arrays[name] = array.astype(dtype)
        if chosen:
            formats[module] = chosen
            sizes = chosen.group_size, chosen.bits, chosen.mode
            found = mx.quantize(arrays.pop(name), *sizes)
            arrays |= dict(zip((name, f"{module}.scales", f"{module}.biases"), found, strict=False))
        mx.eval(arrays)  # one by one: the wide ones are large
    return replace(weights, arrays=arrays, formats=formats)


def widened(weights: Weights, keep: Sequence[str] = ()) -> Weights:
    """Everything in float32, dequantized but for the modules to `keep`."""
    wide = {
        name: array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array
        for name, array in weights.arrays.items()
    }
    for module, chosen in weights.formats.items():
        if module not in keep:
            whole = mx.dequantize(
                wide.pop(f"{module}.weight"),
                wide.pop(f"{module}.scales"),
                wide.pop(f"{module}.biases", None),
                group_size=chosen.group_size,
                bits=chosen.bits,
                mode=chosen.mode,
            )
            wide[f"{module}.weight"] = whole.astype(mx.float32)
    mx.eval(wide)
    kept = {module: weights.formats[module] for module in keep}
    return replace(weights, arrays=wide, formats=kept)


@dataclass(frozen=True)
class Pair:
    """A model on both sides, `plain` and `tested`."""

    plain: DiffusionGemma
    tested: DiffusionGemma


def pair(weights: Weights, reference: Side, tested: Side, keep: Sequence[str] = ()) -> Pair:
    """Each model is built, and all of it evaluated, on its own side."""
    with reference.in_use():
        plain = widened(weights, keep).build()
        mx.eval(plain.parameters())
    with tested.in_use():
        model = weights.build()
        model.merge()
        mx.eval(model.parameters())
    return Pair(plain, model)


def random_weights(config: Config, generation: GenerationConfig, recipe: Recipe) -> Weights:
    """Random numbers in float32, of a size that activations stay near one.

    Matrices are made in their packed form (affine): unpacked they might not fit into memory.
    """
    rng = np.random.default_rng(1)
    arrays: dict[str, mx.array] = {}
    formats: dict[str, Quantization] = {}
    parameters: dict[str, mx.array] = dict(
        tree_flatten(DiffusionGemma(config, generation).parameters())
    )
    for name, shape in ((name, array.shape) for name, array in parameters.items()):
        module, _, leaf = name.rpartition(".")
        wanted = recipe.rule(module) if leaf == "weight" and len(shape) > 1 else None
        chosen = fitting(wanted, shape[-1]) if wanted else None
        if chosen is None:
            arrays[name] = mx.array(1 + rng.standard_normal(shape, np.float32) / 10)
            continue
        formats[module] = chosen
        *rows, width = shape
        words, groups = width * chosen.bits // 32, width // chosen.group_size
        # Numbers are uniform over 2^bits levels around zero. The table is such that a position
        # gives its own token, which is part of its hidden state, some of the probability.
        spread = (0.4 if module == EMBEDDING else 1) * width**-0.5
        step = spread * 12**0.5 / 2**chosen.bits
        scales = step * rng.uniform(0.75, 1.25, (*rows, groups)).astype(np.float32)
        drawn = rng.integers(0, 2**32, (*rows, words), np.uint32)
        arrays[name] = mx.array(drawn)
        arrays[f"{module}.scales"] = mx.array(scales)
        arrays[f"{module}.biases"] = mx.array(scales * ((1 - 2**chosen.bits) / 2))
    return Weights(config, generation, arrays, formats)


# What is watched ---------------------------------------------------------------------------------


class Tape(SeededDraws):
    """Draws of a seed that are kept: after `rewind` the very same numbers come again."""

    def __init__(self, seed: int, vocab_size: int):
        super().__init__(seed, vocab_size)
        self._kept: list[mx.array] = []
        self._place = 0

    def rewind(self) -> "Tape":
        self._place = 0
        return self

    def tokens(self, shape: tuple[int, ...]) -> mx.array:
        return self._play(lambda: super(Tape, self).tokens(shape))

    def gumbel(self, shape: tuple[int, ...]) -> mx.array:
        return self._play(lambda: super(Tape, self).gumbel(shape))

    def _play(self, draw: Callable[[], mx.array]) -> mx.array:
        if self._place == len(self._kept):
            self._kept.append(draw())
            mx.eval(self._kept[-1])
        self._place += 1
        return self._kept[self._place - 1]


class Tap:
    """A block that keeps what it was given and what it gave.

    With `instead` it computes from that, in the type of what it was given: an error of the layers
    before it does not reach it.
    """

    def __init__(self, block: Block, instead: mx.array | None):
        self.self_attn, self.layer_scalar = block.self_attn, block.layer_scalar
        self._block, self._instead = block, instead
        self.router: RouterTap

    def __call__(
        self, x: mx.array, views: Sequence[View], rotation: mx.array, scalar: mx.array
    ) -> mx.array:
        self.given = x
        x = x if self._instead is None else self._instead.astype(x.dtype)
        self.gave: mx.array = self._block(x, views, rotation, scalar)
        return self.gave


class RouterTap:
    """A router that keeps by how much each token is decided: how far the last chosen expert is
    before the first one that is not, in standard deviations of the token's scores."""

    def __init__(self, router: Router):
        self.scale, self.per_expert_scale = router.scale, router.per_expert_scale
        self._router = router

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        scores = self._router.proj(x).astype(mx.float32)
        ordered = mx.sort(scores, axis=-1)
        last = ordered.shape[-1] - self._router.top_k
        ahead = ordered[..., last] - ordered[..., max(last - 1, 0)]
        self.decided = ahead / scores.std(axis=-1)
        return self._router(x)


@contextmanager
def tapped(
    model: DiffusionGemma, instead: Sequence[mx.array | None] | None = None
) -> Iterator[list[Tap]]:
    """Every layer and its router with a tap, for as long as this lasts."""
    decoder: Any = model.model.decoder
    blocks = decoder.layers
    routers = [block.router for block in blocks]
    taps = [Tap(b, i) for b, i in zip(blocks, instead or [None] * len(blocks), strict=True)]
    decoder.layers = taps
    for block, tap, router in zip(blocks, taps, routers, strict=True):
        block.router = tap.router = RouterTap(router)
    try:
        yield taps
    finally:
        decoder.layers = blocks
        for block, router in zip(blocks, routers, strict=True):
            block.router = router


# By the book -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Book:
    """What a step reads off hidden states (B, L, hidden), with all logits at once, in float64.

    `log_p` (B, L, V) are log-probabilities in nats, `entropy` (B, L) is theirs; `self_conditioning`
    is the expected embedding (B, L, hidden); `outer` and `inner` are the scores, noise included, of
    sub-blocks (B, L, blocks) and of all ids by sub-block (B, L, blocks, ids).
    """

    log_p: Any
    entropy: Any
    self_conditioning: Any
    outer: Any
    inner: Any

    def lost_by_best(self, ids: Any) -> float:
        """Nats that the worst of ids (B, L) is behind the best token: 0, or more at a near tie."""
        return float((self.log_p.max(axis=-1) - _at(self.log_p, ids)).max())

    def lost_by_drawn(self, ids: Any) -> float:
        """As much of the draw, by its noisy scores: those of the sub-block and those inside it."""
        block, place = np.divmod(ids, self.inner.shape[-1])
        inside = np.take_along_axis(self.inner, block[..., None, None], axis=2)[..., 0, :]
        outer = self.outer.max(axis=-1) - _at(self.outer, block)
        return float((outer + inside.max(axis=-1) - _at(inside, place)).max())


def _at(scores: Any, ids: Any) -> Any:
    return np.take_along_axis(scores, ids[..., None], axis=-1)[..., 0]


def by_the_book(model: DiffusionGemma, hidden: mx.array, heat: float, noise: mx.array) -> Book:
    """Definitions, in the order in which one would write them down.

    `noise` is the draw's, (B, L, sub-blocks + ids of a sub-block).
    """
    count, width = model.config.vocab_size, model.config.hidden_size
    starts = range(0, count, ROWS)
    products = [np.array(hidden @ _rows(model, first).swapaxes(-1, -2)) for first in starts]
    cap = model.config.final_logit_softcapping
    levels = np.tanh(np.concatenate(products, axis=-1).astype(np.float64) / cap) * cap / heat
    below = levels - levels.max(axis=-1, keepdims=True)
    log_p = below - np.log(np.exp(below).sum(axis=-1, keepdims=True))
    p = np.exp(log_p)
    expected = np.zeros(hidden.shape)
    for first in starts:
        some = mx.array(p[..., first : first + ROWS].astype(np.float32))
        expected += np.array(some @ _rows(model, first))
    entropy = -(p * log_p).sum(axis=-1)
    return Book(log_p, entropy, expected * width**0.5, *_noisy(p, np.array(noise, np.float64)))


def _rows(model: DiffusionGemma, first: int) -> mx.array:
    """Rows of the embedding table, by their ids."""
    last = min(first + ROWS, model.config.vocab_size)
    return model.embedding(mx.arange(first, last)).astype(mx.float32)


def _noisy(p: Any, noise: Any) -> tuple[Any, Any]:
    """Scores of a draw in two stages, by Gumbel-max: of sub-blocks, and of ids in each."""
    width = sub_block(p.shape[-1])
    blocks = -(-p.shape[-1] // width)
    missing = blocks * width - p.shape[-1]
    grouped = np.pad(p, [(0, 0), (0, 0), (0, missing)]).reshape(*p.shape[:2], blocks, width)
    with np.errstate(divide="ignore"):  # the log of what cannot be drawn
        outer = np.log(grouped.sum(axis=-1)) + noise[..., :blocks]
        return outer, np.log(grouped) + noise[..., None, blocks:]


# How far apart -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """How far one array is from the reference's: the largest absolute difference of its numbers,
    and the relative one of its rows, which is the norm of the difference by that of the row."""

    name: str
    absolute: float
    relative: float


def apart(name: str, found: mx.array, wanted: mx.array, share: float = 1.0) -> Part:
    """`relative` is what this share of the rows stays within; 1 is the worst row."""
    a, b = (np.array(each.astype(mx.float32), dtype=np.float64) for each in (found, wanted))
    if a.shape != b.shape:
        raise ValueError(f"{name} has shape {a.shape}, the reference's {b.shape}")
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    length = np.linalg.norm(b, axis=-1)
    relative = np.linalg.norm(a - b, axis=-1) / np.maximum(length, np.finfo(np.float32).tiny)
    return Part(name, float(np.abs(a - b).max()), float(np.quantile(relative, share)))


def differing(found: mx.array, wanted: mx.array) -> float:
    """Share of the entries that are not equal."""
    return float(np.mean(np.array(found) != np.array(wanted)))
