"""The tasks for asyncio: one thread owns MLX, and the event loop stays free.

Steps of all iterators are computed on that thread, in turns; nothing runs ahead of who asks.
Cancelling, or closing an iterator, waits for the step that is being computed and stops there.
"""

import asyncio
import atexit
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from queue import SimpleQueue
from typing import Any, Final, TypeVar, Unpack

import mlx.core as mx

from ..diffusion.prompt_cache import PromptCache, Reading
from ..errors import Error
from ..model.diffusion_gemma import DiffusionGemma
from ..text.template import Hole
from ..text.tokenizer import Tokenizer
from ..text.turns import Text
from ..text.vocabulary import Vocabulary
from .batch import MAX_BATCH, stream_batch, stream_texts
from .choose import Choice, ChooseRequest
from .edit import EditOptions, EditRequest, EditResult
from .fill import FillOptions, FillRequest, FillResult
from .generate import Request
from .request import Draft, Event, Item, Options, Prompt, Task, run_prepared

Result = TypeVar("Result")

_END: Final[Any] = object()


class _GivenUp(Exception):
    """Says that nobody waits for a preparation any more."""


class _Owner:
    """The thread that owns MLX for all event loops of this process; it begins with the first work.

    It is no executor of the library: those cannot do anything at their thread's end, and without
    `clear_streams` there MLX (0.32.4) aborts every third process at its exit, with code 134.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._begin = threading.Lock()
        self._thread: threading.Thread | None = None

    def submit(self, work: Callable[[], Result]) -> Future[Result]:
        """Have something done behind what waits already."""
        future: Future[Result] = Future()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = work()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        with self._begin:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="mlx-diffgemma", daemon=True)
                self._thread.start()
                atexit.register(self._stop)
        self._jobs.put(job)
        return future

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # else it holds its result until the next one comes
        mx.clear_streams()

    def _stop(self) -> None:
        """At the process's end: the step that is being computed ends first."""
        assert self._thread is not None
        self._jobs.put(None)
        self._thread.join()


_OWNER = _Owner()


async def in_mlx_thread(work: Callable[[], Result]) -> Result:
    """Do something on the thread that owns MLX, such as `lambda: load("directory")`.

    Cancelled, work that waits is dropped; what runs goes on to its end, and its result is lost.
    """
    return await asyncio.wrap_future(_OWNER.submit(work))


async def astream(events: Generator[Item, None, None]) -> AsyncGenerator[Item, None]:
    """Any lazy iterator of this package, such as `session.stream("hello")`, for asyncio.

    Closed or cancelled, it waits for the step that is being computed; then the iterator is closed.
    """
    try:
        while True:
            item = await in_mlx_thread(lambda: next(events, _END))
            if item is _END:
                return
            yield item
    finally:
        # Also when it is cancelled once more meanwhile: the thread closes it behind the step.
        await asyncio.shield(asyncio.wrap_future(_OWNER.submit(events.close)))


async def astream_task(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    task: Task[Item],
    prompt_cache: PromptCache | None = None,
) -> AsyncGenerator[Item, None]:
    """The events of a request of whatever kind; it is prepared in a thread of its own.

    Raises:
        Error: as the request's `prepare`.
    """
    given_up = threading.Event()

    def check() -> None:
        if given_up.is_set():
            raise _GivenUp

    try:
        prepared = await asyncio.to_thread(
            lambda: task.prepare(model, Vocabulary(model, tokenizer), check)
        )
    except asyncio.CancelledError:
        given_up.set()
        raise
    async with aclosing(astream(run_prepared(model, prepared, prompt_cache))) as events:
        async for event in events:
            yield event


def astream_generate(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    prompt_cache: PromptCache | None = None,
    **options: Unpack[Options],
) -> AsyncGenerator[Event, None]:
    """As `stream_generate`, for asyncio."""
    return astream_task(model, tokenizer, Request(prompt, **options), prompt_cache)


async def agenerate(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    prompt_cache: PromptCache | None = None,
    **options: Unpack[Options],
) -> str:
    """As `generate`, for asyncio."""
    text = ""
    request = Request(prompt, **options)
    async with aclosing(astream_task(model, tokenizer, request, prompt_cache)) as events:
        async for event in events:
            text += event.text if isinstance(event, Text) else ""
    return text


def astream_fill(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    template: str | Sequence[str | Hole],
    **options: Unpack[FillOptions],
) -> AsyncGenerator[Reading | Draft | FillResult, None]:
    """As `stream_fill`, for asyncio."""
    return astream_task(model, tokenizer, FillRequest(template, **options))


async def afill(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    template: str | Sequence[str | Hole],
    **options: Unpack[FillOptions],
) -> FillResult:
    """As `fill`, for asyncio."""
    result = await _last(astream_fill(model, tokenizer, template, **options))
    assert isinstance(result, FillResult)
    return result


def astream_edit(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    text: str,
    instruction: str,
    **options: Unpack[EditOptions],
) -> AsyncGenerator[Reading | Draft | EditResult, None]:
    """As `stream_edit`, for asyncio."""
    return astream_task(model, tokenizer, EditRequest(text, instruction, **options))


async def aedit(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    text: str,
    instruction: str,
    **options: Unpack[EditOptions],
) -> EditResult:
    """As `edit`, for asyncio."""
    result = await _last(astream_edit(model, tokenizer, text, instruction, **options))
    assert isinstance(result, EditResult)
    return result


async def achoose(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    prompt: Prompt,
    slots: Mapping[str, Sequence[str]],
    *,
    template: str | None = None,
    isolated: bool = False,
    seed: int = 0,
    draws: int = 1,
) -> Choice:
    """As `choose`, for asyncio."""
    request = ChooseRequest(prompt, slots, template, isolated, seed, draws)
    result = await _last(astream_task(model, tokenizer, request))
    assert isinstance(result, Choice)
    return result


def astream_batch(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    requests: Iterable[Task[Item]],
    *,
    max_batch: int = MAX_BATCH,
) -> AsyncGenerator[tuple[int, Item | Error], None]:
    """As `stream_batch`, for asyncio."""
    return astream(stream_batch(model, tokenizer, requests, max_batch=max_batch))


async def abatch_generate(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    requests: Sequence[Request | str],
    *,
    max_batch: int = MAX_BATCH,
) -> list[str]:
    """As `batch_generate`, for asyncio."""
    events = stream_texts(model, tokenizer, requests, max_batch=max_batch)
    answers = [""] * len(requests)
    async with aclosing(astream(events)) as parts:
        async for number, text in parts:
            answers[number] += text
    return answers


async def _last(items: AsyncGenerator[Item, None]) -> Item:
    """The result, which comes last."""
    async with aclosing(items):
        async for item in items:
            last = item
    return last
