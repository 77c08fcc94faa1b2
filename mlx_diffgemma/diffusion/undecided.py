"""What is known of a canvas of which a pass decodes some positions, and which those are.

What a settled position held when it was last decoded stays known: its hidden state, entropy and
expected embedding here, its keys and values in the prompt cache.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import overload

import mlx.core as mx
import numpy as np

from ..model.cache import LayerCache
from ..model.diffusion_gemma import DiffusionGemma, Pass
from ..model.settings import EntropyBound, GenerationConfig, Sampler
from . import sampler as rules
from .constraints import Choices
from .head import Readout, log_probability


@dataclass(frozen=True)
class Known:
    """Of each position (B, L) of a canvas, what its last decoding gave, and at what temperature."""

    hidden: mx.array
    temperature: float | mx.array
    seen: Readout

    def log_probability(self, model: DiffusionGemma, tokens: mx.array) -> mx.array:
        """Log-probability (B, L) of allowed tokens (B, L)."""
        return log_probability(model, self.hidden, tokens, self.temperature, self.seen)

    def blank(self, length: int) -> "Known":
        """Zeros of a canvas of that length, of which this is what some positions gave."""
        seen = self.seen
        return Known(
            _zeros(self.hidden, length),
            self.temperature,
            Readout(
                Choices(_zeros(seen.choices.scores, length), _zeros(seen.choices.tokens, length)),
                None
                if (drawn := seen.perturbed) is None
                else Choices(_zeros(drawn.scores, length), _zeros(drawn.tokens, length)),
                _zeros(seen.sampled, length),
                _zeros(seen.entropy, length),
                _zeros(seen.log_normalizer, length),
                _zeros(seen.self_conditioning, length),
            ),
        )

    def updated(self, positions: mx.array, new: "Known") -> "Known":
        """This, but what is new (B, P) at the positions (P,)."""
        old, seen = self.seen, new.seen
        shape = self.hidden.shape[:2]
        before = mx.broadcast_to(mx.array(self.temperature), shape)
        now = mx.broadcast_to(mx.array(new.temperature), new.hidden.shape[:2])
        return Known(
            _updated(self.hidden, positions, new.hidden),
            _updated(before, positions, now),
            Readout(
                _chosen(old.choices, positions, seen.choices),
                _chosen(old.perturbed, positions, seen.perturbed),
                _updated(old.sampled, positions, seen.sampled),
                _updated(old.entropy, positions, seen.entropy),
                _updated(old.log_normalizer, positions, seen.log_normalizer),
                _updated(old.self_conditioning, positions, seen.self_conditioning),
            ),
        )


def updated(known: Known | None, asked: Pass, new: Known) -> Known:
    """What is known after a pass that has given something new.

    Nothing is known of what is pinned, if it was never asked for, and nobody asks.
    """
    at = asked.read_off
    if at is None:
        return new
    if known is None:
        known = new.blank(asked.canvas.shape[1])
    return known.updated(at, new)


@overload
def _zeros(some: mx.array, length: int) -> mx.array: ...


@overload
def _zeros(some: mx.array | None, length: int) -> mx.array | None: ...


def _zeros(some: mx.array | None, length: int) -> mx.array | None:
    if some is None:
        return None
    return mx.zeros((some.shape[0], length, *some.shape[2:]), some.dtype)


@overload
def _updated(old: mx.array, positions: mx.array, new: mx.array) -> mx.array: ...


@overload
def _updated(
    old: mx.array | None, positions: mx.array, new: mx.array | None
) -> mx.array | None: ...


def _updated(old: mx.array | None, positions: mx.array, new: mx.array | None) -> mx.array | None:
    if old is None or new is None:  # what a run, or its last step, does not need
        return None
    own = copy(old)  # the object, not the numbers
    own[:, positions] = new
    return own


@overload
def _chosen(old: Choices, positions: mx.array, new: Choices) -> Choices: ...


@overload
def _chosen(old: Choices | None, positions: mx.array, new: Choices | None) -> Choices | None: ...


def _chosen(old: Choices | None, positions: mx.array, new: Choices | None) -> Choices | None:
    if old is None or new is None:
        return None
    scores = _updated(old.scores, positions, new.scores)
    return Choices(scores, _updated(old.tokens, positions, new.tokens))


class Undecided:
    """Says which positions of a canvas are decoded next: at first, and where none settles, all.

    Only a canvas that is denoised by itself has the choice.
    """

    def __init__(
        self,
        config: GenerationConfig,
        cache: list[LayerCache],
        canvas: mx.array,
        pinned: mx.array | None = None,
    ):
        self._config = config
        self._rule = config.settling if len(canvas) == 1 else None
        self._ends = mx.array(config.eos_token_ids)
        self._cache = cache
        self._mine = object()  # not this itself, which holds the cache: a cycle is freed late
        self._wanted = None  # in a pass over all: what is pinned needs no hidden states
        if self._rule and pinned is not None:
            at = rules.undecided(np.array(pinned)[0], np.zeros(canvas.shape[1], np.float32))
            self._wanted = None if at is None else mx.array(at)
        self._positions: mx.array | None = None
        self._early = False  # a certain end token stands early in the canvas
        self._stale = 0.0  # canvases of settled positions left out, since a pass over all
        self._agreed = mx.zeros(canvas.shape, dtype=mx.int32)
        self._due = mx.zeros((len(canvas),), dtype=mx.bool_)
        self._whole = mx.array(False)  # a pass over all has left nothing to renoise
        self.settled = mx.zeros(canvas.shape, dtype=mx.bool_)

    def ask(self, canvas: mx.array, known: Known | None, last: bool) -> Pass:
        """The next pass over a canvas (B, L); the last that it may take is over all of it."""
        expected = None if known is None else known.seen.self_conditioning
        if self._rule is None:
            return Pass(canvas, self._cache, expected)
        mine = self._cache[0].reader is self._mine
        self._cache[0].reader = self._mine
        last = last and self._rule.confirm
        if self._positions is None or last or not mine:  # another has read its canvas since
            self._stale = 0.0
            return Pass(canvas, self._cache, expected, wanted=self._wanted)
        assert expected is not None
        at = self._positions
        return Pass(canvas[:, at], self._cache, expected[:, at], at)

    def sampler(self, asked: Pass) -> Sampler:
        """What accepts tokens after this pass."""
        sampler = self._config.sampler
        part = asked.positions is not None and not self._early
        if self._rule and part and isinstance(sampler, EntropyBound):
            return EntropyBound(sampler.bound * self._rule.tighten)
        return sampler

    def certain(self, entropies: mx.array) -> mx.array:
        """Entropies (B, L) for acceptance, to which what is settled adds nothing."""
        return entropies if self._rule is None else mx.where(self.settled, 0.0, entropies)

    def settle(
        self,
        asked: Pass,
        read: mx.array,
        argmax: mx.array,
        canvas: mx.array,
        accepted: mx.array,
        entropies: mx.array,
    ) -> mx.array:
        """Take in what a pass has given for the canvas that it has `read`, and give the next one,
        in which the best tokens stand where they are settled; all (B, L)."""
        if self._rule is None:
            return canvas
        decoded = mx.array(1) if asked.positions is None else mx.zeros(read.shape, dtype=mx.int32)
        if asked.positions is not None:
            decoded[:, asked.positions] = 1
        self._whole = mx.array(False)
        if asked.positions is None and self._rule.confirm:
            self._whole = accepted.all()
        self._agreed = rules.agreeing(self._agreed, decoded, read, argmax)
        ends = (argmax[..., None] == self._ends).any(axis=-1)
        self.settled = rules.settled(self._rule, self._agreed, accepted, entropies, ends)
        return mx.where(self.settled, argmax, canvas)

    def confirmed(self, asked: Pass, stop: mx.array) -> mx.array:
        """(B,) whether a canvas that would stop may: a pass over all of it has said so."""
        if self._rule is not None and not self._rule.confirm:
            return stop
        self._due = stop
        return stop if asked.positions is None else mx.zeros_like(stop)

    @property
    def state(self) -> list[mx.array]:
        """Lists what the next step needs, for the caller to evaluate."""
        return [self._agreed, self._due, self._whole]

    def take_state(self, state: Sequence[mx.array]) -> None:
        """Go on from what another rank has."""
        self._agreed, self._due, self._whole = state

    def turn(self, argmax: mx.array, entropies: mx.array) -> None:
        """Choose what the next pass decodes; all arrays have been computed."""
        if self._rule is None:
            return
        settled = np.array(self.settled)[0]
        ends = np.flatnonzero(settled & np.isin(np.array(argmax)[0], np.array(self._ends)))
        answer = settled[: ends[0] + 1] if len(ends) else settled
        self._early = len(answer) <= rules.EARLY * len(settled)
        self._stale += int(answer.sum()) / len(settled)
        at = None
        # A canvas that looks done, or is due, is looked at as a whole: that may be its last pass.
        done = bool(np.array(self._whole)) or np.array(self._due).all()
        if not done and (self._early or self._stale < self._rule.refresh):
            at = rules.undecided(settled, np.array(entropies)[0])
        self._positions = None if at is None else mx.array(at)
