"""Which examples an iteration takes: those of about equal length, each once an epoch.

The order follows from the seed and the iteration alone, so a run that goes on needs no state of it.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

# What a generator is for, beside the seed and a number; no two share their draws.
ORDER, NOISE, VALIDATION = range(3)


def draws(seed: int, purpose: int, *numbers: int) -> np.random.Generator:
    """Numpy's generator for one purpose at one place of a run."""
    return np.random.default_rng([seed, purpose, *numbers])


class Batches:
    """Packs examples of these lengths, `size` at a time."""

    def __init__(self, lengths: Sequence[int], size: int, seed: int):
        self._lengths = np.array(lengths)
        self._size, self._seed = size, seed
        self.count = -(-len(lengths) // size)  # in an epoch
        self._of = lru_cache(maxsize=1)(self._epoch)

    def at(self, iteration: int) -> list[int]:
        """Indices of the examples of an iteration, counted from 1."""
        epoch, place = divmod(iteration - 1, self.count)
        return self._of(epoch)[place]

    def _epoch(self, epoch: int) -> list[list[int]]:
        """All examples once: neighbours in length together, equal ones anew each time."""
        rng = draws(self._seed, ORDER, epoch)
        mixed = rng.permutation(len(self._lengths))
        sorted_ = mixed[np.argsort(self._lengths[mixed], kind="stable")].tolist()
        packed = [sorted_[i : i + self._size] for i in range(0, len(sorted_), self._size)]
        return [packed[i] for i in rng.permutation(len(packed))]


def in_order(lengths: Sequence[int], size: int, most: int) -> list[list[int]]:
    """Batches that are measured, the same each time: of the first examples, packed by length."""
    count = len(lengths) if most < 0 else min(len(lengths), most * size)
    indices = sorted(range(count), key=lambda i: lengths[i])
    return [indices[i : i + size] for i in range(0, count, size)]
