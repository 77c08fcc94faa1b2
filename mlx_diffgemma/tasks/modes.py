"""What is written next: a canvas denoised, one that the encoder verifies, its next token, a draft.

Each is a decoding of one attempt, whose result is the state to commit. The loop over canvases, in
`generate.py`, asks for it, judges it, and has the encoder keep what is committed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..arguments import SettingError, shown
from ..diffusion.causal import CausalReader, front, written
from ..diffusion.constraints import Constraint
from ..diffusion.decoding import Decoding, Rest
from ..diffusion.denoise import DenoisingState, Start, denoise
from ..diffusion.draws import Draws
from ..model.cache import LayerCache
from ..model.diffusion_gemma import DiffusionGemma
from ..model.settings import GenerationConfig
from .starts import CanvasStart, Opening

# How an answer is written. "denoise" is the model's own way, canvas after canvas; "causal" takes
# the encoder's best token again and again; "speculative" gives what that gives, from drafts.
Mode = Literal["denoise", "causal", "speculative"]

# Names by which they are compared, with and without `verify`.
WAYS: dict[str, tuple[Mode, bool]] = {
    "denoise": ("denoise", False),
    "verify": ("denoise", True),
    "causal": ("causal", False),
    "speculative": ("speculative", False),
}

# A token that the encoder finds less likely is doubted.
DOUBT = 0.3

# Times that a doubted canvas is opened again at most.
ROUNDS = 3

# Denoising steps of a draft, the last ones of the schedule.
DRAFT_STEPS = 2

# A draft that goes on with what another has left has this part of a canvas more than that.
SPARE = 8


@dataclass(frozen=True)
class Read:
    """The encoder has read so many tokens of the answer, in one pass."""

    tokens: int


Written = Decoding[DenoisingState | Read, DenoisingState]


@dataclass(frozen=True)
class Writer:
    """Holds what all attempts at all canvases of an answer have in common."""

    model: DiffusionGemma
    cache: list[LayerCache]
    config: GenerationConfig
    draws: Draws
    start: CanvasStart

    def begin(self, generated: Sequence[int], forbidden: Constraint | None) -> Start | None:
        """Where the next canvas starts; None is noise."""
        begun = self.start.begin(generated, self.draws)
        if forbidden is not None:
            begun = begun or Start(self.draws.tokens((1, self.model.config.canvas_length)))
            begun = replace(begun, constraint=forbidden)
        return begun

    def ends(self, tokens: Sequence[int]) -> int | None:
        """Count the tokens up to the first that ends an answer, with it."""
        ends = self.config.eos_token_ids
        return next((i + 1 for i, token in enumerate(tokens) if token in ends), None)


def check_mode(mode: object) -> None:
    """Refuse what is no mode.

    Raises:
        SettingError: naming the modes.
    """
    if mode not in (modes := get_args(Mode)):
        raise SettingError(f"a mode is one of {', '.join(modes)}, not {shown(mode)}")


def check_ways(names: Sequence[str]) -> None:
    """Refuse what is no key of `WAYS`.

    Raises:
        SettingError: naming them.
    """
    for name in names:
        if name not in WAYS:
            raise SettingError(f"a mode is one of {', '.join(WAYS)}, not {shown(name)}")


def attempt(
    writer: Writer,
    reader: CausalReader | None,
    mode: Mode,
    verify: bool,
    warm: list[int],
    generated: Sequence[int],
    forbidden: Constraint | None,
    room: int,
) -> Written:
    """What is written behind `generated`, at most `room` tokens of it count; all but denoising
    alone needs a reader. `warm` is what a draft has left for the next."""
    if reader is None or (mode == "denoise" and not verify):
        return denoised(writer, generated, forbidden)
    match mode:
        case "denoise":
            return verified(writer, reader, generated, forbidden, room)
        case "causal":
            return next_token(writer, reader, generated, forbidden)
        case "speculative":
            return speculated(writer, reader, generated, forbidden, room, warm)


def denoised(
    writer: Writer, generated: Sequence[int], forbidden: Constraint | None
) -> Decoding[DenoisingState, DenoisingState]:
    """A canvas, as the reference makes it."""
    begun = writer.begin(generated, forbidden)
    return (yield from denoise(writer.model, writer.cache, writer.config, writer.draws, begun))


def verified(
    writer: Writer,
    reader: CausalReader,
    generated: Sequence[int],
    forbidden: Constraint | None,
    room: int,
) -> Written:
    """A canvas that the encoder has read. At its first doubt the encoder's own choice is put, what
    stands before it stays, what follows is denoised again from the middle of the schedule on; and
    of all these canvases the one is taken that the encoder likes best.
    """
    reader.take_back()
    begun = writer.begin(generated, forbidden)
    begun = begun or Start(writer.draws.tokens((1, writer.model.config.canvas_length)))
    start, best, liked, kept = begun, None, -math.inf, 0
    for more in reversed(range(ROUNDS + 1)):
        state = yield from denoise(writer.model, writer.cache, writer.config, writer.draws, start)
        tokens: list[int] = np.array(state.argmax)[0].tolist()
        tokens = tokens[: min(writer.ends(tokens) or len(tokens), room)]
        yield Read(reader.read(tokens))
        chances = np.array(reader.log_probabilities())
        if best is None or chances.mean() > liked:
            best, liked = state, chances.mean()
        doubtful = _doubtful(chances, begun, kept) if more else []
        opening = _corrected(writer, reader, generated, tokens, doubtful, forbidden)
        if opening is None:
            break
        kept = len(opening)
        start = _opened(writer, begun, opening, state, len(tokens))
        reader.take_back()
    assert best is not None
    return best


def _doubtful(chances: npt.NDArray[np.float64], begun: Start, kept: int) -> list[int]:
    """Places of tokens that are doubted: what is given and what is kept is not."""
    doubted = chances < math.log(DOUBT)
    if begun.pinned is not None:
        doubted &= ~np.array(begun.pinned)[0, : len(doubted)]
    doubted[:kept] = False
    return np.flatnonzero(doubted).tolist()


def _corrected(
    writer: Writer,
    reader: CausalReader,
    generated: Sequence[int],
    tokens: list[int],
    doubtful: Sequence[int],
    forbidden: Constraint | None,
) -> list[int] | None:
    """The tokens up to the first doubtful place where the encoder would write another, which is the
    last of them; None if there is no such place."""
    for at in doubtful:
        constraint = None if at else forbidden
        if constraint is None:
            constraint = writer.start.choices([*generated, *tokens[:at]], (), 1)
        (choice,) = reader.following(constraint, at, 1).tokens
        if choice != tokens[at]:
            return [*tokens[:at], choice]
    return None


def _opened(
    writer: Writer, begun: Start, front: Sequence[int], state: DenoisingState, end: int
) -> Start:
    """The canvas of a state that begins with these tokens, with noise from there to `end`."""
    config, draws, shape = writer.config, writer.draws, begun.canvas.shape
    given = mx.zeros(shape, dtype=mx.bool_) if begun.pinned is None else begun.pinned
    at = mx.arange(shape[1])[None]
    noise = begun.constraint.noise(draws.tokens(shape))
    canvas = mx.where((at < end) & ~given, noise, state.argmax)
    canvas[:, : len(front)] = mx.array(list(front))
    middle = max(begun.first_step, config.max_denoising_steps // 2, 1)
    return replace(begun, canvas=canvas, pinned=given | (at < len(front)), first_step=middle)


def next_token(
    writer: Writer, reader: CausalReader, generated: Sequence[int], forbidden: Constraint | None
) -> Written:
    """The encoder's best token, or all of what the answer has to begin with."""
    yield Rest()
    reader.take_back()
    state = _given(writer, generated)
    if state is None:
        constraint = forbidden or writer.start.choices(generated, (), 1)
        following = reader.following(constraint, 0, 1)
        state = written(following.tokens, following)
    yield state
    return state


