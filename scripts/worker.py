"""What `compare_mlx_vlm.py` measures of one system, in a process of its own.

A system is a class with `__init__(directory)`, `remember()` and `answer(prompt, steps, tokens)`.
This module needs MLX alone, so that it runs in mlx-vlm's environment too.
"""

import argparse
import json
import resource
import sys
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter, process_time
from typing import Protocol

import mlx.core as mx


@dataclass
class Answer:
    """One answer: seconds in all, to the first event, for the prompt, and of each further step.

    `step_cpu` is the processor time of a step: on a busy machine it says more than the clock.
    """

    seconds: float
    first: float
    prompt_seconds: float
    steps: int
    step_seconds: list[float]
    step_cpu: list[float]
    tokens: list[int]


class System(Protocol):
    """A runtime with a loaded checkpoint."""

    def remember(self) -> None:
        """From now on, keep what was read for the next prompt."""

    def answer(self, prompt: list[int], steps: int, max_tokens: int) -> Answer:
        """Answer a prompt of ids."""


class Maker(Protocol):
    def __call__(self, directory: str) -> System:
        """Load a checkpoint."""


def now() -> tuple[float, float]:
    """The clock, and the processor time of all threads."""
    return perf_counter(), process_time()


def between(moments: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Seconds and processor seconds from each moment to the next."""
    pairs = list(pairwise(moments))
    return [b[0] - a[0] for a, b in pairs], [b[1] - a[1] for a, b in pairs]


def main(make: Maker) -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--prompt", type=int, required=True)
    parser.add_argument("--turns", type=int, default=0, help="tokens of a first turn")
    arguments = parser.parse_args()
    mx.reset_peak_memory()
    started = perf_counter()
    system = make(arguments.directory)
    found: dict[str, object] = {
        "load_seconds": perf_counter() - started,
        "load_peak": mx.get_peak_memory(),
        "weights": mx.get_active_memory(),
        "load_resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
    }
    if arguments.turns or arguments.steps > 3:
        # The first answer compiles things; with so few steps only memory is of interest.
        system.answer(list(range(100, 108)), 2, 256)
    if arguments.turns:
        found |= two_turns(system, arguments.turns)
    else:
        found |= one_canvas(system, arguments.prompt, arguments.steps)
    print(json.dumps(found))


def one_canvas(system: System, prompt: int, steps: int) -> dict[str, object]:
    """A canvas behind a prompt."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    answer = system.answer(list(range(100, 100 + prompt)), steps, 256)
    return {
        "peak": mx.get_peak_memory(),
        "above": mx.get_peak_memory() - before,
        "seconds": answer.seconds,
        "first": answer.first,
        "steps": answer.steps,
        "step_seconds": answer.step_seconds,
        "step_cpu": answer.step_cpu,
    }


def two_turns(system: System, length: int) -> dict[str, object]:
    """A long first prompt, an answer, and a short second question."""
    first = [100 + i % 600 for i in range(length)]
    cold = system.answer(first, 2, 256).prompt_seconds
    second = system.answer([*first, *range(100, 420)], 2, 256).prompt_seconds
    system.remember()
    answer = system.answer(first, 2, 256).tokens
    kept = system.answer([*first, *answer, *range(300, 364)], 2, 256)
    return {
        "first_turn": cold,
        "second_turn_cold": second,
        "second_turn": kept.prompt_seconds,
        "second_turn_seconds": kept.seconds,
    }
