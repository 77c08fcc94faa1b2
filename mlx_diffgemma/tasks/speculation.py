"""Drafts by the denoiser, of which the encoder takes what it would have written itself.

A draft says one token a place, with certainty. So the usual rejection rule (arXiv 2211.17192) takes
it with the probability that the encoder gives it, and else draws among all others: which is to
draw, and to take the draft where it is what was drawn. As each place has noise of its own, the text
is that of mode "causal" with the same seed.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import mlx.core as mx
import numpy as np

from ..diffusion.causal import CausalReader, Following, front, written
from ..diffusion.constraints import Constraint
from ..diffusion.decoding import Rest
from ..diffusion.denoise import Start, denoise
from ..model.settings import GenerationConfig, Speculation
from .writing import Read, Writer, Written

# Which drafted tokens are taken: those that the encoder would have written, or all that it finds
# typical (arXiv 2401.10774), with which the text is no longer the encoder's.
Acceptance = Literal["exact", "typical"]


# Tokens that the encoder writes without a draft, at most, before it is given another.
ALONE = 32


class Drafter:
    """Drafts for one answer: knows what the last draft has left, and how far drafts were taken.

    A draft pays where more of its tokens are taken than it takes passes, the encoder's with them.
    While drafts of a step do not pay, the encoder writes without one, each time twice as long.
    """

    def __init__(self, rule: Speculation, acceptance: Acceptance):
        self._rule = rule
        self._acceptance = acceptance
        self._steps = rule.steps
        self._warm: list[int] = []
        self._alone = 0  # tokens that are still written without a draft
        self._vain = 0  # drafts of a step in a row that did not pay

    def write(
        self,
        writer: Writer,
        reader: CausalReader,
        generated: Sequence[int],
        forbidden: Constraint | None,
        room: int,
    ) -> Written:
        """The encoder's next token, and of what is drafted behind it what is taken."""
        if self._alone:
            yield Rest()
        reader.take_back()
        if (given := writer.given(generated)) is not None:
            yield given
            return given
        constraint = forbidden or writer.places.choices(generated, (), 1)
        following = reader.following(constraint, 0, 1)
        first = following.tokens[0]
        if self._alone or room == 1 or first in writer.config.eos_token_ids:
            self._alone, self._warm = max(self._alone - 1, 0), self._warm[1:]
            state = written([first], following)
            yield state
            return state
        start = self._begin(writer, generated, first, room)
        config = drafting(writer.config, self._steps)
        state = yield from denoise(writer.model, writer.cache, config, writer.draws, start)
        drafted: list[int] = np.array(state.argmax)[0].tolist()
        length = min(writer.ends(drafted) or len(drafted), room)
        draft = drafted[:length]
        yield Read(reader.read(draft))
        kept = 1
        if length > 1:
            constraint = writer.places.choices(generated, draft, length)
            kept = self._taken(draft, reader.following(constraint, 0, length))
        self._warm = drafted[kept + 1 :]
        self._adapt(kept, length)
        return front(state, kept)

    def _adapt(self, taken: int, drafted: int) -> None:
        """Say how many steps the next draft takes: more where this one paid and was not taken to
        its end, else fewer."""
        if taken > self._steps + 1:
            self._vain = 0
            more = -1 if taken == drafted else 1
            self._steps = min(max(self._steps + more, 1), self._rule.most_steps)
        elif self._steps > 1:
            self._steps -= 1
        else:
            self._vain += 1
            self._alone = min(1 << self._vain, ALONE)

    def _taken(self, draft: Sequence[int], following: Following) -> int:
        """Count the tokens of a draft that are taken; the first is the encoder's."""
        taken = [a == b for a, b in zip(draft, following.tokens, strict=True)]
        if self._acceptance == "typical":
            rule = self._rule
            pairs = zip(following.read, following.entropies, strict=True)
            typical = [p > min(rule.epsilon, rule.delta * math.exp(-h)) for p, h in pairs]
            taken = [a or b for a, b in zip(taken, typical, strict=True)]
        return next((i for i in range(1, len(draft)) if not taken[i]), len(draft))

    def _begin(self, writer: Writer, generated: Sequence[int], first: int, room: int) -> Start:
        """A canvas that begins with a token, goes on with what an earlier draft has left, and
        enters the schedule near its end."""
        whole = writer.model.config.canvas_length
        most, warm = min(whole, room), self._warm
        if warm:
            left = writer.ends(warm) or len(warm)
            spare = max(math.ceil(self._rule.spare * whole), 1)
            most = min(most, -(-(1 + left) // spare) * spare + spare)
        begun = writer.start.begin(generated, writer.draws, most)
        assert begun is not None
        tokens = np.array(begun.canvas)[0]
        length = len(tokens)
        rest = warm[: length - 1]
        tokens[1 : 1 + len(rest)] = rest
        tokens[0] = first
        pinned = np.zeros(length, dtype=bool)
        if begun.pinned is not None:
            pinned = np.array(begun.pinned)[0]
            tokens = np.where(pinned, np.array(begun.canvas)[0], tokens)
        pinned[0] = True
        return replace(
            begun,
            canvas=mx.array(tokens)[None],
            pinned=mx.array(pinned)[None],
            first_step=max(1, writer.config.max_denoising_steps - self._steps + 1),
        )


def drafting(config: GenerationConfig, steps: int) -> GenerationConfig:
    """The settings of a draft."""
    return replace(config, settling=config.speculation.settling)
