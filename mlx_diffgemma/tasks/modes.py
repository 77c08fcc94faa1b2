"""What is written next: a canvas denoised, one that the encoder verifies, its next token, a draft.

Each is a decoding of one attempt, whose result is the state to commit. The loop over canvases, in
`canvases.py`, asks for it, judges it, and has the encoder keep what is committed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..arguments import SettingError, check_kind, is_number, shown
from ..diffusion.causal import CausalReader, written
from ..diffusion.constraints import Constraint
from ..diffusion.decoding import Decoding, Rest
from ..diffusion.denoise import DenoisingState, Start, denoise
from .speculation import Acceptance, Drafter
from .writing import Read, Writer, Written

# How an answer is written. "denoise" is the model's own way, canvas after canvas; "causal" takes
# the encoder's next token again and again; "speculative" gives what that gives, from drafts.
Mode = Literal["denoise", "causal", "speculative"]

# Temperatures, but 0, at which the encoder may draw: logits are divided by them.
TEMPERATURES = (0.001, 2.0)


@dataclass(frozen=True)
class Way:
    """How an answer is written: by whom, and what is taken of that.

    Attributes:
        mode: who writes.
        verify: the encoder reads denoised canvases.
        temperature: at which it draws its tokens; None and 0 take the best ones.
        acceptance: which drafted tokens are taken; None is "exact".
    """

    mode: Mode = "denoise"
    verify: bool = False
    temperature: float | None = None
    acceptance: Acceptance | None = None

    @property
    def causal(self) -> bool:
        """Whether the encoder reads what is written."""
        return self.verify or self.mode != "denoise"

    @property
    def name(self) -> str:
        """How tables call it."""
        name = "verify" if self.verify else self.mode
        return name if self.acceptance is None else f"{name} ({self.acceptance})"

    def check(self) -> None:
        """Refuse what is none, or makes no sense together.

        Raises:
            SettingError: naming what is wrong.
        """
        if self.mode not in (modes := get_args(Mode)):
            raise SettingError(f"a mode is one of {', '.join(modes)}, not {shown(self.mode)}")
        check_kind("verify", self.verify, bool, "true or false")
        if self.verify and self.mode != "denoise":
            raise SettingError(f"mode {self.mode} does not go with verify")
        if (chosen := self.temperature) is not None:
            least, most = TEMPERATURES
            if not is_number(chosen) or (chosen != 0 and not least <= chosen <= most):
                raise SettingError(
                    f"a temperature is 0 or from {least} to {most:g}, not {shown(chosen)}"
                )
            if self.mode == "denoise":
                raise SettingError("a temperature goes with mode causal or speculative")
        if self.acceptance is not None:
            if self.acceptance not in (known := get_args(Acceptance)):
                raise SettingError(
                    f"an acceptance is {' or '.join(known)}, not {shown(self.acceptance)}"
                )
            if self.mode != "speculative":
                raise SettingError("an acceptance goes with mode speculative")


DENOISE = Way()

# Names by which they are compared.
WAYS: dict[str, Way] = {
    "denoise": DENOISE,
    "verify": Way(verify=True),
    "causal": Way("causal"),
    "speculative": Way("speculative"),
}

# A token that the encoder finds less likely is doubted.
DOUBT = 0.3

# Times that a doubted canvas is opened again at most.
ROUNDS = 3


def ways_of(
    names: Sequence[str], temperature: float | None, acceptance: Acceptance | None
) -> list[Way]:
    """The ways of these names of `WAYS`, with temperature and acceptance where they mean something.

    Raises:
        SettingError: there is no such name, or what is given means nothing to any of them.
    """
    for name in names:
        if name not in WAYS:
            raise SettingError(f"a mode is one of {', '.join(WAYS)}, not {shown(name)}")
    found = [WAYS[name] for name in names]
    modes = {way.mode for way in found}
    if not modes & {"causal", "speculative"}:
        replace(found[0], temperature=temperature).check()
    if "speculative" not in modes:
        replace(found[0], acceptance=acceptance).check()
    for i, way in enumerate(found):
        if way.mode != "denoise":
            way = replace(way, temperature=temperature)
        if way.mode == "speculative":
            way = replace(way, acceptance=acceptance)
        way.check()
        found[i] = way
    return found


def attempt(
    writer: Writer,
    reader: CausalReader | None,
    drafter: Drafter,
    way: Way,
    generated: Sequence[int],
    forbidden: Constraint | None,
    room: int,
) -> Written:
    """What is written behind `generated`, at most `room` tokens of it count; all but denoising
    alone needs a reader."""
    if reader is None or not way.causal:
        return denoised(writer, generated, forbidden)
    match way.mode:
        case "denoise":
            return verified(writer, reader, generated, forbidden, room)
        case "causal":
            return next_token(writer, reader, generated, forbidden)
        case "speculative":
            return drafter.write(writer, reader, generated, forbidden, room)


def denoised(
    writer: Writer, generated: Sequence[int], forbidden: Constraint | None
) -> Decoding[DenoisingState, DenoisingState]:
    """A canvas, as the reference makes it."""
    begun = writer.begin(generated, forbidden)
    model, cache, config, draws = writer.model, writer.cache, writer.config, writer.draws
    return (yield from denoise(model, cache, config, draws, begun, writer.top))


def verified(
    writer: Writer,
    reader: CausalReader,
    generated: Sequence[int],
    forbidden: Constraint | None,
    room: int,
) -> Written:
    """A canvas that the encoder has read. At its first doubt the encoder's own choice is put, what
    stands before it stays, what follows is denoised again from the middle of the schedule on; and
    of all these canvases the one is taken that the encoder likes best. It is told once more, with
    what is known of the tokens that it kept, unless it was the first and is the last.
    """
    reader.take_back()
    begun = writer.begin(generated, forbidden) or writer.noise()
    start, best, liked, front = begun, None, -math.inf, None
    for more in reversed(range(ROUNDS + 1)):
        state = yield from denoise(
            writer.model, writer.cache, writer.config, writer.draws, start, writer.top
        )
        state = state if front is None else _as_known(state, front)
        tokens: list[int] = np.array(state.argmax)[0].tolist()
        tokens = tokens[: min(writer.ends(tokens) or len(tokens), room)]
        yield Read(reader.read(tokens))
        chances = np.array(reader.log_probabilities())
        if best is None or chances.mean() > liked:
            best, liked = state, chances.mean()
        kept = 0 if front is None else len(front.tokens)
        doubtful = _doubtful(chances, begun, kept) if more else []
        opening = _corrected(writer, reader, generated, tokens, doubtful, forbidden)
        if opening is None:
            break
        front = Front(*opening, state)
        start = _opened(writer, begun, front.tokens, state, len(tokens))
        reader.take_back()
    assert best is not None
    if front is not None:
        yield replace(best, decoded=0)  # which was counted
    return best


@dataclass(frozen=True)
class Front:
    """What a canvas keeps of the one before it: its first tokens, of which the last is the
    encoder's, as likely as that finds it; all others are as likely as they were in that canvas."""

    tokens: list[int]
    probability: float
    before: DenoisingState


