"""The model in plain torch, for training: small, of fixed shapes, and fast on a GPU.

It computes what the reference's classes compute (tests/tools/test_tiny_model.py), for prompts that
are padded on the left, with every expert on every token: for eight small experts that is faster
than gathering. Parameters have the checkpoint's names without `model.decoder.`.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CAP = 30.0
EPS = 1e-6
HEAD = 32
IMAGE = 8  # the id that stands for a token of a picture


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; layers alternate between sliding and full attention.

    The last is full: the reference makes it so, whatever the config says.
    """

    vocab: int
    hidden: int = 128
    intermediate: int = 256
    expert: int = 64
    layers: int = 4
    heads: int = 4
    experts: int = 8

    def is_full(self, layer: int) -> bool:
        """Whether a layer sees all that is before it."""
        return (self.layers - layer) % 2 == 1


# Keys and values of the prompt, a pair (batch, heads, tokens, HEAD) a layer.
Cache = list[tuple[Tensor, Tensor]]


def rms(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Root-mean-square norm over the last axis, computed in float32."""
    return F.rms_norm(x, x.shape[-1:], None if weight is None else weight.to(x.dtype), EPS)


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

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What heads of queries and keys, and their halves swapped, are multiplied with: cosines
        and sines times the norms' scales, (tokens, heads, HEAD), with rows before them where
        positions have them."""
        angles = positions.float()[..., None, None] * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        queries, keys = self.q_proj.weight.shape[0] // HEAD, self.k_proj.weight.shape[0] // HEAD
        scales = torch.cat(
            [self.q_norm.weight.expand(queries, HEAD), self.k_norm.weight.expand(keys, HEAD)]
        )
        a, b = scales.chunk(2, dim=-1)
        return torch.cat([a * cos, b * cos], -1), torch.cat([-b * sin, a * sin], -1)

    def forward(
        self,
        normed: Tensor,
        scale: Tensor,
        positions: Tensor,
        past: tuple[Tensor, Tensor] | None,
        bias: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output and the new keys and values; `bias` (batch, 1, queries, keys) is -inf or 0.

        `scale` is that of the norm before: it goes into the weights, as do all such scales here.
        """
        batch, length, _ = normed.shape
        kind = normed.dtype
        parts = [self.q_proj.weight, self.k_proj.weight]
        if not self.full:
            parts.append(self.v_proj.weight)
        projected = F.linear(normed, (torch.cat(parts) * scale).to(kind))
        heads = projected.view(batch, length, projected.shape[-1] // HEAD, HEAD)
        size = torch.linalg.vector_norm(heads, dim=-1, keepdim=True, dtype=torch.float32)
        heads = heads * torch.rsqrt(size.square() / HEAD + EPS).to(kind)
        queries, keys = (p.shape[0] // HEAD for p in parts[:2])
        turning = heads[:, :, : queries + keys]
        values = heads[:, :, -keys:].transpose(1, 2)
        straight, crossed = (table.to(kind) for table in self.rotation(positions))
        a, b = turning.chunk(2, dim=-1)
        turned = torch.addcmul(turning * straight, torch.cat([b, a], dim=-1), crossed)
        turned = turned.transpose(1, 2)
        own, seen_keys, seen_values = turned[:, :queries], turned[:, queries:], values
        if past is not None:
            seen_keys = torch.cat([past[0], seen_keys], dim=2)
            seen_values = torch.cat([past[1], values], dim=2)
        groups = queries // keys
        seen = F.scaled_dot_product_attention(
            own,
            seen_keys.repeat_interleave(groups, dim=1),
            seen_values.repeat_interleave(groups, dim=1),
            attn_mask=bias,
            scale=1.0,
        )
        seen = seen.transpose(1, 2).reshape(batch, length, -1)
        return F.linear(seen, self.o_proj.weight.to(kind)), turned[:, queries:], values


class MLP(nn.Module):
    """down(gelu(gate(x)) * up(x))"""

    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.gate_proj = linear(hidden, intermediate)
        self.up_proj = linear(hidden, intermediate)
        self.down_proj = linear(intermediate, hidden)


class Router(nn.Module):
    """Weights of all experts, zero but for the best two."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.proj = linear(shape.hidden, shape.experts)
        self.scale = nn.Parameter(torch.ones(shape.hidden))
        self.per_expert_scale = nn.Parameter(torch.ones(shape.experts))

    def forward(self, normed: Tensor) -> Tensor:
        weight = self.proj.weight * self.scale * self.scale.shape[0] ** -0.5
        shares = F.linear(normed, weight.to(normed.dtype)).float().softmax(-1)
        with torch.no_grad():
            best = shares.amax(-1, keepdim=True)
            second = shares.masked_fill(shares >= best, -1.0).amax(-1, keepdim=True)
            chosen = (shares >= second).float()
        shares = shares * chosen
        shares = shares / shares.sum(-1, keepdim=True) * self.per_expert_scale
        return shares.to(normed.dtype)


class Experts(nn.Module):
    """Stacks of gate, up and down."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(shape.experts, 2 * shape.expert, shape.hidden))
        self.down_proj = nn.Parameter(torch.empty(shape.experts, shape.hidden, shape.expert))


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
        """Layer output in float32, and keys and values in the type of `bias`."""
        kind = bias.dtype
        scale = self.input_layernorm.weight
        seen, keys, values = self.self_attn(rms(x.to(kind)), scale, positions, past, bias)
        x = x + self.post_attention_layernorm(seen)
        # MLP and experts side by side: all gates, then all ups.
        normed = rms(x.to(kind))
        gates, ups = self.experts.gate_up_proj.chunk(2, dim=1)
        dense, routed = (
            self.pre_feedforward_layernorm.weight,
            self.pre_feedforward_layernorm_2.weight,
        )
        weight = torch.cat(
            [
                self.mlp.gate_proj.weight * dense,
                gates.flatten(0, 1) * routed,
                self.mlp.up_proj.weight * dense,
                ups.flatten(0, 1) * routed,
            ]
        )
        gate, up = F.linear(normed, weight.to(kind)).chunk(2, dim=-1)
        inner = F.gelu(gate, approximate="tanh") * up
        width = self.mlp.gate_proj.weight.shape[0]
        by_expert = inner[..., width:].unflatten(-1, (len(gates), -1))
        mixed = (by_expert * self.router(normed)[..., None]).flatten(-2)
        down = self.experts.down_proj.transpose(1, 2).flatten(0, 1).T
        both = self.post_feedforward_layernorm_1(
            F.linear(inner[..., :width], self.mlp.down_proj.weight.to(kind))
        ) + self.post_feedforward_layernorm_2(F.linear(mixed, down.to(kind)))
        return x + self.post_feedforward_layernorm(both), keys, values


class SelfConditioning(MLP):
    """Adds what the last step believed to the embedded canvas."""

    def __init__(self, shape: Shape):
        super().__init__(shape.hidden, shape.intermediate)
        self.pre_norm = Norm(shape.hidden)

    def forward(self, embedded: Tensor, believed: Tensor, kind: torch.dtype) -> Tensor:
        normed = self.pre_norm(believed.to(kind))
        gate = F.gelu(F.linear(normed, self.gate_proj.weight.to(kind)), approximate="tanh")
        inner = gate * F.linear(normed, self.up_proj.weight.to(kind))
        return rms(embedded + F.linear(inner, self.down_proj.weight.to(kind)))


class Model(nn.Module):
    """Encoder and decoder over the same blocks; `kind` is what their products are computed in."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Block(shape, shape.is_full(i)) for i in range(shape.layers))
        self.norm = Norm(shape.hidden)
        self.self_conditioning = SelfConditioning(shape)
        self.kind = torch.float32

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

    def encode(
        self, ids: Tensor, real: Tensor, pictures: Tensor | None = None
    ) -> tuple[Tensor, Cache]:
        """Causal hidden states and keys and values; `real` (batch, tokens) is False for padding.

        `pictures` (batch, tokens of one, hidden) stand where ids are `IMAGE` and see each other.
        """
        length = ids.shape[1]
        order = torch.arange(length, device=ids.device)
        past = order[:, None] >= order
        # Padding sees itself, or its softmax would be over nothing.
        seen = (past & real[:, None]) | (order[:, None] == order)
        x = self.embed(ids)
        if pictures is not None:
            places = ids == IMAGE
            seen = seen | (places[:, :, None] & places[:, None])
            x = x.masked_scatter(places[..., None], pictures)
        bias = self._bias(seen)[:, None]
        cache = []
        for block in self.layers:
            x, keys, values = block(x, order, None, bias)
            cache.append((keys, values))
        return self.norm(x.to(self.kind)), cache

    def read_on(self, ids: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Hidden states of texts behind prompts of one length, and what the cache grows to."""
        before, length = cache[0][0].shape[2], ids.shape[1]
        order = torch.arange(before + length, device=ids.device)
        bias = self._bias(order[before:, None] >= order)
        x = self.embed(ids)
        grown = []
        for block, past in zip(self.layers, cache, strict=True):
            x, *new = block(x, order[before:], past, bias)
            grown.append(tuple(torch.cat(pair, dim=2) for pair in zip(past, new, strict=True)))
        return self.norm(x.to(self.kind)), grown

    def decode(
        self,
        canvas: Tensor,
        believed: Tensor,
        cache: Cache,
        real: Tensor,
        first: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of the canvas behind the cache of `real` prompts.

        Its positions begin at `first` (batch, 1), or behind the cache, where that is None.
        """
        batch, length = canvas.shape
        before = real.shape[1]
        order = torch.arange(length, device=canvas.device) + (before if first is None else first)
        seen = torch.cat([real, torch.ones_like(canvas, dtype=torch.bool)], dim=1)[:, None, None]
        bias = self._bias(seen).expand(batch, 1, length, before + length)
        x = self.self_conditioning(self.embed(canvas), believed, self.kind)
        for block, past in zip(self.layers, cache, strict=True):
            x, _, _ = block(x, order, past, bias)
        return self.norm(x.to(self.kind))

    def _bias(self, seen: Tensor) -> Tensor:
        """Zero where something is seen, -inf elsewhere."""
        none = torch.zeros(seen.shape, dtype=self.kind, device=seen.device)
        return none.masked_fill(~seen, -torch.inf)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32, softly capped."""
        return capped(hidden, self.embed_tokens.weight)


def capped(hidden: Tensor, table: Tensor) -> Tensor:
    """Logits, capped in float32."""
    return torch.tanh(F.linear(hidden, table.to(hidden.dtype)).float() / CAP) * CAP


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
    soft = (shares.to(hidden.dtype) @ table.to(hidden.dtype)).float() * math.sqrt(table.shape[1])
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
