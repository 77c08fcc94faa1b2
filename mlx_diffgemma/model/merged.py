"""What is put together once: linear maps of one input, and arrays made of parameters."""

from collections.abc import Callable, Sequence
from copy import copy
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn


class MergedLinear:
    """Linear maps of one input as one map, so that there is one product.

    Their weights become views of its own. Where one of them is replaced later, by training or an
    adapter, or they are quantized in different ways, each is applied by itself.
    """

    def __init__(self, parts: Sequence[nn.Linear]):
        self._whole: nn.Linear | None = None
        kinds = [(type(p), vars(p), p.keys()) for p in parts]
        mergeable = all(type(p) in (nn.Linear, nn.QuantizedLinear) for p in parts)
        if not parts or not mergeable or any(kind != kinds[0] for kind in kinds):
            return
        self._whole = copy(parts[0])
        for name in parts[0]:
            self._whole[name] = mx.concatenate([part[name] for part in parts])
            ends = list(accumulate(len(part[name]) for part in parts))[:-1]
            for part, own in zip(parts, mx.split(self._whole[name], ends), strict=True):
                part[name] = own
        self._weights = [part.weight for part in parts]

    def __call__(self, parts: Sequence[nn.Linear], x: mx.array) -> mx.array:
        """Outputs of the parts, end to end."""
        if self._whole is not None and all(
            part.get("weight") is own for part, own in zip(parts, self._weights, strict=True)
        ):
            out: mx.array = self._whole(x)
            return out
        return mx.concatenate([part(x) for part in parts], axis=-1)


class Derived:
    """An array made of parameters, kept once for those that stay as they are.

    A forward pass keeps nothing: within `mx.grad` and `mx.compile` its arrays are placeholders.
    """

    def __init__(self, make: Callable[..., mx.array]):
        self._make = make
        self._of: tuple[mx.array, ...] = ()
        self._made: mx.array | None = None

    def keep(self, *own: mx.array) -> None:
        """Make it of these parameters, from now on only where they are replaced."""
        self._of, self._made = own, self._make(*own)

    @property
    def made(self) -> list[mx.array]:
        """Lists the array that is kept, if any."""
        return [] if self._made is None else [self._made]

    def __call__(self, *own: mx.array) -> mx.array:
        """Of these parameters, as `make` makes it."""
        if self._made is None or any(a is not b for a, b in zip(own, self._of, strict=True)):
            return self._make(*own)
        return self._made
