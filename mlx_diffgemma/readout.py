"""What a denoising step reads off the hidden states; the logits are never held as a whole.

At 262,144 tokens and a canvas of 256, one float32 copy of the logits takes 268 MB. The vocabulary
passes by in blocks instead, and a step keeps what the next one needs: ids, entropies and the
expected embedding. The sums are those of the online softmax (Milakov & Gimelshein 2018).
"""

from dataclasses import dataclass

import mlx.core as mx

from .model import DiffusionGemma
from .sampler import ANYTHING, NEVER, Choices, Constraint, Draws, merge, sub_block

# Bytes that one float32 array over a block may take, and most tokens of a block: its rows of the
# embedding table are dequantized at a time.
BLOCK_BYTES = 1 << 25
BLOCK_TOKENS = 1 << 15


@dataclass(frozen=True)
class Readout:
    """Of softmax(logits / heat) under a constraint; arrays are (B, L) unless said otherwise.

    Attributes:
        choices: the most likely tokens, (B, L, S) by set of the constraint.
        noisy: as `choices`, of logits with Gumbel noise; where tokens depend on one another.
        sampled: drawn ids, where they do not. Without draws both are None.
        entropy: float32 nats.
        log_normalizer: log of the sum of exp(logits / heat).
        belief: expected embedding (B, L, hidden), the next step's self-conditioning, or None.
    """

    choices: Choices
    noisy: Choices | None
    sampled: mx.array | None
    entropy: mx.array
    log_normalizer: mx.array
    belief: mx.array | None


def read_out(
    model: DiffusionGemma,
    hidden: mx.array,
    heat: float,
    constraint: Constraint = ANYTHING,
    draws: Draws | None = None,
    *,
    belief: bool = False,
) -> Readout:
    """Read hidden states (B, L, hidden) off, at a temperature; evaluation begins at once."""
    shape = hidden.shape[:2]
    vocab_size = model.config.vocab_size
    cap, warmth = mx.array(model.config.final_logit_softcapping), mx.array(heat)
    peak = mx.full((*shape, 1), NEVER)
    mass = slope = mx.zeros((*shape, 1))
    soft = mx.zeros(hidden.shape) if belief else None
    choices: Choices | None = None
    noisy: Choices | None = None
    picker = None
    if draws is not None and not constraint.joint:
        picker = draws.categorical(shape)
    for first, table in model.vocabulary(_tokens_at_once(shape, vocab_size)):
        raw = hidden @ table.T
        allowed = constraint.allowed(first, table.shape[0], shape[1])
        if allowed is not None:
            raw = mx.where(allowed, raw, NEVER)
        found = constraint.score(raw, first)
        found = Choices(_level(found.scores, cap, warmth), found.tokens)
        choices = merge(choices, found)
        if draws is not None and constraint.joint:
            noise = draws.gumbel(raw.shape)
            noisy = merge(noisy, constraint.score(_level(raw, cap, warmth) + noise, first))
        top = mx.maximum(peak, found.scores.max(axis=-1, keepdims=True))
        weights, slopes, chances = _weigh(raw, top, cap, warmth)
        if picker is None:
            total = weights.sum(axis=-1, keepdims=True)
        else:
            total = picker.add(weights, top, first)
        ended = None if soft is None else chances @ table
        slope, mass, soft = _extend(
            peak, top, mass, total, slope, slopes.sum(axis=-1, keepdims=True), soft, ended
        )
        peak = top
        # Computed before the next block is, or the blocks would pile up.
        kept = [vars(each) for each in (choices, noisy) if each is not None]
        mx.async_eval(mass, slope, soft, kept)  # type: ignore[no-untyped-call]
    assert choices is not None
    return Readout(
        choices=choices,
        noisy=noisy,
        sampled=None if picker is None else picker.tokens(),
        entropy=(mx.log(mass) - slope / mass)[..., 0],
        log_normalizer=(peak + mx.log(mass))[..., 0],
        belief=None if soft is None else model.scaled((soft / mass).astype(hidden.dtype)),
    )


def log_probability(
    model: DiffusionGemma, hidden: mx.array, tokens: mx.array, heat: float, seen: Readout
) -> mx.array:
    """Log-probability (B, L) of allowed `tokens` (B, L), of hidden states that were read off."""
    rows = model.embedding(tokens).astype(mx.float32)
    raw = (hidden.astype(mx.float32) * rows).sum(axis=-1)
    cap = mx.array(model.config.final_logit_softcapping)
    # Rounded apart from the sum, a certain token could seem more than certain.
    return mx.minimum(_level(raw, cap, mx.array(heat)) - seen.log_normalizer, 0.0)


def _tokens_at_once(shape: tuple[int, ...], vocab_size: int) -> int:
    """Tokens of a block: whole sub-blocks of the sampler."""
    width = sub_block(vocab_size)
    tokens = min(BLOCK_TOKENS, BLOCK_BYTES // (4 * shape[0] * shape[1]))
    return max(tokens // width, 1) * width


def _capped(raw: mx.array, cap: mx.array, heat: mx.array) -> mx.array:
    raw = raw.astype(mx.float32)
    return mx.where(raw > NEVER / 2, mx.tanh(raw / cap) * cap / heat, NEVER)


@mx.compile
def _level(raw: mx.array, cap: mx.array, heat: mx.array) -> mx.array:
    """The head's product, softly capped (what must NEVER be chosen stays so) and tempered."""
    return _capped(raw, cap, heat)


@mx.compile
def _weigh(
    raw: mx.array, peak: mx.array, cap: mx.array, heat: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """exp(x) for x below the peak, x exp(x), and exp(x) in the model's type."""
    below = _capped(raw, cap, heat) - peak
    weights = mx.exp(below)
    return weights, weights * below, weights.astype(raw.dtype)


@mx.compile
def _extend(
    peak: mx.array,
    top: mx.array,
    mass: mx.array,
    total: mx.array,
    slope: mx.array,
    slopes: mx.array,
    soft: mx.array | None,
    ended: mx.array | None,
) -> tuple[mx.array, mx.array, mx.array | None]:
    """Sums relative to an old peak and those of a block relative to the new one, added up."""
    down = peak - top
    shrink = mx.exp(down)
    if soft is not None and ended is not None:
        soft = soft * shrink + ended.astype(mx.float32)
    return shrink * (slope + down * mass) + slopes, shrink * mass + total, soft
