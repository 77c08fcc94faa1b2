"""Models that know nothing: random weights, or canvases that are written down beforehand."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from mlx_diffgemma import DiffusionGemma, GenerationConfig
from mlx_diffgemma.model.config import Config, LayerConfig
from mlx_diffgemma.model.diffusion_gemma import Pass


def untrained(
    vocab_size: int,
    canvas: int,
    *,
    seed: int = 3,
    eos: tuple[int, ...] = (1, 6),
    context: int = 4096,
    windows: tuple[int | None, ...] = (None,),
    width: int = 32,
    kind: type[DiffusionGemma] = DiffusionGemma,
) -> Any:
    """Narrow layers, one full layer by default; 64 tokens and 48 steps are its settings."""
    layers = tuple(LayerConfig(16, 1, window, 1e4, 8) for window in windows)
    config = Config(vocab_size, width, 32, 16, 2, 2, 1, 1e-6, 30.0, context, canvas, layers)
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
    Hidden states are rows of the embedding. `_conditioned_on` collects what the model was given for
    self-conditioning.
    """

    script: Sequence[Sequence[int | None]]

    def begin(self, *script: Sequence[int | None]) -> None:
        self.script = script
        self._next = 0
        self._conditioned_on: list[mx.array] = []

    def decode(self, passes: Sequence[Pass], evaluate: Any = None) -> list[mx.array]:
        """Of each position the wanted token's embedding, or zeros."""
        (asked,) = passes
        if asked.self_conditioning is None:
            self._now = self.script[self._next]
            self._next += 1
        else:
            self._conditioned_on.append(asked.self_conditioning)
        length = asked.canvas.shape[1]
        ids = [*self._now, *[0] * length][:length]
        sure = mx.array([[[0.0 if t is None else 60.0] for t in ids]])
        return [self.embedding(mx.array([[t or 0 for t in ids]])) * sure]


def scripted(kind: type[Scripted] = Scripted, *, one_hot: bool = False) -> Scripted:
    """For the small model's vocabulary and canvas; its embedding is a code of random signs.

    One-hot, which takes six times as long, self_conditioning are probabilities times a constant.
    """
    width = 768 if one_hot else 128
    model: Scripted = untrained(768, 64, width=width, kind=kind)
    signs = mx.random.bernoulli(shape=(768, width), key=mx.random.key(0)) * 2.0 - 1.0
    model.model.decoder.embed_tokens.weight = mx.eye(768) if one_hot else signs / width**0.5
    return model
