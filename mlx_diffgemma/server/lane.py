"""Answers what waits for one loaded model: the only place where an `Engine` is moved."""

import logging
import time

from ..errors import Error
from ..tasks.engine import Engine
from ..tasks.generate import Answer
from ..tasks.request import Done
from .worker import Ticket, Worker

# Where the server's own messages go.
LOG = logging.getLogger("uvicorn.error")


class Lane:
    """Begins requests of a worker's queue and moves them on; for the thread that owns MLX.

    Attributes:
        worker: whose model is loaded.
        used: when a request was last under way, on the monotonic clock.
    """

    def __init__(self, worker: Worker, cache_bytes: int):
        self.worker = worker
        self.used = time.monotonic()
        self._engine = Engine[object](worker.model, cache_bytes)

    @property
    def running(self) -> int:
        """Count requests under way."""
        return len(self.worker.answering)

    def next(self, before: float) -> Ticket | None:
        """Find the first in the queue that may begin, of those that were asked before a time.

        Fills, edits and choices, which have many canvases, leave half of the places to answers.
        """
        worker = self.worker
        if self.running >= worker.max_batch:
            return None
        others = sum(not isinstance(each.work, Answer) for each in worker.answering.values())
        room = others < max(worker.max_batch // 2, 1)
        with worker.door.changed:
            for ticket in worker.queue:
                if ticket.asked > before:
                    return None
                if room or isinstance(ticket.work, Answer):
                    return ticket
        return None

    def begin(self, ticket: Ticket) -> None:
        """Take a request out of the queue and let it in."""
        with self.worker.door.changed:
            self.worker.queue.remove(ticket)
        if ticket.cancelled:
            self.worker.counters.cancelled += 1
            return
        try:
            self.worker.answering[self._engine.begin(ticket.work)] = ticket
        except Exception as error:
            end(self.worker, ticket, error)

    def step(self) -> None:
        """Move all on by one step, and tell what comes of it."""
        worker = self.worker
        if not len(self._engine):
            return
        try:
            for key, event in self._engine.step():
                ticket = worker.answering[key]
                if event is None or isinstance(event, Exception):
                    del worker.answering[key]
                    end(worker, ticket, event)
                    continue
                ticket.listen(event)
                if isinstance(event, Done):
                    worker.counters.prompt_tokens += event.prompt_tokens
                    worker.counters.cached_tokens += event.cached_tokens
                    worker.counters.generated_tokens += event.generated_tokens
                    worker.counters.denoising_steps += event.denoising_steps
                    worker.counters.positions_decoded += event.positions_decoded
        except Exception as error:  # of a common pass: all are told, and the thread goes on
            for key, ticket in list(worker.answering.items()):
                self._engine.remove(key)
                end(worker, ticket, error)
            worker.answering.clear()
        self.used = time.monotonic()

    def drop(self) -> None:
        """Stop requests under way that nobody waits for, or that took too long."""
        for key, ticket in list(self.worker.answering.items()):
            if is_over(self.worker, ticket):
                del self.worker.answering[key]
                self._engine.remove(key)

    def close(self) -> None:
        """Stop all, and free what was read."""
        self._engine.close()
        del self._engine  # whoever still has this lane keeps none of the arrays


def drop_waiting(worker: Worker) -> None:
    """Drop requests of a queue that nobody waits for, or that took too long."""
    with worker.door.changed:
        waiting = list(worker.queue)
    for ticket in waiting:
        if is_over(worker, ticket):
            with worker.door.changed:
                worker.queue.remove(ticket)


def is_over(worker: Worker, ticket: Ticket) -> bool:
    """Say whether a request is to be stopped; who waits for it is told."""
    if ticket.cancelled:
        worker.counters.cancelled += 1
        ticket.end()
        return True
    if not ticket.patience.left:
        end(worker, ticket, ticket.patience.timeout)
        return True
    return False


def end(worker: Worker, ticket: Ticket, error: Exception | None) -> None:
    """Tell that a request has been answered, or of what has come between, and count it."""
    if error is None:
        worker.counters.answered += 1
    else:
        worker.counters.failed += 1
        if not isinstance(error, Error):
            LOG.error("a defect", exc_info=error)
    ticket.end(error)
