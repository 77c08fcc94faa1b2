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


class Reciting(DiffusionGemma):
    """Its encoder recites answers, one to each turn that `opens`; its denoiser drafts them, wrong
    at every `wrong`-th token (0 is never, 1 always)."""

    def begin(self, opens: Sequence[int], *answers: Sequence[int], wrong: int = 0) -> None:
        self._opens, self._answers, self._wrong = list(opens), answers, wrong
        self._seen: list[int] = []

    def _wanted(self, place: int) -> tuple[int, int]:
        """How far the answer has come at a place, and its token there."""
        size = len(self._opens)
        turns = [
            i + size
            for i in range(min(place, len(self._seen)) - size + 1)
            if self._seen[i : i + size] == self._opens
        ]
        if not turns:
            return 0, 0
        answer, at = self._answers[len(turns) - 1], place - turns[-1]
        return at, answer[min(at, len(answer) - 1)]

    def encode(self, tokens: mx.array, cache: Any, *rest: Any, **options: Any) -> mx.array:
        """States whose best next token is the answer's."""
        first = cache[0].length
        super().encode(tokens, cache, *rest, **options)
        self._seen[first:] = tokens[0].tolist()
        places = range(first + 1, first + 1 + tokens.shape[1])
        return self.embedding(mx.array([[self._wanted(place)[1] for place in places]])) * 60.0

    def decode(self, passes: Sequence[Pass], evaluate: Any = None) -> list[mx.array]:
        """States whose best tokens are the answer's, but for those that are wrong."""
        found = []
        for asked in passes:
            read_off = asked.read_off
            places = range(asked.canvas.shape[1]) if read_off is None else read_off
            drafted = []
            for place in map(int, places):
                at, token = self._wanted(asked.cache[0].length + place)
                drafted.append((token + 1) % 700 if self._wrong and not at % self._wrong else token)
            found.append(self.embedding(mx.array([drafted])) * 60.0)
        return found


class Chain(DiffusionGemma):
    """A text in which each token depends on the one before it, by a table of logits (V, V); its
    denoiser always drafts token 3."""

    table: mx.array

    def encode(self, tokens: mx.array, cache: Any, *rest: Any, **options: Any) -> mx.array:
        """States whose logits are the table's rows."""
        super().encode(tokens, cache, *rest, **options)
        cap = self.config.final_logit_softcapping
        rows = mx.arctanh(self.table / cap) * cap
        return mx.pad(rows[tokens], [(0, 0), (0, 0), (0, 32 - len(self.table))])

    def decode(self, passes: Sequence[Pass], evaluate: Any = None) -> list[mx.array]:
        """States whose best token is 3."""
        threes = (mx.full(asked.shape, 3, dtype=mx.int32) for asked in passes)
        return [self.embedding(each) * 60.0 for each in threes]


def chain(logits: Sequence[Sequence[float]]) -> Chain:
    """A text of at most 4096 tokens that no token ends."""
    size = len(logits)
    model: Chain = untrained(size, 8, eos=(size,), kind=Chain)
    model.model.decoder.embed_tokens.weight = mx.eye(size, 32)
    model.table = mx.array(logits)
    return model
