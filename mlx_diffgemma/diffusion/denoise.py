"""The denoising loop: the only one. It knows arrays and neither text nor tokenizers.

Chat, filling, editing and batches differ in where a canvas starts: `Start`. The loop does not call
the decoder; it is a `Decoding`, which yields a `Pass` and is sent the hidden states.
"""

from collections import deque
from copy import copy
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from ..arguments import SettingError, check_canvas, whole_number
from ..model.cache import LayerCache
from ..model.diffusion_gemma import DiffusionGemma, Pass
from ..model.settings import GenerationConfig
from . import sampler as rules
from .constraints import ANYTHING, Constraint
from .decoding import Decoding
from .draws import Draws, SeededDraws
from .head import Readout, log_probability, read_out


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
    """

    step: int
    canvas: mx.array
    argmax: mx.array
    accepted: mx.array
    entropy: mx.array
    probability: mx.array
    converged: mx.array


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
) -> Decoding[DenoisingState, DenoisingState]:
    """Refine canvases that follow the cached context: a state a step, the last one as the result.

    The cache is only read; a context of one row serves all canvases. The last state has
    `converged` set in all rows, or its step is `config.max_denoising_steps`.

    Raises:
        SettingError: the start or the draws are not of this model's ids, see `check_start`.
    """
    start = _checked(model, config, draws, start)
    canvas, constraint, steps = start.canvas, start.constraint, config.max_denoising_steps
    fixed = start.pinned
    history: deque[mx.array] = deque(maxlen=max(config.stability_threshold, config.plateau or 0))
    known: _Known | None = None
    last: DenoisingState | None = None
    focus = _Focus(config, canvas, cache)
    for step in range(start.first_step, steps + 1):
        temperature = rules.temperature(steps - step + 1, steps, config.t_min, config.t_max)
        asked = focus.ask(canvas, None if known is None else known.seen.self_conditioning)
        hidden = yield asked
        assert hidden is not None
        known = _know(
            known,
            hidden,
            asked.positions,
            temperature,
            read_out(
                model,
                hidden,
                temperature,
                constraint,
                draws,
                asked.positions,
                self_conditioning=step < steps,
            ),
        )
        seen = known.seen
        read, before = canvas, focus.argmax
        argmax = constraint.choose(seen.choices, fixed, canvas)
        sampled = _sampled(constraint, seen, fixed, canvas)
        if focus.settled is not None:
            sampled = mx.where(focus.settled, argmax, sampled)
        confidence = mx.exp(log_probability(model, known.hidden, sampled, known.temperature, seen))
        entropy, confidence, conditioning = _certain(model, canvas, fixed, seen, confidence)
        known = replace(known, seen=replace(seen, self_conditioning=conditioning))
        accepted = rules.accept(config.sampler, entropy, confidence, fixed)
        was_fixed = fixed
        noise = start.background
        if noise is None:
            noise = constraint.noise(draws.tokens(canvas.shape))
        canvas = rules.renoise(accepted, sampled, noise)
        stop = rules.stops(config, step, argmax, history, entropy, start.pinned)
        if config.sampler.keeps:
            # What is kept is committed, whatever the model would now rather have there.
            fixed = accepted
            argmax = constraint.choose(seen.choices, fixed, canvas)
            stop = stop | fixed.all(axis=-1)
        history.append(argmax)
        probability = mx.exp(log_probability(model, known.hidden, argmax, known.temperature, seen))
        if was_fixed is not None:
            probability = mx.where(was_fixed, 1.0, probability)
        if focus.on:
            settled = focus.settle(
                read, argmax, entropy, accepted, asked.positions, start.pinned, config.eos_token_ids
            )
            canvas = mx.where(settled, argmax, canvas)
            whole = asked.positions is None
            due = (
                rules.is_confident(entropy, config.confidence_threshold, start.pinned)
                if config.settling.early
                else stop
            )
            ready, stop = due, stop & whole
        now = DenoisingState(step, canvas, argmax, accepted, entropy, probability, stop)
        last = now if last is None else _hold(last, now)
        mx.eval(vars(last))
        if focus.on:
            focus.choose(settled, entropy, ready, argmax)
        yield last
        if np.array(last.converged).all():
            break
    assert last is not None  # first_step is not behind the last
    global COUNT
    COUNT = focus.count
    return last


COUNT = 0


@dataclass(frozen=True)
class _Known:
    hidden: mx.array
    temperature: float | mx.array
    seen: Readout


def _know(old, hidden, positions, temperature, seen):
    if positions is None:
        return _Known(hidden, temperature, seen)

    def written(whole, part):
        if whole is None or part is None:
            return None
        own = copy(whole)
        own[:, positions] = part
        return own

    def choices(one, other):
        if one is None:
            return None
        return replace(
            one, scores=written(one.scores, other.scores), tokens=written(one.tokens, other.tokens)
        )

    past = old.seen
    temperatures = copy(
        mx.broadcast_to(mx.array(old.temperature), hidden.shape[:1] + (old.hidden.shape[1],))
    )
    temperatures[:, positions] = temperature
    return _Known(
        written(old.hidden, hidden),
        temperatures,
        Readout(
            choices(past.choices, seen.choices),
            choices(past.perturbed, seen.perturbed),
            written(past.sampled, seen.sampled),
            written(past.entropy, seen.entropy),
            written(past.log_normalizer, seen.log_normalizer),
            written(past.self_conditioning, seen.self_conditioning),
        ),
    )


class _Focus:
    def __init__(self, config, canvas, cache):
        self.config, self.cache = config, cache
        self.on = config.settling is not None and len(canvas) == 1
        self.length = canvas.shape[1]
        self.positions = None
        self.settled = None
        self.argmax = None
        self.agreed = mx.zeros(canvas.shape, mx.int32)
        self.since = 0
        self.count = 0

    def ask(self, canvas, conditioning):
        at = self.positions
        if not self.on:
            self.count += canvas.shape[1]
            return Pass(canvas, self.cache, conditioning)
        if self.cache[0].reader is not self:
            at = None
            self.cache[0].reader = self
        self.count += self.length if at is None else len(at)
        if at is None:
            self.since = 0
            return Pass(canvas, self.cache, conditioning)
        self.since += 1
        return Pass(canvas[:, at], self.cache, conditioning[:, at], at)

    def settle(self, read, argmax, entropy, accepted, positions, pinned, ends):
        rule = self.config.settling
        length = self.length
        here = mx.ones((1, length), mx.bool_)
        if positions is not None:
            here = mx.zeros((1, length), mx.bool_)
            here[:, positions] = True
        if rule.same:
            same = mx.zeros((1, length), mx.bool_) if self.argmax is None else argmax == self.argmax
        else:
            same = read == argmax
        good = same & (entropy < rule.entropy)
        if rule.same:
            kept = same
        else:
            kept = self.argmax == argmax if self.argmax is not None else good
        self.agreed = mx.where(
            here, mx.where(good, self.agreed + 1, 0), mx.where(kept, self.agreed, 0)
        )
        settled = (self.agreed >= rule.agreed) & accepted
        given = (entropy == 0) & accepted
        if pinned is not None:
            given = given | pinned
        settled = settled | given
        if rule.tail:
            end = settled & mx.any(mx.stack([argmax == e for e in ends]), axis=0)
            settled = settled | (mx.cumsum(end.astype(mx.int32), axis=-1) > 0)
        return settled

    def choose(self, settled, entropy, ready, argmax):
        self.settled, self.argmax = settled, argmax
        if bool(np.array(ready).all()) and True or self.since >= self.config.settling.refresh:
            self.positions = None
            return
        at = rules.undecided(np.array(settled)[0], np.array(entropy)[0])
        self.positions = None if at is None else mx.array(at)


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
    seen: Readout,
    confidence: mx.array,
) -> tuple[mx.array, mx.array, mx.array | None]:
    """Entropy, confidence and self-conditioning, in which a fixed position is certain."""
    conditioning = seen.self_conditioning
    if fixed is None:
        return seen.entropy, confidence, conditioning
    if conditioning is not None:
        conditioning = mx.where(fixed[..., None], model.embed(canvas), conditioning)
    return mx.where(fixed, 0.0, seen.entropy), mx.where(fixed, 1.0, confidence), conditioning


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
    return DenoisingState(now.step, canvas, argmax, accepted, entropy, probability, converged)


@mx.compile
def _first_where(rows: mx.array, first: list[mx.array], second: list[mx.array]) -> list[mx.array]:
    return [mx.where(rows, a, b) for a, b in zip(first, second, strict=True)]
