"""Another rank than 0: what it has for what rank 0 has, and how it does what that does."""

import pickle
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property
from typing import Any

from ..diffusion.cache_file import Saved
from ..diffusion.cache_parts import types_held
from ..diffusion.prompt_cache import PromptCache
from ..distributed.launch import LaunchError
from ..distributed.others import packed
from ..errors import Error
from ..model.diffusion_gemma import DiffusionGemma
from ..text.tokenizer import Tokenizer
from ..text.vocabulary import Vocabulary
from .batch import stream_batch
from .engine import Engine
from .generate import Answer
from .request import Prepared, stream
from .together import Numbered

# Seconds within which rank 0 has failed as this one has, or it has failed alone.
ALIKE = 10.0


class Forgotten(Error):
    """Rank 0 does not want any more what is being prepared."""


class Follower:
    """Does what rank 0 tells, with nobody who listens. For one thread, the one that has loaded.

    Args:
        model: this rank's part.
        tokenizer: the same checkpoint's.
        answer: tells rank 0 something, from any thread.
    """

    def __init__(
        self, model: DiffusionGemma, tokenizer: Tokenizer, answer: Callable[[bytes], None]
    ):
        self._model, self._tokenizer, self._answer = model, tokenizer, answer
        self._caches: dict[int, PromptCache] = {}
        self._prepared: dict[int, Prepared[object]] = {}
        self._preparing: set[int] = set()  # what is not there is forgotten
        self._engine: Engine[object] | None = None
        self._failure: Exception | None = None
        self._does: dict[str, Callable[[Any], None]] = {
            "stream": self._stream,
            "batch": self._batch,
            "put together": self._put_together,
            "types held": self._types_held,
            "take apart": self._take_apart,
            "engine": self._begin_engine,
            "begin": self._begin,
            "step": self._step,
            "remove": lambda key: self._running.remove(key),
            "close": lambda work: self._running.close(),
        }

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self._model, self._tokenizer)

    def run(self, received: Callable[[float | None], tuple[int, bytes | None] | None]) -> None:
        """Do all that is told until rank 0 leaves; `received` is as a `Link` has it.

        Raises:
            Exception: something has failed here, and not at rank 0.
        """
        while True:
            found = received(None if self._failure is None else ALIKE)
            if found is None and self._failure is not None:
                raise self._failure
            if found is None or found[1] is None:
                return
            self.follow(found[1])

    def follow(self, message: bytes) -> None:
        """Do what is told.

        Raises:
            Exception: the last message has failed here, and not at rank 0.
        """
        kind, work, dropped = pickle.loads(message)
        for number in dropped:
            self._forget(number)
        if kind == "prepare":
            self._begin_to_prepare(*work)
        elif kind == "failed":
            self._answer(packed((work[0], "" if self._failure is None else _said(self._failure))))
            self._failure = None
        elif kind == "copy":
            self._copy(*work)
        elif kind != "forget":
            if self._failure is not None:
                raise self._failure
            try:
                self._does[kind](work)
            except Exception as error:  # rank 0 mostly has met the same, and goes on
                self._failure = error

    def _forget(self, number: int) -> None:
        self._caches.pop(number, None)
        self._prepared.pop(number, None)
        self._preparing.discard(number)

    def _stream(self, work: tuple[bytes, Numbered | None]) -> None:
        task, known = work
        cache = None if known is None else self._cache(known)
        self._run(stream(self._model, self._tokenizer, pickle.loads(task), cache))

    def _batch(self, work: tuple[bytes, None]) -> None:
        requests, max_batch = pickle.loads(work[0])
        self._run(stream_batch(self._model, self._tokenizer, requests, max_batch=max_batch))

    def _run(self, items: Iterable[object]) -> None:
        for _ in items:
            raise AssertionError("only rank 0 has items")

    def _cache(self, known: Numbered) -> PromptCache:
        """This rank's prompt cache of a number, which has read what rank 0's has."""
        number, standing = known
        cache = self._caches.setdefault(number, PromptCache(self._model))
        if not standing[0]:
            cache.clear()  # rank 0's may have been, when no other rank was to know
        if cache.standing != standing:
            raise LaunchError("this rank has not read what rank 0 has")
        return cache

    def _types_held(self, work: None) -> None:
        types_held(self._model)

    def _put_together(self, known: Numbered) -> None:
        self._cache(known).put_together()

    def _take_apart(self, work: tuple[int, Any]) -> None:
        number, described = work
        self._caches[number] = PromptCache.of(self._model, Saved.like(described))

    def _begin_to_prepare(self, number: int, task: bytes) -> None:
        self._preparing.add(number)
        name = f"preparing {number}"
        work = threading.Thread(target=self._prepare, args=(number, task), name=name, daemon=True)
        work.start()

    def _prepare(self, number: int, task: bytes) -> None:
        def check() -> None:
            if number not in self._preparing:
                raise Forgotten("rank 0 has forgotten it")

        problem = ""
        try:
            self._prepared[number] = pickle.loads(task).prepare(
                self._model, self._vocabulary, check
            )
            check()
        except Exception as error:
            self._prepared.pop(number, None)
            problem = _said(error)
        self._answer(packed((number, problem)))

    def _copy(self, number: int, original: int, seed: int | None) -> None:
        prepared = self._prepared[original]
        assert isinstance(prepared, Answer)
        self._prepared[number] = replace(prepared, seed=seed)

    def _begin_engine(self, cache_bytes: int) -> None:
        self._engine = Engine(self._model, cache_bytes)

    @property
    def _running(self) -> Engine[object]:
        assert self._engine is not None
        return self._engine

    def _begin(self, number: int) -> None:
        self._running.begin(self._prepared[number])

    def _step(self, keys: list[int]) -> None:
        if self._running.keys != keys:
            raise LaunchError("this rank does not answer the requests that rank 0 does")
        for _ in self._running.step():
            pass


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__
