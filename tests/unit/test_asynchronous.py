"""asyncio: the same answers from one thread, a loop that stays free, and what cancelling stops."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import aclosing
from typing import Any
from unittest.mock import patch

import pytest

from mlx_diffgemma import (
    ChatSession,
    DiffusionGemma,
    Draft,
    Error,
    PromptCache,
    Request,
    SettingError,
    Text,
    abatch_generate,
    achoose,
    aedit,
    afill,
    agenerate,
    astream,
    astream_batch,
    astream_generate,
    batch_generate,
    choose,
    edit,
    fill,
    generate,
    in_mlx_thread,
    load,
    stream_generate,
)

RECORD = "Record: 3 pears at 20 to Anna"


@pytest.fixture(scope="module")
def small() -> Any:
    return load()


def test_answers_are_those_without_asyncio_also_side_by_side(small: Any) -> None:
    few: Any = {"seed": 3, "steps": 3}
    slots = {"item": ["pears", "books"]}

    async def main() -> list[object]:
        return await asyncio.gather(
            agenerate(*small, "hello", **few),
            afill(*small, "{{a:yes|no}}", **few),
            aedit(*small, "a smal house", "Fix", **few),
            achoose(*small, RECORD, slots),
            abatch_generate(*small, [Request("hello", **few), Request(RECORD, **few)]),
        )

    assert asyncio.run(main()) == [
        generate(*small, "hello", **few),
        fill(*small, "{{a:yes|no}}", **few),
        edit(*small, "a smal house", "Fix", **few),
        choose(*small, RECORD, slots),
        batch_generate(*small, [Request("hello", **few), Request(RECORD, **few)]),
    ]


def test_events_are_those_without_asyncio(small: Any) -> None:
    few: Any = {"seed": 3, "steps": 3}

    async def all_of(events: Any) -> list[object]:
        return [event async for event in events]

    def run(events: Any) -> list[object]:
        return asyncio.run(all_of(events))

    drafts = run(astream_generate(*small, "hello", **few))[:-1]
    assert drafts == list(stream_generate(*small, "hello", **few))[:-1]  # Done tells seconds
    parts = run(astream_batch(*small, [Request("hello", **few), Request("x", **few)]))
    assert {number for number, _ in parts} == {0, 1}  # type: ignore[misc]
    said = run(astream(ChatSession(*small, steps=3).stream("hello", seed=3)))
    assert any(isinstance(event, Text) for event in said)


def test_one_thread_does_all_of_it_and_the_loop_stays_free() -> None:
    """Each item waits until the event loop has done something."""
    threads: set[int] = set()

    def events(turn: threading.Event) -> Generator[int, None, None]:
        for number in range(3):
            threads.add(threading.get_ident())
            assert turn.wait(30)
            turn.clear()
            yield number

    async def main() -> list[int]:
        turns = [threading.Event() for _ in range(3)]

        async def tick() -> None:
            while True:
                for turn in turns:
                    turn.set()
                await asyncio.sleep(0.001)

        async def take(turn: threading.Event) -> int:
            return sum([number async for number in astream(events(turn))])

        ticking = asyncio.create_task(tick())
        found = await asyncio.gather(*map(take, turns))
        ticking.cancel()
        return found

    assert asyncio.run(main()) == [3, 3, 3]
    threads.add(asyncio.run(in_mlx_thread(threading.get_ident)))
    assert len(threads) == 1
    assert threading.get_ident() not in threads


@pytest.fixture
def decoded() -> Iterator[list[int]]:
    """Grows by one with each pass of a decoder."""
    passes: list[int] = []
    real = DiffusionGemma.decode

    def counted(self: DiffusionGemma, *given: Any) -> Any:
        passes.append(1)
        return real(self, *given)

    with patch.object(DiffusionGemma, "decode", counted):
        yield passes


def test_cancelling_stops_within_a_step_and_closes(small: Any, decoded: list[int]) -> None:
    seen: list[object] = []

    async def ask() -> None:
        async for event in astream_generate(*small, "hello", seed=0, steps=48):
            seen.append(event)

    async def main() -> int:
        task = asyncio.create_task(ask())
        while len(seen) < 2:
            await asyncio.sleep(0.001)
        before = len(decoded)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        stopped = len(decoded)
        assert stopped <= before + 1
        await asyncio.sleep(0.2)
        return len(decoded) - stopped

    assert asyncio.run(main()) == 0


def test_a_loop_that_is_left_stops_the_answer(small: Any, decoded: list[int]) -> None:
    async def main() -> None:
        async with aclosing(astream_generate(*small, "hello", seed=0, steps=48)) as events:
            async for event in events:
                if isinstance(event, Draft) and event.step == 2:
                    break
        assert len(decoded) == 2

    asyncio.run(main())


def test_an_iterator_is_closed_where_it_ran() -> None:
    closed: list[int] = []

    def events() -> Generator[int, None, None]:
        try:
            yield 1
            yield 2
        finally:
            closed.append(threading.get_ident())

    async def main() -> None:
        held = events()
        async with aclosing(astream(held)) as items:
            await anext(items)
        assert closed == [await in_mlx_thread(threading.get_ident)]

    asyncio.run(main())


def test_preparing_is_given_up_and_holds_nobody_up(small: Any) -> None:
    """A schema that takes seconds to compile is not compiled in the thread of MLX."""
    started = threading.Event()
    checks: list[bool] = []

    class Slow:
        def prepare(self, model: object, vocabulary: object, check: Any) -> Any:
            started.set()
            while len(checks) < 10_000:
                check()
                checks.append(True)
                threading.Event().wait(0.001)

    async def main() -> str:
        from mlx_diffgemma.tasks.asynchronous import astream_task

        waiting = asyncio.create_task(anext(astream_task(*small, Slow())))
        while not started.is_set():
            await asyncio.sleep(0.001)
        answer = await agenerate(*small, "hello", seed=0, steps=1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        return answer

    assert asyncio.run(main()) == generate(*small, "hello", seed=0, steps=1)
    assert len(checks) < 10_000


def test_mistakes_are_our_errors(small: Any) -> None:
    async def main() -> None:
        with pytest.raises(SettingError, match="a seed must be"):
            await agenerate(*small, "hello", seed=-1)
        with pytest.raises(Error, match="no hole"):
            await afill(*small, "nothing")

    asyncio.run(main())


def test_two_answers_at_once_do_not_share_a_conversation(small: Any) -> None:
    """The first went on with a cache that the second had changed: a wrong answer, in silence."""
    session, cache = ChatSession(*small, steps=4), PromptCache(small[0])
    for begin in (
        lambda text: session.stream(text, seed=0),
        lambda text: stream_generate(*small, text, prompt_cache=cache, seed=0, steps=4),
    ):
        first, second = begin("hello"), begin("What is the capital of Norway?")
        next(first)
        next(second)
        with pytest.raises(SettingError, match="was used by another answer"):
            next(first)
        assert any(isinstance(event, Text) for event in second)


def test_the_process_ends_well() -> None:
    """MLX aborted at exit, in three of ten runs: its thread ended without `clear_streams`."""
    script = (
        "import asyncio; from mlx_diffgemma import agenerate, in_mlx_thread, load\n"
        "async def main():\n"
        "    model = await in_mlx_thread(load)\n"
        "    print(len(await agenerate(*model, 'hello', seed=0, steps=2)) > 0)\n"
        "    asyncio.create_task(agenerate(*model, 'hello', seed=0))\n"
        "    await asyncio.sleep(0.05)\n"
        "asyncio.run(main())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("True\n", "", 0)
