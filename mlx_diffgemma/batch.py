"""Many runs at once: their passes are decoded together, all else stays their own.

Each keeps its prompt, draws, settings and schedule, so it gives what it would give alone. One may
join or leave between any two steps.
"""

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic

import mlx.core as mx

from .denoise import Item, Run
from .errors import Error
from .generation import Event, Reading, Request, rows_at_once, write_events
from .model import DiffusionGemma, Pass
from .tokenizer import Tokenizer
from .turns import Text

# Requests that `batch_generate` lets in at once.
MAX_BATCH = 8
# Canvases of a larger pass that are decoded beside those of others in one step, which they make
# longer: a choice of hundreds of labels has thousands. About as many as requests run side by side.
SLICE = 8


@dataclass
class _Asked:
    """A pass, and the hidden states of those of its canvases that have been decoded."""

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
        belief = None if self.work.belief is None else self.work.belief[rows]
        return Pass(self.work.canvas[rows], self.work.cache, belief)


class Batch(Generic[Item]):
    """Runs on their way. `step` moves all of them on by one pass.

    For one thread, the one that loaded the model.
    """

    def __init__(self, model: DiffusionGemma):
        self._model = model
        self._runs: dict[int, Run[Item, None]] = {}
        self._asked: dict[int, _Asked] = {}  # passes that are not yet decoded, the oldest first
        self._hidden: dict[int, mx.array] = {}  # answers to passes, until the next step
        self._count = 0

    def __len__(self) -> int:
        return len(self._runs)

    def add(self, run: Run[Item, None]) -> int:
        """Let a run in; gives its number."""
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

    def close(self) -> None:
        """Stop all."""
        for key in list(self._runs):
            self.remove(key)

    def step(self) -> Generator[tuple[int, Item | Exception | None], None, None]:
        """What all runs yield until each has asked for a pass, or read a chunk of a long prompt.

        With their numbers. The last of a run is None, or what it has raised: the others go on.
        Stopping in the middle loses items. A pass of many canvases may take several steps, in
        which those of one canvas go on.
        """
        for key, run in list(self._runs.items()):
            if key in self._asked:
                continue
            answer = self._hidden.pop(key, None)
            while key in self._runs:  # whoever takes an item may remove its run
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
                yield key, item
                if isinstance(item, Reading):  # the others do not wait for the whole prompt
                    break
        self._decode(self._due())

    def _due(self) -> dict[int, Pass]:
        """What is decoded now: each pass of one canvas, and of larger ones a slice.

        A slice has as many canvases as go at once, or fewer where others wait; the oldest pass is
        first.
        """
        due = {key: each.work for key, each in self._asked.items() if each.rows == 1}
        room = SLICE if due else rows_at_once(self._model)
        for key, each in self._asked.items():
            if key not in due and room:
                due[key] = each.slice(room)
                room -= len(due[key].canvas)
        return due

    def _decode(self, passes: dict[int, Pass]) -> None:
        """Hidden states of all passes; canvases of one length go through the model together."""
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


def stream_batch(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    requests: Iterable[Request],
    *,
    max_batch: int = MAX_BATCH,
) -> Generator[tuple[int, Event | Error], None, None]:
    """Answer requests, up to `max_batch` side by side: (index of the request, event).

    A request ends with its `Done`, or with the error that it alone would have raised. The next one
    is taken from `requests` as soon as there is room.
    """
    batch = Batch[Event](model)
    waiting = enumerate(requests)
    numbers: dict[int, int] = {}
    try:
        while True:
            while len(batch) < max_batch and (found := next(waiting, None)) is not None:
                try:
                    run = write_events(model, tokenizer, found[1])
                except Error as error:
                    yield found[0], error
                else:
                    numbers[batch.add(run)] = found[0]
            if not len(batch):
                return
            for key, event in batch.step():
                if isinstance(event, Exception) and not isinstance(event, Error):
                    raise event
                if event is not None:
                    yield numbers[key], event
    finally:
        batch.close()


def batch_generate(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    requests: Sequence[Request | str],
    *,
    max_batch: int = MAX_BATCH,
) -> list[str]:
    """The answers to requests, or to prompts with the checkpoint's settings, in their order.

    Raises:
        Error: the first that a request meets; the others' answers are lost with it.
    """
    asked = [Request(each) if isinstance(each, str) else each for each in requests]
    answers = [""] * len(asked)
    for i, event in stream_batch(model, tokenizer, asked, max_batch=max_batch):
        if isinstance(event, Error):
            raise event
        if isinstance(event, Text):
            answers[i] += event.text
    return answers
