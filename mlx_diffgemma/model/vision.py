"""The vision tower: patches of one picture -> embeddings that stand in a prompt for its tokens.

Each picture goes through by itself, without padding and so without a mask. Parameters keep Hugging
Face's names, but for the `linear` that it wraps around each matrix. Nothing here evaluates.
"""

import mlx.core as mx
import mlx.nn as nn

from ..arguments import SettingError
from .cache import Evaluate
from .feed_forward import GatedMLP
from .layers import rms_norm
from .vision_config import SCORE_BYTES, VisionConfig

# Widths of a head that MLX has a fused attention for: other heads are padded to the next one.
FUSED_WIDTHS = (64, 80, 128)


class PatchEmbedder(nn.Module):
    """Patches and where they stand -> what the first layer is given."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.input_proj = nn.Linear(3 * config.patch_size**2, config.hidden_size, bias=False)
        self.position_embedding_table = mx.zeros(
            (2, config.position_embedding_size, config.hidden_size)
        )

    def __call__(self, patches: mx.array, rows: int, columns: int) -> mx.array:
        pixels = (2 * (patches.astype(mx.float32) - 0.5)).astype(self.input_proj.weight.dtype)
        across, down = self.position_embedding_table
        places = across[:columns] + down[:rows, None]
        return self.input_proj(pixels) + places.reshape(rows * columns, -1)


class VisionAttention(nn.Module):
    """All patches of a picture see each other, with normed queries, keys and values, scale 1."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        self.eps = config.rms_norm_eps
        inner = config.heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def __call__(self, x: mx.array, rotation: mx.array, evaluate: Evaluate | None) -> mx.array:
        """(N, hidden) -> (N, hidden); queries in blocks, so that scores do not all exist at once.

        `evaluate` is called with each block before the next, or several would be under way.
        """
        count = len(x)
        shape = (count, self.heads, self.head_dim)
        queries = turned(self.q_norm(self.q_proj(x).reshape(shape)), rotation)
        keys = turned(self.k_norm(self.k_proj(x).reshape(shape)), rotation)
        values = rms_norm(self.v_proj(x).reshape(shape), self.eps)
        queries, keys, values = (self._padded(each) for each in (queries, keys, values))
        if evaluate is not None:
            for each in (queries, keys, values):
                evaluate(each)  # one after the other: what each is made of is gone then
        rows = max(1, SCORE_BYTES // (4 * self.heads * count))
        parts = []
        for first in range(0, count, rows):
            some = queries[:, :, first : first + rows]
            parts.append(mx.fast.scaled_dot_product_attention(some, keys, values, scale=1.0))
            if evaluate is not None and rows < count:
                evaluate(parts[-1])
        seen = mx.concatenate(parts, axis=2)[0, :, :, : self.head_dim]
        return self.o_proj(seen.swapaxes(0, 1).reshape(count, -1))

    def _padded(self, x: mx.array) -> mx.array:
        """(N, heads, head_dim) -> (1, heads, N, width), zeros behind: they change no product."""
        width = next((w for w in FUSED_WIDTHS if w >= self.head_dim), self.head_dim)
        return mx.pad(x.swapaxes(0, 1)[None], [(0, 0)] * 3 + [(0, width - self.head_dim)])


class VisionLayer(nn.Module):
    """Attention and MLP, each between two norms; both go through the patches in blocks."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = VisionAttention(config)
        self.mlp = GatedMLP(hidden, config.intermediate_size)
        self.rows = config.rows
        self.input_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.pre_feedforward_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.post_feedforward_layernorm = nn.RMSNorm(hidden, eps=eps)

    def __call__(self, x: mx.array, rotation: mx.array, evaluate: Evaluate | None) -> mx.array:
        attended = self.self_attn(self.input_layernorm(x), rotation, evaluate)
        x = x + self.post_attention_layernorm(attended)
        parts = []
        for first in range(0, len(x), self.rows):
            some = self.pre_feedforward_layernorm(x[first : first + self.rows])
            parts.append(self.post_feedforward_layernorm(self.mlp(some)))
            if evaluate is not None and self.rows < len(x):
                evaluate(parts[-1])
        return x + mx.concatenate(parts)


class VisionEncoder(nn.Module):
    """The layers, as the checkpoint names them."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = [VisionLayer(config) for _ in range(config.layers)]


class VisionTower(nn.Module):
    """Patches of a picture (N, 3 patch_size^2) -> soft tokens (N / pool^2, hidden)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embedder = PatchEmbedder(config)
        self.encoder = VisionEncoder(config)
        if config.standardize:
            self.std_bias = mx.zeros((config.hidden_size,))
            self.std_scale = mx.ones((config.hidden_size,))

    def __call__(
        self, patches: mx.array, rows: int, columns: int, evaluate: Evaluate | None
    ) -> mx.array:
        x = self.patch_embedder(patches, rows, columns)
        rotation = self._rotation(rows, columns)
        for layer in self.encoder.layers:
            x = layer(x, rotation, evaluate)
            if evaluate is not None:
                evaluate(x)
        return self._pooled(x, rows, columns)

    def _rotation(self, rows: int, columns: int) -> mx.array:
        """Cosines and sines (2, N, 1, 2, pairs): half of a head turns by column, half by row."""
        half = self.config.head_dim // 2
        frequencies = 1 / mx.power(self.config.rope_theta, mx.arange(0, half, 2) / half)
        patch = mx.arange(rows * columns)
        places = mx.stack([patch % columns, patch // columns], axis=-1).astype(mx.float32)
        angles = places[:, None, :, None] * frequencies
        return mx.stack([mx.cos(angles), mx.sin(angles)])

    def _pooled(self, x: mx.array, rows: int, columns: int) -> mx.array:
        """Means of pool x pool patches, times sqrt(hidden), standardized.

        All in float32, as what is multiplied may leave float16's range and what is subtracted is
        large; the mean alone is rounded, as the reference rounds it.
        """
        pool = self.config.pool
        cells = x.reshape(rows // pool, pool, columns // pool, pool, -1).astype(mx.float32)
        means = cells.mean(axis=(1, 3)).astype(x.dtype).astype(mx.float32)
        tokens = means.reshape(-1, x.shape[-1]) * self.config.hidden_size**0.5
        if self.config.standardize:
            bias, scale = (each.astype(mx.float32) for each in (self.std_bias, self.std_scale))
            tokens = (tokens - bias) * scale
        return tokens.astype(x.dtype)


class Projection(nn.Module):
    """Soft tokens -> embeddings of the text model; a norm without a scale stands before it."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.embedding_projection = nn.Linear(config.hidden_size, config.text_size, bias=False)

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.embedding_projection(rms_norm(tokens, self.eps))


class Vision(nn.Module):
    """`vision_tower` and `embed_vision`, as the checkpoint's encoder names them."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config)
        self.embed_vision = Projection(config)

    def __repr__(self) -> str:
        return f"Vision({self.config.layers} layers, width {self.config.hidden_size})"

    def __call__(
        self, patches: mx.array, rows: int, columns: int, evaluate: Evaluate | None = None
    ) -> mx.array:
        """One picture -> what takes the place of its tokens' embeddings, (tokens, text width).

        Text embeddings are multiplied by sqrt(hidden); these are not.

        Args:
            patches: (rows x columns, 3 patch_size^2) numbers from 0 to 1, row by row; in a patch
                (y, x, channel).
            rows: of patches, a multiple of the config's `pool`.
            columns: likewise.
            evaluate: called with what was computed on the way, or all of it would exist at once.

        Raises:
            SettingError: a side is no multiple of `pool` or longer than the table of positions,
                which MLX would read beyond its end, or the patches have another shape.
        """
        most = self.config.position_embedding_size
        for side in (rows, columns):
            if not 0 < side <= most or side % self.config.pool:
                raise SettingError(
                    f"a side of a picture is a multiple of {self.config.pool} patches, {most} at "
                    f"most; not {side}"
                )
        wanted = (rows * columns, 3 * self.config.patch_size**2)
        if tuple(patches.shape) != wanted:
            raise SettingError(f"patches of this picture are {wanted}, not {patches.shape}")
        return self.embed_vision(self.vision_tower(patches, rows, columns, evaluate))


@mx.compile
def turned(x: mx.array, rotation: mx.array) -> mx.array:
    """Axial rotary embedding of heads (N, heads, head_dim): pairs stand a quarter head apart."""
    a, b = mx.split(mx.unflatten(x, -1, (2, 2, -1)), 2, axis=-2)
    cos, sin = rotation[..., None, :]
    both = mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-2)
    return mx.flatten(both, -3).astype(x.dtype)


PREFIXES = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")


def is_vision(tensor: str) -> bool:
    """Tell whether a checkpoint tensor is the tower's or the projection's."""
    return tensor.startswith(PREFIXES)


def vision_name(tensor: str) -> str:
    """The parameter of `Vision` that a checkpoint tensor belongs to."""
    return tensor.removeprefix("model.encoder.").replace("_proj.linear.", "_proj.")
