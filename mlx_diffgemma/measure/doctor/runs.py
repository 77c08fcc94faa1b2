"""Checks of whole runs of the tiny models; each gives a result or several."""

import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import zip_longest
from typing import Any

import numpy as np

from ...diffusion.decoding import drive
from ...diffusion.denoise import Start, denoise
from ...diffusion.draws import SeededDraws
from ...diffusion.prompt_cache import PromptCache
from ...model.diffusion_gemma import DiffusionGemma
from ...tasks.generate import stream_generate
from ...tasks.starts import forced_tokens, pinned_start
from ...text.turns import Text
from ...text.vocabulary import Vocabulary
from ..bench import QUESTION
from .comparison import Comparison, Subject
from .results import Result
from .taps import Tape

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "count": {"type": "integer"}},
    "required": ["name", "count"],
}

RECORD = "Record: Anna Berg from Norway, born 1984-03-12"

# Keys and punctuation are pinned, and holes have as many tokens as what stands here in their place.
PINNED = (
    ('{"name":"', True),
    ("Anna Berg", False),
    ('","born":"', True),
    ("1984-03-12", False),
    ('","country":"', True),
    ("Norway", False),
    ('"}', True),
)


def denoising(
    compare: Comparison, on: Subject, prompt: str = QUESTION, steps: int | None = None
) -> Iterator[Result]:
    """Check that the same draws give the same canvas at every step."""
    yield _canvases(compare, "denoising", on, prompt, steps, lambda draws: None)[0]


def pins(compare: Comparison, on: Subject, steps: int | None = None) -> Iterator[Result]:
    """Check the same with pinned positions, which have to stay at every step."""
    assert on.tokenizer is not None
    words = Vocabulary(on.pair.plain, on.tokenizer)
    starts: list[Start] = []

    def start(draws: SeededDraws) -> Start:
        starts.append(pinned_start([forced_tokens(on.pair.plain, words, PINNED)], draws))
        return starts[0]

    result, canvases = _canvases(compare, "pinned run", on, RECORD, steps, start)
    yield result
    pinned, given = (np.array(each) for each in (starts[0].pinned, starts[0].canvas))
    changed = float(np.mean([(canvas != given)[pinned] for canvas in canvases]))
    yield compare.result("pins stay", on, "broken", changed, result.cost)


def _canvases(
    compare: Comparison,
    check: str,
    on: Subject,
    prompt: str,
    steps: int | None,
    start: Callable[[SeededDraws], Start | None],
) -> tuple[Result, list[Any]]:
    """Run on both sides; return the tested one's canvases and best tokens, step by step, too."""
    assert on.tokenizer is not None
    turn = on.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
    ids = on.tokenizer.encode(turn)
    tape = Tape(0, on.pair.plain.config.vocab_size)

    def run(model: DiffusionGemma) -> list[Any]:
        prompt_cache = PromptCache(model)
        prompt_cache.read(ids)
        config = model.generation.override(max_denoising_steps=steps)
        taken, started = [], time.perf_counter()
        for now in drive(
            model, denoise(model, prompt_cache.cache, config, tape, start(tape.rewind()))
        ):
            both = np.concatenate([np.array(now.canvas), np.array(now.argmax)])
            taken.append((both, time.perf_counter() - started))
            started = time.perf_counter()
        return taken

    wanted, found, cost = compare.both(lambda: run(on.pair.plain), lambda: run(on.pair.tested))
    missing = (None, 0.0)
    pairs = list(zip_longest(found, wanted, fillvalue=missing))
    shares = [1.0 if a is None or b is None else float(np.mean(a != b)) for (a, _), (b, _) in pairs]
    seconds = [float(np.median([s for _, s in each])) for each in (wanted, found)]
    detail = f"{len(found)} steps of {1e3 * seconds[1]:.1f} ms, reference {1e3 * seconds[0]:.1f} ms"
    if first := next((i + 1 for i, share in enumerate(shares) if share), None):
        detail = f"equal up to step {first - 1} of {len(wanted)}; {detail}"
    value = float(np.mean(shares))
    result = compare.result(check, on, "canvases", value, cost, detail)
    return result, [row for both, _ in found for row in np.split(both, 2)]


def schema(compare: Comparison, on: Subject) -> Iterator[Result]:
    """Check that an answer under a schema follows it; a run ends with an error if it does not."""
    if find_spec("jsonschema") is None:
        why = "needs pip install 'mlx-diffgemma[schema]'"
        yield compare.without("schema", on.name, on.dtype, "skipped", why)
        return
    assert on.tokenizer is not None
    tokenizer, tape = on.tokenizer, Tape(2, on.pair.plain.config.vocab_size)

    def answer(model: DiffusionGemma) -> str:
        events = stream_generate(
            model, tokenizer, QUESTION, schema=SCHEMA, draws=tape.rewind(), steps=4
        )
        return "".join(event.text for event in events if isinstance(event, Text))

    wanted, found, cost = compare.both(
        lambda: answer(on.pair.plain), lambda: answer(on.pair.tested)
    )
    detail = "the same document" if found == wanted else "another document, which is valid too"
    yield compare.result("schema", on, "broken", 0.0, cost, detail)
