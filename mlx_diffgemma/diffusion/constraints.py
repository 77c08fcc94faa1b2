"""Which tokens a canvas may hold, and the best of those it may."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

import mlx.core as mx
import numpy as np

Part = TypeVar("Part")

# A logit of what must not be chosen. Finite, so that 0 * log 0 in an entropy stays 0.
NEVER = -1e9

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
    """Take what the block with the best score has, the earlier at a tie."""

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
    """Says which tokens a canvas may hold: each for itself (`allowed`), and together (`choose`).

    `joint` says whether the tokens depend on one another.
    """

    joint: ClassVar[bool]

    def allowed(self, first: int, count: int, positions: mx.array) -> mx.array | None:
        """Which of `count` ids from `first` on may stand at each of the positions (P,):
        (P, count) or (B, P, count), or None for all."""

    def score(self, logits: mx.array, first: int) -> Choices:
        """The best tokens of a block (B, L, C) whose ids begin at `first`, NEVER where none is."""

    def choose(self, choices: Choices, fixed: mx.array | None, canvas: mx.array) -> mx.array:
        """(B, L) ids of the best allowed canvas that is `canvas` where `fixed`."""

    def noise(self, tokens: mx.array) -> mx.array:
        """Uniform tokens (B, L) turned into noise that cannot be taken for an answer."""


class Anything:
    """No constraint."""

    joint: ClassVar[bool] = False

    def allowed(self, first: int, count: int, positions: mx.array) -> mx.array | None:
        return None

    def score(self, logits: mx.array, first: int) -> Choices:
        return best(logits, first)

    def choose(self, choices: Choices, fixed: mx.array | None, canvas: mx.array) -> mx.array:
        tokens = choices.tokens[..., 0]
        return tokens if fixed is None else mx.where(fixed, canvas, tokens)

    def noise(self, tokens: mx.array) -> mx.array:
        return tokens


ANYTHING = Anything()


@dataclass(frozen=True)
class ForbidFirst(Anything):
    """A constraint: some tokens must not stand at the front of the canvas.

    They are out for sampling, the argmax and self-conditioning alike.
    """

    ids: tuple[int, ...]

    def allowed(self, first: int, count: int, positions: mx.array) -> mx.array:
        banned = mx.array(np.isin(np.arange(first, first + count), self.ids))
        return ~(banned & (positions == 0)[:, None])


@dataclass(frozen=True, eq=False)
class Listed(Anything):
    """A constraint: what may stand at each place, whatever stands at others.

    Attributes:
        table: (S, vocabulary) sets of tokens.
        index: (P,) which of them each place has.
    """

    table: mx.array
    index: mx.array

    def allowed(self, first: int, count: int, positions: mx.array) -> mx.array:
        return self.table[:, first : first + count][self.index[positions]]
