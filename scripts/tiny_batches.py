"""Examples as rows of fixed width, made by processes of their own while a model trains.

A row is a prompt, padded on the left, and a canvas. Positions are relative in every layer, so a row
padded so and masked is computed as the same prompt without padding.
"""

import multiprocessing
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from queue import Empty
from typing import Any

import numpy as np
from tiny_data import Example, Sources, streams
from tokenizers import Tokenizer

CANVAS = 64
PAD, EOS, END = 0, 1, 6  # <pad>, <eos>, <turn|>
ROWS = 1024  # of one task that a process makes at once


def rendered(example: Example) -> str:
    """The prompt as the chat template writes it."""
    turns = [*example.history, ("user", example.prompt)]
    names = {"assistant": "model"}
    said = "".join(f"<|turn>{names.get(role, role)}\n{text}<turn|>\n" for role, text in turns)
    return f"<bos>{said}<|turn>model\n"


@dataclass(frozen=True)
class Rows:
    """Examples side by side; arrays (rows, width) of int16, the prompt's of the given width.

    Attributes:
        prompt: ids, padded on the left.
        target: the right canvas: the answer, an end token and `<eos>` to the end.
        start: what the canvas starts from and goes back to, or -1 where that is noise.
        pinned: 1 where the canvas is given.
        length: (rows, 1) tokens of the answer with its end token.
    """

    prompt: np.ndarray
    target: np.ndarray
    start: np.ndarray
    pinned: np.ndarray
    length: np.ndarray

    def arrays(self) -> tuple[np.ndarray, ...]:
        """All of them, in one order."""
        return self.prompt, self.target, self.start, self.pinned, self.length


def encode(
    tokenizer: Tokenizer, examples: Iterable[Example], width: int
) -> tuple[Rows, list[Example]]:
    """Rows, and their examples: those whose prompt and answer have room."""
    examples = list(examples)

    def ids(texts: list[str]) -> list[list[int]]:
        return [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    prompts = ids([rendered(example) for example in examples])
    pieces = [example.pieces or ((example.answer, False),) for example in examples]
    parts = iter(ids([text for each in pieces for text, _ in each]))
    starts = iter(ids([e.start for e in examples if e.start is not None]))
    kept, made = [], []
    for example, prompt, each in zip(examples, prompts, pieces, strict=True):
        spelled = [next(parts) for _ in each]
        start = next(starts) if example.start is not None else None
        answer = [token for tokens in spelled for token in tokens]
        if len(prompt) > width or max(len(answer), len(start or [])) >= CANVAS:
            continue
        marks = [given for (_, given), tokens in zip(each, spelled, strict=True) for _ in tokens]
        ends = example.pieces is not None
        kept.append(example)
        made.append(
            (
                [PAD] * (width - len(prompt)) + prompt,
                _canvas(answer),
                [-1] * CANVAS if start is None else _canvas(start),
                (marks + [ends] * CANVAS)[:CANVAS],
                [len(answer) + 1],
            )
        )
    columns = [np.array(column, dtype=np.int16) for column in zip(*made, strict=True)]
    return Rows(*columns), kept


def _canvas(tokens: list[int]) -> list[int]:
    return (tokens + [END] + [EOS] * CANVAS)[:CANVAS]


def _chunks(
    seed: int, sources: Sources, tokenizer: Tokenizer, tasks: dict[str, tuple[int, float]]
) -> Iterator[tuple[str, Rows]]:
    """Tasks by share, `ROWS` examples of one at a time; `tasks` has widths and shares."""
    rng = random.Random(seed)
    made = {k: v for k, v in streams(rng, sources).items() if k in tasks}
    order = sorted(tasks, key=lambda name: rng.random())
    while True:
        for name in order:
            yield name, encode(tokenizer, islice(made[name], ROWS), tasks[name][0])[0]
        order = rng.choices(list(tasks), [share for _, share in tasks.values()], k=8)


def _work(queue: Any, arguments: tuple[Any, ...], saved: str) -> None:
    seed, sources, tasks = arguments
    for chunk in _chunks(seed, sources, Tokenizer.from_str(saved), tasks):
        queue.put(chunk)


class Maker:
    """Processes that make rows."""

    def __init__(
        self,
        processes: int,
        seed: int,
        sources: Sources,
        tokenizer: Tokenizer,
        tasks: dict[str, tuple[int, float]],
    ):
        context = multiprocessing.get_context("fork")
        self._queue = context.Queue(2 * processes)
        self._processes = [
            context.Process(
                target=_work,
                args=(self._queue, (seed + 1000 * i, sources, tasks), tokenizer.to_str()),
                daemon=True,
            )
            for i in range(processes)
        ]
        for process in self._processes:
            process.start()

    def take(self, wait: bool) -> tuple[str, Rows] | None:
        """The next rows with their task; None where there are none yet and `wait` is False."""
        try:
            chunk: tuple[str, Rows] = self._queue.get(block=wait)
        except Empty:
            return None
        return chunk

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
