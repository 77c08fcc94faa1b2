"""What a step of training asks of the model, and the loss of its answer.

As in all public recipes, one block of each answer is denoised: its tokens are replaced by uniform
random ones with a probability t, the encoder has read the prompt and the blocks before it, and half
of the canvases are self-conditioned on what a first pass, which has no gradient, predicts. The loss
is the mean cross-entropy of all positions of the canvas, changed or not; beside it stands the
encoder's own, of each next token. Differences from what the sampler does are few: the first pass
stands in for all steps before, its temperature is 1, and tokens are not accepted by entropy.

Randomness is numpy's, on the host, so that a run that goes on draws what it would have drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..distributed.share import ALONE, Share
from ..model.config import Config
from ..model.diffusion_gemma import DiffusionGemma
from .cross_entropy import cross_entropy, expected_embedding
from .forward import decode, encode


@dataclass(frozen=True)
class Sample:
    """One example, in ids.

    Attributes:
        prompt: what is given; may be empty.
        response: what is supervised, with the token that closes the turn.
        truncated: the response goes on; what fills its last canvas is then not supervised.
    """

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    truncated: bool = False

    @property
    def length(self) -> int:
        """Tokens of both."""
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class Objective:
    """Constants of the objective, as in the public recipes.

    Attributes:
        smallest_noise: t is drawn from between this and 1 minus this.
        self_conditioned: the share of canvases that are.
        encoder_weight: of the encoder's loss; 0 computes none.
    """

    smallest_noise: float = 1e-4
    self_conditioned: float = 0.5
    encoder_weight: float = 1.0


@dataclass(frozen=True)
class Noised:
    """What one step asks, a row an example; all random numbers are drawn.

    Where several ranks learn together, these are one's rows of a larger batch.

    Attributes:
        tokens: ids (B, T) that the encoder reads, filled on the right.
        lengths: how many of each row are no filling.
        prefixes: how many of each row stand before its canvas.
        canvas: noised ids (B, L).
        target: the right ones (B, L).
        supervised: of each row, how many positions of its canvas are, from the first on.
        conditioned: whether a row's canvas is self-conditioned.
        levels: t of each row.
        positions: supervised ones of all rows of the batch, those of other ranks included.
        pairs: tokens of the batch that the encoder is to expect, likewise.
        self_conditioning: what canvases are conditioned on (B, L, hidden), zeros for those that are
            not; None asks for the first pass, where any is.
    """

    tokens: mx.array
    lengths: tuple[int, ...]
    prefixes: tuple[int, ...]
    canvas: mx.array
    target: mx.array
    supervised: tuple[int, ...]
    conditioned: tuple[bool, ...]
    levels: tuple[float, ...]
    positions: int
    pairs: int
    self_conditioning: mx.array | None = None


@dataclass(frozen=True)
class Losses:
    """Scalars, in nats a token: the denoiser's, the encoder's and their weighted sum.

    Of a rank's rows they are its part of the batch's: those of all ranks add up to it.
    """

    denoising: mx.array
    reading: mx.array
    total: mx.array


def noised(
    samples: Sequence[Sample],
    rng: np.random.Generator,
    config: Config,
    end_token: int,
    objective: Objective,
    *,
    level: float | None = None,
    share: Share = ALONE,
) -> Noised:
    """Draw a block of each sample, and its noise; of several ranks each keeps each n-th of them.

    The numbers drawn for a sample depend on those before it alone, and with the same `rng` are the
    same at each `level`.

    Args:
        samples: at least one for each rank; their responses are not empty.
        rng: drawn from.
        config: the model's; its canvas and vocabulary.
        end_token: what fills the last block of a response.
        objective: constants.
        level: t of all rows; None draws one for each.
        share: which rank this is.
    """
    length = config.canvas_length
    rows = [_drawn(sample, rng, config, end_token, objective, level) for sample in samples]
    reads = [
        (*sample.prompt, *sample.response)[: None if objective.encoder_weight else row.prefix]
        for sample, row in zip(samples, rows, strict=True)
    ]
    positions = sum(min(row.supervised, length) for row in rows)
    pairs = sum(max(len(each) - 1, 0) for each in reads)
    rows, reads = rows[share.rank :: share.size], reads[share.rank :: share.size]
    # Of nothing at all there would be no keys; what fills a row is seen by nobody.
    width = max(1, *(len(each) for each in reads))
    tokens = np.full((len(rows), width), end_token, np.int32)
    for row, each in zip(tokens, reads, strict=True):
        row[: len(each)] = each
    return Noised(
        tokens=mx.array(tokens),
        lengths=tuple(len(each) for each in reads),
        prefixes=tuple(row.prefix for row in rows),
        canvas=mx.array(np.stack([row.canvas for row in rows])),
        target=mx.array(np.stack([row.target for row in rows])),
        supervised=tuple(min(row.supervised, length) for row in rows),
        conditioned=tuple(row.conditioned for row in rows),
        levels=tuple(row.level for row in rows),
        positions=positions,
        pairs=pairs,
    )


@dataclass(frozen=True)
class _Row:
    """One sample's block, as `Noised` has it."""

    prefix: int
    canvas: np.ndarray
    target: np.ndarray
    supervised: int
    conditioned: bool
    level: float


