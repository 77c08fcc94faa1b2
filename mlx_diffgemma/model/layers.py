"""One layer, read downward: attention, block, self-conditioning.

Parameters keep Hugging Face's names. Nothing here evaluates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn

from ..distributed.share import Share
from .cache import CacheUpdate, Evaluate, Mask
from .config import Config, LayerConfig
from .feed_forward import Experts, GatedMLP, Router
from .merged import Derived, MergedLinear
from .part import LayerPart

# Bytes that the scores of one product of queries and keys may take.
SCORE_BYTES = 1 << 27


@dataclass(frozen=True)
class View:
    """Says what the next `rows` times `count` tokens attend to: their mask, and how they update
    the cache.

    Where attention is computed in blocks of queries, `evaluate` is called with each block before
    the next is begun, or several would be under way. Only `queries` of the tokens look, where that
    is given: the others are there to be seen.
    """

    rows: int
    count: int
    mask: Mask
    update: CacheUpdate
    evaluate: Evaluate | None = None
    queries: int | None = None

    @property
    def looking(self) -> int:
        """How many of the tokens of a row look."""
        return self.count if self.queries is None else self.queries


def rms_norm(x: mx.array, eps: float) -> mx.array:
    """Root-mean-square norm over the last axis, without a scale."""
    return mx.fast.rms_norm(x, None, eps)


class Attention(nn.Module):
    """Grouped-query attention with normed queries, keys and values and a scale of 1.

    A full layer has no `v_proj`: its values are the raw key projection through the value norm.
    """

    def __init__(self, config: Config, layer: LayerConfig, part: LayerPart | None = None):
        super().__init__()
        part = part or LayerPart.whole(config, layer)
        layer = part.of(layer)
        self.layer = layer
        self.eps = config.rms_norm_eps
        self.heads = len(part.heads)
        self._share = part.share
        queries = self.heads * layer.head_dim
        keys = layer.num_key_value_heads * layer.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        if layer.window is not None:
            self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(layer.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(layer.head_dim, eps=config.rms_norm_eps)
        # The denominator is the whole head also where only a part of it turns ("proportional").
        pairs = mx.arange(layer.rotated_pairs, dtype=mx.float32)
        frequencies = 1 / mx.power(layer.rope_theta, 2 * pairs / layer.head_dim)
        still = mx.zeros((layer.head_dim // 2 - layer.rotated_pairs,))
        self._frequencies = mx.concatenate([frequencies, still])
        self._merged = MergedLinear([])
        self._scales = Derived(partial(_spread, self.heads, layer))
        turning = self.heads + layer.num_key_value_heads
        values = 0 if layer.window is None else layer.num_key_value_heads
        self._still = (mx.arange(turning + values) >= turning)[:, None, None]

    def rotation(self, positions: mx.array) -> mx.array:
        """Cosines and sines (B or 1, T, 1, 2, head_dim / 2) at float32 positions (B or 1, T)."""
        return cos_and_sin(positions, self._frequencies)

    @property
    def _parts(self) -> list[nn.Linear]:
        """Lists the projections of queries, keys and, where they have their own, values."""
        return [self.q_proj, self.k_proj, *([] if self.layer.window is None else [self.v_proj])]

    def merge(self) -> None:
        """One product instead of three, and scales put together, from now on."""
        self._merged = MergedLinear(self._parts)
        self._scales.keep(self.q_norm.weight, self.k_norm.weight)

    def unmerge(self) -> None:
        """Three products again: of weights that are replaced, the merged ones would be held."""
        self._merged = MergedLinear([])

    @property
    def constants(self) -> list[mx.array]:
        """Lists the arrays that a forward pass needs beside the parameters."""
        return [self._frequencies, self._still, *self._scales.made]

    def __call__(
        self,
        x: mx.array,
        views: Sequence[View],
        rotation: mx.array,
        wanted: mx.array | None = None,
    ) -> mx.array:
        """Outputs for x (B, T, hidden), or for the tokens `wanted` (W,) of it."""
        batch, length, _ = x.shape
        projected = self._merged(self._parts, x)
        normed = rms_norm(projected.reshape(batch, length, -1, self.layer.head_dim), self.eps)
        scales = self._scales(self.q_norm.weight, self.k_norm.weight)
        turned = scale_and_rotate(normed, scales, rotation, self._still)
        queries, new = turned[:, :, : self.heads], turned[:, :, self.heads :]
        if self.layer.window is None:
            new = mx.concatenate([new, normed[:, :, self.heads :]], axis=2)
        if wanted is not None:
            queries = queries[:, wanted]
        if len(views) == 1:
            seen = self._attend(queries, new, views[0])
        else:
            # Prompt caches differ in length: the tokens of each attend by themselves, unpadded.
            looking = list(accumulate(view.rows * view.looking for view in views))[:-1]
            ends = list(accumulate(view.rows * view.count for view in views))[:-1]
            parts = zip(mx.split(queries, looking, 1), mx.split(new, ends, 1), views, strict=True)
            seen = mx.concatenate(
                [mx.flatten(self._attend(*_in_rows(*part)), 0, 1) for part in parts]
            )
        return self._share.sum(self.o_proj(seen.reshape(*queries.shape[:2], -1)))

    def _attend(self, queries: mx.array, new: mx.array, view: View) -> mx.array:
        """What (rows, count, heads, head_dim) see, of this shape."""
        queries, new = queries.swapaxes(1, 2), new.swapaxes(1, 2)
        keys, values = mx.split(view.update(new), 2, axis=1)
        count, seen = queries.shape[2], keys.shape[2]
        # Heads this wide are not fused, so all scores exist at once: in blocks of queries, then.
        rows = max(1, SCORE_BYTES // (4 * queries.shape[0] * queries.shape[1] * seen))
        parts = []
        for first in range(0, count, rows):
            some, last = queries[:, :, first : first + rows], min(first + rows, count)
            if view.mask is None:
                parts.append(attention(some, keys, values))
                continue
            mask, end = view.mask, seen
            if isinstance(mask, mx.array):
                mask = mask[first:last]
            elif mask == "causal":
                end = seen - count + last
            known = keys[:, :, :end], values[:, :, :end]
            # Fused where MLX finds that faster: long prompts on newer chips.
            parts.append(mx.fast.scaled_dot_product_attention(some, *known, scale=1.0, mask=mask))
            if view.evaluate is not None and rows < count:
                view.evaluate(parts[-1])
        whole = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)
        return whole.swapaxes(1, 2)


def _in_rows(queries: mx.array, new: mx.array, view: View) -> tuple[mx.array, mx.array, View]:
    """Tokens that stand in a row (1, rows x count, ...), as the rows that they are of."""
    asking, seen = (view.rows, view.looking), (view.rows, view.count)
    return mx.unflatten(queries[0], 0, asking), mx.unflatten(new[0], 0, seen), view


def _spread(heads: int, layer: LayerConfig, queries: mx.array, keys: mx.array) -> mx.array:
    """Scales (heads, head_dim) of heads of queries, of keys and, which have none, of values."""
    shape = layer.num_key_value_heads, layer.head_dim
    parts = [mx.broadcast_to(queries, (heads, layer.head_dim)), mx.broadcast_to(keys, shape)]
    if layer.window is not None:
        parts.append(mx.ones(shape, dtype=keys.dtype))
    return mx.concatenate(parts)


def attention(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """Every query sees every key, at a scale of 1; (B, heads, T, head_dim), grouped.

    MLX's own function never fuses this (256 queries, heads of 256 or 512), and would multiply the
    queries by the scale.
    """
    groups = mx.unflatten(queries, 1, (keys.shape[1], -1))
    scores = groups @ keys[:, :, None].swapaxes(-1, -2)
    seen = mx.softmax(scores, axis=-1, precise=True) @ values[:, :, None]
    return mx.flatten(seen, 1, 2)


# Elementwise chains between the products, each one kernel.


@mx.compile
def cos_and_sin(positions: mx.array, frequencies: mx.array) -> mx.array:
    """Of all angles, (..., T) and (pairs,) -> (..., T, 1, 2, pairs)"""
    shape = (*positions.shape, 1, 2, len(frequencies))
    angles = mx.broadcast_to(positions[..., None, None, None], shape) * frequencies
    return mx.where(mx.array([[True], [False]]), mx.cos(angles), mx.sin(angles))


@mx.compile
def scale_and_rotate(
    x: mx.array, scales: mx.array, rotation: mx.array, still: mx.array
) -> mx.array:
    """Heads (B, T, heads, head_dim) times scales (heads, head_dim), then rotary embedding (arXiv
    2104.09864, eq. 34, of pairs half a head apart) of those that are not `still` (heads, 1, 1)."""
    halves, scales = mx.unflatten(x, -1, (2, -1)), mx.unflatten(scales, -1, (2, -1))
    # Spread before anything is computed: MLX fuses only what has one shape.
    a, b, cos, sin = (
        mx.broadcast_to(half, halves.shape)
        for both in (halves, rotation)
        for half in mx.split(both, 2, axis=-2)
    )
    scale_a, scale_b = mx.split(scales, 2, axis=-2)
    a, b = a * scale_a, b * scale_b
    first = mx.array([[True], [False]])
    turned = mx.where(first, a * cos - b * sin, b * cos + a * sin)
    return mx.flatten(mx.where(still, halves, turned).astype(x.dtype), -2)


@mx.compile
def scaled_sum(x: mx.array, y: mx.array, scalar: mx.array) -> mx.array:
    """(x + y) * scalar"""
    return (x + y) * scalar


class Block(nn.Module):
    """One layer; encoder and decoder call it with their own mask, scalar and cache verb."""

    def __init__(self, config: Config, layer: LayerConfig, part: LayerPart):
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, layer, part)
        self.mlp = GatedMLP(hidden, len(part.inner))
        self.router = Router(config)
        self.experts = Experts(config, len(part.expert))
        self._share = part.share
        self.input_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.pre_feedforward_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.pre_feedforward_layernorm_2 = nn.RMSNorm(hidden, eps=eps)
        self.post_feedforward_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.post_feedforward_layernorm_1 = nn.RMSNorm(hidden, eps=eps)
        self.post_feedforward_layernorm_2 = nn.RMSNorm(hidden, eps=eps)
        self.layer_scalar = mx.ones((1,))
        self.eps = eps
        self._scales = Derived(_stacked)

    @property
    def _three(self) -> tuple[mx.array, mx.array, mx.array]:
        """Scales of the norms before the feed-forward layer: of MLP, experts and router."""
        norms = self.pre_feedforward_layernorm, self.pre_feedforward_layernorm_2
        return norms[0].weight, norms[1].weight, self.router.scale

    def merge(self) -> None:
        """Products of one input become one product, and scales are put together."""
        self.self_attn.merge()
        self.mlp.merge()
        self._scales.keep(*self._three)

    def unmerge(self) -> None:
        """Products of their own again, for weights that will be replaced."""
        self.self_attn.unmerge()
        self.mlp.unmerge()

    @property
    def constants(self) -> list[mx.array]:
        """Lists the arrays that a forward pass needs beside the parameters."""
        return [*self.self_attn.constants, *self._scales.made]

    def __call__(
        self,
        x: mx.array,
        views: Sequence[View],
        rotation: mx.array,
        scalar: mx.array,
        wanted: mx.array | None = None,
    ) -> mx.array:
        """Of x (B, T, hidden) the next layer's input, or of the tokens `wanted` (W,) alone: of the
        others there are keys and values."""
        attended = self.self_attn(self.input_layernorm(x), views, rotation, wanted)
        if wanted is not None:
            x = x[:, wanted]
        x = x + self.post_attention_layernorm(attended)
        # Three norms of one input are one norm and one product with three scales.
        scales = self._scales(*self._three)
        to_mlp, to_experts, to_router = rms_norm(x, self.eps) * scales
        top, weights = self.router(to_router)
        self._share.compare(top, "the experts that a layer chooses")
        routed = self.experts(to_experts, top, weights, self.router.per_expert_scale)
        dense, routed = self._share.sums(self.mlp(to_mlp), routed)
        dense = self.post_feedforward_layernorm_1(dense)
        routed = self.post_feedforward_layernorm_2(routed)
        return scaled_sum(x, self.post_feedforward_layernorm(dense + routed), scalar)


def _stacked(mlp: mx.array, experts: mx.array, router: mx.array) -> mx.array:
    """Scales (3, 1, 1, hidden) of a layer's three norms before the feed-forward layer."""
    return mx.stack([mlp, experts, router * router.shape[-1] ** -0.5])[:, None, None]


class SelfConditioning(GatedMLP):
    """Adds what the previous step believed to the canvas embedding (decoder only)."""

    def __init__(self, config: Config, inner: int, share: Share):
        super().__init__(config.hidden_size, inner)
        self._share = share
        self.pre_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eps = config.rms_norm_eps

    def __call__(self, embedded: mx.array, self_conditioning: mx.array | None = None) -> mx.array:
        """`self_conditioning` is the embedding that the last step expects; None stands for zeros.

        That is the first step; the norm applies there too.
        """
        if self_conditioning is not None:
            believed = super().__call__(self.pre_norm(self_conditioning))
            embedded = embedded + self._share.sum(believed)
        return rms_norm(embedded, self.eps)
