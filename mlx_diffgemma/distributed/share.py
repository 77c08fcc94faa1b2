"""One rank's share of a model that several compute together, and how they put results together."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import mlx.core as mx
import numpy as np

from .launch import LaunchError
from .others import Others


class Group(Protocol):
    """Puts arrays of all ranks together. Each rank calls the same, in the same order."""

    def sum(self, x: mx.array) -> mx.array:
        """The sum over ranks, the same bits on all."""

    def gather(self, x: mx.array) -> mx.array:
        """All ranks' arrays, (ranks, ...)."""


class Ranks:
    """The group that `mlx.launch` has started.

    Each call begins at once. Left to a later evaluation, those that do not depend on each other
    would begin in an order that may differ between ranks: one's sum would meet another's state.
    """

    def __init__(self, group: mx.distributed.Group):
        self._group = group

    def sum(self, x: mx.array) -> mx.array:
        found = mx.distributed.all_sum(x, group=self._group)
        mx.async_eval(found)  # type: ignore[no-untyped-call]
        return found

    def gather(self, x: mx.array) -> mx.array:
        found = mx.distributed.all_gather(x[None], group=self._group)
        mx.async_eval(found)  # type: ignore[no-untyped-call]
        return found


@dataclass(frozen=True)
class Share:
    """Rank `rank` of `size`; one rank alone has everything, and needs no group.

    `others` is rank 0's way to tell them what they are to do. With `check`, what must be the same
    on all ranks is compared, which takes its time.
    """

    rank: int = 0
    size: int = 1
    group: Group | None = field(default=None, compare=False)
    others: Others | None = field(default=None, compare=False)
    check: bool = False

    def cut(self, count: int, unit: int = 1) -> range:
        """Its part of `count` things, whose borders are multiples of `unit`; maybe an empty one."""
        units = -(-count // unit)
        first, end = (units * i // self.size * unit for i in (self.rank, self.rank + 1))
        return range(min(first, count), min(end, count))

    def sum(self, x: mx.array) -> mx.array:
        """The sum of what the ranks have."""
        return x if self.group is None else self.group.sum(x)

    def sums(self, *parts: mx.array) -> Sequence[mx.array]:
        """The sum of each part, which have one shape, in one go."""
        return parts if self.group is None else list(self.group.sum(mx.stack(list(parts))))

    def compare(self, x: mx.array, what: str) -> None:
        """With `check`, see whether all ranks have the same bits.

        Raises:
            LaunchError: they have not.
        """
        if self.group is None or not self.check:
            return
        bits = mx.flatten(mx.contiguous(x)).view(mx.uint8).astype(mx.uint32)
        mixed = ((bits + 1) * (mx.arange(len(bits)) % 65521 + 1)).astype(mx.uint32)
        sums = np.array(self.group.gather(mixed.sum()[None]))[:, 0].tolist()
        if len(set(sums)) > 1:
            raise LaunchError(f"ranks differ in {what}: checksums {sums}")

    def gather(self, arrays: Sequence[mx.array]) -> list[list[mx.array]]:
        """What each rank has, in one go: (B, L, n) of 32 bits each, and of the same kinds."""
        if self.group is None:
            return [list(arrays)]
        kinds = [each.dtype for each in arrays]
        ends = list(accumulate(each.shape[-1] for each in arrays))[:-1]
        packed = mx.concatenate([each.view(mx.uint32) for each in arrays], axis=-1)
        return [
            [part.view(kind) for part, kind in zip(mx.split(rank, ends, -1), kinds, strict=True)]
            for rank in self.group.gather(packed)
        ]

    def agreed(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        """What rank 0 has, on all ranks: of arrays of 32 bits or booleans, in one go.

        What decides how it goes on must be the same everywhere, or one would wait for ever.
        """
        if self.group is None:
            return list(arrays)
        words = [
            mx.flatten(each.astype(mx.uint32) if each.dtype == mx.bool_ else each.view(mx.uint32))
            for each in (mx.contiguous(array) for array in arrays)
        ]
        packed = mx.concatenate(words)
        told = self.group.sum(packed if not self.rank else mx.zeros_like(packed))
        parts = mx.split(told, list(accumulate(map(len, words)))[:-1])
        return [
            (part.astype(mx.bool_) if like.dtype == mx.bool_ else part.view(like.dtype)).reshape(
                like.shape
            )
            for part, like in zip(parts, arrays, strict=True)
        ]


ALONE = Share()
