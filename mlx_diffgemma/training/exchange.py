"""Sums over ranks that learn together: many arrays in few exchanges."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

import mlx.core as mx

from ..distributed.share import ALONE, Share

Arrays = dict[str, mx.array]

# Bytes of an exchange, from which on the next array goes into another one; as in MLX's own
# `average_gradients`, which does not say in which order its exchanges begin.
PIECE = 1 << 25


@dataclass(frozen=True)
class Together:
    """Ranks that learn together: which of them this is, and in rank 0 what the others hear of what
    they are to do next, see `ranks.learn_along`."""

    share: Share = ALONE
    told: Callable[[bytes], None] | None = None

    def tell(self, word: bytes) -> None:
        """Say it to all others, if this is rank 0."""
        if self.told is not None:
            self.told(word)


BY_ITSELF = Together()


def summed(share: Share, arrays: Mapping[str, mx.array]) -> Arrays:
    """The sum of each array over ranks, the same on all, computed; alone, what was given.

    All ranks have arrays of the same names, shapes and types.
    """
    if share.size == 1:
        return dict(arrays)
    found: Arrays = {}
    for names in _pieces(arrays):
        some = [arrays[name] for name in names]
        total = share.sum(mx.concatenate([mx.flatten(each) for each in some]))
        mx.eval(total)  # a GPU that waited for other ranks would be stopped after some seconds
        ends = list(accumulate(each.size for each in some))[:-1]
        for name, part, own in zip(names, mx.split(total, ends), some, strict=True):
            found[name] = part.reshape(own.shape)
        mx.eval(found)
    return {name: found[name] for name in arrays}


def _pieces(arrays: Mapping[str, mx.array]) -> Iterator[list[str]]:
    """Names of arrays of one type that go together, in an order that is the same on all ranks."""
    names: list[str] = []
    count = 0
    order = sorted(arrays, key=lambda name: (str(arrays[name].dtype), name))
    for name, after in zip(order, [*order[1:], None], strict=True):
        names.append(name)
        count += arrays[name].nbytes
        other = after is None or arrays[after].dtype != arrays[name].dtype
        if other or count >= PIECE:
            yield names
            names, count = [], 0
