"""The rules of sampling, as pure functions: they know neither the model nor the loop.

Entropies are in nats. Positions run along the last axis of (B, L) arrays, the vocabulary along the
last axis of (B, L, V) arrays.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar, Protocol

import mlx.core as mx

# A logit of what must not be chosen. Finite, so that 0 * log 0 in an entropy stays 0.
NEVER = -1e9


def temperature(remaining: int, steps: int, t_min: float, t_max: float) -> float:
    """Linear schedule over the steps that remain (`steps` .. 1), as in the reference.

    It starts at `t_max` and ends one step short of `t_min`.
    """
    return t_min + (t_max - t_min) * (remaining / steps)


def entropy(logits: mx.array) -> mx.array:
    """Entropy of softmax(logits) over the last axis, float32 nats."""
    log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return -(mx.exp(log_p) * log_p).sum(axis=-1)


def probability(logits: mx.array, tokens: mx.array) -> mx.array:
    """Probability (B, L) of `tokens` (B, L) under softmax(logits) (B, L, V)."""
    chosen = mx.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return mx.exp(chosen - mx.logsumexp(logits, axis=-1))


def sample(logits: mx.array, gumbel: mx.array) -> mx.array:
    """A draw from softmax(logits): the argmax after adding standard Gumbel noise (B, L, V)."""
    return best(logits + gumbel)


def best(logits: mx.array) -> mx.array:
    """The most likely ids (B, L), int32 as all ids here."""
    return mx.argmax(logits, axis=-1).astype(mx.int32)


def pin(logits: mx.array, pinned: mx.array, tokens: mx.array) -> mx.array:
    """One-hot logits (B, L, V) for `tokens` (B, L) where `pinned` (B, L)."""
    one_hot = mx.where(mx.arange(logits.shape[-1]) == tokens[..., None], 0.0, NEVER)
    return mx.where(pinned[..., None], one_hot, logits)


def accept_by_entropy(entropies: mx.array, bound: float) -> mx.array:
    """Take positions from the most certain on while the entropies *before* each sum to <= bound.

    That sum bounds the mutual information of the accepted tokens (arXiv 2505.24857, eq. for the
    entropy-bounded sampler), so they are nearly independent. The most certain one always passes.
    """
    order = mx.argsort(entropies, axis=-1)
    ordered = mx.take_along_axis(entropies, order, axis=-1)
    passes = mx.cumsum(ordered, axis=-1) - ordered <= bound
    return mx.take_along_axis(passes, mx.argsort(order, axis=-1), axis=-1)


def accept_by_confidence(
    confidence: mx.array, threshold: float, fixed: mx.array | None
) -> mx.array:
    """What is fixed, tokens of probability >= threshold, or else the best that is not fixed."""
    if fixed is None:
        fixed = mx.zeros(confidence.shape, dtype=mx.bool_)
    ranked = mx.where(fixed, -1.0, confidence)
    best = mx.arange(ranked.shape[-1]) == mx.argmax(ranked, axis=-1, keepdims=True)
    return fixed | (ranked >= threshold) | best


def renoise(accepted: mx.array, tokens: mx.array, noise: mx.array) -> mx.array:
    """Keep `tokens` where accepted, noise everywhere else."""
    return mx.where(accepted, tokens, noise)


def is_stable(argmax: mx.array, history: Sequence[mx.array], threshold: int) -> mx.array:
    """(B,) whether the argmax canvas equals each of the previous `threshold` ones."""
    if len(history) < threshold:
        return mx.zeros((argmax.shape[0],), dtype=mx.bool_)
    stable = mx.ones((argmax.shape[0],), dtype=mx.bool_)
    for earlier in islice(history, len(history) - threshold, None):
        stable = stable & (argmax == earlier).all(axis=-1)
    return stable


def is_confident(entropies: mx.array, threshold: float, pinned: mx.array | None) -> mx.array:
    """(B,) whether the mean entropy, over the positions not pinned, is below the threshold."""
    if pinned is None:
        return entropies.mean(axis=-1) < threshold
    free = ~pinned
    return (entropies * free).sum(axis=-1) < threshold * mx.maximum(free.sum(axis=-1), 1)


@dataclass(frozen=True)
class EntropyBound:
    """The reference's sampler. Nothing stays: each step decides every position anew."""

    bound: float = 0.1
    keeps: ClassVar[bool] = False

    def accept(self, entropies: mx.array, confidence: mx.array, fixed: mx.array | None) -> mx.array:
        return accept_by_entropy(entropies, self.bound)


@dataclass(frozen=True)
class ConfidenceThreshold:
    """Accept what is likely enough and never look back (the default of mlx-vlm).

    Fewer steps than the entropy bound, and errors stay.
    """

    threshold: float = 0.9
    keeps: ClassVar[bool] = True

    def accept(self, entropies: mx.array, confidence: mx.array, fixed: mx.array | None) -> mx.array:
        return accept_by_confidence(confidence, self.threshold, fixed)


Sampler = EntropyBound | ConfidenceThreshold


class Draws(Protocol):
    """Where all randomness of a run comes from."""

    def tokens(self, shape: tuple[int, ...]) -> mx.array:
        """Uniform token ids."""

    def gumbel(self, shape: tuple[int, ...]) -> mx.array:
        """Standard Gumbel noise, float32."""


class SeededDraws:
    """Draws from a seed: the same seed, the same sequence."""

    def __init__(self, seed: int, vocab_size: int):
        self._key = mx.random.key(seed)
        self._vocab_size = vocab_size

    def _next(self) -> mx.array:
        self._key, key = mx.random.split(self._key)
        return key

    def tokens(self, shape: tuple[int, ...]) -> mx.array:
        return mx.random.randint(0, self._vocab_size, shape, key=self._next())

    def gumbel(self, shape: tuple[int, ...]) -> mx.array:
        return mx.random.gumbel(shape, key=self._next())
