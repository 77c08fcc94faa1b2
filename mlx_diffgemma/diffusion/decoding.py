"""Runs coroutines that ask for passes: one alone, or many whose passes are decoded together.

A `Decoding` is a generator. It yields items, which its runner takes, and passes, each of which is
answered with its hidden states. So it need not know which others are decoded beside it.
"""

from collections.abc import Callable, Generator, Iterable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Generic, TypeVar

import mlx.core as mx

from ..model.diffusion_gemma import DiffusionGemma, Pass
from .prompt_cache import Reading

Item = TypeVar("Item")

Other = TypeVar("Other")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Rest:
    """Asks for nothing: what a decoding computes by itself goes on, once others had their turn."""


Decoding = Generator[Item | Pass | Rest, mx.array | None, Result]

# Canvas positions computed side by side where a task has many canvases.
POSITIONS_AT_ONCE = 4096

# Canvases of a larger pass that are decoded beside those of others in one step, which they make
# longer: a choice of hundreds of labels has thousands. About as many as requests run side by side.
SLICE = 8


def rows_at_once(model: DiffusionGemma) -> int:
    """Count the canvases that may go through one pass, at least one."""
    return max(1, POSITIONS_AT_ONCE // model.config.canvas_length)


def drive(model: DiffusionGemma, decoding: Decoding[Item, object]) -> Generator[Item, None, None]:
    """Run one alone: its passes are decoded, its items yielded."""
    answer: mx.array | None = None
    with closing(decoding), suppress(StopIteration):
        while True:
            item = decoding.send(answer)
            answer = None
            if isinstance(item, Pass):
                answer = model.decode([item], mx.async_eval)[0]
            elif not isinstance(item, Rest):
                yield item


@dataclass
class Clock:
    """Seconds spent computing, not those that a consumer takes between two items."""

    seconds: float = 0.0


def relay(
    decoding: Decoding[Any, Result],
    tell: Callable[[Any], Iterable[Other]],
    clock: Clock | None = None,
) -> Decoding[Other, Result]:
    """Hand on the passes of another decoding, and replace each item by what `tell` makes of it."""
    answer: mx.array | None = None
    clock = clock or Clock()
    with closing(decoding):
        while True:
            resumed = perf_counter()
            try:
                item = decoding.send(answer)
            except StopIteration as end:
                return end.value
            answer = (yield item) if isinstance(item, Pass | Rest) else None
            clock.seconds += perf_counter() - resumed
            if not isinstance(item, Pass | Rest):
                yield from tell(item)


@dataclass
class _Asked:
    """Holds a pass, and the hidden states of its canvases that have been decoded."""

    work: Pass
    hidden: list[mx.array] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return len(self.work.canvas)

    @property
    def done(self) -> int:
        return sum(map(len, self.hidden))

    def slice(self, most: int) -> Pass:
        """The next canvases, at most so many."""
        rows = slice(self.done, self.done + most)
        self_conditioning = (
            None if self.work.self_conditioning is None else self.work.self_conditioning[rows]
        )
        return Pass(self.work.canvas[rows], self.work.cache, self_conditioning)


class Batch(Generic[Item]):
    """Holds decodings that run side by side; `step` moves each on by one pass.

    For one thread, the one that loaded the model.
    """

    def __init__(self, model: DiffusionGemma):
        self._model = model
        self._runs: dict[int, Decoding[Item, None]] = {}
        self._asked: dict[int, _Asked] = {}  # passes that are not yet decoded, the oldest first
        self._hidden: dict[int, mx.array] = {}  # answers to passes, until the next step
        self._count = 0

    def __len__(self) -> int:
        return len(self._runs)

    def add(self, run: Decoding[Item, None]) -> int:
        """Let a run in, and give its number."""
        key = self._count
        self._runs[key] = run
        self._count += 1
        return key

    def remove(self, key: int) -> None:
        """Stop a run and free what it holds; nothing happens if it has ended."""
        run = self._runs.pop(key, None)
        self._asked.pop(key, None)
        self._hidden.pop(key, None)
        if run is not None:
            run.close()
            mx.clear_cache()

    def close(self) -> None:
        """Stop all."""
        for key in list(self._runs):
            self.remove(key)

    def step(self) -> Generator[tuple[int, Item | Exception | None], None, None]:
        """Yield the items of all runs, until each asks for a pass, rests, or reads a prompt.

        Items come with their run's number; the last of a run is None, or what it has raised, and
        the others go on. Stopping in the middle loses items. A pass of many canvases may take
        several steps, in which those of one canvas go on.
        """
        for key, run in list(self._runs.items()):
            if key in self._asked:
                continue
            answer = self._hidden.pop(key, None)
            while key in self._runs:  # who takes an item may remove its run
                try:
                    item = run.send(answer)
                except StopIteration:
                    self.remove(key)
                    yield key, None
                    break
                except Exception as error:
                    self.remove(key)
                    yield key, error
                    break
                answer = None
                if isinstance(item, Pass):
                    self._asked[key] = _Asked(item)
                    break
                if isinstance(item, Rest):
                    break
                yield key, item
                if isinstance(item, Reading):  # the others do not wait for the whole prompt
                    break
        self._decode(self._due())

    def _due(self) -> dict[int, Pass]:
        """Choose what is decoded now: each pass of one canvas, and of larger ones a slice.

        A slice has as many canvases as go at once, or fewer where others wait; the oldest pass is
        first.
        """
        due = {key: each.work for key, each in self._asked.items() if each.rows == 1}
        free = SLICE if due else rows_at_once(self._model)
        for key, each in self._asked.items():
            if key not in due and free:
                due[key] = each.slice(free)
                free -= len(due[key].canvas)
        return due

    def _decode(self, passes: dict[int, Pass]) -> None:
        """Decode the passes; canvases of one length go through the model together."""
        lengths = {asked.canvas.shape[1] for asked in passes.values()}
        for length in lengths:
            keys = [key for key, asked in passes.items() if asked.canvas.shape[1] == length]
            hidden = self._model.decode([passes[key] for key in keys], mx.async_eval)
            for key, part in zip(keys, hidden, strict=True):
                asked = self._asked[key]
                asked.hidden.append(part)
                if asked.done == asked.rows:
                    del self._asked[key]
                    whole = asked.hidden
                    self._hidden[key] = whole[0] if len(whole) == 1 else mx.concatenate(whole)
