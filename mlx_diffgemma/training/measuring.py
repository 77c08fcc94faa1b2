"""What a model can do while it is trained: its losses with fixed noise, and answers that are right.

The loss misleads: a model may predict tokens better and answer worse. So some cases are answered
by the same code that answers users, and compared with what the examples say.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import mlx.core as mx

from ..errors import Error
from ..model.diffusion_gemma import DiffusionGemma
from ..tasks.batch import MAX_BATCH, stream_batch
from ..tasks.generate import Request
from ..tasks.request import Done
from ..text.tokenizer import Tokenizer
from ..text.turns import Text, ToolCall, TurnReader
from .batches import VALIDATION, draws, in_order
from .data import Example
from .events import LEVELS, Measuring, Succeeded, Validated
from .objective import Objective, Sample, losses, noised
from .settings import Settings
from .step import scalar

# What an answer says: its text, and the calls of tools in it.
Said = tuple[str, tuple[ToolCall, ...]]

Stop = Callable[[], bool]


def validate(
    model: DiffusionGemma,
    examples: Sequence[Example],
    settings: Settings,
    end_token: int,
    iteration: int,
    stopped: Stop,
    *,
    of: str = "valid",
) -> Iterator[Measuring | Validated]:
    """Losses of examples at each of `LEVELS`; ends without them once `stopped` says so."""
    began = time.perf_counter()
    objective = Objective(encoder_weight=settings.encoder_weight)
    samples = [each.sample for each in examples]
    most = settings.val_batches if of == "valid" else settings.test_batches
    batches = in_order([each.length for each in samples], settings.batch_size, most)
    denoising, reading = [0.0] * len(LEVELS), 0.0
    model.eval()
    for number, indices in enumerate(batches):
        for i, level in enumerate(LEVELS):
            if stopped():
                return
            batch = noised(
                [samples[j] for j in indices],
                draws(settings.seed, VALIDATION, number),
                model.config,
                end_token,
                objective,
                level=level,
            )
            found = losses(model, batch, objective)
            denoising[i] += len(indices) * scalar(found.denoising)
            reading += len(indices) * scalar(found.reading) / len(LEVELS)
        clear_cache(settings.clear_cache_threshold)
        yield Measuring("loss", number + 1, len(batches))
    count = sum(map(len, batches))
    seconds = time.perf_counter() - began
    means = tuple(each / count for each in denoising)
    yield Validated(iteration, means, reading / count, seconds, of)


def answerable(examples: Sequence[Example], most: int) -> list[Example]:
    """The first examples, at most so many, that ask something and say the whole answer."""
    found = (each for each in examples if each.asks and not each.sample.truncated)
    return [each for each, _ in zip(found, range(most), strict=False)]


def answer_cases(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    cases: Sequence[Example],
    settings: Settings,
    iteration: int,
    stopped: Stop,
    *,
    of: str = "valid",
) -> Iterator[Measuring | Succeeded]:
    """Answer cases as `generate` would, each with a seed of its own, always the same; ends without
    a count once `stopped` says so.

    Raises:
        Error: a case cannot be answered at all.
    """
    began = time.perf_counter()
    length = model.config.canvas_length
    requests = [
        Request(
            list(case.sample.prompt),
            max_tokens=math.ceil(len(case.sample.response) / length) * length,
            steps=settings.success_steps or settings.distill,
            seed=settings.seed + i,
        )
        for i, case in enumerate(cases)
    ]
    said: list[tuple[str, list[ToolCall]]] = [("", []) for _ in cases]
    right = done = 0
    model.eval()
    side_by_side = min(MAX_BATCH, max(1, settings.batch_size))
    events = stream_batch(model, tokenizer, requests, max_batch=side_by_side)
    with closing(events):
        for i, event in events:
            if stopped():
                return
            text, calls = said[i]
            match event:
                case Error():
                    raise event
                case Text():
                    said[i] = text + event.text, calls
                case ToolCall():
                    calls.append(event)
                case Done():
                    done += 1
                    wanted = expected(tokenizer, cases[i].sample)
                    right += (text.strip(), tuple(calls)) == wanted
                    yield Measuring("answers", done, len(cases))
    clear_cache(settings.clear_cache_threshold)
    yield Succeeded(iteration, right, len(cases), time.perf_counter() - began, of)


def expected(tokenizer: Tokenizer, sample: Sample) -> Said:
    """What the response of a sample says, read as an answer is."""
    parts = TurnReader(tokenizer, sample.prompt).feed(sample.response, last=True)
    text = "".join(part.text for part in parts if isinstance(part, Text))
    return text.strip(), tuple(part for part in parts if isinstance(part, ToolCall))


def clear_cache(threshold: int) -> None:
    """Give memory back that MLX keeps for later, if it is more than that."""
    if mx.get_cache_memory() > threshold:
        mx.clear_cache()
