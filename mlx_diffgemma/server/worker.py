"""Owns MLX in a server: one thread loads, generates and frees, and nobody else does."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import mlx.core as mx

from ..errors import Error
from ..model.diffusion_gemma import DiffusionGemma
from ..tasks.engine import Engine, prepared
from ..tasks.generate import Answer
from ..tasks.request import Done, Prepared, Task
from ..text.tokenizer import Tokenizer
from ..text.vocabulary import Vocabulary

# Takes what whoever waits is given: events, at the end None, or an exception.
Listener = Callable[[object], None]

Item = TypeVar("Item")

_log = logging.getLogger("uvicorn.error")  # where the server's own messages go


class Busy(Exception):
    """Says that the queue is full."""


class Stopped(Error):
    """Says that the server's end has cut a request off."""


class Timeout(Error):
    """Says that a request took longer than it may."""


class Gone(Error):
    """Says that nobody waits for an answer any more."""


@dataclass(eq=False)
class Patience:
    """Says how long somebody waits for an answer, its preparation included.

    Attributes:
        seconds: the whole time.
        ends: on the monotonic clock.
        gone: whether nobody waits any more; any thread may say so.
    """

    seconds: float
    ends: float
    gone: bool = False

    @property
    def left(self) -> float:
        """Give what is left, in seconds."""
        return max(self.ends - time.monotonic(), 0.0)

    @property
    def timeout(self) -> Timeout:
        """Make the error that is told when the time is over."""
        return Timeout(f"the request took longer than {self.seconds:g} seconds")

    def check(self) -> None:
        """Raise where it makes no sense to go on; called between pieces of long work.

        Raises:
            Gone: nobody waits.
            Timeout: the time is over.
        """
        if self.gone:
            raise Gone("nobody waits for the answer")
        if not self.left:
            raise self.timeout


@dataclass(eq=False)
class Ticket:
    """Stands for a request on its way."""

    work: Prepared[object]
    listen: Listener
    patience: Patience
    cancelled: bool = False


@dataclass
class Counters:
    """Counts what the server has done so far."""

    answered: int = 0
    failed: int = 0
    cancelled: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    denoising_steps: int = 0
    positions_decoded: int = 0


