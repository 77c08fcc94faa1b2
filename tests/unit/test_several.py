"""Several models on one thread: who is loaded, who waits, who goes."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from shutil import copytree
from typing import Any

import mlx.core as mx
import pytest
from looking import PIXELS, content_checkpoint
from random_model import untrained

from mlx_diffgemma import DiffusionGemma, Done, Draft, Request, Text, Tokenizer, generate, load
from mlx_diffgemma.checkpoint.late import LateModel
from mlx_diffgemma.checkpoint.load import EMBEDDED
from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.server.thread import MlxThread
from mlx_diffgemma.server.worker import Busy, NotLoaded, Stopped, Ticket, Timeout, Worker

TOKENIZER = Tokenizer.from_directory(EMBEDDED)

# Bytes that a model says it needs, and those of the arrays of a step, which are far fewer.
LARGE = 1 << 40


class Gated(DiffusionGemma):
    """Waits for leave before each pass."""

    def decode(self, passes: Any, evaluate: Any = None) -> Any:
        if not self.leave.acquire(timeout=20):
            raise AssertionError("nobody gave leave")
        return super().decode(passes, evaluate)


class Weights:
    """Gives a model in pieces, each of which needs leave unless there is plenty of it."""

    stays = False
    tokenizer = TOKENIZER

    def __init__(self, *, pieces: int = 2, needed: int = 0):
        self.model = self._made()
        self.model.leave = threading.Semaphore(0)
        self.pieces, self.needed = pieces, needed
        self.loads = self.unloads = 0
        self.broken = False
        self.gone = 0.0  # when, on the monotonic clock

    def _made(self) -> Any:
        return untrained(TOKENIZER.vocab_size, 24, kind=Gated)

    def loading(self) -> Iterator[None]:
        self.loads += 1
        if self.broken:
            raise CheckpointError("/secret/model is missing")
        for _ in range(self.pieces):
            time.sleep(0.001)
            yield
        self.model.take_weights(self._made())

    def unload(self) -> None:
        self.unloads += 1
        self.gone = time.monotonic()

    def needs(self, tokens: int, pictures: bool) -> int:
        return self.needed

    def context_bytes(self, tokens: int, pictures: bool) -> int:
        return 0


class Asked:
    """A request, and what came of it."""

    def __init__(self, worker: Worker, work: Any = None, tokens: int = 24):
        self.events: Queue[Any] = Queue()
        self.worker = worker
        steps = 2 if tokens == 24 else 48
        request = Request("hello", max_tokens=tokens, steps=steps, seed=0)
        work = work or worker.prepare(request)
        self.ticket: Ticket = worker.submit(work, self.events.put)

    def until(self, kind: type) -> Any:
        while not isinstance(event := self.events.get(timeout=20), kind):
            assert event is not None, "it ended"
            assert not isinstance(event, Exception), repr(event)
        return event


def settled(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.005)


@contextmanager
def serving(
    *sources: Any, timeout: float = 60, max_batch: int = 2, max_queue: int = 50, **bounds: Any
) -> Iterator[list[Worker]]:
    workers = [
        Worker(source, name=f"m{i}", max_batch=max_batch, max_queue=max_queue, timeout=timeout)
        for i, source in enumerate(sources)
    ]
    thread = MlxThread(workers, cache_bytes=0, **bounds)
    thread.start()
    try:
        yield workers
    finally:
        for source in sources:
            if isinstance(source, Weights):
                source.model.leave.release(10_000)
        thread.stop()


def free(*sources: Weights) -> None:
    """Let the models compute as long as they like."""
    for source in sources:
        source.model.leave.release(10_000)


def test_many_first_requests_are_one_load_and_two_models_go_side_by_side() -> None:
    a, b = Weights(), Weights(pieces=20)
    with serving(a, b, max_batch=4) as (first, second):
        assert (a.loads, b.loads) == (0, 0)
        running = Asked(first, tokens=4000)
        settled(lambda: first.running == 1)
        waiting = [Asked(second) for _ in range(20)]
        free(b)
        # Each piece that is loaded is followed by a step of the other model.
        for _ in range(46):
            a.model.leave.release()
        for each in waiting:
            each.until(Done)
        assert first.running == 1
        assert (a.loads, b.loads) == (1, 1)
        assert isinstance(running.until(Draft), Draft)


def test_an_idle_model_is_unloaded_and_its_memory_is_free() -> None:
    """With the real loading: the answer after it is that of a model that was loaded as ever."""
    late = LateModel("tiny", memory=1 << 40)
    hello = Request("hello", seed=0, max_tokens=40)
    said = [""] * 2
    before = mx.get_active_memory()
    with serving(late, keep_alive=0.05) as (worker,):
        for i in range(2):
            asked = Asked(worker, worker.prepare(hello))
            while event := asked.events.get(timeout=20):
                said[i] += event.text if isinstance(event, Text) else ""
            settled(lambda: not worker.loaded)
            settled(lambda: mx.get_active_memory() < before + 100_000)
        assert (worker.counters.loaded, worker.counters.unloaded) == (2, 2)
    model, tokenizer = load("tiny")
    assert said == [generate(model, tokenizer, "hello", seed=0, max_tokens=40)] * 2


def test_the_model_that_was_used_longest_ago_makes_room() -> None:
    a, b, c = Weights(), Weights(), Weights(needed=LARGE)
    free(a, b, c)
    with serving(a, b, c, memory=LARGE - 1) as (first, second, third):
        Asked(second).until(Done)
        Asked(first).until(Done)
        Asked(third).until(Done)  # it is tried though it does not fit: nobody else is in the way
        assert (a.unloads, b.unloads) == (1, 1)
        assert b.gone < a.gone
        c.needed = 0
        Asked(first).until(Done)
        settled(lambda: first.loaded and third.loaded)
        assert not second.loaded


def test_a_busy_model_is_not_unloaded_and_keeps_nobody_waiting_for_ever() -> None:
    """Later requests for the busy one begin behind the one that waits for its memory."""
    a, b, c = Weights(), Weights(needed=LARGE), Weights()
    free(b, c)
    with serving(a, b, c, memory=LARGE - 1, overtaken=0, max_batch=1) as (first, second, third):
        Asked(third).until(Done)
        running = Asked(first, tokens=4000)
        settled(lambda: first.running == 1)
        a.needed = LARGE
        waiting = Asked(second)
        later = Asked(first)
        a.model.leave.release(20)
        time.sleep(0.1)
        assert (a.unloads, b.loads) == (0, 0)
        assert c.unloads == 0  # what is idle does not go where that would not be enough
        assert waiting.events.empty()
        first.cancel(running.ticket)
        free(a)
        waiting.until(Done)
        assert a.unloads == 1
        a.needed = b.needed = 0
        later.until(Done)
        assert (a.loads, b.loads) == (2, 1)


def test_a_model_that_fits_does_not_wait_for_one_that_does_not() -> None:
    a, b, c = Weights(), Weights(needed=LARGE), Weights()
    free(c)
    with serving(a, b, c, memory=LARGE - 1) as (first, second, third):
        Asked(first, tokens=4000)
        settled(lambda: first.running == 1)
        waiting = Asked(second)
        a.model.leave.release(30)
        Asked(third).until(Done)
        assert waiting.events.empty()
        assert (first.running, second.waiting) == (1, 1)


def test_a_defect_that_ends_the_thread_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waited did so for ever."""
    a = Weights(pieces=1000)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with serving(a) as (worker,):
        waiting = Asked(worker)
        settled(lambda: a.loads == 1)
        monkeypatch.setattr(MlxThread, "_unload_idle", None)
        assert isinstance(waiting.until(Stopped), Stopped)
        with pytest.raises(Busy):
            Asked(worker)


