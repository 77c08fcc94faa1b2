"""Puts together what blocks of the vocabulary have given, of one rank or of several."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import mlx.core as mx

from ..distributed.share import Share
from .constraints import Choices, fold, highest, merge
from .draws import Draws, sub_block

# Bytes of a piece of noise: of the real vocabulary and canvas as many ids as a block mostly has,
# which then takes a piece as it is. Another number gives other texts of the same seed.
NOISE_BYTES = 57 << 19

# Sums over blocks (B, L, 1 each), of numbers relative to exp(a block's peak).


@mx.compile
def mass_of(top: mx.array, peaks: Sequence[mx.array], masses: Sequence[mx.array]) -> mx.array:
    """Sum of exp(x - top) over all tokens."""
    parts = [mx.exp(p - top) * mass for p, mass in zip(peaks, masses, strict=True)]
    return fold(mx.add, parts)


@mx.compile
def slope_of(
    top: mx.array,
    peaks: Sequence[mx.array],
    masses: Sequence[mx.array],
    slopes: Sequence[mx.array],
) -> mx.array:
    """Sum of (x - top) exp(x - top) over the tokens of these blocks."""
    blocks = zip(peaks, masses, slopes, strict=True)
    parts = [mx.exp(p - top) * (slope + (p - top) * mass) for p, mass, slope in blocks]
    return fold(mx.add, parts)


class Noise:
    """Gumbel noise of the vocabulary, drawn piece by piece.

    How many ids a piece has follows from the shape alone. So neither the blocks that are read off,
    whose size follows from free memory, nor the number of ranks, each of which draws all and uses
    its own, change what a seed gives.
    """

    def __init__(self, draws: Draws, shape: tuple[int, ...], vocab_size: int):
        width, positions = sub_block(vocab_size), prod(shape)
        self._draws, self._shape, self._vocab_size = draws, shape, vocab_size
        self._count = max(NOISE_BYTES // (4 * positions) // width, 1) * width
        self._drawn = 0  # pieces
        self._last: mx.array | None = None  # of them, while some of it is still to be used

    def _next(self) -> mx.array:
        first = self._drawn * self._count
        self._drawn += 1
        return self._draws.gumbel((*self._shape, min(self._count, self._vocab_size - first)))

    def at(self, first: int, count: int) -> mx.array:
        """Of `count` ids from one on; they only grow."""
        parts = []
        while count:
            number, begin = divmod(first, self._count)
            while self._drawn <= number:
                self._last = self._next()
            assert self._last is not None
            piece, length = self._last, self._last.shape[-1]
            end = min(begin + count, length)
            if end == length:
                self._last = None  # or its memory could not be taken for what becomes of it
            parts.append(piece if end - begin == length else piece[..., begin:end])
            first, count = first + end - begin, count - end + begin
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)

    def end(self) -> None:
        """Nothing more is used, and whoever draws next finds the same on all ranks."""
        while self._drawn * self._count < self._vocab_size:
            self._next()


class _Drawn(Protocol):
    """Knows which ids were drawn."""

    def tokens(self) -> mx.array:
        """The ids (B, L)."""

    def drawn(self) -> Choices:
        """The same, with what they won by."""


@dataclass(frozen=True)
class _Taken:
    """Ids that were drawn on some rank."""

    found: Choices

    def tokens(self) -> mx.array:
        return self.found.tokens[..., 0]

    def drawn(self) -> Choices:
        return self.found


@dataclass(frozen=True)
class Found:
    """What the ids read off so far have given; sums are relative to exp(top)."""

    top: mx.array
    mass: mx.array
    slopes: Sequence[mx.array]
    choices: Choices
    perturbed: Choices | None
    drawn: _Drawn | None

    def over_ranks(self, share: Share) -> "Found":
        """The same of all ranks' ids; at a tie the lowest stays, which the first rank has."""
        if share.size == 1:
            return self
        chosen = [self.choices]
        chosen += [] if self.perturbed is None else [self.perturbed]
        chosen += [] if self.drawn is None else [self.drawn.drawn()]
        told = [self.top, self.mass, fold(mx.add, self.slopes)]
        told += [array for each in chosen for array in (each.scores, each.tokens)]
        tops, masses, slopes, *rest = zip(*share.gather(told), strict=True)
        top = highest(tops)
        best = [
            merge([Choices(*pair) for pair in zip(*pairs, strict=True)])
            for pairs in zip(rest[::2], rest[1::2], strict=True)
        ]
        return Found(
            top,
            mass_of(top, tops, masses),
            [slope_of(top, tops, masses, slopes)],
            best[0],
            None if self.perturbed is None else best[1],
            None if self.drawn is None else _Taken(best[-1]),
        )
