"""Owns MLX in a server: one thread loads, generates and frees, and nobody else does."""

import threading
import time
from collections.abc import Iterator, Sequence
from math import inf

import mlx.core as mx

from ..errors import Error
from ..model.placeholders import pictures_in
from .lane import LOG, Lane, drop_waiting, end
from .worker import Door, NotLoaded, Stopped, Ticket, Worker

# Seconds in which a request for a model that could not be loaded is told so at once.
RETRY_SECONDS = 5

# Seconds that a request may wait for the memory of models that are busy, while later requests for
# those begin. Behind them it is the next: each change of models is a load.
OVERTAKEN_SECONDS = 10


class MlxThread:
    """Answers the requests of all models side by side, and has those loaded that are asked for.

    A model that does not stay is loaded when the first request for it comes, one at a time, between
    steps of the others. It is unloaded when it is idle for long, or when another needs its memory.

    Args:
        workers: of each model, which no other thread answers.
        cache_bytes: keys and values of earlier prompts that are kept, of all models together: each
            has an equal part.
        memory: bytes that all models together may take; None is no bound.
        keep_alive: seconds without a request, after which a model is unloaded.
        overtaken: see `OVERTAKEN_SECONDS`.
        retry: see `RETRY_SECONDS`.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        *,
        cache_bytes: int,
        memory: int | None = None,
        keep_alive: float = inf,
        overtaken: float = OVERTAKEN_SECONDS,
        retry: float = RETRY_SECONDS,
    ):
        self.workers = tuple(workers)
        self._cache_bytes = cache_bytes // len(workers)
        self._memory = memory
        self._keep_alive = keep_alive
        self._overtaken, self._retry = overtaken, retry
        self._door = Door()
        for worker in workers:
            worker.door = self._door
        self._lanes: list[Lane] = []
        self._under_way: tuple[Worker, Iterator[None]] | None = None  # what is being loaded
        self._failed: dict[Worker, float] = {}  # when it did
        self._short: Ticket | None = None  # waits for memory that others have
        self._ready = threading.Event()
        self._stopping = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._own, name="mlx")

    def start(self) -> None:
        """Load the models that stay, and return once requests can be answered.

        Raises:
            Error: as loading does.
        """
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Stop whatever runs and end the thread."""
        with self._door.changed:
            self._stopping.set()
            self._door.open = False
            self._door.changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Say whether the thread is there to answer."""
        return self._door.open

    def _own(self) -> None:
        try:
            self._run()
        finally:
            self._end()
            # Without it MLX (0.32.4) may abort the process at its exit, with code 134.
            mx.clear_streams()

    def _run(self) -> None:
        try:
            for worker in self.workers:
                if worker.source.stays:
                    for _ in worker.source.loading():
                        pass
                    self._let_in(worker)
        except Exception as error:
            self._failure = error
            self._ready.set()
            return
        self._door.open = not self._stopping.is_set()
        self._ready.set()
        while not self._stopping.is_set():
            self._wait()
            self._admit()
            self._load()
            for lane in self._lanes:
                lane.step()
                lane.drop()
            for worker in self.workers:
                drop_waiting(worker)
            self._unload_idle()

    def _end(self) -> None:
        """Stop all, and tell those who wait, also where a defect has ended the thread."""
        with self._door.changed:
            self._door.open = False
        self._under_way = None
        for lane in self._lanes:
            lane.close()
        for worker in self.workers:
            for ticket in [*worker.answering.values(), *worker.queue]:
                ticket.end(Stopped("the server is shutting down"))

    def _wait(self) -> None:
        """Wait until something is to be done: a request, an end, a model that was idle for long."""
        with self._door.changed:
            while not (
                self._stopping.is_set()
                or self._under_way
                or any(each.queue or each.answering for each in self.workers)
            ):
                last = min((lane.used for lane in self._lanes if self._may_go(lane)), default=inf)
                left = last + self._keep_alive - time.monotonic()
                if left <= 0:
                    return
                self._door.changed.wait(None if left == inf else left)

    def _admit(self) -> None:
        """Begin requests while there is room, in the order they came where one waits for memory."""
        short = self._short
        late = short is not None and time.monotonic() - short.asked >= self._overtaken
        for lane in self._lanes.copy():
            before = short.asked if late and short and not lane.worker.source.stays else inf
            while ticket := lane.next(before):
                needed = lane.worker.source.context_bytes(*_context(lane.worker, ticket))
                self._make_room(needed, ticket, lane)
                lane.begin(ticket)

    def _load(self) -> None:
        """Load a piece of the model that somebody waits for."""
        if self._under_way is None:
            worker = self._next_to_load()
            if worker is None:
                return
            LOG.info("loading the model %r", worker.name)
            self._under_way = worker, worker.source.loading()
        worker, pieces = self._under_way
        try:
            next(pieces)
        except StopIteration:
            self._under_way = None
            self._let_in(worker)
        except Exception as error:
            self._under_way = None
            del pieces  # and what it has read
            worker.source.unload()
            self._failed[worker] = time.monotonic()
            LOG.error(
                "the model %r cannot be loaded: %s",
                worker.name,
                error,
                exc_info=None if isinstance(error, Error) else error,
            )
            self._refuse(worker)

    def _let_in(self, worker: Worker) -> None:
        self._failed.pop(worker, None)
        self._lanes.append(Lane(worker, self._cache_bytes))
        worker.loaded = True
        worker.counters.loaded += 1

    def _next_to_load(self) -> Worker | None:
        """Choose the model whose first request waits for longest, once there is memory for it."""
        self._short = None
        waiting = []
        with self._door.changed:
            for worker in self.workers:
                if worker.queue and not worker.loaded:
                    waiting.append((worker.queue[0], worker))
        for ticket, worker in sorted(waiting, key=lambda each: each[0].asked):
            if time.monotonic() - self._failed.get(worker, -inf) < self._retry:
                self._refuse(worker)
                continue
            needed = worker.source.needs(*_context(worker, ticket))
            if self._make_room(needed, ticket) or not any(each.running for each in self._lanes):
                return worker
            self._short = self._short or ticket
            if time.monotonic() - self._short.asked >= self._overtaken:
                break
        return None

    def _make_room(self, needed: int, ticket: Ticket, own: Lane | None = None) -> bool:
        """Unload models that nobody uses until so many bytes are free, and say whether they are.

        It is the one that was used longest ago of those that are large enough, or of all. Those
        with older requests than this one are used.
        """
        while self._memory is not None:
            missing = mx.get_active_memory() + needed - self._memory
            if missing <= 0:
                break
            idle = [
                lane for lane in self._lanes if lane is not own and self._may_go(lane, ticket.asked)
            ]
            sizes = sum(lane.worker.source.needs(0, False) for lane in idle)
            busy = any(lane.running for lane in self._lanes if lane is not own)
            if not idle or (busy and sizes < missing):  # they would go in vain
                return False
            enough = [lane for lane in idle if lane.worker.source.needs(0, False) >= missing]
            self._unload(min(enough or idle, key=lambda lane: lane.used))
        return True

    def _may_go(self, lane: Lane, before: float = inf) -> bool:
        """Say whether nobody uses a model, nor has asked for it before a time."""
        if lane.worker.source.stays or lane.running:
            return False
        with self._door.changed:
            return not (lane.worker.queue and lane.worker.queue[0].asked < before)

    def _unload_idle(self) -> None:
        now = time.monotonic()
        for lane in self._lanes.copy():
            if now - lane.used >= self._keep_alive and self._may_go(lane):
                self._unload(lane)

    def _unload(self, lane: Lane) -> None:
        self._lanes.remove(lane)
        lane.close()
        lane.worker.loaded = False
        lane.worker.counters.unloaded += 1
        lane.worker.source.unload()
        LOG.info("unloaded the model %r", lane.worker.name)

    def _refuse(self, worker: Worker) -> None:
        """Tell all who wait for a model that it cannot be loaded."""
        with self._door.changed:
            waiting = list(worker.queue)
            worker.queue.clear()
        said = f"the model {worker.name} cannot be loaded now; the server's log says why"
        for ticket in waiting:
            end(worker, ticket, NotLoaded(said))


def _context(worker: Worker, ticket: Ticket) -> tuple[int, bool]:
    """Count the tokens that a request needs at least, and say whether it has pictures.

    As `fit` has it: behind the prompt one canvas is written, and one is denoised.
    """
    prompt = ticket.work.prompt
    return len(prompt) + 2 * worker.model.config.canvas_length, bool(pictures_in(prompt))
