"""The worker's thread: who is told what when, with a model that takes its time."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from queue import Queue
from typing import Any

import pytest
from random_model import untrained

from mlx_diffgemma import DiffusionGemma, Done, Draft, FillResult, Request, Tokenizer
from mlx_diffgemma.checkpoint.load import EMBEDDED
from mlx_diffgemma.diffusion.decoding import SLICE
from mlx_diffgemma.diffusion.prompt_cache import Reading
from mlx_diffgemma.measure.bench import Decoding
from mlx_diffgemma.server.worker import Busy, Gone, Ticket, Timeout, Worker
from mlx_diffgemma.tasks.choose import choose, write_choose
from mlx_diffgemma.tasks.fill import write_fill
from mlx_diffgemma.tasks.generate import write_events
from mlx_diffgemma.tasks.request import fresh_draws
from mlx_diffgemma.tasks.starts import pinned_start
from mlx_diffgemma.text.template import TemplateError, parse_template

TOKENIZER = Tokenizer.from_directory(EMBEDDED)


class Stepping(DiffusionGemma):
    """Waits for leave before each pass, and keeps how many rows each pass has had."""

    def decode(self, passes: Any, evaluate: Any = None) -> Any:
        self.sizes.append([len(each.canvas) for each in passes])
        if not self.leave.acquire(timeout=20):
            raise AssertionError("nobody gave leave")
        return super().decode(passes, evaluate)


class Asked:
    """Work that was handed in, and what came of it."""

    def __init__(self, worker: Worker, work: Any):
        self.events: Queue[Any] = Queue()
        self.ticket: Ticket = worker.submit(work, self.events.put)

    def until(self, kind: type | tuple[type, ...]) -> Any:
        """The next event of this kind."""
        while not isinstance(event := self.events.get(timeout=20), kind):
            assert event is not None, "it ended"
        return event


def settled(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.005)


@contextmanager
def working(*, max_batch: int = 4, timeout: float = 60) -> Iterator[tuple[Worker, Stepping]]:
    made: list[Stepping] = []

    def load() -> tuple[DiffusionGemma, Tokenizer]:
        model = untrained(TOKENIZER.vocab_size, 24, kind=Stepping)
        model.sizes, model.leave = [], threading.Semaphore(0)
        made.append(model)
        return model, TOKENIZER

    worker = Worker(load, max_batch=max_batch, max_queue=2, timeout=timeout, cache_bytes=0)
    worker.start()
    try:
        yield worker, made[0]
    finally:
        made[0].leave.release(10_000)
        worker.stop()


def endless(worker: Worker) -> Request:
    return worker.prepared(Request("hello", max_tokens=4000, seed=0))


def job(worker: Worker, template: str) -> Any:
    form = worker.form(parse_template(template), "x", worker.patience())

    def made(model: DiffusionGemma, tokenizer: Tokenizer) -> Decoding[object, None]:
        return write_fill(model, form, model.generation, fresh_draws(model, 0))

    return made


def test_who_waits_too_long_is_told_while_another_is_answered() -> None:
    """Only when its turn came, used to be the case, and till then it had a place in the queue."""
    with working(max_batch=1, timeout=1.5) as (worker, model):
        first = Asked(worker, endless(worker))
        settled(lambda: worker.running == 1)
        worker._timeout = 0.3
        late = [Asked(worker, endless(worker)) for _ in range(2)]
        with pytest.raises(Busy):
            Asked(worker, endless(worker))
        time.sleep(0.4)
        model.leave.release()  # one step of the first
        for each in late:
            assert "longer than" in str(each.until(Timeout))
        settled(lambda: worker.waiting == 0)
        assert worker.running == 1
        assert isinstance(first.until(Draft), Draft)


def test_who_goes_away_while_waiting_frees_the_place() -> None:
    with working(max_batch=1) as (worker, model):
        Asked(worker, endless(worker))
        settled(lambda: worker.running == 1)
        gone = Asked(worker, endless(worker))
        worker.cancel(gone.ticket)
        model.leave.release()
        settled(lambda: worker.waiting == 0)
        assert worker.counters.cancelled == 1


def test_a_fill_stops_between_its_scoring_passes() -> None:
    """The passes that compare lengths were one piece of work that nothing could stop."""
    with working() as (worker, model):
        filling = Asked(worker, job(worker, "a {{x}} b {{y}} c {{z}}"))
        steps = 8  # of denoising, before the first length is judged
        model.leave.release(steps)
        settled(lambda: len(model.sizes) == steps + 1)  # inside the first scoring pass
        worker.cancel(filling.ticket)
        model.leave.release(50)
        settled(lambda: worker.running == 0)
        assert len(model.sizes) == steps + 1
        assert worker.counters.cancelled == 1


def test_fills_go_through_the_model_together_with_answers() -> None:
    with working() as (worker, model):
        asked = [
            Asked(worker, worker.prepared(Request("hello", seed=0, steps=6, max_tokens=24))),
            Asked(worker, job(worker, "a {{x:3}} b")),
        ]
        settled(lambda: len(model.sizes) == 1)
        model.leave.release(10_000)
        assert isinstance(asked[0].until(Done), Done)
        assert isinstance(asked[1].until(FillResult), FillResult)
        assert [1, 1] in model.sizes


def test_a_defect_of_one_leaves_the_others_alone() -> None:
    """It used to end whatever else was running."""

    def broken(model: DiffusionGemma, tokenizer: Tokenizer) -> Decoding[object, None]:
        yield "begun"
        raise ZeroDivisionError

    with working() as (worker, model):
        other = Asked(worker, worker.prepared(Request("hello", seed=0, steps=3, max_tokens=24)))
        bad = Asked(worker, broken)
        assert bad.until(str) == "begun"
        model.leave.release(10_000)
        assert isinstance(bad.until(ZeroDivisionError), ZeroDivisionError)
        assert isinstance(other.until(Done), Done)
        assert worker.counters.failed == 1


def test_a_long_prompt_does_not_hold_up_the_others() -> None:
    """All of its chunks used to be read before anybody else had a step."""
    chunks = 5

    def reader(model: DiffusionGemma, tokenizer: Tokenizer) -> Decoding[object, None]:
        for done in range(chunks):
            yield Reading(done, chunks)

    with working() as (worker, model):
        Asked(worker, endless(worker))
        reading = Asked(worker, reader)
        model.leave.release(3)
        settled(lambda: len(model.sizes) == 4)
        told = reading.events.qsize()
        assert told in (3, 4)


def test_a_schema_is_compiled_by_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was the worker's thread, and all other answers stood still."""
    from mlx_diffgemma.text import schema

    threads: list[str] = []
    compile_ = schema.compiled

    def noted(*given: Any) -> Any:
        threads.append(threading.current_thread().name)
        return compile_(*given)

    monkeypatch.setattr(schema, "compiled", noted)
    with working() as (worker, model):
        model.leave.release(10_000)
        request = worker.prepared(Request("x", schema={"enum": ["yes", "no"]}, steps=2, seed=0))
        Asked(worker, request).until(Done)
    assert threads == [threading.current_thread().name]


