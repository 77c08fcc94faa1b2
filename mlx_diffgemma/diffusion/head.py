"""Reads off hidden states what a denoising step needs; the logits are never held as a whole.

At 262,144 tokens and a canvas of 256, one float32 copy of the logits takes 268 MB. The vocabulary
passes by in blocks instead, and a step keeps what the next one needs: ids, entropies and the
expected embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from ..model.diffusion_gemma import TABLE_BYTES, DiffusionGemma
from .constraints import ANYTHING, NEVER, Choices, Constraint, fold, highest, merge
from .draws import APART, Categorical, Draws, sub_block
from .whole import Found, Noise, mass_of, slope_of

# Bytes that one float32 array over a block may take: nine blocks of the real vocabulary and canvas.
# A step holds about ten such arrays, as MLX runs ahead of the computation by up to two blocks.
BLOCK_BYTES = 57 << 19

# Blocks whose three sums one kernel can join: MLX fuses 24 arrays at most.
JOINED = 6


@dataclass(frozen=True)
class Readout:
    """Of softmax(logits / temperature) under a constraint; arrays are (B, L) unless said otherwise.

    Attributes:
        choices: the most likely tokens, (B, L, S) by set of the constraint.
        perturbed: as `choices`, of logits with Gumbel noise; where tokens depend on one another.
        sampled: drawn ids, where they do not. Without draws both are None.
        entropy: float32 nats.
        log_normalizer: log of the sum of exp(logits / temperature).
        self_conditioning: expected embedding (B, L, hidden), for the next step, or None.
    """

    choices: Choices
    perturbed: Choices | None
    sampled: mx.array | None
    entropy: mx.array
    log_normalizer: mx.array
    self_conditioning: mx.array | None


def read_out(
    model: DiffusionGemma,
    hidden: mx.array,
    temperature: float,
    constraint: Constraint = ANYTHING,
    draws: Draws | None = None,
    positions: mx.array | None = None,
    *,
    categorical: Categorical | None = None,
    self_conditioning: bool = False,
) -> Readout:
    """Read hidden states (B, L, hidden) off, at a temperature; evaluation begins at once.

    They may be those of some `positions` (L,) of a canvas. What is drawn is `draws`'s, or a
    `categorical` that is given.
    """
    shape = hidden.shape[:2]
    positions = mx.arange(shape[1]) if positions is None else positions
    cap, divisor = mx.array(model.config.final_logit_softcapping), mx.array(temperature)
    if draws is not None and not constraint.joint:
        categorical = draws.categorical(shape)
    # One entry a block; sums are relative to exp(the block's peak), so no block waits for another.
    choices: list[Choices] = []
    perturbed: list[Choices] = []
    peaks, masses, slopes = [], [], []
    soft: list[tuple[mx.array, mx.array]] = []  # each relative to exp(its peak)
    count = _tokens_at_once(model, shape[0] * shape[1])
    noise = Noise(draws, shape, model.config.vocab_size) if draws and constraint.joint else None
    for first, table in model.vocabulary(count):
        raw = hidden @ table.T
        allowed = constraint.allowed(first, table.shape[0], positions)
        if allowed is not None:
            raw = mx.where(allowed, raw, NEVER)
        found = constraint.score(raw, first)
        levels = _level(found.scores, cap, divisor)
        choices.append(replace(found, scores=levels))
        if noise is not None:
            noisy = _level(raw, cap, divisor) + noise.at(first, table.shape[0])
            perturbed.append(constraint.score(noisy, first))
        # With one set of all tokens, the best of it is the peak.
        peak = levels.max(axis=-1, keepdims=True) if levels.shape[-1] > 1 else levels
        weights, chances = _weigh(raw, peak, cap, divisor)
        if categorical is None:
            masses.append(weights.sum(axis=-1, keepdims=True))
        else:
            masses.append(categorical.add(weights, peak, first))
            mx.async_eval(categorical.state)  # type: ignore[no-untyped-call]
        peaks.append(peak)
        slopes.append(_times_log(weights).sum(axis=-1, keepdims=True))
        if self_conditioning:
            if len(soft) == APART:
                most = highest([each for each, _ in soft])
                soft = [(most, _mixed(most, *zip(*soft, strict=True)))]
            soft.append((peak, chances @ table))
        # Computed before the next block is, or the blocks would pile up.
        kept = [vars(each[-1]) for each in (choices, perturbed) if each]
        mx.async_eval(kept, masses[-1], slopes[-1], soft)  # type: ignore[no-untyped-call]
    if noise is not None:
        noise.end()
    top = highest(peaks)
    several = (slice(i, i + JOINED) for i in range(0, len(peaks), JOINED))
    read = Found(
        top,
        mass_of(top, peaks, masses),
        [slope_of(top, peaks[some], masses[some], slopes[some]) for some in several],
        merge(choices),
        merge(perturbed) if perturbed else None,
        categorical,
    ).over_ranks(model.part.share)
    log_normalizer = _log_normalizer(read.top, read.mass)
    expected = None
    if soft:
        mixed = _mixed(log_normalizer, *zip(*soft, strict=True))
        expected = model.scaled(model.part.share.sum(mixed))
    return Readout(
        choices=read.choices,
        perturbed=read.perturbed,
        sampled=None if read.drawn is None else read.drawn.tokens(),
        entropy=_entropy(read.mass, read.slopes)[..., 0],
        log_normalizer=log_normalizer[..., 0],
        self_conditioning=expected,
    )


def log_probability(
    model: DiffusionGemma,
    hidden: mx.array,
    tokens: mx.array,
    temperature: float | mx.array,
    seen: Readout,
) -> mx.array:
    """Log-probability (B, L) of allowed `tokens` (B, L), of hidden states that were read off.

    The temperature is that at which they were, of all or (L,) of each.
    """
    rows = model.embedding(tokens).astype(mx.float32)
    raw = (hidden.astype(mx.float32) * rows).sum(axis=-1)
    cap = mx.array(model.config.final_logit_softcapping)
    found: mx.array = _log_chance(raw, cap, mx.array(temperature), seen.log_normalizer)
    return found


def _tokens_at_once(model: DiffusionGemma, positions: int) -> int:
    """Tokens of a block: whole sub-blocks of the sampler."""
    width = sub_block(model.config.vocab_size)
    tokens = BLOCK_BYTES // (4 * positions)
    if model.dequantizes:
        item = model.model.decoder.norm.weight.dtype.size
        tokens = min(tokens, TABLE_BYTES // (item * model.config.hidden_size))
    return max(tokens // width, 1) * width


def _capped(raw: mx.array, cap: mx.array, temperature: mx.array) -> mx.array:
    raw = raw.astype(mx.float32)
    return mx.where(raw > NEVER / 2, mx.tanh(raw / cap) * cap / temperature, NEVER)


@mx.compile
def _level(raw: mx.array, cap: mx.array, temperature: mx.array) -> mx.array:
    """The head's product, softly capped (what must NEVER be chosen stays so) and tempered."""
    return _capped(raw, cap, temperature)


