"""A model and all that it answers side by side; what it has read stays for later requests."""

from collections.abc import Callable, Generator
from contextlib import nullcontext
from dataclasses import replace
from typing import Generic

from ..diffusion.decoding import Batch
from ..diffusion.prompt_cache import PrefixCache, PromptCache
from ..model.diffusion_gemma import DiffusionGemma
from ..text.vocabulary import Vocabulary
from .generate import Answer
from .request import Item, Prepared, Task
from .together import copied_on_all, number_of, prepare_on_all


class Engine(Generic[Item]):
    """Begins requests at any time, and moves all on together.

    For one thread, the one that loaded the model. Where ranks share it, rank 0 has the others do
    the same with engines of theirs, so what it begins has to be `prepared`.

    Args:
        model: as `load` gives it.
        cache_bytes: keys and values of earlier prompts that are kept, of all ranks together.
    """

    def __init__(self, model: DiffusionGemma, cache_bytes: int):
        self.model = model
        self._batch = Batch[Item](model)
        self._prefix_cache = PrefixCache(model, cache_bytes)
        self._caches: dict[int, PromptCache] = {}
        self._others = model.part.share.others
        self._tell("engine", cache_bytes)

    def __len__(self) -> int:
        return len(self._batch)

    @property
    def keys(self) -> list[int]:
        """The numbers of requests that are being answered, the oldest first."""
        return list(self._caches)

    def begin(self, work: Prepared[Item]) -> int:
        """Let a request in, and give its number."""
        if self._others is not None:
            self._tell("begin", number_of(work))
        with nullcontext() if self._others is None else self._others.in_step():
            prompt_cache = self._prefix_cache.take(work.prompt)
            key = self._batch.add(work.run(prompt_cache))
            self._caches[key] = prompt_cache
            return key

    def step(self) -> Generator[tuple[int, Item | Exception | None], None, None]:
        """Yield events as `Batch.step` does; what an answered request has read is kept."""
        if self._others is None:
            yield from self._step()
            return
        self._tell("step", self.keys)
        events = self._others.all_of(self._step())
        try:
            while (event := next(events, None)) is not None:
                yield event
        finally:
            for _ in events:  # the others complete their step
                pass

    def _step(self) -> Generator[tuple[int, Item | Exception | None], None, None]:
        for key, event in self._batch.step():
            if event is None:
                self._prefix_cache.give(self._caches.pop(key))
            elif isinstance(event, Exception):
                del self._caches[key]
            yield key, event

    def remove(self, key: int) -> None:
        """Stop a request and free what it holds; nothing happens if it has ended."""
        self._tell("remove", key)
        self._caches.pop(key, None)
        self._batch.remove(key)

    def close(self) -> None:
        """Stop all."""
        self._tell("close")
        for key in self.keys:
            self._caches.pop(key, None)
            self._batch.remove(key)

    def _tell(self, kind: str, work: object = None) -> None:
        if self._others is not None:
            self._others.tell(kind, work)


def prepared(
    task: Task[Item], model: DiffusionGemma, vocabulary: Vocabulary, check: Callable[[], None]
) -> Prepared[Item]:
    """Prepare a request for an engine of this model, in any thread.

    Raises:
        Error: as the task's own `prepare`, and as `prepare_on_all`.
    """
    return prepare_on_all(model, task, lambda: task.prepare(model, vocabulary, check), check)


def reseeded(work: Answer, seed: int | None) -> Answer:
    """Repeat an answer that was `prepared`, with another seed.

    Raises:
        Error: as `copied_on_all`.
    """
    return copied_on_all(work.model, work, replace(work, seed=seed), seed)
