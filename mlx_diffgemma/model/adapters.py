"""Modules that stand in the place of adapted ones: experts with low-rank terms, maps of two sides,
rows with factors.

Of linear layers mlx-lm's are used, see `checkpoint.adapter`.
"""

import math
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn


def gathered(x: mx.array, weight: mx.array, experts: mx.array, in_order: bool) -> mx.array:
    """Row i of `x` (N, 1, in) times the matrix `weight[experts[i]]` (out, in) -> (N, 1, out)."""
    # MLX's CPU backend gathers in float32 only.
    dtype = mx.float32 if mx.default_device() == mx.Device(mx.cpu) else x.dtype
    product = mx.gather_mm(
        x.astype(dtype),
        weight.astype(dtype).swapaxes(-1, -2),
        rhs_indices=experts,
        sorted_indices=in_order,
    )
    return product.astype(x.dtype)


class LoRAExperts(nn.Module):
    """A matrix per expert, each with a low-rank term; shapes as in mlx-lm's `LoRASwitchLinear`."""

    def __init__(
        self,
        linear: nn.Module,
        shape: tuple[int, int, int],
        r: int,
        dropout: float,
        scale: float,
    ):
        """Adapt `linear`, whose matrices unpacked have the shape (experts, out, in)."""
        super().__init__()
        experts, outputs, inputs = shape
        self.linear = linear
        self.dropout = nn.Dropout(p=dropout)
        self.scale = scale
        bound = 1 / math.sqrt(inputs)
        self.lora_a = mx.random.uniform(low=-bound, high=bound, shape=(experts, r, inputs))
        self.lora_b = mx.zeros((experts, outputs, r))

    def __call__(self, x: mx.array, experts: mx.array, in_order: bool) -> mx.array:
        """Row i of `x` (N, 1, in) times the matrix of expert `experts[i]` -> (N, 1, out)."""
        out = self.linear(x, experts, in_order)
        inner = self.dropout(x).astype(self.lora_a.dtype)
        for low in (self.lora_a, self.lora_b):
            inner = gathered(inner, low, experts, in_order)
        return out + (self.scale * inner).astype(out.dtype)


class ScaledRows(nn.Module):
    """A map each of whose outputs is multiplied by a number of its own."""

    def __init__(self, linear: nn.Module, factors: mx.array):
        super().__init__()
        self.linear, self.factors = linear, factors

    def __call__(self, x: mx.array) -> mx.array:
        out = self.linear(x)
        return out * self.factors.astype(out.dtype)


@dataclass
class Side:
    """Which side of the model is at work; the encoder and the decoder set it as they begin."""

    encodes: bool = False


class SidedLinear(nn.Module):
    """A map that the encoder and the decoder apply in two ways, as PEFT trains them."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module, side: Side):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self._side = side

    def __call__(self, x: mx.array) -> mx.array:
        return (self.encoder if self._side.encodes else self.decoder)(x)