@mx.compile
def _log_chance(
    raw: mx.array, cap: mx.array, temperature: mx.array, log_normalizer: mx.array
) -> mx.array:
    # Rounded apart from the sum, a certain token could seem more than certain.
    return mx.minimum(_capped(raw, cap, temperature) - log_normalizer, 0.0)


@mx.compile
def _weigh(
    raw: mx.array, peak: mx.array, cap: mx.array, temperature: mx.array
) -> tuple[mx.array, mx.array]:
    """exp(x) for x below the peak, in float32 and in the model's type."""
    weights = mx.exp(_capped(raw, cap, temperature) - peak)
    return weights, weights.astype(raw.dtype)


@mx.compile
def _times_log(weights: mx.array) -> mx.array:
    """x exp(x) for exp(x), from it alone: one array less is read, and the product dies sooner."""
    return mx.where(weights > 0, weights * mx.log(weights), 0.0)


# Of sums over all blocks.


@mx.compile
def _log_normalizer(top: mx.array, mass: mx.array) -> mx.array:
    return top + mx.log(mass)


@mx.compile
def _entropy(mass: mx.array, slopes: Sequence[mx.array]) -> mx.array:
    """-sum(p log p). Both sums are relative to the top: their difference may be tiny."""
    return mx.log(mass) - fold(mx.add, slopes) / mass


