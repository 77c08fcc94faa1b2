"""What the denoising loop asks of patterns: tokens that they allow, the best allowed canvas."""

from collections.abc import Sequence
from typing import ClassVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .automaton import Ids, Plan
from .constraints import NEVER, Choices


class Plans:
    """A plan a canvas row, as the denoising loop's constraint."""

    joint: ClassVar[bool] = True

    def __init__(self, plans: Sequence[Plan], vocab_size: int):
        self._plans = list(plans)
        # Few different unions of token sets occur; each position refers to one of them.
        unions: dict[frozenset[int], int] = {}
        table: list[npt.NDArray[np.bool_]] = []
        index: list[list[int]] = []
        for plan in self._plans:
            known: dict[tuple[int, ...], int] = {}
            for sets in plan.sets_at:
                if sets not in known:
                    allowed = frozenset().union(*(plan.machine.sets[k] for k in sets))
                    if allowed not in unions:
                        unions[allowed] = len(table)
                        mask = np.zeros(vocab_size, dtype=bool)
                        mask[list(allowed)] = True
                        table.append(mask)
                    known[sets] = unions[allowed]
            index.append([known[sets] for sets in plan.sets_at])
        self._table = mx.array(np.stack(table))
        self._outside = mx.array(np.stack([_outside(mask) for mask in table]))
        self._index = mx.array(index, dtype=mx.int32)
        self._sets = [[np.array(ids) for ids in plan.machine.sets] for plan in self._plans]
        self._widest = max(map(len, self._sets))

    def allowed(self, first: int, count: int, positions: mx.array) -> mx.array:
        """(B, P, count) whether some allowed canvas has the id there."""
        return self._table[:, first : first + count][mx.take(self._index, positions, axis=1)]

    def noise(self, tokens: mx.array) -> mx.array:
        """Uniform tokens (B, L) turned into noise that cannot be taken for an answer."""
        return self._outside[self._index, tokens]

    def score(self, logits: mx.array, first: int) -> Choices:
        """The best token of each set of a row's pattern; rows with fewer sets are filled up."""
        rows = [
            _score(row, sets, first, self._widest)
            for row, sets in zip(logits, self._sets, strict=True)
        ]
        scores, tokens = mx.stack([r.scores for r in rows]), mx.stack([r.tokens for r in rows])
        return Choices(scores, tokens, first)

    def choose(self, choices: Choices, fixed: mx.array | None, canvas: mx.array) -> mx.array:
        """(B, L) ids of the allowed canvas with the highest sum of scores."""
        mx.eval(choices.scores, choices.tokens, canvas, [] if fixed is None else fixed)
        scores = np.array(choices.scores, dtype=np.float64)
        tokens, given = np.array(choices.tokens), np.array(canvas)
        chosen = np.empty_like(given)
        held = np.zeros(given.shape, dtype=bool) if fixed is None else np.array(fixed)
        for b, plan in enumerate(self._plans):
            for i in np.flatnonzero(held[b]):
                tokens[b, i] = given[b, i]
                reads = plan.machine.readable(int(given[b, i]))
                scores[b, i, : len(reads)] = np.where(reads, 0.0, NEVER)
            path = plan.best_path(scores[b, :, : len(self._sets[b])])
            chosen[b] = tokens[b, np.arange(len(path)), path]
        return mx.array(chosen)


def _outside(allowed: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """Each id, or if it is allowed the next one that is not. Where many are allowed, each id.

    Among a few allowed digits, a random digit looks like a token that an earlier step has accepted.
    """
    ids = np.arange(len(allowed), dtype=np.int32)
    others = ids[~allowed]
    if 8 * len(others) < 7 * len(allowed):
        return ids
    return np.where(allowed, others[np.searchsorted(others, ids) % len(others)], ids)


def _score(logits: mx.array, sets: list[Ids], first: int, widest: int) -> Choices:
    """Of a block (L, C): the best logit in each set and its place, (L, widest) each."""
    count = logits.shape[-1]
    here = [ids[(ids >= first) & (ids < first + count)] - first for ids in sets]
    scores = [mx.full((len(logits), 1), NEVER)] * widest
    tokens = [mx.zeros((len(logits), 1), dtype=mx.int32)] * widest
    single = [k for k, ids in enumerate(here) if len(ids) == 1]
    if single:
        columns = logits[:, mx.array(np.concatenate([here[k] for k in single]))]
        for column, k in enumerate(single):
            scores[k] = columns[:, column : column + 1].astype(mx.float32)
            tokens[k] = tokens[k] + int(here[k][0])
    for k, ids in enumerate(here):
        if len(ids) > 1:
            columns = logits[:, mx.array(ids)]
            at = mx.argmax(columns, axis=-1, keepdims=True)
            scores[k] = mx.take_along_axis(columns, at, axis=-1).astype(mx.float32)
            tokens[k] = mx.array(ids).astype(mx.int32)[at]
    return Choices(mx.concatenate(scores, axis=1), mx.concatenate(tokens, axis=1))
