"""The encoder and the decoder over a batch, for gradients: arrays in, arrays out.

They are the blocks that generation runs, with the same masks and positions. But keys and values are
arrays that a layer returns, and not a cache that it writes: so a layer may be computed twice, which
is what checkpointing its gradient means. Nothing is evaluated here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..model.cache import LayerCache, Mask
from ..model.config import LayerConfig
from ..model.diffusion_gemma import DiffusionGemma
from ..model.layers import Block, View

# Arrays in, one or several arrays out.
Layer = Callable[..., Any]


def encode(
    model: DiffusionGemma, tokens: mx.array, *, checkpointed: bool = False
) -> tuple[mx.array, list[mx.array]]:
    """Read (B, T) ids -> hidden states (B, T, hidden), and keys and values of each layer.

    Those are (B, 2 x heads, T, head_dim), heads of keys first. Rows that are shorter are filled on
    the right: no token sees what follows it. With `checkpointed`, a layer's inputs alone are saved
    for its gradient.
    """
    x = model.embed(tokens)
    rotations = model.rotations(mx.arange(tokens.shape[1], dtype=mx.float32)[None])
    # One mask for all layers of a kind, as each is held until the gradient.
    masks = {kind: LayerCache(kind.window).encoder_mask(tokens.shape[1]) for kind in rotations}
    kept = []
    scalars = model.model.encoder.language_model.layers
    for block, own in zip(model.model.decoder.layers, scalars, strict=True):
        kind = block.self_attn.layer
        layer = _reading(block, masks[kind], rotations[kind])
        x, new = _checkpointed(block, layer, checkpointed)(x, own.layer_scalar)
        kept.append(new)
    return model.model.decoder.norm(x), kept


def decode(
    model: DiffusionGemma,
    canvases: mx.array,
    kept: Sequence[mx.array],
    rows: Sequence[int],
    prefixes: Sequence[int],
    self_conditioning: mx.array | None = None,
    *,
    checkpointed: bool = False,
) -> mx.array:
    """Denoise canvases (N, L) -> hidden states (N, L, hidden).

    Args:
        model: whose blocks.
        canvases: ids.
        kept: what `encode` returned.
        rows: of each canvas, the row of the batch that it belongs to.
        prefixes: how many tokens of that row stand before the canvas; it sees these alone, and its
            positions go on from there.
        self_conditioning: (N, L, hidden) the embedding that another pass expects; None is zeros.
        checkpointed: as in `encode`.
    """
    count, length = canvases.shape
    decoder = model.model.decoder
    x = decoder.self_conditioning(model.embed(canvases), self_conditioning)
    x = x.reshape(1, count * length, -1)
    rotations = model.rotations(
        mx.array([[float(first + i) for first in prefixes for i in range(length)]])
    )
    places = list(zip(rows, prefixes, strict=True))
    for block, known in zip(decoder.layers, kept, strict=True):
        layer = _denoising(block, places, length, rotations[block.self_attn.layer])
        x = _checkpointed(block, layer, checkpointed)(x, block.layer_scalar, known)
    return decoder.norm(x).reshape(count, length, -1)


def _reading(block: Block, mask: Mask, rotation: mx.array) -> Layer:
    """One layer of the encoder: (B, T, hidden) -> the next one's input, keys and values."""

    def layer(x: mx.array, scalar: mx.array) -> tuple[mx.array, mx.array]:
        made: list[mx.array] = []

        def update(new: mx.array) -> mx.array:
            made.append(new)
            return new

        rows, count, _ = x.shape
        return block(x, [View(rows, count, mask, update)], rotation, scalar), made[0]

    return layer


def _denoising(
    block: Block, places: Sequence[tuple[int, int]], length: int, rotation: mx.array
) -> Layer:
    """One layer of the decoder: canvases in a row (1, N x L, hidden), each behind its own prefix.

    A canvas sees all of itself and what the row's prefix holds; in a sliding layer, as in a cache,
    the last `window - 1` tokens of it.
    """
    kind: LayerConfig = block.self_attn.layer

    def layer(x: mx.array, scalar: mx.array, known: mx.array) -> mx.array:
        def view(row: int, prefix: int) -> View:
            first = 0 if kind.window is None else max(0, prefix - (kind.window - 1))
            past = known[row : row + 1, :, first:prefix]

            def update(new: mx.array) -> mx.array:
                return mx.concatenate([past, new], axis=2) if prefix else new

            return View(1, length, None, update)

        views = [view(*place) for place in places]
        return block(x, views, rotation, scalar)

    return layer


def _checkpointed(block: Block, layer: Layer, wanted: bool) -> Layer:
    """The same layer, whose insides are computed again for its gradient, if that is wanted.

    What has a gradient is an argument: the block's trained parameters, too. Those that it holds are
    its own again afterwards. Dropout drops the same numbers both times.
    """
    if not wanted:
        return layer
    own = block.trainable_parameters()
    begin = _random_state()
    calls = iter([False])

    def layer_of(parameters: dict[str, Any], *arguments: mx.array) -> Any:
        end = _random_state() if next(calls, True) else None
        if end is not None:
            mx.random.seed(begin)
        block.update(parameters)
        try:
            return layer(*arguments)
        finally:
            block.update(own)
            if end is not None:
                mx.random.seed(end)

    whole = mx.checkpoint(layer_of)
    return lambda *arguments: whole(own, *arguments)


def _random_state() -> int:
    """Where MLX's generator stands, as the seed that brings it there."""
    high, low = mx.random.state[0].tolist()  # type: ignore[index]
    return int(high) << 32 | int(low)
