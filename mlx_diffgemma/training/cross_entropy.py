"""The head and its loss over blocks of the vocabulary: the logits never exist as a whole.

At 262,144 tokens and a canvas of 256, one float32 copy of the logits takes 268 MB, and a gradient
that MLX derives holds about five. Here a block at a time is computed, forward and, once more,
backward; `mx.depends` has MLX begin a block only when the last one is done, as within a gradient
nothing can be evaluated.
"""

from collections.abc import Iterator

import mlx.core as mx

from ..model.diffusion_gemma import DiffusionGemma

# Bytes that one float32 array over a block may take, or a block of the table where it has to be
# dequantized. MLX runs ahead of the computation, so that several exist at once.
BLOCK_BYTES = 1 << 24

LEAST = -1e30  # below any logit


def cross_entropy(model: DiffusionGemma, hidden: mx.array, tokens: mx.array) -> mx.array:
    """Loss (N,) in nats, float32, of ids (N,) by hidden states (N, hidden).

    It has a gradient for the hidden states and, where the embedding table is trained, for that.
    """
    embed = model.model.decoder.embed_tokens
    cap = mx.array(model.config.final_logit_softcapping)

    @mx.custom_function
    def loss(hidden: mx.array, table: mx.array) -> tuple[mx.array, mx.array]:
        peak, mass = mx.full((len(hidden), 1), LEAST), mx.zeros((len(hidden), 1))
        own = mx.zeros((len(hidden), 1))
        for first, rows in _blocks(model, len(hidden), table):
            (hidden,) = mx.depends([hidden], [peak, mass, own])
            peak, mass, own = _add(hidden @ rows.T, cap, tokens[:, None] - first, peak, mass, own)
        whole = peak + mx.log(mass)
        return (whole - own)[:, 0], whole

    @loss.vjp
    def gradient(
        primals: tuple[mx.array, mx.array],
        cotangents: tuple[mx.array, mx.array],
        outputs: tuple[mx.array, mx.array],
    ) -> tuple[mx.array, mx.array]:
        hidden, table = primals
        scale = cotangents[0][:, None]
        found = mx.zeros(hidden.shape, mx.float32)
        of_rows: list[mx.array] = []
        for first, rows in _blocks(model, len(hidden), table):
            (states,) = mx.depends([hidden], [found, *of_rows[-1:]])
            slope = _slope(states @ rows.T, cap, tokens[:, None] - first, outputs[1])
            found = found + (slope @ rows).astype(mx.float32)
            if trained:
                of_rows.append(slope.T @ (states * scale).astype(states.dtype))
        found = (found * scale).astype(hidden.dtype)
        return found, mx.concatenate(of_rows) if trained else table

    trained = "weight" in embed.trainable_parameters()
    # A packed table has no gradient; MLX asks for one of each argument, so none is given.
    table = embed.weight if trained else mx.zeros(())
    each: mx.array = loss(hidden, table)[0]  # type: ignore[index]
    return each


def expected_embedding(model: DiffusionGemma, hidden: mx.array) -> mx.array:
    """What softmax(logits) of hidden states (..., hidden) expects the embedding to be, of this
    shape; without a gradient. The sampler's temperature is none of training's."""
    states = mx.stop_gradient(hidden).reshape(-1, hidden.shape[-1])
    cap = mx.array(model.config.final_logit_softcapping)
    peak, mass = mx.full((len(states), 1), LEAST), mx.zeros((len(states), 1))
    soft = mx.zeros(states.shape, mx.float32)
    for _, rows in _blocks(model, len(states), mx.zeros(())):
        (states,) = mx.depends([states], [peak, mass, soft])
        rows = mx.stop_gradient(rows)
        weights, share, top = _weigh(states @ rows.T, cap, peak)
        mass = mass * share + weights.sum(axis=-1, keepdims=True)
        soft = soft * share + (weights.astype(rows.dtype) @ rows).astype(mx.float32)
        peak = top
    return model.scaled((soft / mass).astype(hidden.dtype)).reshape(hidden.shape)


def tokens_at_once(model: DiffusionGemma, rows: int) -> int:
    """Tokens of a block, for so many hidden states."""
    item = model.model.decoder.norm.weight.dtype.size
    return block_tokens(rows, item * model.config.hidden_size if model.dequantizes else 0)


def block_tokens(rows: int, dequantized: int) -> int:
    """Tokens of a block, for so many hidden states; each takes so many bytes of the table's."""
    return max(1, BLOCK_BYTES // max(4 * rows, dequantized, 1))


def _blocks(model: DiffusionGemma, rows: int, table: mx.array) -> Iterator[tuple[int, mx.array]]:
    """First id and rows of each block of a trained table, or of the model's where it is frozen."""
    count = tokens_at_once(model, rows)
    if not table.ndim:
        yield from model.vocabulary(count)
        return
    for first in range(0, len(table), count):
        yield first, table[first : first + count]


def _capped(raw: mx.array, cap: mx.array) -> mx.array:
    return mx.tanh(raw.astype(mx.float32) / cap) * cap


@mx.compile
def _add(
    raw: mx.array, cap: mx.array, place: mx.array, peak: mx.array, mass: mx.array, own: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Peak, sum of exp(logit - peak) and the wanted tokens' logits, with a block's; (N, 1) each.

    `place` (N, 1) is where in the block the wanted token would stand.
    """
    logits = _capped(raw, cap)
    top = mx.maximum(peak, logits.max(axis=-1, keepdims=True))
    mass = mass * mx.exp(peak - top) + mx.exp(logits - top).sum(axis=-1, keepdims=True)
    wanted = mx.where(mx.arange(raw.shape[-1]) == place, logits, 0.0)
    return top, mass, own + wanted.sum(axis=-1, keepdims=True)


@mx.compile
def _slope(raw: mx.array, cap: mx.array, place: mx.array, whole: mx.array) -> mx.array:
    """Gradient (N, block) of the loss for the head's product."""
    bent = mx.tanh(raw.astype(mx.float32) / cap)
    wanted = (mx.arange(raw.shape[-1]) == place).astype(mx.float32)
    return ((mx.exp(bent * cap - whole) - wanted) * (1 - bent * bent)).astype(raw.dtype)


@mx.compile
def _weigh(raw: mx.array, cap: mx.array, peak: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """exp(logit - top), what earlier sums are to be multiplied by, and the top."""
    logits = _capped(raw, cap)
    top = mx.maximum(peak, logits.max(axis=-1, keepdims=True))
    return mx.exp(logits - top), mx.exp(peak - top), top
