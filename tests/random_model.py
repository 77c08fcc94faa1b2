"""Models that know nothing: random weights, or canvases that are written down beforehand."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from mlx_diffgemma import DiffusionGemma, GenerationConfig
from mlx_diffgemma.model import Config, LayerConfig, Pass


def untrained(
    vocab_size: int,
    canvas: int,
    *,
    seed: int = 3,
    eos: tuple[int, ...] = (1, 6),
    context: int = 4096,
    windows: tuple[int | None, ...] = (None,),
    kind: type[DiffusionGemma] = DiffusionGemma,
) -> Any:
    """Layers of width 32, one full layer by default; 64 tokens and 48 steps are its settings."""
    layers = tuple(LayerConfig(16, 1, window, 1e4, 8) for window in windows)
    config = Config(vocab_size, 32, 32, 16, 2, 2, 1, 1e-6, 30.0, context, canvas, layers)
    generation = GenerationConfig(max_new_tokens=64, eos_token_ids=eos)
    model = kind(config, generation)
    keys = iter(mx.random.split(mx.random.key(seed), 999))
    model.update(
        tree_map(lambda p: mx.random.normal(p.shape, key=next(keys)) * 0.5, model.parameters())
    )
    return model


class Scripted(DiffusionGemma):
    """Writes the canvases of `script` in turn, each until it is stable.

    None in a canvas is a position where all tokens are equally likely, so that it never converges.
    `_beliefs` collects what it was given for self-conditioning.
    """

    script: Sequence[Sequence[int | None]]

    def begin(self, *script: Sequence[int | None]) -> None:
        self.script = script
        self._next = 0
        self._beliefs: list[mx.array] = []

    def decode(self, passes: Sequence[Pass]) -> list[mx.array]:
        """Of each position the wanted token and how sure it is."""
        (asked,) = passes
        if asked.belief is None:
            self._now = self.script[self._next]
            self._next += 1
        length = asked.canvas.shape[1]
        ids = [*self._now, *[0] * length][:length]
        return [mx.array([[[t or 0, 0.0 if t is None else 30.0] for t in ids]])]

    def logits(self, hidden: mx.array) -> mx.array:
        return (mx.arange(self.config.vocab_size) == hidden[..., :1]) * hidden[..., 1:]

    def soft_embedding(self, logits: mx.array) -> mx.array:
        self._beliefs.append(mx.softmax(logits, axis=-1))
        return super().soft_embedding(logits)


def scripted() -> Scripted:
    """For the small model's vocabulary and canvas."""
    return untrained(768, 64, kind=Scripted)
