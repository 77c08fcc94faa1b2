"""The thread that owns MLX in a server: it loads, generates and frees, and nobody else does."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace

import mlx.core as mx

from .batch import Batch
from .context import Context, Contexts
from .errors import Error
from .generation import Done, Request, encode_prompt
from .model import DiffusionGemma
from .tokenizer import Tokenizer

# What is given to whoever waits: events, at the end None, or an exception.
Listener = Callable[[object], None]
# Work that is no request for an answer (filling, choosing): it yields events, one a denoising step.
Job = Callable[[DiffusionGemma, Tokenizer], Generator[object, None, None]]


_log = logging.getLogger("uvicorn.error")  # where the server's own messages go


class Busy(Exception):
    """The queue is full."""


class Stopped(Error):
    """The server ends before the request does."""


class Timeout(Error):
    """A request took longer than it may."""


@dataclass
class Ticket:
    """A request on its way."""

    work: Request | Job
    listen: Listener
    deadline: float
    cancelled: bool = False


@dataclass
class Counters:
    """What the server has done so far."""

    answered: int = 0
    failed: int = 0
    cancelled: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    denoising_steps: int = 0


@dataclass
class _Running:
    ticket: Ticket
    context: Context | None = None
    generator: Generator[object, None, None] | None = None


class Worker:
    """Queues work in the order it comes, and does up to `max_batch` pieces side by side.

    Args:
        load: gives the model and the tokenizer, on the thread.
        max_batch: requests that are denoised together.
        max_queue: requests that may wait; one more is refused.
        timeout: seconds from being queued to the end.
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
        self._waiting: queue.Queue[Ticket | None] = queue.Queue()
        self._max_queue = max_queue
        self._timeout = timeout
        self._cache_bytes = cache_bytes
        self._ready = threading.Event()
        self._stopping = threading.Event()
        self._failure: Exception | None = None
        self._running: dict[int, _Running] = {}
        self._jobs: list[_Running] = []
        self.counters = Counters()
        self._thread = threading.Thread(target=self._run, name="mlx")
        self.tokenizer: Tokenizer
        self.model_facts: dict[str, int] = {}

    def start(self) -> None:
        """Load the model; returns once it can answer.

        Raises:
            Error: as `load` does.
        """
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Stop whatever runs and end the thread."""
        self._stopping.set()
        self._waiting.put(None)
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread is there to answer."""
        return self._thread.is_alive() and not self._stopping.is_set()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._waiting.qsize()

    @property
    def running(self) -> int:
        """Requests being answered."""
        return len(self._running) + len(self._jobs)

    def submit(self, work: Request | Job, listen: Listener) -> Ticket:
        """Queue work. `listen` is called on the thread: with events, an exception, at last None.

        Raises:
            Busy: the queue is full.
        """
        if self._waiting.qsize() >= self._max_queue or not self.alive:
            self.counters.refused += 1
            raise Busy
        ticket = Ticket(work, listen, time.monotonic() + self._timeout)
        self._waiting.put(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Nobody waits for this any more; it stops within one denoising step."""
        ticket.cancelled = True

    def _run(self) -> None:
        try:
            model, self.tokenizer = self._load()
        except Exception as error:
            self._failure = error
            self._ready.set()
            return
        self._model = model
        config = model.config
        self.model_facts = {
            "context": model.context,
            "canvas": config.canvas_length,
        }
        batch = Batch(model, self.tokenizer)
        contexts = Contexts(model, self._cache_bytes)
        self._ready.set()
        while not self._stopping.is_set():
            self._admit(batch, contexts)
            self._advance(batch, contexts)
            self._advance_jobs()
            self._drop(batch)
        for running in [*self._running.values(), *self._jobs]:
            running.ticket.listen(Stopped("the server is shutting down"))
            running.ticket.listen(None)
        batch.close()
        for running in self._jobs:
            if running.generator is not None:
                running.generator.close()
        while not self._waiting.empty():
            if (ticket := self._waiting.get()) is not None:
                ticket.listen(Stopped("the server is shutting down"))
                ticket.listen(None)

    def _admit(self, batch: Batch, contexts: Contexts) -> None:
        """Take from the queue while there is room; waits where nothing else is to be done."""
        while self.running < self._max_batch:
            try:
                ticket = self._waiting.get(block=not self.running)
            except queue.Empty:
                return
            if ticket is None:
                return
            if ticket.cancelled:
                self.counters.cancelled += 1
                continue
            try:
                if isinstance(ticket.work, Request):
                    self._begin(ticket, ticket.work, batch, contexts)
                else:
                    generator = ticket.work(self._model, self.tokenizer)
                    self._jobs.append(_Running(ticket, generator=generator))
            except Exception as error:
                self._end(ticket, error)

    def _begin(self, ticket: Ticket, request: Request, batch: Batch, contexts: Contexts) -> None:
        ids = encode_prompt(
            self.tokenizer,
            request.prompt,
            enable_thinking=request.enable_thinking,
            tools=request.tools,
        )
        context = contexts.take(ids)
        key = batch.add(replace(request, prompt=ids, context=context))
        self._running[key] = _Running(ticket, context)

    def _advance(self, batch: Batch, contexts: Contexts) -> None:
        if not len(batch):
            return
        try:
            for key, event in batch.step():
                running = self._running[key]
                if isinstance(event, Error):
                    del self._running[key]
                    self._end(running.ticket, event)
                    continue
                if running.ticket.cancelled:  # also between two chunks of a long prompt
                    batch.remove(key)
                    continue
                running.ticket.listen(event)
                if isinstance(event, Done):
                    del self._running[key]
                    self.counters.prompt_tokens += event.prompt_tokens
                    self.counters.cached_tokens += event.cached_tokens
                    self.counters.generated_tokens += event.generated_tokens
                    self.counters.denoising_steps += event.denoising_steps
                    if running.context is not None:
                        contexts.give(running.context)
                    self._end(running.ticket, None)
        except Exception as error:  # a defect: those who wait are told, the thread goes on
            for key, running in list(self._running.items()):
                batch.remove(key)
                self._end(running.ticket, error)
            self._running.clear()

    def _advance_jobs(self) -> None:
        for running in list(self._jobs):
            assert running.generator is not None
            try:
                event = next(running.generator)
            except StopIteration:
                self._jobs.remove(running)
                self._end(running.ticket, None)
            except Exception as error:
                self._jobs.remove(running)
                self._end(running.ticket, error)
            else:
                running.ticket.listen(event)

    def _drop(self, batch: Batch) -> None:
        """Stop what nobody waits for, and what has taken too long."""
        now = time.monotonic()
        for key, running in list(self._running.items()):
            if self._over(running.ticket, now):
                del self._running[key]
                batch.remove(key)
        for running in list(self._jobs):
            if self._over(running.ticket, now):
                self._jobs.remove(running)
                assert running.generator is not None
                running.generator.close()
                mx.clear_cache()

    def _over(self, ticket: Ticket, now: float) -> bool:
        if ticket.cancelled:
            self.counters.cancelled += 1
            ticket.listen(None)
            return True
        if now > ticket.deadline:
            self._end(ticket, Timeout(f"the request took longer than {self._timeout:g} seconds"))
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
