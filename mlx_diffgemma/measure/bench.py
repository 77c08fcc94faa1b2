"""How fast a checkpoint is on this machine: the numbers that users post and compare."""

import platform
import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from statistics import median, median_low
from typing import Any

import mlx.core as mx

from ..checkpoint.load import load
from ..checkpoint.weights import DType
from ..model.diffusion_gemma import DiffusionGemma
from ..model.settings import Speed
from ..tasks.generate import stream_generate
from ..tasks.modes import DENOISE, Way
from ..tasks.request import Done, Draft
from ..text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Measurement:
    """One answer, or the medians of several; rates and seconds are of computing.

    `first_draft_seconds` counts from the question; `step_seconds` is the median over steps. Memory
    is in bytes, weights included.
    """

    prompt_tokens: int
    generated_tokens: int
    canvases: int
    steps_per_canvas: float
    tokens_per_forward: float
    positions_per_token: float
    prefill_tokens_per_second: float
    first_draft_seconds: float
    step_seconds: float
    canvas_seconds: float
    tokens_per_second: float
    peak_memory: int


@dataclass(frozen=True)
class Report:
    """What was measured of one checkpoint: medians, and all runs behind them."""

    model: str
    load_seconds: float
    load_peak_memory: int
    weights: int
    median: Measurement
    runs: tuple[Measurement, ...]


class Subject:
    """A loaded checkpoint that is measured run by run."""

    def __init__(
        self,
        name: str,
        path: str | Path | None,
        revision: str | None,
        adapter: str | None = None,
        *,
        dtype: DType | None,
        max_memory: int | None,
        speed: Speed,
        shared: Callable[[], tuple[DiffusionGemma, Tokenizer]] | None = None,
    ):
        """`shared` loads it where several ranks share it, in place of `load`."""
        self.name = name
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        started = time.perf_counter()
        if shared is not None:
            self._model, self._tokenizer = shared()
        else:
            self._model, self._tokenizer = load(
                path,
                revision=revision,
                dtype=dtype,
                max_memory=max_memory,
                speed=speed,
                adapter=adapter,
            )
        self._load_seconds = time.perf_counter() - started
        self._load_peak = mx.get_peak_memory() - before
        self._weights = mx.get_active_memory() - before
        self._way = DENOISE
        self._runs: list[Measurement] = []

    def in_way(self, way: Way) -> "Subject":
        """The same loaded checkpoint, measured as it writes in this way."""
        other = copy(self)
        other.name, other._way, other._runs = f"{self.name}, {way.name}", way, []
        return other

    def warm_up(self, prompt_tokens: int) -> None:
        """Take two steps that do not count: kernels are compiled, pages are read at first use."""
        measure(self._model, self._tokenizer, prompt_tokens, 2, 1, 0, self._way)

    def run(self, prompt_tokens: int, steps: int | None, max_tokens: int | None) -> None:
        """Measure once more; each run has a seed of its own."""
        seed = len(self._runs)
        others = mx.get_active_memory() - self._weights
        run = measure(
            self._model, self._tokenizer, prompt_tokens, steps, max_tokens, seed, self._way
        )
        # Another checkpoint that is loaded beside this one does not count.
        self._runs.append(replace(run, peak_memory=run.peak_memory - others))

    def report(self) -> Report:
        """Return what is known by now."""
        return Report(
            self.name,
            self._load_seconds,
            self._load_peak,
            self._weights,
            middle(self._runs),
            tuple(self._runs),
        )


def measure(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    prompt_tokens: int,
    steps: int | None,
    max_tokens: int | None,
    seed: int,
    way: Way = DENOISE,
) -> Measurement:
    """Answer a prompt of so many tokens."""
    drafts: list[tuple[int, float]] = []
    prompt = prompt_of(tokenizer, prompt_tokens)
    started = time.perf_counter()
    for event in stream_generate(
        model,
        tokenizer,
        prompt,
        steps=steps,
        max_tokens=max_tokens,
        seed=seed,
        mode=way.mode,
        verify=way.verify,
        temperature=way.temperature,
        acceptance=way.acceptance,
    ):
        if isinstance(event, Draft):
            drafts.append((event.canvas, time.perf_counter()))
        elif isinstance(event, Done):
            done = event
    first = drafts[0][1] - started
    # A new canvas encodes the last one first: what lies between canvases is no step.
    seconds = [b - a for (canvas, a), (other, b) in pairwise(drafts) if canvas == other]
    return Measurement(
        prompt_tokens=done.prompt_tokens,
        generated_tokens=done.generated_tokens,
        canvases=done.canvases,
        steps_per_canvas=done.denoising_steps / done.canvases,
        tokens_per_forward=done.tokens_per_forward,
        positions_per_token=done.positions_per_token,
        prefill_tokens_per_second=done.prompt_tokens / done.prompt_seconds,
        first_draft_seconds=first,
        # Where every canvas took one step, that step is all there is.
        step_seconds=median(seconds) if seconds else done.generation_seconds / len(drafts),
        canvas_seconds=done.generation_seconds / done.canvases,
        tokens_per_second=done.generated_tokens / (done.prompt_seconds + done.generation_seconds),
        peak_memory=done.peak_memory,
    )


def prompt_of(tokenizer: Tokenizer, tokens: int) -> list[int]:
    """Make a chat turn of exactly so many ids: a question, repeated or cut at the front."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}])
    ids = tokenizer.encode(text)
    filler = tokenizer.encode(f"{QUESTION} ")
    missing = max(tokens - len(ids), 0)
    return [*(filler * (missing // len(filler) + 1))[:missing], *ids][-tokens:]


QUESTION = "Record: Anna Berg from Norway"


def middle(runs: Sequence[Measurement]) -> Measurement:
    """Return the median of each number; of an even count the lower one."""
    names = [field.name for field in fields(Measurement)]
    return Measurement(**{name: median_low([getattr(run, name) for run in runs]) for name in names})


def bench(
    subjects: Sequence[Subject],
    prompt_tokens: int,
    steps: int | None,
    max_tokens: int | None,
    repeats: int,
    progress: Callable[[str], None],
) -> list[Report]:
    """Measure checkpoints in turns, so that a busy or hot machine is so for all."""
    for subject in subjects:
        progress(f"warming up {subject.name}")
        subject.warm_up(prompt_tokens)
    for number in range(repeats):
        for subject in subjects:
            progress(f"run {number + 1} of {repeats}: {subject.name}")
            subject.run(prompt_tokens, steps, max_tokens)
    return [subject.report() for subject in subjects]


def as_json(reports: Sequence[Report]) -> dict[str, Any]:
    """Return everything as JSON, with what it was measured on."""
    return {**machine(), "models": [asdict(report) for report in reports]}


def machine() -> dict[str, Any]:
    """Return versions and device."""
    try:
        own = version("mlx-diffgemma")
    except PackageNotFoundError:
        own = "a checkout"
    known = mx.device_info()
    return {
        "mlx_diffgemma": own,
        "mlx": version("mlx"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": str(mx.default_device()),
        "device_info": {key: value for key, value in known.items() if value},
    }
