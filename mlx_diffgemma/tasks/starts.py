"""Starts canvases from noise, an opening, text that is given, a document of a schema, arrays.

Each is told what the earlier canvases hold, and gives a `Start`, or None for uniform noise over a
whole canvas. What they know is text and ids; arrays are made where a canvas begins.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..arguments import shown
from ..diffusion.automaton import Plan
from ..diffusion.constraints import ANYTHING, Constraint, Listed
from ..diffusion.denoise import Start
from ..diffusion.draws import Draws
from ..diffusion.plans import Plans
from ..diffusion.prompt_cache import ContextError, remaining_context
from ..errors import Error
from ..model.diffusion_gemma import DiffusionGemma
from ..model.settings import GenerationConfig
from ..text.schema import Compiled, SchemaError
from ..text.tokenizer import Tokenizer, TooLong, no_check
from ..text.vocabulary import Vocabulary

# Unions of token sets that are kept of a document, a byte for each token of the vocabulary.
MOST_MASKS = 64


class CanvasError(Error):
    """Text that does not fit into a canvas."""


class Places(Protocol):
    """Says which tokens may stand where in one answer, which only grows."""

    def choices(self, generated: Sequence[int], written: Sequence[int], count: int) -> Constraint:
        """Which tokens may stand at each of `count` places, the first right behind `generated`,
        and each behind as many of `written` as there are places before it."""


class CanvasStart(Protocol):
    """Says where the canvases of an answer start."""

    def begin(
        self, generated: Sequence[int], draws: Draws, most: int | None = None
    ) -> Start | None:
        """The start of the canvas behind these tokens; None is noise. With `most` it has no more
        positions, and none behind which no answer goes on."""

    def places(self) -> Places:
        """What the tokens of an answer may be, one by one."""


class Free:
    """Any token may stand anywhere."""

    def places(self) -> Places:
        return self

    def choices(self, generated: Sequence[int], written: Sequence[int], count: int) -> Constraint:
        return ANYTHING


@dataclass(frozen=True)
class Noise(Free):
    """Every canvas starts from noise; with a budget, no longer than what is left of it."""

    length: int
    budget: int | None = None

    def begin(
        self, generated: Sequence[int], draws: Draws, most: int | None = None
    ) -> Start | None:
        length = self.length if most is None else min(self.length, most)
        if self.budget is not None:
            length = min(length, self.budget - len(generated))
        elif most is None:
            return None
        return Start(draws.tokens((1, length)))


@dataclass(frozen=True)
class Opening(Free):
    """The first canvas begins with these tokens; with a budget, canvases are as those of `Noise`,
    but hold the opening and a token more."""

    tokens: tuple[int, ...]
    length: int
    budget: int | None = None

    def begin(
        self, generated: Sequence[int], draws: Draws, most: int | None = None
    ) -> Start | None:
        if generated:
            return Noise(self.length, self.budget).begin(generated, draws, most)
        length = self.length
        if self.budget is not None:
            length = max(min(length, self.budget), len(self.tokens) + 1)
        free: list[int | None] = [None] * (length - len(self.tokens))
        return pinned_start([[*self.tokens, *free]], draws)


@dataclass(frozen=True, eq=False)
class First(Free):
    """The first canvas is given, as a start or as tokens that are pinned where they are not None;
    later ones start from noise."""

    start: Start | list[int | None]

    def begin(
        self, generated: Sequence[int], draws: Draws, most: int | None = None
    ) -> Start | None:
        if generated:
            return None
        return self.start if isinstance(self.start, Start) else pinned_start([self.start], draws)


@dataclass(frozen=True, eq=False)
class Document:
    """Canvases that are, one after another, a document of a schema within a budget of tokens."""

    schema: Compiled
    length: int
    budget: int

    def begin(
        self, generated: Sequence[int], draws: Draws, most: int | None = None
    ) -> Start | None:
        machine = self.schema.machine
        states = machine.advance(frozenset([machine.first]), generated)
        length = self.length if most is None else min(self.length, most)
        plan = machine.plan(length, self.budget - len(generated), states)
        if most is not None:
            plan = plan.front(_answered(plan, self.schema.vocabulary.fill))
        return planned_start([plan], self.schema.vocabulary, draws)

    def places(self) -> Places:
        return DocumentPlaces(self.schema, self.budget)


def _answered(plan: Plan, fill: int) -> int:
    """Count the positions up to where every answer has ended: behind it there is but fill."""
    forced = plan.forced()
    return 1 + next((i for i in reversed(range(len(forced))) if forced[i] != fill), 0)


class DocumentPlaces:
    """The tokens of one document of a schema: each place is read once."""

    def __init__(self, schema: Compiled, budget: int):
        self._machine, self._size, self._budget = schema.machine, schema.vocabulary.size, budget
        self._states, self._read = frozenset([schema.machine.first]), 0
        self._masks: dict[tuple[int, ...], npt.NDArray[np.bool_]] = {}

    def choices(self, generated: Sequence[int], written: Sequence[int], count: int) -> Constraint:
        self._states = self._machine.advance(self._states, generated[self._read :])
        self._read = len(generated)
        states, rows = self._states, dict[tuple[int, ...], int]()
        masks, index = list[npt.NDArray[np.bool_]](), list[int]()
        for i in range(count):
            sets = self._machine.sets_behind(states, self._budget - self._read - i)
            if sets not in rows:
                rows[sets] = len(rows)
                masks.append(self._mask(sets))
            index.append(rows[sets])
            states = self._machine.advance(states, written[i : i + 1])
        return Listed(mx.array(np.stack(masks)), mx.array(index))

    def _mask(self, sets: tuple[int, ...]) -> npt.NDArray[np.bool_]:
        """(vocabulary,) which tokens one of the sets has."""
        if sets not in self._masks:
            if len(self._masks) == MOST_MASKS:
                self._masks.clear()
            self._masks[sets] = self._machine.union(sets, self._size)
        return self._masks[sets]


def document(
    model: DiffusionGemma, schema: Compiled, prompt_tokens: int, config: GenerationConfig
) -> Document:
    """A schema's documents, as canvases behind a prompt.

    Raises:
        SchemaError: the shortest document is over the budget.
    """
    length = model.config.canvas_length
    remaining = (model.context - prompt_tokens) // length * length
    budget = min(config.max_new_tokens, remaining)
    shortest = schema.machine.shortest
    if shortest > budget:
        raise SchemaError(
            f"the shortest document of the schema has {shortest} tokens, more than the "
            f"{budget} that may be written"
        )
    return Document(schema, length, budget)


def encode_opening(
    model: DiffusionGemma, tokenizer: Tokenizer, opening: str | Sequence[int]
) -> list[int]:
    """Ids of what an answer begins with; ids pass through.

    Raises:
        ContextError: it leaves no room in a canvas.
    """
    length = model.config.canvas_length
    if isinstance(opening, str):
        try:
            ids = tokenizer.encode_within(opening, length, "the opening")
        except TooLong as error:
            raise ContextError(f"{error}, and no more fits into a canvas") from None
    else:
        ids = list(opening)
    if len(ids) >= length:
        raise ContextError(f"the opening has {len(ids)} tokens, more than a canvas holds")
    return ids


@dataclass(frozen=True)
class Pieces:
    """A canvas of text pieces: (text, True) is pinned, (text, False) is a hole of as many tokens.

    What follows the pieces is pinned to the end of the answer. Holes start from noise.
    """

    pieces: tuple[tuple[str, bool], ...]

    def __post_init__(self) -> None:
        match self.pieces:
            case [(str(), bool()), *rest] if all(map(_is_piece, rest)):
                return
        raise CanvasError(
            f"pieces are pairs of a text and whether it is given, at least one; not "
            f"{shown(self.pieces)}"
        )


def _is_piece(piece: object) -> bool:
    match piece:
        case (str(), bool()):
            return True
    return False


def forced_tokens(
    model: DiffusionGemma,
    vocabulary: Vocabulary,
    pieces: Sequence[tuple[str, bool]],
    check: Callable[[], None] = no_check,
) -> list[int | None]:
    """The tokens of a canvas of `Pieces`, None where it has noise; `check` may raise now and then.

    Raises:
        CanvasError: there is no text in them, or they and an end token are more than the canvas.
    """
    if not any(text for text, _ in pieces):
        raise CanvasError("there is no text in the pieces")
    length = model.config.canvas_length
    characters = sum(len(text) for text, _ in pieces)
    if characters > length * vocabulary.tokenizer.longest:  # before anything is encoded
        raise CanvasError(
            f"the text has {characters:,} characters, more than a canvas of {length} tokens holds"
        )
    forced: list[int | None] = []
    for text, given in pieces:
        check()
        ids = vocabulary.literal(text).ids
        forced += ids if given else [None] * len(ids)
    if len(forced) >= length:
        raise CanvasError(
            f"the text has {len(forced)} tokens, more than a canvas of {length} holds"
        )
    return [*forced, *vocabulary.ending(length - len(forced))]


def pinned_start(forced: list[list[int | None]], draws: Draws) -> Start:
    """Canvases (B, L) of given tokens, which are pinned, and noise where there is None."""
    pinned = mx.array([[token is not None for token in row] for row in forced])
    given = mx.array([[token or 0 for token in row] for row in forced], dtype=mx.int32)
    return Start(mx.where(pinned, given, draws.tokens(pinned.shape)), pinned=pinned)


def planned_start(plans: Sequence[Plan], vocabulary: Vocabulary, draws: Draws) -> Start:
    """Canvases that follow plans, a row each: what has no choice is pinned, the rest is noise."""
    start = pinned_start([plan.forced() for plan in plans], draws)
    assert start.pinned is not None
    constraint = Plans(plans, vocabulary.size)
    canvas = mx.where(start.pinned, start.canvas, constraint.noise(start.canvas))
    return replace(start, canvas=canvas, constraint=constraint)


def clip_context(
    model: DiffusionGemma, prompt: list[int], given: list[int], step: int = 1
) -> tuple[list[int], int]:
    """A prompt and the text that the answer begins with, without as many tokens of the text's
    beginning as do not fit; and how many those are, a multiple of `step`.

    Raises:
        ContextError: the prompt alone does not fit.
    """
    remaining = remaining_context(model, prompt) - model.config.canvas_length
    dropped = min(-(-max(len(given) - remaining, 0) // step) * step, len(given))
    return prompt + given[dropped:], dropped