def test_a_model_that_cannot_be_loaded_is_tried_again_but_not_at_once() -> None:
    a, b = Weights(), Weights()
    b.broken = True
    free(a, b)
    with serving(a, b, retry=0.5) as (first, second):
        told = [Asked(second).until(NotLoaded) for _ in range(20)]
        assert b.loads <= 2
        assert str(told[0]) == "the model m1 cannot be loaded now; the server's log says why"
        Asked(first).until(Done)
        b.broken = False
        time.sleep(0.5)
        Asked(second).until(Done)
        assert second.counters.failed == 20


def test_who_waits_for_a_load_is_told_when_the_time_is_over() -> None:
    a, b = Weights(), Weights(pieces=100_000)
    free(a, b)
    with serving(a, b, timeout=0.4, max_queue=3) as (first, second):
        Asked(first).until(Done)
        waiting = [Asked(second) for _ in range(3)]
        with pytest.raises(Busy):  # the bound is each model's own
            Asked(second)
        Asked(first).until(Done)
        for each in waiting:
            assert "longer than 0.4 seconds" in str(each.until(Timeout))
        assert second.waiting == 0


def test_who_leaves_while_a_model_loads_frees_the_place_and_the_load_goes_on() -> None:
    a = Weights(pieces=100)
    free(a)
    with serving(a) as (worker,):
        gone = Asked(worker)
        worker.cancel(gone.ticket)
        assert gone.events.get(timeout=20) is None
        settled(lambda: worker.loaded)
        assert (worker.counters.cancelled, worker.waiting, a.loads) == (1, 0, 1)


def test_the_end_while_a_model_loads() -> None:
    a = Weights(pieces=100_000)
    with serving(a) as (worker,):
        waiting = Asked(worker)
        settled(lambda: a.loads == 1)
    assert isinstance(waiting.events.get(timeout=1), Stopped)
    assert waiting.events.get(timeout=1) is None


def test_a_checkpoint_that_has_changed_or_gone_is_not_loaded(tmp_path: Path) -> None:
    """Requests are prepared with what was known of it at the start."""
    one, two = (copytree(EMBEDDED, tmp_path / name) for name in ("one", "two"))
    late = [LateModel(str(each), memory=1 << 40) for each in (one, two)]
    config = one / "config.json"
    config.write_text(config.read_text().replace("{", '{"other": 1,', 1))
    (two / "model.safetensors").unlink()
    for each, said in zip(late, ("has changed since", "no model"), strict=True):
        with pytest.raises(CheckpointError, match=said):
            next(iter(each.loading()))


def test_a_model_that_sees_comes_and_goes_with_its_tower(tmp_path: Path) -> None:
    directory = str(content_checkpoint(tmp_path / "looking"))
    parts = [{"type": "image", "image": PIXELS}, {"type": "text", "text": "What?"}]
    look = Request([{"role": "user", "content": parts}], seed=0, steps=2, max_tokens=16)
    late = LateModel(directory, memory=1 << 40)
    assert late.needs(9, True) > late.needs(9, False)
    before = mx.get_active_memory()
    with serving(late, keep_alive=0.05) as (worker,):
        for _ in range(2):
            assert Asked(worker, worker.prepare(look)).until(Done).generated_tokens
            settled(lambda: not worker.loaded and mx.get_active_memory() <= before + 10_000)
            assert late.model.sight
            assert not late.model.sight.loaded
