"""Draws all random numbers of a run."""

from typing import Protocol

import mlx.core as mx
import numpy as np

from ..arguments import whole_number
from .constraints import Choices, _of_best, best, merge

# The largest seed that MLX's keys take.
MOST_SEED = (1 << 64) - 1

# Places of an answer whose noise is drawn at once.
PLACES = 64

# Drawn ids of which a seed is made.
SEED_PARTS = 8

# Blocks of the vocabulary whose parts are held apart before they are joined.
APART = 12

# Randomness --------------------------------------------------------------------------------------


class Categorical(Protocol):
    """One draw a position, of a distribution that is seen in blocks."""

    def add(self, weights: mx.array, peak: mx.array, first: int) -> mx.array:
        """A block of weights (B, L, C) of ids from `first` on, relative to exp(peak) (B, L, 1).

        Answers their sum (B, L, 1).
        """

    @property
    def state(self) -> list[mx.array]:
        """Lists what is kept of the blocks so far, for the caller to evaluate."""

    def tokens(self) -> mx.array:
        """The ids drawn, (B, L)."""

    def drawn(self) -> Choices:
        """The same, (B, L, 1), and by what they won: to be compared with draws of other ids."""


class Draws(Protocol):
    """Gives all random numbers of a run."""

    def tokens(self, shape: tuple[int, ...]) -> mx.array:
        """Uniform token ids."""

    def gumbel(self, shape: tuple[int, ...]) -> mx.array:
        """Standard Gumbel noise, float32."""

    def categorical(self, shape: tuple[int, ...]) -> Categorical:
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
    def state(self) -> list[mx.array]:
        return [*self._inside, *(a for each in self._best for a in (each.scores, each.tokens))]

    def _inside_best(self) -> mx.array:
        found: mx.array = _of_best([each.scores for each in self._best], self._inside)
        return found

    def tokens(self) -> mx.array:
        return self._id(merge(self._best))

    def drawn(self) -> Choices:
        found = merge(self._best)
        return Choices(found.scores, self._id(found)[..., None])

    def _id(self, found: Choices) -> mx.array:
        score = _perturbed(self._inside_best(), mx.array(0.0), self._inner)
        number = found.tokens[..., 0]
        drawn: mx.array = _id_in(number, mx.argmax(score, axis=-1), mx.array(score.shape[-1]))
        return drawn


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

    def categorical(self, shape: tuple[int, ...]) -> Categorical:
        width = sub_block(self.vocab_size)
        count = -(-self.vocab_size // width)
        return TwoStage(*mx.split(self.gumbel((*shape, count + width)), [count], axis=-1))


class PlaceDraws:
    """Draws the tokens of an answer place by place: a place that is asked for again, in a pass of
    one or of many, is given the same noise.

    So the text does not depend on which places are drawn together: a drafted token is taken where
    it is the one that is drawn.
    """

    def __init__(self, draws: Draws, vocab_size: int):
        width = sub_block(vocab_size)
        self._draws, self._sizes = draws, (-(-vocab_size // width), width)
        self._blocks: dict[int, mx.array] = {}  # noise of `PLACES` places each
        self._drawn = 0  # blocks
        seed = 0
        for part in np.array(draws.tokens((1, SEED_PARTS)))[0].tolist():
            seed = (seed * vocab_size + part) % (MOST_SEED + 1)
        # For all that is no token of the answer, and must not change which those are.
        self.others = SeededDraws(seed, vocab_size)

    def at(self, place: int, count: int) -> Categorical:
        """Draws (1, count) of the places from one on; places only grow."""
        first, last = place // PLACES, (place + count - 1) // PLACES
        self._blocks = {i: block for i, block in self._blocks.items() if i >= first}
        while self._drawn <= last:
            self._blocks[self._drawn] = self._draws.gumbel((1, PLACES, sum(self._sizes)))
            self._drawn += 1
        noise = [self._blocks[i] for i in range(first, last + 1)]
        begin = place - first * PLACES
        mine = mx.concatenate(noise, axis=1)[:, begin : begin + count]
        return TwoStage(*mx.split(mine, [self._sizes[0]], axis=-1))
