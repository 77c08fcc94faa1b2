"""Recorders of what a model computes: draws that repeat, layers and routers that are watched."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from ...diffusion.draws import SeededDraws
from ...model.diffusion_gemma import DiffusionGemma
from ...model.feed_forward import Router
from ...model.layers import Block, View


class Tape(SeededDraws):
    """Draws of a seed that are kept: after `rewind` the very same numbers come again."""

    def __init__(self, seed: int, vocab_size: int):
        super().__init__(seed, vocab_size)
        self._kept: list[mx.array] = []
        self._place = 0

    def rewind(self) -> "Tape":
        self._place = 0
        return self

    def tokens(self, shape: tuple[int, ...]) -> mx.array:
        return self._play(lambda: super(Tape, self).tokens(shape))

    def gumbel(self, shape: tuple[int, ...]) -> mx.array:
        return self._play(lambda: super(Tape, self).gumbel(shape))

    def _play(self, draw: Callable[[], mx.array]) -> mx.array:
        if self._place == len(self._kept):
            self._kept.append(draw())
            mx.eval(self._kept[-1])
        self._place += 1
        return self._kept[self._place - 1]


class Tap:
    """A block that keeps what it was given and what it gave.

    With `instead` it computes from that, in the type of what it was given: an error of the layers
    before it does not reach it.
    """

    def __init__(self, block: Block, instead: mx.array | None):
        self.self_attn, self.layer_scalar = block.self_attn, block.layer_scalar
        self._block, self._instead = block, instead
        self.router: RouterTap

    def __call__(
        self,
        x: mx.array,
        views: Sequence[View],
        rotation: mx.array,
        scalar: mx.array,
        wanted: mx.array | None = None,
    ) -> mx.array:
        self.given = x
        x = x if self._instead is None else self._instead.astype(x.dtype)
        self.gave: mx.array = self._block(x, views, rotation, scalar, wanted)
        return self.gave


class RouterTap:
    """A router that keeps by how much each token is decided: how far the last chosen expert is
    before the first one that is not, in standard deviations of the token's scores."""

    def __init__(self, router: Router):
        self.scale, self.per_expert_scale = router.scale, router.per_expert_scale
        self._router = router

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        scores = self._router.proj(x).astype(mx.float32)
        ordered = mx.sort(scores, axis=-1)
        last = ordered.shape[-1] - self._router.top_k
        ahead = ordered[..., last] - ordered[..., max(last - 1, 0)]
        self.decided = ahead / scores.std(axis=-1)
        return self._router(x)


@contextmanager
def tapped(
    model: DiffusionGemma, instead: Sequence[mx.array | None] | None = None
) -> Iterator[list[Tap]]:
    """Put a tap on every layer and its router, for as long as this lasts."""
    decoder: Any = model.model.decoder
    blocks = decoder.layers
    routers = [block.router for block in blocks]
    taps = [Tap(b, i) for b, i in zip(blocks, instead or [None] * len(blocks), strict=True)]
    decoder.layers = taps
    for block, tap, router in zip(blocks, taps, routers, strict=True):
        block.router = tap.router = RouterTap(router)
    try:
        yield taps
    finally:
        decoder.layers = blocks
        for block, router in zip(blocks, routers, strict=True):
            block.router = router