def _as_known(state: DenoisingState, front: Front) -> DenoisingState:
    """A canvas whose tokens that were kept are as likely as they were when they were written. In
    itself they are certain, as what is pinned is."""
    before, last = front.before, len(front.tokens) - 1
    at = mx.arange(state.argmax.shape[1])[None]
    own = mx.where(at == last, front.probability, state.probability)
    state = replace(state, probability=mx.where(at < last, before.probability, own))
    if state.top is None or before.top is None:
        return state
    (ids, levels), (its_ids, its_levels) = state.top, before.top
    kept, corrected = (at < last)[..., None], (at == last)[..., None]
    best = mx.arange(ids.shape[-1]) == 0
    levels = mx.where(corrected & best, math.log(max(front.probability, 1e-30)), levels)
    top = mx.where(kept, its_ids, ids), mx.where(kept, its_levels, levels)
    return replace(state, top=top)


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
) -> tuple[list[int], float] | None:
    """The tokens up to the first doubtful place where the encoder would write another, which is the
    last of them, and how likely it finds that one; None if there is no such place."""
    for at in doubtful:
        constraint = None if at else forbidden
        if constraint is None:
            constraint = writer.places.choices([*generated, *tokens[:at]], (), 1)
        following = reader.following(constraint, at, 1)
        (choice,) = following.tokens
        if choice != tokens[at]:
            return [*tokens[:at], choice], following.probabilities[0]
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
    """The encoder's next token, or all of what the answer has to begin with."""
    yield Rest()
    reader.take_back()
    state = writer.given(generated)
    if state is None:
        constraint = forbidden or writer.places.choices(generated, (), 1)
        following = reader.following(constraint, 0, 1)
        state = written(following.tokens, following)
    yield state
    return state