def _drawn(
    sample: Sample,
    rng: np.random.Generator,
    config: Config,
    end_token: int,
    objective: Objective,
    level: float | None,
) -> _Row:
    length = config.canvas_length
    first = int(rng.integers(-(-len(sample.response) // length))) * length
    block = sample.response[first : first + length]
    target = np.full(length, end_token, np.int32)
    target[: len(block)] = block
    least = objective.smallest_noise
    drawn = float(rng.uniform(least, 1 - least))
    share = drawn if level is None else level
    replaced = rng.random(length) < share
    noise = rng.integers(config.vocab_size, size=length, dtype=np.int32)
    return _Row(
        prefix=len(sample.prompt) + first,
        canvas=np.where(replaced, noise, target),
        target=target,
        supervised=len(block) if sample.truncated else length,
        conditioned=bool(rng.random() < objective.self_conditioned),
        level=share,
    )


def losses(
    model: DiffusionGemma, batch: Noised, objective: Objective, *, checkpointed: bool = False
) -> Losses:
    """Both losses of a batch, as a graph that `mx.grad` may go through.

    With `checkpointed`, each layer is computed once more for its gradient, and much less is held.
    """
    read, kept = encode(model, batch.tokens, checkpointed=checkpointed)
    rows = range(len(batch.prefixes))
    hidden = decode(
        model,
        batch.canvas,
        kept,
        rows,
        batch.prefixes,
        _first_pass(model, batch, kept),
        checkpointed=checkpointed,
    )
    denoising = _mean_loss(model, hidden, batch.target, batch.supervised, batch.positions)
    reading = mx.zeros(())
    if objective.encoder_weight:
        pairs = [length - 1 for length in batch.lengths]
        reading = _mean_loss(model, read[:, :-1], batch.tokens[:, 1:], pairs, batch.pairs)
    return Losses(denoising, reading, denoising + objective.encoder_weight * reading)


def _first_pass(model: DiffusionGemma, batch: Noised, kept: Sequence[mx.array]) -> mx.array | None:
    """What canvases are conditioned on (B, L, hidden), zeros for those that are not; None is none.

    It is what a pass over the same canvas, itself not conditioned, expects; without a gradient.
    """
    rows = [row for row, wanted in enumerate(batch.conditioned) if wanted]
    if not rows or batch.self_conditioning is not None:
        return batch.self_conditioning
    some = mx.array(rows)
    prefixes = [batch.prefixes[row] for row in rows]
    found = expected_embedding(model, decode(model, batch.canvas[some], kept, rows, prefixes))
    if len(rows) == len(batch.conditioned):
        return found
    zeros = mx.zeros((len(batch.conditioned), *found.shape[1:]), found.dtype)
    zeros[some] = found
    return zeros


def _mean_loss(
    model: DiffusionGemma, hidden: mx.array, tokens: mx.array, counts: Sequence[int], of: int
) -> mx.array:
    """Mean loss of the first so many positions of each row, of all rows together; of none, 0.

    Where those are not all, but a part `of` so many, it is that part of the mean of all.
    """
    length = tokens.shape[1]
    places = [row * length + i for row, count in enumerate(counts) for i in range(count)]
    if not places:
        return mx.zeros(())
    states, wanted = hidden.reshape(-1, hidden.shape[-1]), tokens.flatten()
    if len(places) < len(wanted):
        some = mx.array(places)
        states, wanted = states[some], wanted[some]
    found: mx.array = cross_entropy(model, states, wanted).mean()
    return found if len(places) == of else found * (len(places) / of)
