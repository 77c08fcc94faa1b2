"""The worker's thread: who is told what when, with a model that takes its time."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from queue import Queue
from typing import Any

import pytest
from random_model import untrained

from mlx_diffgemma import (
    DiffusionGemma,
    Done,
    Draft,
    FillResult,
    PromptCache,
    Reading,
    Request,
    Tokenizer,
    choose,
)
from mlx_diffgemma.checkpoint.load import EMBEDDED
from mlx_diffgemma.diffusion.decoding import SLICE, Decoding
from mlx_diffgemma.server.thread import MlxThread
from mlx_diffgemma.server.worker import Busy, Gone, Resident, Ticket, Timeout, Worker
from mlx_diffgemma.tasks.choose import ChooseRequest, Question
from mlx_diffgemma.tasks.edit import EditRequest, EditResult
from mlx_diffgemma.tasks.fill import FillRequest
from mlx_diffgemma.tasks.starts import Pieces
from mlx_diffgemma.text.template import TemplateError

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

    worker = Worker(Resident(load), max_batch=max_batch, max_queue=2, timeout=timeout)
    thread = MlxThread([worker], cache_bytes=0)
    thread.start()
    try:
        yield worker, made[0]
    finally:
        made[0].leave.release(10_000)
        thread.stop()


def endless(worker: Worker) -> Any:
    return worker.prepare(Request("hello", max_tokens=4000, seed=0))


def form(worker: Worker, template: str) -> Any:
    return worker.prepare(FillRequest(template, "x", seed=0))


@dataclass
class Work:
    """Prepared work that yields what it is told to."""

    items: Callable[[], Decoding[object, None]]
    prompt: tuple[int, ...] = ()

    def run(self, prompt_cache: PromptCache) -> Decoding[object, None]:
        return self.items()


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
        filling = Asked(worker, form(worker, "a {{x}} b {{y}} c {{z}}"))
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
            Asked(worker, worker.prepare(Request("hello", seed=0, steps=6, max_tokens=24))),
            Asked(worker, form(worker, "a {{x:3}} b")),
        ]
        settled(lambda: len(model.sizes) == 1)
        model.leave.release(10_000)
        assert isinstance(asked[0].until(Done), Done)
        assert isinstance(asked[1].until(FillResult), FillResult)
        assert [1, 1] in model.sizes


def test_a_defect_of_one_leaves_the_others_alone() -> None:
    """It used to end whatever else was running."""

    def broken() -> Decoding[object, None]:
        yield "begun"
        raise ZeroDivisionError

    with working() as (worker, model):
        other = Asked(worker, worker.prepare(Request("hello", seed=0, steps=3, max_tokens=24)))
        bad = Asked(worker, Work(broken))
        assert bad.until(str) == "begun"
        model.leave.release(10_000)
        assert isinstance(bad.until(ZeroDivisionError), ZeroDivisionError)
        assert isinstance(other.until(Done), Done)
        assert worker.counters.failed == 1


def test_a_long_prompt_does_not_hold_up_the_others() -> None:
    """All of its chunks used to be read before anybody else had a step."""
    chunks = 5

    def reader() -> Decoding[object, None]:
        for done in range(chunks):
            yield Reading(done, chunks)

    with working() as (worker, model):
        Asked(worker, endless(worker))
        reading = Asked(worker, Work(reader))
        model.leave.release(3)
        settled(lambda: len(model.sizes) == 4)
        told = reading.events.qsize()
        assert told in (3, 4)


def test_a_schema_is_compiled_by_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was the worker's thread, and all other answers stood still."""
    from mlx_diffgemma.text import schema

    threads: list[str] = []
    compile_ = schema.compiled

    def noted(*given: Any, **more: Any) -> Any:
        threads.append(threading.current_thread().name)
        return compile_(*given, **more)

    monkeypatch.setattr(schema, "compiled", noted)
    with working() as (worker, model):
        model.leave.release(10_000)
        request = worker.prepare(Request("x", schema={"enum": ["yes", "no"]}, steps=2, seed=0))
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
        tasks: list[tuple[Any, type]] = [
            (Request("hi", opening="Well", seed=0, steps=2, max_tokens=24), Done),
            (Request("x", start=Pieces((("a", True), ("b", False))), steps=2, max_tokens=24), Done),
            (ChooseRequest("x", {"x": ["1", "2"]}), dict),
            (FillRequest("a {{x:2}} {{y:yes|no}} b", "x", seed=0), FillResult),
        ]
        for task, result in tasks:
            assert Asked(worker, worker.prepare(task)).until(result)
    assert threads == {threading.current_thread().name}