def _given(writer: Writer, generated: Sequence[int]) -> DenoisingState | None:
    """What the answer has to begin with, where nothing has been written yet."""
    if generated or not isinstance(writer.start, Opening):
        return None
    return written(writer.start.tokens)


def speculated(
    writer: Writer,
    reader: CausalReader,
    generated: Sequence[int],
    forbidden: Constraint | None,
    room: int,
    warm: list[int],
) -> Written:
    """The encoder's next token, and of what the denoiser drafts behind it all that the encoder
    would have written. `warm` is where that draft starts, and becomes what remains of it.
    """
    reader.take_back()
    if (given := _given(writer, generated)) is not None:
        yield given
        return given
    following = reader.following(forbidden or writer.start.choices(generated, (), 1), 0, 1)
    first = following.tokens[0]
    if room == 1 or first in writer.config.eos_token_ids:
        state = written([first], following)
        yield state
        return state
    start = _drafting(writer, generated, first, warm)
    state = yield from denoise(writer.model, writer.cache, writer.config, writer.draws, start)
    drafted: list[int] = np.array(state.argmax)[0].tolist()
    length = min(writer.ends(drafted) or len(drafted), room)
    draft = drafted[:length]
    yield Read(reader.read(draft))
    kept = 1
    if length > 1:
        choices = writer.start.choices(generated, draft, length)
        chosen = reader.following(choices, 0, length).tokens
        kept = next((i for i in range(1, length) if draft[i] != chosen[i]), length)
    warm[:] = drafted[kept + 1 :]
    return front(state, kept)


def _drafting(writer: Writer, generated: Sequence[int], first: int, warm: Sequence[int]) -> Start:
    """A canvas that begins with a token, goes on with what an earlier draft has left, and enters
    the schedule near its end."""
    config, draws = writer.config, writer.draws
    begun = writer.begin(generated, None)
    begun = begun or Start(draws.tokens((1, writer.model.config.canvas_length)))
    length = begun.canvas.shape[1]
    if warm and not begun.constraint.joint:  # a plan is laid over a whole canvas
        left = writer.ends(warm) or len(warm)
        length = min(length, 1 + left + length // SPARE)
        begun = replace(begun, canvas=begun.canvas[:, :length])
    tokens = np.array(begun.canvas)[0]
    rest = list(warm)[: length - 1]
    tokens[1 : 1 + len(rest)] = rest
    tokens[0] = first
    pinned = np.zeros(length, dtype=bool)
    if begun.pinned is not None:
        held = np.array(begun.pinned)[0]
        tokens = np.where(held, np.array(begun.canvas)[0], tokens)
        pinned |= held
    pinned[0] = True
    return replace(
        begun,
        canvas=mx.array(tokens)[None],
        pinned=mx.array(pinned)[None],
        first_step=max(1, config.max_denoising_steps - DRAFT_STEPS + 1),
    )