@mx.compile
def _mixed(reference: mx.array, peaks: Sequence[mx.array], soft: Sequence[mx.array]) -> mx.array:
    """Sums of the table's rows (B, L, hidden), relative to exp(reference); the expected row, where
    that is the log-normalizer."""
    parts = [mx.exp(p - reference) * part for p, part in zip(peaks, soft, strict=True)]
    return fold(mx.add, parts).astype(soft[0].dtype)


# Reading causally: what the encoder's hidden states say of the tokens that follow them.


@dataclass(frozen=True)
class CausalReadout:
    """What hidden states say of the next token; float32 log-probabilities at temperature 1.

    Attributes:
        log_probability: of the tokens that were asked about, (B, T).
        top: the likeliest ids, the first the best, (B, T, K).
        top_log_probability: theirs, (B, T, K).
    """

    log_probability: mx.array
    top: mx.array
    top_log_probability: mx.array


def read_causally(
    model: DiffusionGemma, hidden: mx.array, tokens: mx.array, top: int = 1
) -> CausalReadout:
    """Read the encoder's hidden states (B, T, hidden) off, for tokens (B, T): each the next one.

    More than the best token, `top` > 1, takes the head's product once more.
    """
    seen = read_out(model, hidden, 1.0)
    if top == 1:
        best = seen.choices.tokens
        levels = log_probability(model, hidden, best[..., 0], 1.0, seen)[..., None]
    else:
        best, levels = likeliest(model, hidden, 1.0, seen, top)
    return CausalReadout(
        log_probability=log_probability(model, hidden, tokens, 1.0, seen),
        top=best,
        top_log_probability=levels,
    )


def likeliest(
    model: DiffusionGemma,
    hidden: mx.array,
    temperature: float | mx.array,
    seen: Readout,
    count: int,
    constraint: Constraint = ANYTHING,
) -> tuple[mx.array, mx.array]:
    """The likeliest tokens of hidden states (B, L, hidden) that were read off, the best first, with
    their log-probabilities; both are (B, L, count). Where fewer are allowed, the rest are NEVER.

    The temperature is as in `log_probability`. It takes the head's product once more.
    """
    scores, ids = _highest_logits(model, hidden, count, constraint)
    chances = [log_probability(model, hidden, ids[..., i], temperature, seen) for i in range(count)]
    levels = mx.where(scores > NEVER / 2, mx.stack(chances, axis=-1), NEVER)
    order = mx.argsort(-levels, axis=-1)  # the product was rounded to the model's type
    return mx.take_along_axis(ids, order, axis=-1), mx.take_along_axis(levels, order, axis=-1)


def _highest_logits(
    model: DiffusionGemma, hidden: mx.array, count: int, constraint: Constraint
) -> tuple[mx.array, mx.array]:
    """The `count` highest logits that are allowed and their ids, (B, L, count) in no order."""
    positions = mx.arange(hidden.shape[1])
    scores: mx.array | None = None
    ids: mx.array | None = None
    for first, table in model.vocabulary(_tokens_at_once(model, hidden.shape[0] * hidden.shape[1])):
        raw = hidden @ table.T
        allowed = constraint.allowed(first, table.shape[0], positions)
        if allowed is not None:
            raw = mx.where(allowed, raw, NEVER)
        some = mx.broadcast_to(mx.arange(first, first + raw.shape[-1]), raw.shape)
        if scores is not None and ids is not None:
            raw, some = mx.concatenate([scores, raw], -1), mx.concatenate([ids, some], -1)
        at = mx.argpartition(-raw, min(count, raw.shape[-1]) - 1, axis=-1)[..., :count]
        scores, ids = mx.take_along_axis(raw, at, -1), mx.take_along_axis(some, at, -1)
        # As in `read_out`, blocks must not pile up.
        mx.async_eval(scores, ids)  # type: ignore[no-untyped-call]
    assert scores is not None
    assert ids is not None
    share = model.part.share
    if share.size > 1:
        found = share.gather([scores.astype(mx.float32), ids])
        scores, ids = (mx.concatenate(list(each), -1) for each in zip(*found, strict=True))
        at = mx.argpartition(-scores, count - 1, axis=-1)[..., :count]
        scores, ids = mx.take_along_axis(scores, at, -1), mx.take_along_axis(ids, at, -1)
    return scores, ids
