"""Starting canvases made of text: what is given, what is free, what is to be repaired."""

from collections.abc import Sequence

import mlx.core as mx

from .denoise import Start
from .errors import Error
from .generation import room_behind
from .model import DiffusionGemma
from .sampler import Draws
from .tokenizer import Tokenizer


class CanvasError(Error):
    """Text that does not fit into a canvas."""


def fill_start(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    pieces: Sequence[tuple[str, bool]],
    draws: Draws,
) -> Start:
    """A canvas of text pieces: (text, True) is pinned, (text, False) is a hole of as many tokens.

    What follows the pieces is pinned to the end of the answer. Holes start from noise.

    Raises:
        CanvasError: the pieces and an end token are more than the canvas.
    """
    tokens: list[int] = []
    pinned: list[bool] = []
    for text, given in pieces:
        ids = tokenizer.encode(text)
        tokens += ids
        pinned += [given] * len(ids)
    ids = _padded(model, tokenizer, tokens)
    mask = mx.array([pinned + [True] * (len(ids) - len(pinned))])
    noise = draws.tokens((1, len(ids)))
    return Start(mx.where(mask, mx.array([ids], dtype=mx.int32), noise), pinned=mask)


def pinned_start(forced: list[list[int | None]], draws: Draws) -> Start:
    """Canvases (B, L) of given tokens, which are pinned, and noise where there is None."""
    pinned = mx.array([[token is not None for token in row] for row in forced])
    given = mx.array([[token or 0 for token in row] for row in forced], dtype=mx.int32)
    noise = draws.tokens(pinned.shape)
    return Start(mx.where(pinned, given, noise), pinned=pinned)


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


def _padded(model: DiffusionGemma, tokenizer: Tokenizer, tokens: list[int]) -> list[int]:
    """Tokens, the end of the turn, and the fill of <eos> that models are trained with."""
    length = model.config.canvas_length
    if len(tokens) >= length:
        raise CanvasError(
            f"the text has {len(tokens)} tokens, more than a canvas of {length} holds"
        )
    ends = model.generation.eos_token_ids
    turn = tokenizer.token_id("<turn|>")
    end = turn if turn in ends else ends[0]
    return [*tokens, end, *[ends[0]] * (length - len(tokens) - 1)]
