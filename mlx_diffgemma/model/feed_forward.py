"""What follows attention in a layer: an MLP of all tokens, a router, the experts it chooses."""

import math

import mlx.core as mx
import mlx.nn as nn

from .adapters import LoRAExperts, gathered
from .config import Config
from .merged import MergedLinear


def gelu(x: mx.array) -> mx.array:
    """x P(X <= x) of a standard normal X, by tanh (arXiv 1606.08415, section 2).

    MLX's own takes a power, which is slow, and rounds in between; the reference computes in
    float32. Few operations in a row, or MLX would split the chain.
    """
    y = x.astype(mx.float32)
    root = math.sqrt(2 / math.pi)
    return (0.5 * y * (1 + mx.tanh(y * (root + root * 0.044715 * (y * y))))).astype(x.dtype)


@mx.compile
def gated(gate: mx.array, up: mx.array) -> mx.array:
    """gelu(gate) * up"""
    return gelu(gate) * up


@mx.compile
def gated_by(gate: mx.array, up: mx.array, weights: mx.array, scales: mx.array) -> mx.array:
    """gelu(gate) * up * weights * scales, in the type of `up`."""
    return gelu(gate) * up * (weights * scales).astype(up.dtype)


class GatedMLP(nn.Module):
    """down(gelu(gate(x)) * up(x))"""

    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)
        self._merged = MergedLinear([])

    def merge(self) -> None:
        """One product instead of two, from now on."""
        self._merged = MergedLinear([self.gate_proj, self.up_proj])

    def unmerge(self) -> None:
        """Two products again, see `Attention.unmerge`."""
        self._merged = MergedLinear([])

    def __call__(self, x: mx.array) -> mx.array:
        both = self._merged([self.gate_proj, self.up_proj], x)
        return self.down_proj(gated(*mx.split(both, 2, axis=-1)))


class Router(nn.Module):
    """Chooses the experts of each token, by its normed residual times `scale` / sqrt(hidden)."""

    def __init__(self, config: Config):
        super().__init__()
        self.top_k = config.top_k_experts
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.scale = mx.ones((config.hidden_size,))
        self.per_expert_scale = mx.ones((config.num_experts,))

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Expert ids and weights, (..., top_k) each; weights add up to one."""
        scores = self.proj(x).astype(mx.float32)
        top = mx.argpartition(scores, kth=-self.top_k, axis=-1)[..., -self.top_k :]
        top = mx.stop_gradient(top)  # ids have no gradient, and MLX asks for one
        # A softmax over the chosen equals a softmax over all, renormalised over the chosen.
        return top, mx.softmax(mx.take_along_axis(scores, top, axis=-1), axis=-1)


class ExpertLinear(nn.Module):
    """One matrix per expert, (experts, out, in); quantized once `scales` stand beside it."""

    def __init__(self, experts: int, inputs: int, outputs: int):
        super().__init__()
        self.weight = mx.zeros((experts, outputs, inputs))

    def to_quantized(self, group_size: int, bits: int, mode: str = "affine") -> "ExpertLinear":
        """Quantize in place (the hook that `mlx.nn.quantize` calls)."""
        self._group_size, self._bits, self._mode = group_size, bits, mode
        packed = mx.quantize(self.weight, group_size, bits, mode)
        self.weight, self.scales, *biases = packed
        if biases:
            self.biases = biases[0]
        return self

    def to_lora(self, r: int, scale: float, dropout: float) -> LoRAExperts:
        """Stand beside low-rank terms (the hook that mlx-lm calls)."""
        experts, outputs, inputs = self.weight.shape
        if "scales" in self:
            inputs = inputs * 32 // self._bits
        return LoRAExperts(self, (experts, outputs, inputs), r, dropout, scale)

    def __call__(self, x: mx.array, experts: mx.array, in_order: bool) -> mx.array:
        """Row i of `x` (N, 1, in) times the matrix of expert `experts[i]` -> (N, 1, out)."""
        if "scales" in self:
            return mx.gather_qmm(
                x,
                self.weight,
                self.scales,
                self.get("biases"),
                rhs_indices=experts,
                transpose=True,
                group_size=self._group_size,
                bits=self._bits,
                mode=self._mode,
                sorted_indices=in_order,
            )
        return gathered(x, self.weight, experts, in_order)


class Experts(nn.Module):
    """The routed half of the feed-forward layer: `top_k` experts a token, summed by weight.

    Each is `inner` wide; ranks that share a layer have columns of all experts.
    """

    def __init__(self, config: Config, inner: int):
        super().__init__()
        hidden = config.hidden_size
        # Gate rows first, then up rows. Never slice the packed matrix before the product:
        # a lazily sliced operand has given wrong experts in other ports.
        self.gate_up_proj = ExpertLinear(config.num_experts, hidden, 2 * inner)
        self.down_proj = ExpertLinear(config.num_experts, inner, hidden)

    def __call__(self, x: mx.array, top: mx.array, weights: mx.array, scales: mx.array) -> mx.array:
        """Of x (..., hidden), the experts `top` (..., k) by `weights` (..., k) and a scale each."""
        # Rows in the order of their expert let the kernel read each matrix once.
        chosen = top.flatten()
        order = mx.argsort(chosen)
        experts = chosen[order]
        rows = x.reshape(-1, 1, x.shape[-1])[order // top.shape[-1]]
        gate, up = mx.split(self.gate_up_proj(rows, experts, True), 2, axis=-1)
        # Weighed here, where rows are narrow: the next product is linear.
        weighing = (weights.flatten()[order], scales[experts])
        inner = gated_by(gate, up, *(each[:, None, None] for each in weighing))
        out = self.down_proj(inner, experts, True)
        # Back in the order of tokens, then summed. Adding into place would be one pass less, but
        # Metal adds in any order, and a seed must give the same text again.
        return out[mx.argsort(order)].reshape(*top.shape, -1).sum(axis=-2)
