"""Distillation: a model learns to be right in few steps from itself at all its steps.

The teacher is the model without an adapter, at the checkpoint's settings: its answers are the
targets (`taught`). The student's canvases are not noised ones, but those that it meets itself where
it has so few steps: `along_schedule` begins with noise alone, and goes on as the sampler does, with
what it has accepted, its mistakes, and its own predictions as self-conditioning.

On the small Sudoku model of the tests it gained nothing that could be told from chance: 200 updates
of 16 left 84 % right in 4 steps (150 puzzles), 150 updates for 2 steps 63 % (300 puzzles), and the
full model at a high learning rate fell.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from ..diffusion import sampler as rules
from ..diffusion.decoding import Batch
from ..diffusion.draws import SeededDraws
from ..diffusion.guards import trust
from ..diffusion.head import log_probability, read_out
from ..diffusion.prompt_cache import PREFILL_CHUNK, PromptCache
from ..model.diffusion_gemma import DiffusionGemma
from ..model.settings import GenerationConfig
from ..tasks.batch import MAX_BATCH
from ..tasks.canvases import Committed, Told, decode_tokens
from ..tasks.starts import Noise
from .forward import decode, encode
from .objective import Noised, Sample

SEEDS = 1 << 63  # of draws that one generator begins


def taught(
    model: DiffusionGemma,
    prompts: Sequence[Sequence[int]],
    *,
    config: GenerationConfig | None = None,
    answers: int = 1,
    seed: int = 0,
    side_by_side: int = MAX_BATCH,
) -> Iterator[tuple[int, Sample]]:
    """Answer prompts with the model as it is: (index of the prompt, sample), as they are done.

    An answer that has not converged teaches nothing, and is left out.

    Args:
        model: the teacher.
        prompts: ids.
        config: None is the checkpoint's, at all its steps.
        answers: of each prompt, each with a seed of its own.
        seed: of the first; the others count on.
        side_by_side: how many are decoded together.

    Raises:
        ContextError: a prompt is empty or leaves no room.
    """
    config = config or model.generation
    waiting = iter([(i, number) for i in range(len(prompts)) for number in range(answers)])
    batch = Batch[Told](model)
    places: dict[int, int] = {}
    written: dict[int, list[int]] = {}
    reasons: dict[int, str | None] = {}
    try:
        while True:
            while len(batch) < side_by_side and (asked := next(waiting, None)) is not None:
                i, number = asked
                draws = SeededDraws(seed + i * answers + number, model.config.vocab_size)
                start, cache = Noise(model.config.canvas_length), PromptCache(model)
                key = batch.add(
                    decode_tokens(
                        model, prompts[i], config, draws, PREFILL_CHUNK, start, cache, trust
                    )
                )
                places[key], written[key] = i, []
            if not len(batch):
                return
            for key, told in batch.step():
                if isinstance(told, Exception):
                    raise told
                if isinstance(told, Committed):
                    written[key] += told.tokens
                    reasons[key] = told.finish_reason
                elif told is None:
                    tokens, reason = written.pop(key), reasons.pop(key)
                    if reason in ("stop", "length"):
                        prompt = tuple(prompts[places[key]])
                        yield places[key], Sample(prompt, tuple(tokens), reason == "length")
    finally:
        batch.close()


def along_schedule(
    model: DiffusionGemma, batch: Noised, rng: np.random.Generator, steps: int
) -> Noised:
    """Put canvases in place that the model itself comes to in 0 to `steps` - 1 of `steps` steps.

    They are computed, without a gradient. `rng` is drawn from once a row and once for all.
    """
    config = model.generation.override(max_denoising_steps=steps)
    taken = rng.integers(steps, size=len(batch.prefixes)).tolist()
    draws = SeededDraws(int(rng.integers(SEEDS)), model.config.vocab_size)
    _, kept = encode(model, batch.tokens)
    mx.eval(kept)
    canvas = draws.tokens(batch.canvas.shape)
    expected: mx.array | None = None
    for step in range(1, max(taken) + 1):
        rows = [row for row, count in enumerate(taken) if count >= step]
        some = mx.array(rows)
        hidden = decode(
            model,
            canvas[some],
            kept,
            rows,
            [batch.prefixes[row] for row in rows],
            None if expected is None else expected[some],
        )
        temperature = rules.temperature(steps - step + 1, steps, config.t_min, config.t_max)
        seen = read_out(model, hidden, temperature, draws=draws, self_conditioning=True)
        assert seen.sampled is not None
        assert seen.self_conditioning is not None
        sure = mx.exp(log_probability(model, hidden, seen.sampled, temperature, seen))
        accepted = rules.accept(config.sampler, seen.entropy, sure, None)
        noise = draws.tokens(seen.sampled.shape)
        if expected is None:
            expected = mx.zeros((*canvas.shape, hidden.shape[-1]), hidden.dtype)
        canvas[some] = rules.renoise(accepted, seen.sampled, noise)
        expected[some] = seen.self_conditioning
        mx.eval(canvas, expected)
    return replace(
        batch,
        canvas=canvas,
        conditioned=tuple(count > 0 for count in taken),
        levels=tuple(1 - count / steps for count in taken),
        self_conditioning=expected,
    )
