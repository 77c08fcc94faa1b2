"""The rules of sampling, as pure functions: they know neither the model nor the loop.

Entropies are in nats. Positions run along the last axis of (B, L) arrays, tokens of the vocabulary
along the last axis of (B, L, C) arrays.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

import mlx.core as mx

from .arguments import whole_number

Part = TypeVar("Part")
# A logit of what must not be chosen. Finite, so that 0 * log 0 in an entropy stays 0.
NEVER = -1e9
# The largest seed that MLX's keys take.
MOST_SEED = (1 << 64) - 1
# Blocks of the vocabulary whose parts are held apart before they are joined.
APART = 12


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


# Which tokens ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choices:
    """The best token of each of S sets of tokens: scores and ids, (B, L, S).

    Ids count from `first`, the block's.
    """

    scores: mx.array
    tokens: mx.array
    first: int = 0


def best(logits: mx.array, first: int) -> Choices:
    """Of all tokens of a block (B, L, C) whose ids begin at `first`, as one set."""
    at = mx.argmax(logits, axis=-1, keepdims=True)
    return Choices(mx.take_along_axis(logits, at, axis=-1), at, first)


def merge(blocks: Sequence[Choices]) -> Choices:
    """The best of what several blocks have, the earlier at a tie; ids count from 0."""
    scores = [block.scores for block in blocks]
    tokens = [block.tokens for block in blocks]
    return Choices(highest(scores), _best_id(scores, tokens, [block.first for block in blocks]))


def fold(function: Callable[[Part, Part], Part], parts: Sequence[Part]) -> Part:
    """All parts joined, neighbours first: MLX fuses eleven operations in a row, and no more."""
    while len(parts) > 1:
        pairs = (parts[i : i + 2] for i in range(0, len(parts), 2))
        parts = [function(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
    return parts[0]


# Blocks are joined by one kernel over all of them: to concatenate them takes a copy of each.


@mx.compile
def highest(scores: Sequence[mx.array]) -> mx.array:
    """The best score of all blocks."""
    return fold(mx.maximum, scores)


@mx.compile
def _of_best(scores: Sequence[mx.array], things: Sequence[mx.array]) -> mx.array:
    """What the block with the best score has, the earlier at a tie."""

    def better(
        one: tuple[mx.array, mx.array], other: tuple[mx.array, mx.array]
    ) -> tuple[mx.array, mx.array]:
        later = other[0] > one[0]
        return mx.maximum(one[0], other[0]), mx.where(later, other[1], one[1])

    return fold(better, list(zip(scores, things, strict=True)))[1]


@mx.compile
def _best_id(scores: Sequence[mx.array], at: Sequence[mx.array], firsts: list[int]) -> mx.array:
    """The place in the block with the best score, counted from 0."""
    found: mx.array = _of_best(scores, [a + first for a, first in zip(at, firsts, strict=True)])
    return found.astype(mx.int32)


class Constraint(Protocol):
    """What tokens a canvas may hold: each for itself (`allowed`), and together (`choose`).

    `joint` says whether the tokens depend on one another.
    """

    joint: ClassVar[bool]

    def allowed(self, first: int, count: int, length: int) -> mx.array | None:
        """Which of `count` ids from `first` on may stand at each of L = `length` positions:
        (L, count) or (B, L, count), or None for all."""

    def score(self, logits: mx.array, first: int) -> Choices:
        """The best tokens of a block (B, L, C) whose ids begin at `first`, NEVER where none is."""

    def choose(self, choices: Choices, fixed: mx.array | None, canvas: mx.array) -> mx.array:
        """(B, L) ids of the best allowed canvas that is `canvas` where `fixed`."""

    def noise(self, tokens: mx.array) -> mx.array:
        """Uniform tokens (B, L) turned into noise that cannot be taken for an answer."""


class Anything:
    """No constraint."""

    joint: ClassVar[bool] = False

    def allowed(self, first: int, count: int, length: int) -> mx.array | None:
        return None

    def score(self, logits: mx.array, first: int) -> Choices:
        return best(logits, first)

    def choose(self, choices: Choices, fixed: mx.array | None, canvas: mx.array) -> mx.array:
        tokens = choices.tokens[..., 0]
        return tokens if fixed is None else mx.where(fixed, canvas, tokens)

    def noise(self, tokens: mx.array) -> mx.array:
        return tokens


ANYTHING = Anything()


# Randomness --------------------------------------------------------------------------------------


class Picker(Protocol):
    """One draw a position, of a distribution that is seen in blocks."""

    def add(self, weights: mx.array, peak: mx.array, first: int) -> mx.array:
        """A block of weights (B, L, C) of ids from `first` on, relative to exp(peak) (B, L, 1).

        Answers their sum (B, L, 1).
        """

    @property
    def held(self) -> list[mx.array]:
        """What is kept of the blocks so far, for the caller to evaluate."""

    def tokens(self) -> mx.array:
        """The ids drawn, (B, L)."""


class Draws(Protocol):
    """Where all randomness of a run comes from."""

    def tokens(self, shape: tuple[int, ...]) -> mx.array:
        """Uniform token ids."""

    def gumbel(self, shape: tuple[int, ...]) -> mx.array:
        """Standard Gumbel noise, float32."""

    def categorical(self, shape: tuple[int, ...]) -> Picker:
        """Draws of this shape from distributions over the vocabulary."""


def sub_block(vocab_size: int) -> int:
    """Ids that are first drawn as one: about the root of the vocabulary, a power of two."""
    return int(1 << ((vocab_size - 1).bit_length() + 1) // 2)


class TwoStage:
    """Draws first a sub-block of ids, then an id in it.

    Both by the Gumbel-max trick, which needs a number a sub-block and one an id of the drawn one,
    instead of one a token of the vocabulary. The result does not depend on the blocks.
    """

    def __init__(self, outer: mx.array, inner: mx.array):
        """Gumbel noise (B, L, sub-blocks) and (B, L, ids of a sub-block)."""
        self._outer, self._inner = outer, inner
        # The best sub-block of each block, and the weights in it.
        self._best: list[Choices] = []
        self._inside: list[mx.array] = []

    def add(self, weights: mx.array, peak: mx.array, first: int) -> mx.array:
        width = self._inner.shape[-1]
        if ragged := -weights.shape[-1] % width:
            weights = mx.pad(weights, [(0, 0), (0, 0), (0, ragged)])
        grouped = weights.reshape(*weights.shape[:2], -1, width)
        mass = grouped.sum(axis=-1)
        start = first // width
        outer = self._outer[..., start : start + mass.shape[-1]]
        found = best(_perturbed(mass, peak, outer), start)
        inside = mx.take_along_axis(grouped, found.tokens[..., None], axis=2)[:, :, 0]
        if len(self._best) == APART:
            self._inside = [self._inside_best()]
            self._best = [merge(self._best)]
        self._best.append(found)
        self._inside.append(inside)
        return mass.sum(axis=-1, keepdims=True)

    @property
    def held(self) -> list[mx.array]:
        return [*self._inside, *(a for each in self._best for a in (each.scores, each.tokens))]

    def _inside_best(self) -> mx.array:
        found: mx.array = _of_best([each.scores for each in self._best], self._inside)
        return found

    def tokens(self) -> mx.array:
        number = merge(self._best).tokens[..., 0]
        score = _perturbed(self._inside_best(), mx.array(0.0), self._inner)
        return _id_in(number, mx.argmax(score, axis=-1), mx.array(score.shape[-1]))


@mx.compile
def _perturbed(weights: mx.array, peak: mx.array, gumbel: mx.array) -> mx.array:
    return mx.log(weights) + peak + gumbel


@mx.compile
def _id_in(number: mx.array, at: mx.array, width: mx.array) -> mx.array:
    return number * width + at.astype(mx.int32)


@mx.compile
def _uniform(shape: tuple[int, ...], count: int, key: mx.array) -> mx.array:
    return mx.random.randint(0, count, shape, key=key)


@mx.compile
def _gumbel(shape: tuple[int, ...], key: mx.array) -> mx.array:
    return mx.random.gumbel(shape, key=key)


class SeededDraws:
    """Draws from a seed: the same seed, the same sequence.

    Raises:
        SettingError: the seed is no whole number from 0 to 2^64 - 1.
    """

    def __init__(self, seed: int, vocab_size: int):
        self._key = mx.random.key(whole_number("a seed", seed, 0, MOST_SEED))
        self.vocab_size = whole_number("vocab_size", vocab_size, 1)

    def _next(self) -> mx.array:
        self._key, key = mx.random.split(self._key)
        return key

    def tokens(self, shape: tuple[int, ...]) -> mx.array:
        drawn: mx.array = _uniform(shape, self.vocab_size, self._next())
        return drawn

    def gumbel(self, shape: tuple[int, ...]) -> mx.array:
        return _gumbel(shape, self._next())

    def categorical(self, shape: tuple[int, ...]) -> Picker:
        width = sub_block(self.vocab_size)
        count = -(-self.vocab_size // width)
        return TwoStage(*mx.split(self.gumbel((*shape, count + width)), [count], axis=-1))
