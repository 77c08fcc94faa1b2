"""The model in plain torch, for training: small, of fixed shapes, and fast on a GPU.

It computes what the reference's classes compute (tests/tools/test_tiny_model.py), for prompts that
are padded on the left, with every expert on every token: for eight small experts that is faster
than gathering. Parameters have the checkpoint's names without `model.decoder.`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CAP = 30.0
EPS = 1e-6
HEAD = 32


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; layers alternate between sliding and full attention."""

    vocab: int
    hidden: int = 128
    intermediate: int = 256
    expert: int = 64
    layers: int = 4
    heads: int = 4
    experts: int = 8


# Keys and values of the prompt, a pair (batch, heads, tokens, HEAD) a layer.
Cache = list[tuple[Tensor, Tensor]]


def rms(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Root-mean-square norm in float32."""
    x = x.float()
    if x.shape[-1] > HEAD:
        return F.rms_norm(x, x.shape[-1:], weight, EPS)
    # On a GPU, the fused one is slow for rows as short as a head.
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    return x if weight is None else x * weight


class Norm(nn.Module):
    """A norm with a scale."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms(x, self.weight)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class Attention(nn.Module):
    """Holds projections and norms; full layers have no projection of values."""

    def __init__(self, shape: Shape, full: bool):
        super().__init__()
        keys = HEAD * (1 if full else 2)
        self.q_proj = linear(shape.hidden, HEAD * shape.heads)
        self.k_proj = linear(shape.hidden, keys)
        if not full:
            self.v_proj = linear(shape.hidden, keys)
        self.o_proj = linear(HEAD * shape.heads, shape.hidden)
        self.q_norm, self.k_norm = Norm(HEAD), Norm(HEAD)
        self.full = full
        base, pairs = (1e6, HEAD // 8) if full else (1e4, HEAD // 2)
        frequencies = torch.zeros(HEAD // 2)
        frequencies[:pairs] = base ** -(2 * torch.arange(pairs) / HEAD)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(
        self, x: Tensor, positions: Tensor, past: tuple[Tensor, Tensor] | None, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output and the new keys and values; `bias` (batch, 1, queries, keys) is -inf or 0."""
        batch, length, _ = x.shape
        angles = positions.float()[:, None] * self.frequencies
        cos, sin = angles.cos(), angles.sin()

        def heads(projected: Tensor) -> Tensor:
            return projected.view(batch, length, -1, HEAD).transpose(1, 2)

        def turned(states: Tensor) -> Tensor:
            a, b = states.chunk(2, dim=-1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

        raw = heads(self.k_proj(x))
        queries = turned(rms(heads(self.q_proj(x)), self.q_norm.weight)).to(raw.dtype)
        keys = turned(rms(raw, self.k_norm.weight)).to(raw.dtype)
        values = rms(raw if self.full else heads(self.v_proj(x))).to(raw.dtype)
        all_keys, all_values = keys, values
        if past is not None:
            all_keys = torch.cat([past[0], keys], dim=2)
            all_values = torch.cat([past[1], values], dim=2)
        groups = queries.shape[1] // keys.shape[1]
        seen = F.scaled_dot_product_attention(
            queries,
            all_keys.repeat_interleave(groups, dim=1),
            all_values.repeat_interleave(groups, dim=1),
            attn_mask=bias.to(raw.dtype),
            scale=1.0,
        )
        return self.o_proj(seen.transpose(1, 2).reshape(batch, length, -1)), keys, values


class MLP(nn.Module):
    """down(gelu(gate(x)) * up(x))"""

    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.gate_proj = linear(hidden, intermediate)
        self.up_proj = linear(hidden, intermediate)
        self.down_proj = linear(intermediate, hidden)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(
            F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x)
        )
        return out


class Router(nn.Module):
    """Weights of all experts, zero but for the best two."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.proj = linear(shape.hidden, shape.experts)
        self.scale = nn.Parameter(torch.ones(shape.hidden))
        self.per_expert_scale = nn.Parameter(torch.ones(shape.experts))

    def forward(self, x: Tensor) -> Tensor:
        scaled = rms(x) * self.scale * self.scale.shape[0] ** -0.5
        with torch.autocast(x.device.type, enabled=False):
            shares = (scaled @ self.proj.weight.T).softmax(-1)
        best = shares.amax(-1, keepdim=True)
        second = shares.masked_fill(shares >= best, -1.0).amax(-1, keepdim=True)
        chosen = torch.where(shares >= second, shares, 0.0)
        return chosen / chosen.sum(-1, keepdim=True) * self.per_expert_scale


class Experts(nn.Module):
    """Stacks of gate, up and down."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(shape.experts, 2 * shape.expert, shape.hidden))
        self.down_proj = nn.Parameter(torch.empty(shape.experts, shape.hidden, shape.expert))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        both = F.linear(x, self.gate_up_proj.flatten(0, 1)).unflatten(-1, (weights.shape[-1], -1))
        gate, up = both.chunk(2, dim=-1)
        inner = F.gelu(gate, approximate="tanh") * up * weights[..., None].to(up.dtype)
        return F.linear(inner.flatten(-2), self.down_proj.transpose(1, 2).flatten(0, 1).T)


class Block(nn.Module):
    """A layer, of encoder and decoder alike: their layer scalars stay 1 here."""

    def __init__(self, shape: Shape, full: bool):
        super().__init__()
        self.self_attn = Attention(shape, full)
        self.mlp = MLP(shape.hidden, shape.intermediate)
        self.router = Router(shape)
        self.experts = Experts(shape)
        for name in (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "pre_feedforward_layernorm_2",
            "post_feedforward_layernorm",
            "post_feedforward_layernorm_1",
            "post_feedforward_layernorm_2",
        ):
            self.add_module(name, Norm(shape.hidden))

    def forward(
        self, x: Tensor, positions: Tensor, past: tuple[Tensor, Tensor] | None, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        seen, keys, values = self.self_attn(self.input_layernorm(x), positions, past, bias)
        x = x + self.post_attention_layernorm(seen)
        dense = self.post_feedforward_layernorm_1(self.mlp(self.pre_feedforward_layernorm(x)))
        routed = self.experts(self.pre_feedforward_layernorm_2(x), self.router(x))
        both = dense + self.post_feedforward_layernorm_2(routed)
        return x + self.post_feedforward_layernorm(both), keys, values


class SelfConditioning(MLP):
    """Adds what the last step believed to the embedded canvas."""

    def __init__(self, shape: Shape):
        super().__init__(shape.hidden, shape.intermediate)
        self.pre_norm = Norm(shape.hidden)

    def forward(self, embedded: Tensor, believed: Tensor) -> Tensor:  # type: ignore[override]
        return rms(embedded + super().forward(self.pre_norm(believed)))


def _same(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


class Model(nn.Module):
    """Encoder and decoder over the same blocks; `quick` compiles what is called for shapes that do
    not change."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Block(shape, bool(i % 2)) for i in range(shape.layers))
        self.norm = Norm(shape.hidden)
        self.self_conditioning = SelfConditioning(shape)
        self.quick: Callable[..., Any] = _same

    def start(self) -> None:
        """Draw the weights."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith(("q_norm.weight", "k_norm.weight")):
                    parameter.fill_(HEAD**-0.25)
                elif "norm" not in name and "scale" not in name:
                    parameter.normal_(0, 0.02 if "embed" in name else 0.05)

    def embed(self, ids: Tensor) -> Tensor:
        """What a layer is given."""
        return self.embed_tokens(ids) * math.sqrt(self.shape.hidden)

    def encode(self, ids: Tensor, real: Tensor) -> tuple[Tensor, Cache]:
        """Causal hidden states and keys and values; `real` (batch, tokens) is False for padding."""
        length = ids.shape[1]
        order = torch.arange(length, device=ids.device)
        past = order[:, None] >= order
        # Padding sees itself, or its softmax would be over nothing.
        seen = (past & real[:, None]) | (order[:, None] == order)
        bias = torch.zeros(seen.shape, device=ids.device).masked_fill(~seen, -torch.inf)[:, None]
        x = self.embed(ids)
        cache = []
        for block in self.layers:
            x, keys, values = self.quick(block)(x, order, None, bias)
            cache.append((keys, values))
        return self.norm(x), cache

    def decode(self, canvas: Tensor, believed: Tensor, cache: Cache, real: Tensor) -> Tensor:
        """Hidden states of the canvas behind the cache of `real` prompts."""
        batch, length = canvas.shape
        before = real.shape[1]
        order = torch.arange(before, before + length, device=canvas.device)
        seen = torch.cat([real, torch.ones_like(canvas, dtype=torch.bool)], dim=1)[:, None, None]
        bias = torch.zeros(seen.shape, device=canvas.device).masked_fill(~seen, -torch.inf)
        bias = bias.expand(batch, 1, length, before + length)
        x = self.self_conditioning(self.embed(canvas), believed)
        for block, past in zip(self.layers, cache, strict=True):
            x, _, _ = self.quick(block)(x, order, past, bias)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32, softly capped."""
        return capped(hidden, self.embed_tokens.weight)


def capped(hidden: Tensor, table: Tensor) -> Tensor:
    return torch.tanh(F.linear(hidden, table).float() / CAP) * CAP


def losses(hidden: Tensor, table: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of each position."""
    logits = capped(hidden, table).flatten(0, 1)
    return F.cross_entropy(logits, target.flatten(), reduction="none").view(target.shape)


def belief(
    hidden: Tensor, table: Tensor, temperature: Tensor, uniform: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Expected embedding, entropy in nats, best token and, with uniform draws, a drawn token."""
    scores = capped(hidden, table) / temperature
    log_shares = scores.log_softmax(-1)
    shares = log_shares.exp()
    entropy = -(shares * log_shares).sum(-1)
    soft = (shares.to(table.dtype) @ table).float() * math.sqrt(table.shape[1])
    best = scores.argmax(-1)
    if uniform is None:
        return soft, entropy, best, best
    drawn = (log_shares - torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))).argmax(-1)
    return soft, entropy, best, drawn


def accepted(entropy: Tensor, bound: float = 0.1) -> Tensor:
    """The most certain positions, while the entropies before each add up to the bound at most."""
    ordered, order = entropy.sort(-1)
    passes = ordered.cumsum(-1) - ordered <= bound
    return torch.zeros_like(passes).scatter(-1, order, passes)
