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

from ...checkpoint.quantization import Quantization
from ...convert.recipes import Recipe, fitting
from ...model.config import Config
from ...model.diffusion_gemma import DiffusionGemma
from ...model.settings import GenerationConfig

Value = TypeVar("Value")

EMBEDDING = "model.decoder.embed_tokens"


@dataclass(frozen=True)
class Side:
    """A device, and whether it computes plainly: no function is compiled there."""

    device: mx.Device
    plain: bool

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Compute on this side whatever is built in here. Sides do not nest."""
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
        """Compute the result, with all arrays in it computed here, and the seconds that took."""
        with self.in_use():
            started = time.perf_counter()
            value = compute()
            mx.eval(value)
            return value, time.perf_counter() - started


@dataclass(frozen=True)
class Weights:
    """A model's arrays by name, and how those that are packed are stored, by module."""

    config: Config
    generation: GenerationConfig
    arrays: dict[str, mx.array]
    formats: dict[str, Quantization]

    def build(self) -> DiffusionGemma:
        """Build the model that computes with them as they are stored."""
        model = DiffusionGemma(self.config, self.generation)

        def stored(path: str, module: nn.Module) -> bool | dict[str, Any]:
            return path in self.formats and vars(self.formats[path])

        nn.quantize(model, class_predicate=stored)
        model.load_weights(list(self.arrays.items()))
        model.eval()
        return model


def weights_of(model: DiffusionGemma) -> Weights:
    """Take those of a model that is not quantized."""
    return Weights(model.config, model.generation, dict(tree_flatten(model.parameters())), {})


def packed(weights: Weights, dtype: mx.Dtype, recipe: Recipe | None) -> Weights:
    """Convert weights to another type, quantized as `convert` would."""
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
    """Convert everything to float32, dequantized but for the modules to `keep`."""
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
    """Build each model, and evaluate all of it, on its own side."""
    with reference.in_use():
        plain = widened(weights, keep).build()
        mx.eval(plain.parameters())
    with tested.in_use():
        model = weights.build()
        model.merge()
        mx.eval(model.parameters())
    return Pair(plain, model)


def random_weights(config: Config, generation: GenerationConfig, recipe: Recipe) -> Weights:
    """Make random numbers in float32, of a size that activations stay near one.

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