class Worker:
    """Queues work in the order it comes, and does up to `max_batch` pieces side by side.

    Args:
        load: gives the model and the tokenizer, on the thread.
        max_batch: requests that are denoised together.
        max_queue: requests that may wait; one more is refused.
        timeout: seconds from being asked to the end, preparation included.
        cache_bytes: keys and values of earlier prompts that are kept.
    """

    def __init__(
        self,
        load: Callable[[], tuple[DiffusionGemma, Tokenizer]],
        *,
        max_batch: int,
        max_queue: int,
        timeout: float,
        cache_bytes: int,
    ):
        self._load = load
        self._max_batch = max_batch
        self._waiting: deque[Ticket] = deque()
        self._changed = threading.Condition()  # held to touch the queue
        self._max_queue = max_queue
        self._timeout = timeout
        self._cache_bytes = cache_bytes
        self._ready = threading.Event()
        self._stopping = threading.Event()
        self._failure: Exception | None = None
        self._running: dict[int, Ticket] = {}
        self.counters = Counters()
        self._thread = threading.Thread(target=self._own, name="mlx")
        self.tokenizer: Tokenizer

    def start(self) -> None:
        """Load the model, and return once it can answer.

        Raises:
            Error: as `load` does.
        """
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Stop whatever runs and end the thread."""
        with self._changed:
            self._stopping.set()
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Say whether the thread is there to answer."""
        return self._thread.is_alive() and not self._stopping.is_set()

    @property
    def waiting(self) -> int:
        """Count requests in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Count requests that are being answered."""
        return len(self._running)

    @property
    def model(self) -> DiffusionGemma:
        """Give the model, whose arrays are for the worker's thread alone."""
        return self._model

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Give what the model's tokens can spell; for any thread."""
        return Vocabulary(self._model, self.tokenizer)

    def patience(self) -> Patience:
        """Give the patience of somebody who asks now."""
        return Patience(self._timeout, time.monotonic() + self._timeout)

    def prepare(self, task: Task[Item], patience: Patience | None = None) -> Prepared[Item]:
        """Prepare a request, on the thread of whoever asks: seconds that hold up nobody else.

        Raises:
            Error: as the task's own `prepare`.
            Gone: nobody waits any more.
            Timeout: the time is over.
        """
        check = (patience or self.patience()).check
        work = prepared(task, self._model, self.vocabulary, check)
        check()
        return work

    def submit(
        self, work: Prepared[object], listen: Listener, patience: Patience | None = None
    ) -> Ticket:
        """Queue a request that is prepared.

        `listen` is called on the worker's thread: with events, an exception, at last None.

        Raises:
            Busy: the queue is full.
        """
        ticket = Ticket(work, listen, patience or self.patience())
        with self._changed:
            if len(self._waiting) >= self._max_queue or not self.alive:
                self.counters.refused += 1
                raise Busy
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Stop a request that nobody waits for any more, within one denoising step."""
        ticket.cancelled = True

    def _own(self) -> None:
        try:
            self._run()
        finally:
            # Without it MLX (0.32.4) may abort the process at its exit, with code 134.
            mx.clear_streams()

    def _run(self) -> None:
        try:
            model, self.tokenizer = self._load()
        except Exception as error:
            self._failure = error
            self._ready.set()
            return
        self._model = model
        engine = Engine[object](model, self._cache_bytes)
        self._ready.set()
        while not self._stopping.is_set():
            self._admit(engine)
            self._advance(engine)
            self._drop(engine)
        engine.close()
        for ticket in [*self._running.values(), *self._waiting]:
            ticket.listen(Stopped("the server is shutting down"))
            ticket.listen(None)

    def _admit(self, engine: Engine[object]) -> None:
        """Begin requests of the queue while there is room; wait where nothing else is to do."""
        while self.running < self._max_batch:
            with self._changed:
                while not (self._waiting or self.running or self._stopping.is_set()):
                    self._changed.wait()
                ticket = self._next()
                if ticket is None or self._stopping.is_set():
                    return
                self._waiting.remove(ticket)
            if ticket.cancelled:
                self.counters.cancelled += 1
                continue
            try:
                self._running[engine.begin(ticket.work)] = ticket
            except Exception as error:
                self._end(ticket, error)

    def _next(self) -> Ticket | None:
        """Find the first in the queue that may begin.

        Fills, edits and choices, which have many canvases, leave half of the places to answers.
        """
        others = sum(not isinstance(each.work, Answer) for each in self._running.values())
        room = others < max(self._max_batch // 2, 1)
        return next((t for t in self._waiting if room or isinstance(t.work, Answer)), None)

    def _advance(self, engine: Engine[object]) -> None:
        if not len(engine):
            return
        try:
            for key, event in engine.step():
                ticket = self._running[key]
                if event is None or isinstance(event, Exception):
                    del self._running[key]
                    self._end(ticket, event)
                    continue
                ticket.listen(event)
                if isinstance(event, Done):
                    self.counters.prompt_tokens += event.prompt_tokens
                    self.counters.cached_tokens += event.cached_tokens
                    self.counters.generated_tokens += event.generated_tokens
                    self.counters.denoising_steps += event.denoising_steps
                    self.counters.positions_decoded += event.positions_decoded
        except Exception as error:  # of a common pass: all are told, and the thread goes on
            for key, ticket in list(self._running.items()):
                engine.remove(key)
                self._end(ticket, error)
            self._running.clear()

    def _drop(self, engine: Engine[object]) -> None:
        """Stop requests that nobody waits for, or that took too long, queued or running."""
        with self._changed:
            waiting = list(self._waiting)
        for ticket in waiting:
            if self._over(ticket):
                with self._changed:
                    self._waiting.remove(ticket)
        for key, ticket in list(self._running.items()):
            if self._over(ticket):
                del self._running[key]
                engine.remove(key)

    def _over(self, ticket: Ticket) -> bool:
        if ticket.cancelled:
            self.counters.cancelled += 1
            ticket.listen(None)
            return True
        if not ticket.patience.left:
            self._end(ticket, ticket.patience.timeout)
            return True
        return False

    def _end(self, ticket: Ticket, error: Exception | None) -> None:
        if error is None:
            self.counters.answered += 1
        else:
            self.counters.failed += 1
            if not isinstance(error, Error):
                _log.error("a defect", exc_info=error)
            ticket.listen(error)
        ticket.listen(None)
