"""The denoising loop: the only one. It knows arrays and neither text nor tokenizers.

Chat, filling, editing and batches differ in where a canvas starts: `Start`. The loop does not call
the decoder; it is a `Decoding`, which yields a `Pass` and is sent the hidden states.
"""

from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from ..arguments import SettingError, check_canvas, whole_number
from ..model.cache import LayerCache
from ..model.diffusion_gemma import DiffusionGemma, Pass
from ..model.settings import GenerationConfig
from . import sampler as rules
from .constraints import ANYTHING, NEVER, Constraint
from .decoding import Decoding
from .draws import Draws, SeededDraws
from .head import Readout, likeliest, read_out
from .undecided import Known, Undecided, updated


@dataclass(frozen=True)
class DenoisingState:
    """The state after one denoising step; arrays are (B, L) and already computed.

    Attributes:
        step: counts from 1.
        canvas: ids that the next step would start from: accepted tokens and fresh noise.
        argmax: the model's best token at each position; what is committed at the end.
        accepted: positions whose token on the canvas is not noise.
        entropy: nats, of the temperature-scaled distribution; 0 where pinned.
        probability: of `argmax` under that distribution.
        converged: (B,) the stop rule has held; such a row no longer changes.
        settled: positions that the next step does not decode, see `settings.Settling`.
        decoded: positions of a row that all steps so far have decoded; a step over all counts L,
            or less where some are pinned and only keys and values of them are wanted, see `Pass`.
        first_step: where the schedule was entered.
        top: of a canvas's last state, where it is asked for: the likeliest ids, the best first, and
            their log-probabilities under that distribution, (B, L, K) each; NEVER where fewer may
            stand there.
    """

    step: int
    canvas: mx.array
    argmax: mx.array
    accepted: mx.array
    entropy: mx.array
    probability: mx.array
    converged: mx.array
    settled: mx.array
    decoded: int
    first_step: int = 1
    top: tuple[mx.array, mx.array] | None = None


@dataclass(frozen=True)
class Start:
    """Says where a canvas starts, if not from uniform noise; arrays are (B, L).

    Attributes:
        canvas: the starting ids.
        pinned: True where the starting id must stay. A pinned position counts as certain for
            acceptance and self-conditioning, and not at all for the stop rule.
        background: what a position that is not accepted goes back to; None is fresh noise. Editing
            uses the user's own text here, which noise would destroy.
        constraint: which canvases are allowed.
        first_step: where the schedule is entered, from 1.
    """

    canvas: mx.array
    pinned: mx.array | None = None
    background: mx.array | None = None
    constraint: Constraint = ANYTHING
    first_step: int = 1


def check_start(start: Start, vocab_size: int, steps: int) -> None:
    """Check, once a canvas, that it can start so; its arrays are computed for that.

    Raises:
        SettingError: shapes differ, an id is not in the vocabulary, or no step is left.
    """
    check_canvas("a starting canvas", start.canvas, vocab_size)
    shape = start.canvas.shape
    if (background := start.background) is not None:
        check_canvas("a background", background, vocab_size)
        if background.shape != shape:
            raise SettingError(f"a background must be of the canvas's shape {shape}")
    if (pinned := start.pinned) is not None and not (
        isinstance(pinned, mx.array) and pinned.dtype == mx.bool_ and pinned.shape == shape
    ):
        raise SettingError(f"what is pinned must be an array of booleans of shape {shape}")
    whole_number("the first step", start.first_step, 1, steps)


def denoise(
    model: DiffusionGemma,
    cache: list[LayerCache],
    config: GenerationConfig,
    draws: Draws,
    start: Start | None = None,
    top: int = 0,
) -> Decoding[DenoisingState, DenoisingState]:
    """Refine canvases that follow the cached context: a state a step, the last one as the result.

    The cache is only read; a context of one row serves all canvases. With `top` the last state
    tells so many of the likeliest tokens of each place. It has
    `converged` set in all rows, or its step is `config.max_denoising_steps`.

    Raises:
        SettingError: the start or the draws are not of this model's ids, see `check_start`.
    """
    start = _checked(model, config, draws, start)
    canvas, constraint, steps = start.canvas, start.constraint, config.max_denoising_steps
    fixed = start.pinned
    history: deque[mx.array] = deque(maxlen=max(config.stability_threshold, config.plateau or 0))
    undecided = Undecided(config, cache, canvas, start.pinned)
    known: Known | None = None
    last: DenoisingState | None = None
    decoded = 0
    for step in range(start.first_step, steps + 1):
        temperature = rules.temperature(steps - step + 1, steps, config.t_min, config.t_max)
        asked = undecided.ask(canvas, known, last=step == steps)
        hidden = yield asked
        assert hidden is not None
        decoded += asked.decoded(len(cache))
        new = _read(model, hidden, temperature, constraint, draws, asked, more=step < steps)
        known = updated(known, asked, new)
        read = canvas
        argmax = constraint.choose(known.seen.choices, fixed, canvas)
        sampled = _sampled(constraint, known.seen, fixed, canvas)
        confidence = mx.exp(known.log_probability(model, sampled))
        known, entropy, confidence = _certain(model, canvas, fixed, known, confidence)
        counted = undecided.certain(entropy)
        accepted = rules.accept(undecided.sampler(asked), counted, confidence, fixed)
        was_fixed = fixed
        noise = start.background
        if noise is None:
            noise = constraint.noise(draws.tokens(canvas.shape))
        canvas = rules.renoise(accepted, sampled, noise)
        stop = rules.stops(config, step, argmax, history, entropy, start.pinned)
        if config.sampler.keeps:
            # What is kept is committed, whatever the model would now rather have there.
            fixed = accepted
            argmax = constraint.choose(known.seen.choices, fixed, canvas)
            stop = stop | fixed.all(axis=-1)
        probability = mx.exp(known.log_probability(model, argmax))
        if was_fixed is not None:
            probability = mx.where(was_fixed, 1.0, probability)
        canvas = undecided.settle(asked, read, argmax, canvas, accepted, entropy)
        now = DenoisingState(
            step=step,
            canvas=canvas,
            argmax=argmax,
            accepted=accepted,
            entropy=entropy,
            probability=probability,
            converged=undecided.confirmed(asked, stop),
            settled=undecided.settled,
            decoded=decoded,
            first_step=start.first_step,
        )
        now = _agreed(model, now, undecided)
        canvas = now.canvas
        history.append(now.argmax)
        fixed = now.accepted if config.sampler.keeps else fixed
        last = now if last is None else _hold(last, now)
        mx.eval(vars(last), undecided.state)
        undecided.turn(last.argmax, last.entropy)
        over = step == steps or np.array(last.converged).all()
        if top and over:
            last = replace(last, top=_top(model, known, constraint, top, was_fixed, last.argmax))
        yield last
        if over:
            break
    assert last is not None  # first_step is not behind the last
    return last


