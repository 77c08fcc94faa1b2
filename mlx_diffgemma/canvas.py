"""Starting canvases made of text: what is given, what is free, what is to be repaired."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx

from .automaton import Plan, Plans
from .denoise import Start
from .errors import Error
from .generation import room_behind
from .model import DiffusionGemma
from .sampler import Draws
from .tokenizer import unhurried
from .vocabulary import Vocabulary


class CanvasError(Error):
    """Text that does not fit into a canvas."""


def fill_start(
    model: DiffusionGemma,
    vocabulary: Vocabulary,
    pieces: Sequence[tuple[str, bool]],
    draws: Draws,
) -> Start:
    """A canvas of text pieces: (text, True) is pinned, (text, False) is a hole of as many tokens.

    What follows the pieces is pinned to the end of the answer. Holes start from noise.

    Raises:
        CanvasError: the pieces and an end token are more than the canvas.
    """
    return pinned_start([forced_tokens(model, vocabulary, pieces)], draws)


def forced_tokens(
    model: DiffusionGemma,
    vocabulary: Vocabulary,
    pieces: Sequence[tuple[str, bool]],
    check: Callable[[], None] = unhurried,
) -> list[int | None]:
    """The tokens of `fill_start`'s canvas, None where it has noise; `check` may raise now and then.

    Raises:
        CanvasError: as `fill_start`.
    """
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
    model: DiffusionGemma, prompt: list[int], given: list[int]
) -> tuple[list[int], int]:
    """A prompt and the text that the answer begins with, without as many tokens of the text's
    beginning as do not fit; and how many those are.

    Raises:
        ContextError: the prompt alone does not fit.
    """
    room = room_behind(model, prompt) - model.config.canvas_length
    dropped = max(len(given) - room, 0)
    return prompt + given[dropped:], dropped
