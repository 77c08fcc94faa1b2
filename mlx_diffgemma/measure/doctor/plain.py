"""The readout of hidden states by its definition: what the fast one is compared with."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ...diffusion.draws import sub_block
from ...model.diffusion_gemma import DiffusionGemma

# Rows of the embedding table that are multiplied with at once; bounds the memory.
ROWS = 1 << 14


@dataclass(frozen=True)
class PlainReadout:
    """What a step reads off hidden states (B, L, hidden), with all logits at once, in float64.

    `log_p` (B, L, V) are log-probabilities in nats, `entropy` (B, L) is theirs; `self_conditioning`
    is the expected embedding (B, L, hidden); `outer` and `inner` are the scores, noise included, of
    sub-blocks (B, L, blocks) and of all ids by sub-block (B, L, blocks, ids).
    """

    log_p: Any
    entropy: Any
    self_conditioning: Any
    outer: Any
    inner: Any

    def nats_behind_best(self, ids: Any) -> float:
        """Return the nats from the worst of ids (B, L) to the best token: 0 but for near ties."""
        return float((self.log_p.max(axis=-1) - _at(self.log_p, ids)).max())

    def nats_behind_drawn(self, ids: Any) -> float:
        """Return as much of the draw, by perturbed scores: of the sub-block, and inside it."""
        block, place = np.divmod(ids, self.inner.shape[-1])
        inside = np.take_along_axis(self.inner, block[..., None, None], axis=2)[..., 0, :]
        outer = self.outer.max(axis=-1) - _at(self.outer, block)
        return float((outer + inside.max(axis=-1) - _at(inside, place)).max())


def _at(scores: Any, ids: Any) -> Any:
    return np.take_along_axis(scores, ids[..., None], axis=-1)[..., 0]


def plain_readout(
    model: DiffusionGemma, hidden: mx.array, temperature: float, noise: mx.array
) -> PlainReadout:
    """Follow the definitions, in the order in which one would write them down.

    `noise` is the draw's, (B, L, sub-blocks + ids of a sub-block).
    """
    count, width = model.config.vocab_size, model.config.hidden_size
    starts = range(0, count, ROWS)
    products = [np.array(hidden @ _rows(model, first).swapaxes(-1, -2)) for first in starts]
    cap = model.config.final_logit_softcapping
    raw = np.concatenate(products, axis=-1).astype(np.float64)
    logits = np.tanh(raw / cap) * cap / temperature
    below = logits - logits.max(axis=-1, keepdims=True)
    log_p = below - np.log(np.exp(below).sum(axis=-1, keepdims=True))
    p = np.exp(log_p)
    expected = np.zeros(hidden.shape)
    for first in starts:
        some = mx.array(p[..., first : first + ROWS].astype(np.float32))
        expected += np.array(some @ _rows(model, first))
    entropy = -(p * log_p).sum(axis=-1)
    return PlainReadout(
        log_p, entropy, expected * width**0.5, *_perturbed(p, np.array(noise, np.float64))
    )


def _rows(model: DiffusionGemma, first: int) -> mx.array:
    """Return rows of the embedding table, by their ids."""
    last = min(first + ROWS, model.config.vocab_size)
    return model.embedding(mx.arange(first, last)).astype(mx.float32)


def _perturbed(p: Any, noise: Any) -> tuple[Any, Any]:
    """Return scores of a draw in two stages, by Gumbel-max: of sub-blocks, and of ids in each."""
    width = sub_block(p.shape[-1])
    blocks = -(-p.shape[-1] // width)
    missing = blocks * width - p.shape[-1]
    grouped = np.pad(p, [(0, 0), (0, 0), (0, missing)]).reshape(*p.shape[:2], blocks, width)
    with np.errstate(divide="ignore"):  # the log of what cannot be drawn
        outer = np.log(grouped.sum(axis=-1)) + noise[..., :blocks]
        return outer, np.log(grouped) + noise[..., None, blocks:]