def test_nothing_is_encoded_on_the_workers_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Openings, choices and fills were: a megabyte of them, and all other answers stood still."""
    encode, threads = Tokenizer.encode, set()

    def noted(self: Tokenizer, text: str) -> list[int]:
        threads.add(threading.current_thread().name)
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode", noted)
    with working() as (worker, model):
        model.leave.release(10_000)
        patience = worker.patience()
        asked = worker.prepared(Request("hi", opening="Well", seed=0, steps=2, max_tokens=24))
        question = worker.question("x", {"x": ["1", "2"]}, None, False, 1, patience)
        forced = worker.canvas([("a", True), ("b", False)], patience)
        ready = worker.prepared(Request("x", seed=0, steps=2, max_tokens=24))

        def repairing(model: DiffusionGemma, tokenizer: Tokenizer) -> Decoding[object, None]:
            start = pinned_start([forced], fresh_draws(model, 0))
            return write_events(model, tokenizer, replace(ready, start=start))

        assert isinstance(Asked(worker, asked).until(Done), Done)
        assert isinstance(Asked(worker, repairing).until(Done), Done)
        assert Asked(worker, lambda m, t: write_choose(m, question, 0)).until(dict)
        assert Asked(worker, job(worker, "a {{x:2}} {{y:yes|no}} b")).until(FillResult)
    assert threads == {threading.current_thread().name}


def test_an_opening_given_as_ids_is_the_same() -> None:
    with working() as (worker, model):
        model.leave.release(10_000)
        asked = Request("hi", opening="Well", seed=0, steps=3, max_tokens=24)
        ready = worker.prepared(asked)
        assert ready.opening == TOKENIZER.encode("Well")
        whole = replace(asked, prompt=ready.prompt)
        texts = [Asked(worker, each).until(Draft).text for each in (ready, whole)]
        assert texts[0] == texts[1]
        assert texts[0].startswith("Well")


def test_preparing_ends_with_the_time_or_when_nobody_waits() -> None:
    """Neither --timeout nor leaving ended it: threads went on for nobody."""
    with working(timeout=0.05) as (worker, _):
        late = worker.patience()
        time.sleep(0.1)
        gone = replace(late, ends=time.monotonic() + 60, gone=True)
        for patience, error in ((late, Timeout), (gone, Gone)):
            with pytest.raises(error):
                worker.prepared(Request("x"), patience)
            with pytest.raises(error):
                worker.form(parse_template("a {{x}}"), "x", patience)
            with pytest.raises(error):
                worker.question("x", {"x": ["1", "2"]}, None, False, 1, patience)
            with pytest.raises(error):
                worker.canvas([("a", True)], patience)
        with pytest.raises(TemplateError, match="100,000 characters; the context of"):
            worker.form(["a" * 100_000], "x", worker.patience())


def test_many_canvases_are_decoded_in_slices_beside_others() -> None:
    """All canvases of a choice were one pass, and others waited for each of its draws."""
    slots = {"x": [f"{i:02}{i:02}" for i in range(20)]}
    with working() as (worker, model):
        question = worker.question("x", slots, "{x}.", False, 2, worker.patience())
        assert len(question.rows) > 2 * SLICE
        Asked(worker, endless(worker))
        settled(lambda: len(model.sizes) == 1)
        choosing = Asked(worker, lambda m, t: write_choose(m, question, 0))
        model.leave.release(40)
        found = choosing.until(dict)
        beside = [sizes for sizes in model.sizes if len(sizes) > 1]
        assert all(sizes[0] == 1 and sizes[1] <= SLICE for sizes in beside)
        assert sum(sizes[1] for sizes in beside) == 2 * len(question.rows)
        model.leave.release(10_000)
        alone = untrained(TOKENIZER.vocab_size, 24)
    expected = choose(alone, TOKENIZER, "x", slots, template="{x}.", draws=2)
    assert found["x"] == pytest.approx(expected["x"], rel=1e-4)


def test_jobs_leave_places_to_requests() -> None:
    """Choices took all places, and nobody else was answered for as long as they ran."""

    def reader(model: DiffusionGemma, tokenizer: Tokenizer) -> Decoding[object, None]:
        while True:
            yield Reading(0, 1)

    with working(max_batch=2) as (worker, model):
        first, second = Asked(worker, reader), Asked(worker, reader)
        settled(lambda: worker.running == 1)
        model.leave.release(10_000)
        asked = worker.prepared(Request("hello", seed=0, steps=3, max_tokens=24))
        assert isinstance(Asked(worker, asked).until(Done), Done)
        assert second.events.empty()
        worker.cancel(first.ticket)
        assert isinstance(second.until(Reading), Reading)
