"""The denoising loop: the only one. It knows arrays and neither text nor tokenizers.

Chat, filling and editing differ in where a canvas starts: `Start`.
"""

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass

import mlx.core as mx

from . import sampler as rules
from .config import GenerationConfig
from .model import DiffusionGemma, LayerCache


@dataclass(frozen=True)
class Snapshot:
    """The state after one denoising step; all arrays are (1, L) and already computed.

    Attributes:
        step: counts from 1.
        canvas: ids that the next step would start from: accepted tokens and fresh noise.
        argmax: the model's best token at each position; what is committed at the end.
        accepted: positions whose token on the canvas is not noise.
        entropy: nats, of the temperature-scaled distribution; 0 where pinned.
        converged: the stop rule holds, so this is the last step.
    """

    step: int
    canvas: mx.array
    argmax: mx.array
    accepted: mx.array
    entropy: mx.array
    converged: bool


@dataclass(frozen=True)
class Start:
    """Where a canvas starts, if not from uniform noise; all arrays are (1, L).

    Attributes:
        canvas: the starting ids.
        pinned: True where the starting id must stay. A pinned position counts as certain for
            acceptance and self-conditioning, and not at all for the stop rule.
        background: what a position that is not accepted goes back to; None is fresh noise. Editing
            uses the user's own text here, which noise would destroy.
    """

    canvas: mx.array
    pinned: mx.array | None = None
    background: mx.array | None = None


def denoise(
    model: DiffusionGemma,
    cache: list[LayerCache],
    config: GenerationConfig,
    draws: rules.Draws,
    start: Start | None = None,
) -> Generator[Snapshot, None, None]:
    """Refine one canvas that follows the cached context, a snapshot a step, computed on demand.

    The cache is only read. The last snapshot has `converged` set, or its step is
    `config.max_denoising_steps`.
    """
    steps = config.max_denoising_steps
    if start is None:
        start = Start(draws.tokens((1, model.config.canvas_length)))
    canvas, pinned = start.canvas, start.pinned
    fixed = mx.zeros(canvas.shape, dtype=mx.bool_) if pinned is None else pinned
    history: deque[mx.array] = deque(maxlen=config.stability_threshold)
    belief: mx.array | None = None
    for step in range(1, steps + 1):
        heat = rules.temperature(steps - step + 1, steps, config.t_min, config.t_max)
        logits = model(canvas, cache, belief) / heat
        sampled = rules.sample(logits, draws.gumbel(logits.shape))
        entropy = rules.entropy(logits)
        confidence = rules.probability(logits, sampled)
        accepted = config.sampler.accept(entropy, confidence, ~fixed)
        if pinned is not None:
            entropy = mx.where(pinned, 0.0, entropy)
        argmax = mx.where(fixed, canvas, rules.best(logits))
        belief = model.soft_embedding(logits)
        if pinned is not None:
            belief = mx.where(pinned[..., None], model.embed(canvas), belief)

        tokens = mx.where(fixed, canvas, sampled)
        accepted = fixed | accepted
        noise = draws.tokens(canvas.shape) if start.background is None else start.background
        canvas = rules.renoise(accepted, tokens, noise)
        stop = rules.is_stable(argmax, history, config.stability_threshold)
        free = None if pinned is None else ~pinned
        stop = stop & rules.is_confident(entropy, config.confidence_threshold, free)
        if config.sampler.keeps:
            fixed = accepted
            argmax = mx.where(fixed, canvas, argmax)
            stop = stop | fixed.all(axis=-1)
        mx.eval(canvas, argmax, accepted, entropy, stop)
        history.append(argmax)
        converged = bool(stop.item())
        yield Snapshot(step, canvas, argmax, accepted, entropy, converged)
        if converged:
            return
