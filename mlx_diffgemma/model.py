"""DiffusionGemma in one file, read downward: config, cache, attention, experts, block, model.

Parameters keep Hugging Face's names. The encoder and the decoder of the paper are one stack of
blocks: the encoder calls it with a causal mask, its own layer scalars and a cache that is written;
the decoder with no mask, its own scalars and a cache that is only read.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .arguments import NUMBER_LIMITS, SIZE_LIMIT, is_number, is_size, shown
from .config import GenerationConfig
from .errors import Error

Mask = mx.array | str | None
# Bytes that the scores of one product of queries and keys may take.
SCORE_BYTES = 1 << 27
# Bytes that a block of the embedding table may take where it has to be dequantized.
TABLE_BYTES = 1 << 26
# Of a config: no model has as many layers, nor as many numbers in one matrix.
LAYERS_LIMIT = 1000
MATRIX_LIMIT = 1 << 44
# What a layer's cache does with new keys and values (B, 2 x heads, T, head_dim), and answers: those
# to attend to.
CacheVerb = Callable[[mx.array], mx.array]
# What a caller does with arrays on the way: `mx.eval` bounds memory, `mx.async_eval` computes while
# the graph of later layers is being built. The model itself only builds graphs, so that `mx.grad`
# and `mx.compile` may go through it.
Evaluate = Callable[[mx.array], None]


class ConfigError(Error):
    """A `config.json` that this model cannot run as written."""


@dataclass(frozen=True)
class LayerConfig:
    """One layer's attention: `window` is None where attention is full."""

    head_dim: int
    num_key_value_heads: int
    window: int | None
    rope_theta: float
    rotated_pairs: int  # of head_dim / 2 pairs; the others carry no position


