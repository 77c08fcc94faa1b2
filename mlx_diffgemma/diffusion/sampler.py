"""The rules of sampling, as pure functions: they know neither the model nor the loop.

Entropies are in nats. Positions run along the last axis of (B, L) arrays, tokens of the vocabulary
along the last axis of (B, L, C) arrays.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..model.settings import EntropyBound, GenerationConfig, Sampler, Settling
from .constraints import fold


def temperature(remaining: int, steps: int, t_min: float, t_max: float) -> float:
    """Linear schedule over the steps that remain (`steps` .. 1), as in the reference.

    It starts at `t_max` and ends one step short of `t_min`.
    """
    return t_min + (t_max - t_min) * (remaining / steps)


@mx.compile
def accept_by_entropy(entropies: mx.array, bound: float) -> mx.array:
    """Take positions from the most certain on while the entropies *before* each sum to <= bound.

    That sum bounds the mutual information of the accepted tokens (arXiv 2505.24857, eq. for the
    entropy-bounded sampler), so they are nearly independent. The most certain one always passes.
    """
    order = mx.argsort(entropies, axis=-1)
    ordered = mx.take_along_axis(entropies, order, axis=-1)
    passes = mx.cumsum(ordered, axis=-1) - ordered <= bound
    return mx.take_along_axis(passes, mx.argsort(order, axis=-1), axis=-1)


@mx.compile
def accept_by_confidence(
    confidence: mx.array, threshold: float, fixed: mx.array | None
) -> mx.array:
    """Accept what is fixed, what has probability >= threshold, or else the best not fixed."""
    if fixed is None:
        fixed = mx.zeros(confidence.shape, dtype=mx.bool_)
    ranked = mx.where(fixed, -1.0, confidence)
    best = mx.arange(ranked.shape[-1]) == mx.argmax(ranked, axis=-1, keepdims=True)
    return fixed | (ranked >= threshold) | best


def accept(
    sampler: Sampler, entropies: mx.array, confidence: mx.array, fixed: mx.array | None
) -> mx.array:
    """(B, L) which positions a sampler accepts, by entropy or by the drawn tokens' probability."""
    if isinstance(sampler, EntropyBound):
        return accept_by_entropy(entropies, sampler.bound)
    return accept_by_confidence(confidence, sampler.threshold, fixed)


def renoise(accepted: mx.array, tokens: mx.array, noise: mx.array) -> mx.array:
    """Keep `tokens` where accepted, noise everywhere else."""
    return mx.where(accepted, tokens, noise)


def is_stable(argmax: mx.array, history: Sequence[mx.array], threshold: int) -> mx.array:
    """(B,) whether the argmax canvas equals each of the previous `threshold` ones."""
    if len(history) < threshold:
        return mx.zeros((argmax.shape[0],), dtype=mx.bool_)
    if not threshold:
        return mx.ones((argmax.shape[0],), dtype=mx.bool_)
    recent = list(history)[-threshold:]
    return fold(mx.logical_and, [(argmax == earlier).all(axis=-1) for earlier in recent])


@mx.compile
def is_confident(entropies: mx.array, threshold: float, pinned: mx.array | None) -> mx.array:
    """(B,) whether the mean entropy, over the positions not pinned, is below the threshold."""
    if pinned is None:
        return entropies.mean(axis=-1) < threshold
    free = ~pinned
    return (entropies * free).sum(axis=-1) < threshold * mx.maximum(free.sum(axis=-1), 1)


def stops(
    config: GenerationConfig,
    step: int,
    argmax: mx.array,
    history: Sequence[mx.array],
    entropies: mx.array,
    pinned: mx.array | None,
) -> mx.array:
    """(B,) whether a canvas is finished: its best tokens stable and, in the mean, certain.

    Or stable for so long that they are taken however uncertain they are; never before
    `config.min_steps`.
    """
    if step < config.min_steps:
        return mx.zeros((argmax.shape[0],), dtype=mx.bool_)
    stable = is_stable(argmax, history, config.stability_threshold)
    stop = stable & is_confident(entropies, config.confidence_threshold, pinned)
    if config.plateau is not None:
        stop = stop | is_stable(argmax, history, config.plateau)
    return stop


# Which positions are decoded next -----------------------------------------------------------------

# Sizes of a pass are multiples of this part of a canvas: shapes are few then.
SIZES = 32

# Share of a canvas before which an end token is early. What fills the canvas behind it is most of
# the work then; behind later ones, unread fill costs more right answers than it saves.
EARLY = 0.625


@mx.compile
def agreeing(agreed: mx.array, decoded: mx.array, read: mx.array, argmax: mx.array) -> mx.array:
    """(B, L) how many decodings in a row found best what they read there.

    A token of noise is no answer's: keys and values that were computed in its place are not those
    of the token that comes to stand there.
    """
    return mx.where(read == argmax, agreed + decoded, 0)


def settled(
    rule: Settling,
    agreed: mx.array,
    accepted: mx.array,
    entropies: mx.array,
    ends: mx.array,
) -> mx.array:
    """(B, L) what need not be decoded again, see `Settling`; `ends` marks tokens that end."""
    sure = accepted & (entropies < rule.entropy)
    early = mx.arange(ends.shape[-1]) < EARLY * ends.shape[-1]
    certain_ends = (sure & ends & early).astype(mx.int32)
    behind = mx.cumsum(certain_ends, axis=-1) > certain_ends
    return sure & ((agreed >= rule.agreed) | behind)


def undecided(
    settled: npt.NDArray[np.bool_], entropies: npt.NDArray[np.float32]
) -> npt.NDArray[np.int32] | None:
    """Positions (P,) that are decoded next, of a canvas (L,); None is all.

    They are those not settled and, up to the next size of a pass, the least certain others.
    """
    length = len(settled)
    size = -(-length // SIZES)
    count = max(-(-int((~settled).sum()) // size), 1) * size
    if count >= length:
        return None
    order = np.argsort(np.where(settled, -entropies, -np.inf), kind="stable")
    return np.sort(order[:count]).astype(np.int32)
