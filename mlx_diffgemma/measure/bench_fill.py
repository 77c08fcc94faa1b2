"""How long an editor waits for a short hole: completions with a `suffix`, as the server does."""

import time
from dataclasses import dataclass
from statistics import median_low

from ..model.diffusion_gemma import DiffusionGemma
from ..tasks.fill import FillRequest, FillResult
from ..tasks.request import Draft, stream
from ..text.template import Hole
from ..text.tokenizer import Tokenizer

# What stands around the hole, and the most tokens that go into it unless the caller says.
LEFT, RIGHT, MOST = "def add(a, b):\n    return ", "\n\nprint(add(1, 2))\n", 16


@dataclass(frozen=True)
class Latency:
    """Medians over runs, in seconds from the question: until something can be shown, and until all
    is there. `steps` are denoising steps, where lengths tried side by side count once, and
    `canvases` the positions that they have decoded, in whole canvases."""

    most_tokens: int
    first_draft_seconds: float
    whole_seconds: float
    steps: int
    canvases: float


def fill_latency(
    model: DiffusionGemma, tokenizer: Tokenizer, most: int, steps: int | None, repeats: int
) -> Latency:
    """Fill one hole of at most so many tokens, once to warm up and `repeats` times that count."""
    runs: list[tuple[float, float, int, float]] = []
    for seed in range(repeats + 1):
        parts: list[str | Hole] = [LEFT, Hole("middle", most=most), RIGHT]
        request = FillRequest(parts, steps=steps, seed=seed, quick=True)
        started, first = time.perf_counter(), 0.0
        for event in stream(model, tokenizer, request):
            if isinstance(event, Draft) and not first:
                first = time.perf_counter() - started
            elif isinstance(event, FillResult):
                result = event
        canvases = result.positions_decoded / model.config.canvas_length
        runs.append((first, time.perf_counter() - started, result.steps, canvases))
    firsts, wholes, taken, decoded = map(median_low, zip(*runs[1:], strict=True))
    return Latency(most, firsts, wholes, int(taken), decoded)