@dataclass(frozen=True)
class Config:
    """The numbers of `config.json` that the text model needs, one dialect."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_attention_heads: int
    num_experts: int
    top_k_experts: int
    rms_norm_eps: float
    final_logit_softcapping: float
    max_position_embeddings: int
    canvas_length: int
    layers: tuple[LayerConfig, ...]

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "Config":
        """Read either dialect: `global_head_dim` as shipped, or `per_layer_config` as re-saved.

        Raises:
            ConfigError: a value is missing, or asks for something this model does not do.
        """
        if config.get("model_type") != "diffusion_gemma":
            found = shown(config.get("model_type"))
            raise ConfigError(f"model_type is {found}, not 'diffusion_gemma'")
        text = config.get("text_config")
        if not isinstance(text, dict):
            raise ConfigError("there is no text_config")
        for key, supported in _ONLY.items():
            value = text.get(key, supported[0])
            # 0 == False, so types are compared too.
            if not any(type(value) is type(one) and value == one for one in supported):
                raise ConfigError(f"text_config.{key} = {shown(value)} is not supported")
        if config.get("tie_word_embeddings", True) is not True:
            found = shown(config["tie_word_embeddings"])
            raise ConfigError(f"tie_word_embeddings = {found} is not supported")
        try:
            made = cls(
                vocab_size=_size(text, "vocab_size"),
                hidden_size=_size(text, "hidden_size"),
                intermediate_size=_size(text, "intermediate_size"),
                moe_intermediate_size=_size(text, "moe_intermediate_size"),
                num_attention_heads=_size(text, "num_attention_heads"),
                num_experts=_size(text, "num_experts"),
                top_k_experts=_size(text, "top_k_experts"),
                rms_norm_eps=_positive(text, "rms_norm_eps", 1e-6),
                final_logit_softcapping=_positive(text, "final_logit_softcapping", 30.0),
                max_position_embeddings=_size(text, "max_position_embeddings"),
                canvas_length=_size(config, "canvas_length", 256),
                layers=tuple(_layers(text)),
            )
        except KeyError as missing:
            raise ConfigError(f"there is no {missing.args[0]}") from None
        made._check()
        return made

    def _check(self) -> None:
        """Refuse numbers that do not go together, and matrices that cannot exist."""
        if self.top_k_experts > self.num_experts:
            raise ConfigError(f"top_k_experts = {self.top_k_experts} of {self.num_experts} experts")
        if self.canvas_length > self.max_position_embeddings:
            raise ConfigError(
                f"canvas_length = {self.canvas_length} is more than max_position_embeddings = "
                f"{self.max_position_embeddings}"
            )
        for i, layer in enumerate(self.layers):
            if layer.window is not None and layer.window < 2:
                # The reference's cache keeps everything here, against its own mask.
                raise ConfigError(f"sliding_window = {layer.window} is not supported")
            if layer.head_dim % 2 or self.num_attention_heads % layer.num_key_value_heads:
                raise ConfigError(
                    f"layer {i}: {self.num_attention_heads} heads of {layer.head_dim} do not go "
                    f"with {layer.num_key_value_heads} key-value heads"
                )
        widest = self.num_attention_heads * max(layer.head_dim for layer in self.layers)
        rows = max(
            self.vocab_size,
            self.intermediate_size,
            widest,
            self.num_experts * 2 * self.moe_intermediate_size,
        )
        if widest > SIZE_LIMIT or rows * self.hidden_size > MATRIX_LIMIT:
            raise ConfigError("its sizes ask for a matrix larger than any there is")


def _size(values: dict[str, Any], key: str, default: int | None = None) -> int:
    """A whole number by its name; without a default, KeyError says that it is missing."""
    value = values[key] if default is None else values.get(key, default)
    if not is_size(value):
        raise ConfigError(f"{key} = {shown(value)} is not a whole number from 1 to {SIZE_LIMIT}")
    return value


def _positive(values: dict[str, Any], key: str, default: float | None = None) -> float:
    """As `_size`, of a number that float32 holds."""
    value = values[key] if default is None else values.get(key, default)
    if not is_number(value) or value < NUMBER_LIMITS[0]:
        raise ConfigError(f"{key} = {shown(value)} is not a positive number")
    return float(value)


# What the reference leaves open and this model has one answer for; the first is the default.
_ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("diffusion_gemma_text",),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "tie_word_embeddings": (True,),
    "use_bidirectional_attention": (None, "vision"),
    # Gemma 4 has these, DiffusionGemma does not
    "attention_k_eq_v": (None, True),
    "enable_moe_block": (None, True),
    "use_double_wide_mlp": (None, False),
    "num_kv_shared_layers": (None, 0),
    "hidden_size_per_layer_input": (None, 0),
}
_ROPE_DEFAULTS: dict[str, dict[str, Any]] = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {
        "rope_type": "proportional",
        "rope_theta": 1e6,
        "partial_rotary_factor": 0.25,
    },
}


def _layers(text: dict[str, Any]) -> Iterator[LayerConfig]:
    kinds = _kinds(text)
    overrides = _overrides(text, kinds)
    ropes = text.get("rope_parameters")
    if ropes is None:
        ropes = _ROPE_DEFAULTS
    if not isinstance(ropes, dict):
        raise ConfigError(f"rope_parameters = {shown(ropes)} is not a JSON object")
    for i, kind in enumerate(kinds):
        own = overrides.get(i, {})
        head_dim = _size({**text, **own}, "head_dim")
        theta, fraction = _rope(kind, ropes.get(kind))
        yield LayerConfig(
            head_dim=head_dim,
            num_key_value_heads=_size({**text, **own}, "num_key_value_heads"),
            window=_size(text, "sliding_window") if kind == "sliding_attention" else None,
            rope_theta=theta,
            rotated_pairs=int(fraction * head_dim // 2),
        )


def _kinds(text: dict[str, Any]) -> list[str]:
    """The kind of attention of each layer."""
    count = _size(text, "num_hidden_layers")
    if count > LAYERS_LIMIT:
        raise ConfigError(f"num_hidden_layers = {count} is more than {LAYERS_LIMIT}")
    kinds = text.get("layer_types")
    if kinds is None:
        kinds = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(count)]
    if not isinstance(kinds, list):
        raise ConfigError(f"layer_types = {shown(kinds)} is not a list")
    if len(kinds) != count:
        raise ConfigError(f"layer_types has {len(kinds)} entries for {count} layers")
    for i, kind in enumerate(kinds):
        if not isinstance(kind, str) or kind not in _ROPE_DEFAULTS:
            raise ConfigError(f"layer_types[{i}] = {shown(kind)} is not supported")
    # The reference forces the last layer to full attention, whatever the list says.
    return [*kinds[:-1], "full_attention"]


def _overrides(text: dict[str, Any], kinds: list[str]) -> dict[int, dict[str, Any]]:
    """What single layers have in place of `head_dim` and `num_key_value_heads`."""
    given = text.get("per_layer_config")
    if given is None:  # the dialect as shipped: full layers have other heads
        wide = {"head_dim": text.get("global_head_dim", 512)}
        if text.get("num_global_key_value_heads") is not None:
            wide["num_key_value_heads"] = text["num_global_key_value_heads"]
        return {i: wide for i, kind in enumerate(kinds) if kind == "full_attention"}
    if not isinstance(given, dict):
        raise ConfigError(f"per_layer_config = {shown(given)} is not a JSON object")
    layers = {str(i): i for i in range(len(kinds))}
    for key, own in given.items():
        if key not in layers or not isinstance(own, dict):
            raise ConfigError(f"per_layer_config[{shown(key)}] is no layer's")
        if unknown := own.keys() - {"head_dim", "num_key_value_heads"}:
            raise ConfigError(f"per_layer_config[{key}] overrides {shown(min(unknown))}")
    return {layers[key]: own for key, own in given.items()}


def _rope(kind: str, rope: Any) -> tuple[float, float]:
    """Base and rotated share of a kind of layer."""
    if not isinstance(rope, dict):
        raise ConfigError(f"rope_parameters.{kind} = {shown(rope)} is not a JSON object")
    fraction = rope.get("partial_rotary_factor", 1.0)
    supported = (
        is_number(fraction)
        and 0 <= fraction <= 1
        and is_number(rope.get("factor", 1.0))
        and rope.get("factor", 1.0) == 1.0
        and (
            rope.get("rope_type") == "proportional"
            or (rope.get("rope_type") == "default" and fraction == 1.0)
        )
    )
    if not supported:
        raise ConfigError(f"rope_parameters.{kind} = {shown(rope)} is not supported")
    return _positive(rope, "rope_theta"), float(fraction)


@dataclass(frozen=True)
class LayerMark:
    """A place to which a `LayerCache` can go back; only a sliding layer has to hold an array."""

    length: int
    held: mx.array | None = None


class LayerCache:
    """Keys and values of one layer, one array (B, 2 x heads, T, head_dim): heads of keys first.

    `length` counts all tokens seen; a sliding layer keeps its last `window - 1`: a later token sees
    no more. The buffer has room behind what is kept, where a canvas's keys and values stand while
    it is denoised. A write makes a new array, in the old one's memory unless a mark or fork still
    needs that.
    """

    def __init__(self, window: int | None):
        self.window = window
        self.length = 0
        self.kept = 0
        self._buffer: mx.array | None = None
        self._room = 0  # tokens that the next larger buffer shall hold at least

    @property
    def held(self) -> mx.array | None:
        """Keys and values of the tokens kept; None is none."""
        return None if self._buffer is None else self._buffer[:, :, : self.kept]

    def hold(self, length: int, held: mx.array | None) -> None:
        """Replace everything: `length` tokens have been seen, and these are kept."""
        self.length = length
        self.kept = 0 if held is None else held.shape[2]
        self._buffer = held

    def read(self, new: mx.array) -> mx.array:
        """What is kept followed by the new keys and values, which are not kept.

        A held batch of one serves any number of new rows.
        """
        if self._buffer is None:
            return new
        end = self.kept + new.shape[2]
        if len(new) != len(self._buffer):
            # Of many rows at once, none keeps its own copy of the context.
            kept = self._buffer[:, :, : self.kept]
            return mx.concatenate([mx.broadcast_to(kept, (len(new), *kept.shape[1:])), new], axis=2)
        if self._buffer.shape[2] < end:
            self._buffer = self._with_room(self._buffer[:, :, : self.kept], end)
        own = copy(self._buffer)  # the object, not the numbers: a fork may hold it too
        own[:, :, self.kept : end] = new
        self._buffer = own
        return self._buffer[:, :, :end]

    def reserve(self, count: int) -> None:
        """That many tokens will come: appending them then copies nothing that is held."""
        if self.window is None:
            self._room = max(self._room, self.kept + count)

    def _with_room(self, kept: mx.array, count: int) -> mx.array:
        """A buffer that begins with what is kept and has room for `count` tokens at least."""
        batch, heads, length, size = kept.shape
        buffer = mx.zeros((batch, heads, max(self._room, count), size), dtype=kept.dtype)
        buffer[:, :, :length] = kept
        return buffer

    def append(self, new: mx.array) -> mx.array:
        """As `read`, and keep them for later calls."""
        count = new.shape[2]
        seen = self.read(new)
        self.length += count
        drop = 0 if self.window is None else seen.shape[2] - (self.window - 1)
        if drop > 0:
            self.hold(self.length, mx.contiguous(seen[:, :, drop:]))
            return seen
        if self._buffer is None:
            self._buffer = self._with_room(seen, count)
        self.kept += count
        return seen

    def mark(self) -> LayerMark:
        """Where the cache stands. A full layer holds all tokens, so its length says enough."""
        if self.window is None:
            return LayerMark(self.length)
        return LayerMark(self.length, self.held)

    def restore(self, mark: LayerMark) -> None:
        """Go back to a mark made earlier in the same sequence of tokens."""
        if self.window is not None or not mark.length:
            self.hold(mark.length, mark.held)
        else:
            self.length = self.kept = mark.length

    def fork(self) -> "LayerCache":
        """Another that holds the same; memory is shared until one of them writes."""
        other = LayerCache(self.window)
        other.length, other.kept, other._buffer = self.length, self.kept, self._buffer
        other._room = self._room
        return other

    def encoder_mask(self, count: int) -> Mask:
        """Mask for `count` new tokens: causal, and in a sliding layer `q - k < window`."""
        if self.window is None or self.kept + count <= self.window:
            return "causal"
        ahead = mx.arange(self.kept, self.kept + count)[:, None] - mx.arange(self.kept + count)
        return (ahead >= 0) & (ahead < self.window)


# Of a layer's cache and a number of new tokens: what these see, causal or (T, kept + T).
EncoderMask = Callable[[LayerCache, int], Mask]


@dataclass(frozen=True)
class View:
    """What the first `rows` rows not yet served attend to: their mask and cache verb.

    Where attention is computed in blocks of queries, `evaluate` is called with each block before
    the next is begun, or several would be under way.
    """

    rows: int
    mask: Mask
    verb: CacheVerb
    evaluate: Evaluate | None = None


def rms_norm(x: mx.array, eps: float) -> mx.array:
    """Root-mean-square norm over the last axis, without a scale."""
    return mx.fast.rms_norm(x, None, eps)


class Joined:
    """Linear maps of one input as one map, so that there is one product.

    Their weights become views of its own. Where one of them is replaced later, by training or an
    adapter, or they are quantized in different ways, each is applied by itself.
    """

    def __init__(self, parts: Sequence[nn.Linear]):
        self._whole: nn.Linear | None = None
        kinds = [(type(p), vars(p), p.keys()) for p in parts]
        if not parts or any(kind != kinds[0] for kind in kinds):
            return
        self._whole = copy(parts[0])
        for name in parts[0]:
            self._whole[name] = mx.concatenate([part[name] for part in parts])
            ends = list(accumulate(len(part[name]) for part in parts))[:-1]
            for part, own in zip(parts, mx.split(self._whole[name], ends), strict=True):
                part[name] = own
        self._weights = [part.weight for part in parts]

    def __call__(self, parts: Sequence[nn.Linear], x: mx.array) -> mx.array:
        """Outputs of the parts, end to end."""
        if self._whole is not None and all(
            part.get("weight") is own for part, own in zip(parts, self._weights, strict=True)
        ):
            out: mx.array = self._whole(x)
            return out
        return mx.concatenate([part(x) for part in parts], axis=-1)


class Derived:
    """An array made of parameters, kept once for those that stay as they are.

    A forward pass keeps nothing: within `mx.grad` and `mx.compile` its arrays are placeholders.
    """

    def __init__(self, make: Callable[..., mx.array]):
        self._make = make
        self._of: tuple[mx.array, ...] = ()
        self._made: mx.array | None = None

    def keep(self, *own: mx.array) -> None:
        """Make it of these parameters, from now on only where they are replaced."""
        self._of, self._made = own, self._make(*own)

    @property
    def made(self) -> list[mx.array]:
        """What is kept, if anything."""
        return [] if self._made is None else [self._made]

    def __call__(self, *own: mx.array) -> mx.array:
        """Of these parameters, as `make` makes it."""
        if self._made is None or any(a is not b for a, b in zip(own, self._of, strict=True)):
            return self._make(*own)
        return self._made


class Attention(nn.Module):
    """Grouped-query attention with normed queries, keys and values and a scale of 1.

    A full layer has no `v_proj`: its values are the raw key projection through the value norm.
    """

    def __init__(self, config: Config, layer: LayerConfig):
        super().__init__()
        self.layer = layer
        self.eps = config.rms_norm_eps
        self.heads = config.num_attention_heads
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
        self._joined = Joined([])
        self._scales = Derived(partial(_spread, self.heads, layer))
        turning = self.heads + layer.num_key_value_heads
        values = 0 if layer.window is None else layer.num_key_value_heads
        self._still = (mx.arange(turning + values) >= turning)[:, None, None]

    def rotation(self, positions: mx.array) -> mx.array:
        """Cosines and sines (B or 1, T, 1, 2, head_dim / 2) at float32 positions (B or 1, T)."""
        return cos_and_sin(positions, self._frequencies)

    @property
    def _parts(self) -> list[nn.Linear]:
        """What projects to heads: of queries, keys and, where they have their own, values."""
        return [self.q_proj, self.k_proj, *([] if self.layer.window is None else [self.v_proj])]

    def join(self) -> None:
        """One product instead of three, and scales put together, from now on."""
        self._joined = Joined(self._parts)
        self._scales.keep(self.q_norm.weight, self.k_norm.weight)

    @property
    def constants(self) -> list[mx.array]:
        """What a forward pass needs beside the parameters."""
        return [self._frequencies, self._still, *self._scales.made]

    def __call__(self, x: mx.array, views: Sequence[View], rotation: mx.array) -> mx.array:
        batch, length, _ = x.shape
        projected = self._joined(self._parts, x)
        normed = rms_norm(projected.reshape(batch, length, -1, self.layer.head_dim), self.eps)
        scales = self._scales(self.q_norm.weight, self.k_norm.weight)
        turned = scaled_and_turned(normed, scales, rotation, self._still)
        queries, new = turned[:, :, : self.heads], turned[:, :, self.heads :]
        if self.layer.window is None:
            new = mx.concatenate([new, normed[:, :, self.heads :]], axis=2)
        queries, new = queries.swapaxes(1, 2), new.swapaxes(1, 2)
        if len(views) == 1:
            seen = self._attend(queries, new, views[0])
        else:
            # PrefixCache differ in length: rows of each attend by themselves, without padding.
            ends = list(accumulate(view.rows for view in views))[:-1]
            parts = zip(mx.split(queries, ends), mx.split(new, ends), views, strict=True)
            seen = mx.concatenate([self._attend(*part) for part in parts])
        return self.o_proj(seen.swapaxes(1, 2).reshape(batch, length, -1))

    def _attend(self, queries: mx.array, new: mx.array, view: View) -> mx.array:
        keys, values = mx.split(view.verb(new), 2, axis=1)
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
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)


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
def scaled_and_turned(
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


@mx.compile
def scaled_sum(x: mx.array, y: mx.array, scalar: mx.array) -> mx.array:
    """(x + y) * scalar"""
    return (x + y) * scalar


class GatedMLP(nn.Module):
    """down(gelu(gate(x)) * up(x))"""

    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)
        self._joined = Joined([])

    def join(self) -> None:
        """One product instead of two, from now on."""
        self._joined = Joined([self.gate_proj, self.up_proj])

    def __call__(self, x: mx.array) -> mx.array:
        both = self._joined([self.gate_proj, self.up_proj], x)
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
        # MLX's CPU backend gathers in float32 only.
        dtype = mx.float32 if mx.default_device() == mx.Device(mx.cpu) else x.dtype
        product = mx.gather_mm(
            x.astype(dtype),
            self.weight.astype(dtype).swapaxes(-1, -2),
            rhs_indices=experts,
            sorted_indices=in_order,
        )
        return product.astype(x.dtype)


class Experts(nn.Module):
    """The routed half of the feed-forward layer: `top_k` experts a token, summed by weight."""

    def __init__(self, config: Config):
        super().__init__()
        hidden, inner = config.hidden_size, config.moe_intermediate_size
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


class Block(nn.Module):
    """One layer; encoder and decoder call it with their own mask, scalar and cache verb."""

    def __init__(self, config: Config, layer: LayerConfig):
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, layer)
        self.mlp = GatedMLP(hidden, config.intermediate_size)
        self.router = Router(config)
        self.experts = Experts(config)
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

    def join(self) -> None:
        """Products of one input become one product, and scales are put together."""
        self.self_attn.join()
        self.mlp.join()
        self._scales.keep(*self._three)

    @property
    def constants(self) -> list[mx.array]:
        """What a forward pass needs beside the parameters."""
        return [*self.self_attn.constants, *self._scales.made]

    def __call__(
        self, x: mx.array, views: Sequence[View], rotation: mx.array, scalar: mx.array
    ) -> mx.array:
        attended = self.self_attn(self.input_layernorm(x), views, rotation)
        x = x + self.post_attention_layernorm(attended)
        # Three norms of one input are one norm and one product with three scales.
        scales = self._scales(*self._three)
        to_mlp, to_experts, to_router = rms_norm(x, self.eps) * scales
        dense = self.post_feedforward_layernorm_1(self.mlp(to_mlp))
        routed = self.experts(to_experts, *self.router(to_router), self.router.per_expert_scale)
        routed = self.post_feedforward_layernorm_2(routed)
        return scaled_sum(x, self.post_feedforward_layernorm(dense + routed), scalar)


def _stacked(mlp: mx.array, experts: mx.array, router: mx.array) -> mx.array:
    """Scales (3, 1, 1, hidden) of a layer's three norms before the feed-forward layer."""
    return mx.stack([mlp, experts, router * router.shape[-1] ** -0.5])[:, None, None]