def test_an_edit_encodes_little_on_the_workers_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was the whole text, three times for each of its canvases: seconds of a long one, in
    which all other answers stood still."""
    encode, sizes = Tokenizer.encode, [0]

    def noted(self: Tokenizer, text: str) -> list[int]:
        if threading.current_thread().name == "mlx":
            sizes.append(len(text))
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode", noted)
    many = "".join(f"This is line {i}.\n" for i in range(3000))
    with working() as (worker, model):
        model.leave.release(10_000)
        asked = EditRequest(many, "Repair", lines=(1500, 1502), steps=2, seed=0)
        edited = Asked(worker, worker.prepare(asked)).until(EditResult)
    assert edited.text.startswith(many[: many.index("This is line 1499.")])
    assert edited.text.endswith(many[many.index("This is line 1502.") :])
    assert len(sizes) > 1
    canvas = 24
    assert max(sizes) <= (canvas + 1) * TOKENIZER.longest


def test_an_opening_given_as_ids_is_the_same() -> None:
    with working() as (worker, model):
        model.leave.release(10_000)
        asked = Request("hi", opening="Well", seed=0, steps=3, max_tokens=24)
        ids = replace(asked, opening=TOKENIZER.encode("Well"))
        ready = [worker.prepare(each) for each in (asked, ids)]
        assert ready[0].prompt == ready[1].prompt
        texts = [Asked(worker, each).until(Draft).text for each in ready]
        assert texts[0] == texts[1]
        assert texts[0].startswith("Well")


def test_preparing_ends_with_the_time_or_when_nobody_waits() -> None:
    """Neither --timeout nor leaving ended it: threads went on for nobody."""
    with working(timeout=0.05) as (worker, _):
        late = worker.patience()
        time.sleep(0.1)
        gone = replace(late, ends=time.monotonic() + 60, gone=True)
        tasks: list[Any] = [
            Request("x"),
            Request("x", opening="a"),
            Request("x", schema={"enum": ["a", "b"]}),
            Request("x", start=Pieces((("a", True),))),
            FillRequest("a {{x}}", "x"),
            ChooseRequest("x", {"x": ["1", "2"]}),
            EditRequest("x", "y"),
        ]
        for patience, error in ((late, Timeout), (gone, Gone)):
            for task in tasks:
                with pytest.raises(error):
                    worker.prepare(task, patience)
        with pytest.raises(TemplateError, match="100,000 characters; the context of"):
            worker.prepare(FillRequest("a" * 100_000 + "{{x}}", "x"))


def test_many_canvases_are_decoded_in_slices_beside_others() -> None:
    """All canvases of a choice were one pass, and others waited for each of its draws."""
    slots = {"x": [f"{i:02}{i:02}" for i in range(20)]}
    with working() as (worker, model):
        question = worker.prepare(ChooseRequest("x", slots, "{x}.", draws=2))
        assert isinstance(question, Question)
        assert len(question.rows) > 2 * SLICE
        Asked(worker, endless(worker))
        settled(lambda: len(model.sizes) == 1)
        choosing = Asked(worker, question)
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

    def reader() -> Decoding[object, None]:
        while True:
            yield Reading(0, 1)

    with working(max_batch=2) as (worker, model):
        first, second = Asked(worker, Work(reader)), Asked(worker, Work(reader))
        settled(lambda: worker.running == 1)
        model.leave.release(10_000)
        asked = worker.prepare(Request("hello", seed=0, steps=3, max_tokens=24))
        assert isinstance(Asked(worker, asked).until(Done), Done)
        assert second.events.empty()
        worker.cancel(first.ticket)
        assert isinstance(second.until(Reading), Reading)


def test_the_process_ends_well() -> None:
    """MLX aborted when a server ended: its worker's thread ended without `clear_streams`."""
    script = (
        "import threading\n"
        "from mlx_diffgemma import EditRequest, load\n"
        "from mlx_diffgemma.server.thread import MlxThread\n"
        "from mlx_diffgemma.server.worker import Resident, Worker\n"
        "worker = Worker(Resident(load), max_batch=1, max_queue=1, timeout=60)\n"
        "thread = MlxThread([worker], cache_bytes=0)\n"
        "thread.start()\n"
        "ended = threading.Event()\n"
        "work = worker.prepare(EditRequest('a small hosue', 'Fix', seed=0))\n"
        "worker.submit(work, lambda event: event is None and ended.set())\n"
        "print(ended.wait(60))\n"
        "thread.stop()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("True\n", "", 0)