def _read(
    model: DiffusionGemma,
    hidden: mx.array,
    temperature: float,
    constraint: Constraint,
    draws: Draws,
    asked: Pass,
    more: bool,
) -> Known:
    """What a pass has given, and what the next one expects if there are `more`."""
    seen = read_out(
        model, hidden, temperature, constraint, draws, asked.read_off, self_conditioning=more
    )
    return Known(hidden, temperature, seen)


def _top(
    model: DiffusionGemma,
    known: Known,
    constraint: Constraint,
    count: int,
    fixed: mx.array | None,
    argmax: mx.array,
) -> tuple[mx.array, mx.array]:
    """The likeliest tokens and their log-probabilities (B, L, count); what is fixed is certain."""
    seen, count = known.seen, min(count, model.config.vocab_size)
    ids, levels = likeliest(model, known.hidden, known.temperature, seen, count, constraint)
    if fixed is not None:
        alone = mx.where(mx.arange(count) == 0, 0.0, NEVER)
        ids = mx.where(fixed[..., None], argmax[..., None], ids)
        levels = mx.where(fixed[..., None], alone, levels)
    mx.eval(ids, levels)
    return ids, levels


def _checked(
    model: DiffusionGemma, config: GenerationConfig, draws: Draws, start: Start | None
) -> Start:
    """The start, or one of uniform noise.

    Raises:
        SettingError: start or draws are not of this model's ids.
    """
    vocab_size = model.config.vocab_size
    if isinstance(draws, SeededDraws) and draws.vocab_size > vocab_size:
        raise SettingError(f"draws of {draws.vocab_size} ids are not of this model's {vocab_size}")
    if start is None:
        return Start(draws.tokens((1, model.config.canvas_length)))
    check_start(start, vocab_size, config.max_denoising_steps)
    return start


def _sampled(
    constraint: Constraint, seen: Readout, fixed: mx.array | None, canvas: mx.array
) -> mx.array:
    """(B, L) ids drawn, but those of the canvas where they are fixed."""
    if seen.perturbed is not None:
        return constraint.choose(seen.perturbed, fixed, canvas)
    assert seen.sampled is not None
    return seen.sampled if fixed is None else mx.where(fixed, canvas, seen.sampled)


def _certain(
    model: DiffusionGemma,
    canvas: mx.array,
    fixed: mx.array | None,
    known: Known,
    confidence: mx.array,
) -> tuple[Known, mx.array, mx.array]:
    """What is known, entropy and confidence, in which a fixed position is certain."""
    seen = known.seen
    if fixed is None:
        return known, seen.entropy, confidence
    if (expected := seen.self_conditioning) is not None:
        expected = mx.where(fixed[..., None], model.embed(canvas), expected)
        known = replace(known, seen=replace(seen, self_conditioning=expected))
    return known, mx.where(fixed, 0.0, seen.entropy), mx.where(fixed, 1.0, confidence)


def _agreed(model: DiffusionGemma, now: DenoisingState, undecided: Undecided) -> DenoisingState:
    """The state as rank 0 has it: what goes into the next step, and decides whether there is one.

    Equal ranks have computed the same, bit by bit; one that has not must not go its own way.
    """
    share = model.part.share
    if share.size == 1:
        return now
    arrays = {name: each for name, each in vars(now).items() if isinstance(each, mx.array)}
    told = share.agreed([*arrays.values(), *undecided.state])
    same: dict[str, Any] = dict(zip(arrays, told, strict=False))
    now = replace(now, **same)
    undecided.settled = now.settled
    undecided.take_state(told[len(arrays) :])
    return now


def _hold(last: DenoisingState, now: DenoisingState) -> DenoisingState:
    """The new state, but rows that had converged stay as they were."""
    rows = last.converged[:, None]
    held = _first_where(
        rows,
        [last.canvas, last.argmax, last.accepted, last.entropy, last.probability],
        [now.canvas, now.argmax, now.accepted, now.entropy, now.probability],
    )
    canvas, argmax, accepted, entropy, probability = held
    converged = last.converged | now.converged
    return replace(
        now,
        canvas=canvas,
        argmax=argmax,
        accepted=accepted,
        entropy=entropy,
        probability=probability,
        converged=converged,
    )


@mx.compile
def _first_where(rows: mx.array, first: list[mx.array], second: list[mx.array]) -> list[mx.array]:
    return [mx.where(rows, a, b) for a, b in zip(first, second, strict=True)]
