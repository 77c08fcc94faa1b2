"""A model and all that it answers side by side; what it has read stays for later requests."""

from collections.abc import Generator
from typing import Generic

from ..diffusion.decoding import Batch
from ..diffusion.prompt_cache import PrefixCache, PromptCache
from ..model.diffusion_gemma import DiffusionGemma
from .request import Item, Prepared


class Engine(Generic[Item]):
    """Begins requests at any time, and moves all on together.

    For one thread, the one that loaded the model.

    Args:
        model: as `load` gives it.
        cache_bytes: keys and values of earlier prompts that are kept.
    """

    def __init__(self, model: DiffusionGemma, cache_bytes: int):
        self.model = model
        self._batch = Batch[Item](model)
        self._prefix_cache = PrefixCache(model, cache_bytes)
        self._caches: dict[int, PromptCache] = {}

    def __len__(self) -> int:
        return len(self._batch)

    def begin(self, work: Prepared[Item]) -> int:
        """Let a request in, and give its number."""
        prompt_cache = self._prefix_cache.take(work.prompt)
        key = self._batch.add(work.run(prompt_cache))
        self._caches[key] = prompt_cache
        return key

    def step(self) -> Generator[tuple[int, Item | Exception | None], None, None]:
        """Yield events as `Batch.step` does; what an answered request has read is kept."""
        for key, event in self._batch.step():
            if event is None:
                self._prefix_cache.give(self._caches.pop(key))
            elif isinstance(event, Exception):
                del self._caches[key]
            yield key, event

    def remove(self, key: int) -> None:
        """Stop a request and free what it holds; nothing happens if it has ended."""
        self._caches.pop(key, None)
        self._batch.remove(key)

    def close(self) -> None:
        """Stop all."""
        for key in list(self._caches):
            self.remove(key)