class SelfConditioning(GatedMLP):
    """Adds what the previous step believed to the canvas embedding (decoder only)."""

    def __init__(self, config: Config):
        super().__init__(config.hidden_size, config.intermediate_size)
        self.pre_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eps = config.rms_norm_eps

    def __call__(self, embedded: mx.array, belief: mx.array | None = None) -> mx.array:
        """`belief` is the embedding that the last step expects; None stands for zeros.

        That is the first step; the norm applies there too.
        """
        if belief is not None:
            embedded = embedded + super().__call__(self.pre_norm(belief))
        return rms_norm(embedded, self.eps)


class Decoder(nn.Module):
    """All weights but the encoder's layer scalars."""

    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Block(config, layer) for layer in config.layers]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_conditioning = SelfConditioning(config)


class LayerScalar(nn.Module):
    """What the encoder has of its own in a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_scalar = mx.ones((1,))


class LanguageModel(nn.Module):
    """The encoder's layers, as far as they are not the decoder's."""

    def __init__(self, config: Config):
        super().__init__()
        self.layers = [LayerScalar() for _ in config.layers]


class Encoder(nn.Module):
    """`language_model`, as the checkpoint names it; the vision tower would stand beside it."""

    def __init__(self, config: Config):
        super().__init__()
        self.language_model = LanguageModel(config)


class Backbone(nn.Module):
    """`decoder` and `encoder` as the checkpoint names them; the encoder owns only its scalars."""

    def __init__(self, config: Config):
        super().__init__()
        self.decoder = Decoder(config)
        self.encoder = Encoder(config)


@dataclass(frozen=True)
class Pass:
    """What a denoising step wants decoded: canvases (B, L) behind one context.

    `belief` (B, L, hidden) is the embedding that the step before expects; None at the first.
    """

    canvas: mx.array
    cache: list[LayerCache]
    belief: mx.array | None = None


class DiffusionGemma(nn.Module):
    """The text model: `encode` writes a prompt to the cache, a call denoises a canvas."""

    def __init__(self, config: Config, generation: GenerationConfig):
        super().__init__()
        self.config = config
        self.generation = generation
        self.model = Backbone(config)
        self.context = config.max_position_embeddings  # tokens, or fewer where memory is short
        self._table: mx.array | None = None

    def make_cache(self) -> list[LayerCache]:
        """An empty cache, a layer an entry."""
        return [LayerCache(layer.window) for layer in self.config.layers]

    def embedding(self, tokens: mx.array) -> mx.array:
        """(B, T) ids -> rows of the table (B, T, hidden)."""
        embed = self.model.decoder.embed_tokens
        rows: mx.array = embed(tokens)
        if isinstance(embed, nn.QuantizedEmbedding):
            # Where scales are no floats, MLX gives bfloat16 whatever is computed in.
            rows = rows.astype(self.model.decoder.norm.weight.dtype)
        return rows

    def embed(self, tokens: mx.array) -> mx.array:
        """(B, T) ids -> what a layer is given (B, T, hidden)."""
        return self.scaled(self.embedding(tokens))

    def scaled(self, embedded: mx.array) -> mx.array:
        """Rows of the table times sqrt(hidden)."""
        # The reference rounds the factor to the embedding's type.
        return embedded * mx.array(self.config.hidden_size**0.5, dtype=embedded.dtype)

    def encode(
        self,
        tokens: mx.array,
        cache: list[LayerCache],
        input_embeddings: mx.array | None = None,
        *,
        mask: EncoderMask = LayerCache.encoder_mask,
        evaluate: Evaluate | None = None,
    ) -> mx.array:
        """Append (B, T) ids to the cache -> hidden states (B, T, hidden).

        Nobody who only evaluates the cache pays for the last layer's attention and experts.

        Args:
            tokens: ids.
            cache: written.
            input_embeddings: (B, T, hidden) to take in place of `embed(tokens)`.
            mask: what each layer's new tokens see, given its cache and their number; causal, and
                within the window of a sliding layer, by default.
            evaluate: called with parts of long prompts, so that their scores do not pile up.
        """
        x = self.embed(tokens) if input_embeddings is None else input_embeddings
        rotations = self._rotations([cache[0].length], x.shape[1])
        scalars = self.model.encoder.language_model.layers
        for block, layer, own in zip(self.model.decoder.layers, cache, scalars, strict=True):
            # Nothing is evaluated in the last layer: its output may not be wanted.
            on_the_way = None if layer is cache[-1] else evaluate
            view = View(x.shape[0], mask(layer, x.shape[1]), layer.append, on_the_way)
            x = block(x, [view], rotations[block.self_attn.layer], own.layer_scalar)
        return self.model.decoder.norm(x)

    def decode(self, passes: Sequence[Pass], evaluate: Evaluate | None = None) -> list[mx.array]:
        """Hidden states (B, L, hidden) of each pass's canvases; all have the same L.

        Every canvas position sees the whole canvas and, of its cache, all that is held: in a
        sliding layer the last `window - 1` tokens. Passes do not see each other. `evaluate` is
        called with each layer's output.
        """
        canvas, belief = passes[0].canvas, passes[0].belief
        if len(passes) > 1:
            canvas = mx.concatenate([each.canvas for each in passes])
            if known := [each.belief for each in passes if each.belief is not None]:
                # No belief is one of zeros: norm and MLP leave them zero.
                shape = (*canvas.shape[1:], self.config.hidden_size)
                none = (mx.zeros((len(p.canvas), *shape), known[0].dtype) for p in passes)
                belief = mx.concatenate(
                    [z if p.belief is None else p.belief for p, z in zip(passes, none, strict=True)]
                )
        x = self.model.decoder.self_conditioning(self.embed(canvas), belief)
        offsets = [each.cache[0].length for each in passes for _ in range(len(each.canvas))]
        rotations = self._rotations(offsets[:1] if len(passes) == 1 else offsets, canvas.shape[1])
        for i, block in enumerate(self.model.decoder.layers):
            layers = [(len(each.canvas), each.cache[i]) for each in passes]
            views = [View(rows, None, layer.read) for rows, layer in layers]
            x = block(x, views, rotations[block.self_attn.layer], block.layer_scalar)
            if evaluate is not None:
                evaluate(x)
        x = self.model.decoder.norm(x)
        if len(passes) == 1:
            return [x]
        return list(mx.split(x, list(accumulate(len(each.canvas) for each in passes))[:-1]))

    def _rotations(self, offsets: list[int], count: int) -> dict[LayerConfig, mx.array]:
        """Rotation of `count` positions from each row's offset on, for each kind of layer."""
        positions = mx.array([[float(offset + i) for i in range(count)] for offset in offsets])
        kinds = {block.self_attn.layer: block.self_attn for block in self.model.decoder.layers}
        return {layer: attention.rotation(positions) for layer, attention in kinds.items()}

    def join(self) -> None:
        """Products of one input become one product; for weights that stay as they are."""
        for block in self.model.decoder.layers:
            block.join()
        self.model.decoder.self_conditioning.join()

    @property
    def constants(self) -> list[mx.array]:
        """Arrays beside the parameters that a forward pass needs, to be evaluated with them.

        What stays lazy belongs to the thread that made it, and fails in any other.
        """
        return [array for block in self.model.decoder.layers for array in block.constants]

    @property
    def dequantizes(self) -> bool:
        """Whether each step dequantizes the embedding table."""
        quantized = isinstance(self.model.decoder.embed_tokens, nn.QuantizedEmbedding)
        return quantized and self._table is None

    def keep_table(self, evaluate: Evaluate) -> None:
        """Hold the embedding table dequantized, beside its packed form.

        `evaluate` is called with the table after each block of it.
        """
        width = self.config.hidden_size
        table = mx.zeros((self.config.vocab_size, width), self.model.decoder.norm.weight.dtype)
        for first, rows in self.vocabulary(TABLE_BYTES // (32 * width)):
            table[first : first + len(rows)] = rows
            evaluate(table)  # in place: at once, temporaries would be several times as large
        self._table = table

    def vocabulary(self, count: int) -> Iterator[tuple[int, mx.array]]:
        """The embedding table, `count` ids at a time: the first id and rows (count, hidden).

        Rows are dequantized once for the head and for self-conditioning: on Apple GPUs that is
        faster than a quantized product with the table not transposed.
        """
        embed = self.model.decoder.embed_tokens
        whole = self._table
        if not isinstance(embed, nn.QuantizedEmbedding):
            whole = embed.weight
        for first in range(0, self.config.vocab_size, count):
            some = slice(first, first + count)
            if whole is not None:
                yield first, whole[some]
                continue
            rows = mx.dequantize(
                embed.weight[some],
                embed.scales[some],
                None if embed.get("biases") is None else embed.biases[some],
                group_size=embed.group_size,
                bits=embed.bits,
                mode=embed.mode,
            )
            yield first, rows.astype(self.model.decoder.norm.weight.dtype)

    def logits(self, hidden: mx.array) -> mx.array:
        """(..., hidden) -> float32 (..., vocabulary), softly capped by tanh."""
        cap = self.config.final_logit_softcapping
        raw = self.model.decoder.embed_tokens.as_linear(hidden).astype(mx.float32)
        return mx.tanh(raw / cap) * cap

    def __call__(
        self, canvas: mx.array, cache: list[LayerCache], belief: mx.array | None = None
    ) -> mx.array:
        """One denoising pass: canvas (B, L) -> float32 logits (B, L, vocabulary)."""
        return self.logits(self.decode([Pass(canvas, cache, belief)])[0])


def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Checkpoint tensors -> parameters: raw expert stacks gain `.weight`, the rest is dropped.

    Dropped are the vision tower and the copies of tied tensors that some files carry.
    """
    return {parameter_name(name): array for name, array in weights.items() if is_text(name)}


def parameter_name(tensor: str) -> str:
    """The parameter a checkpoint tensor belongs to."""
    raw = tensor.endswith((".experts.gate_up_proj", ".experts.down_proj"))
    return tensor + ".weight" if raw else tensor


def is_text(tensor: str) -> bool:
    """Whether a checkpoint tensor is one of this model's (not vision, not a tied copy)."""
    if tensor.startswith("model.decoder."):
        return True
    return tensor.startswith("model.encoder.language_model.") and tensor.endswith(".layer_scalar")
