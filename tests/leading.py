"""Rank 0 in this thread and the others in threads beside it, which do what it says."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import Empty, Queue

import mlx.core as mx
from sharing import End, Threads

from mlx_diffgemma import DiffusionGemma, Tokenizer, load
from mlx_diffgemma.distributed.others import Others
from mlx_diffgemma.distributed.share import Share
from mlx_diffgemma.tasks.following import Follower


class Ended(Exception):
    """What would end the process."""


def _end(sentence: str) -> None:
    raise Ended(sentence)


def _received(
    told: "Queue[bytes | None]", seconds: float | None
) -> tuple[int, bytes | None] | None:
    try:
        return 0, told.get(timeout=seconds)
    except Empty:
        return None


@contextmanager
def leading(
    directory: Path, size: int, change: Callable[[DiffusionGemma, int], None] | None = None
) -> Iterator[tuple[DiffusionGemma, Tokenizer]]:
    """Rank 0's part of a model that so many share; one alone has all of it.

    `change` makes another of a rank's model. What another rank fails in is raised at the end.
    """
    if size == 1:
        yield load(directory)
        return
    threads, told = Threads(size), [Queue[bytes | None]() for _ in range(size - 1)]
    failures: list[Exception] = []

    def send(message: bytes) -> None:
        for each in told:
            each.put(message)

    others = Others(send, size, _end)

    def follow(rank: int) -> None:
        try:
            model, tokenizer = load(directory, share=Share(rank, size, End(rank, threads)))
            if change is not None:
                change(model, rank)
            Follower(model, tokenizer, others.heard).run(partial(_received, told[rank - 1]))
        except Exception as error:
            failures.append(error)
            threads.barrier.abort()
        finally:
            mx.clear_streams()

    ranks = [threading.Thread(target=follow, args=(rank,)) for rank in range(1, size)]
    for each in ranks:
        each.start()
    try:
        model, tokenizer = load(directory, share=Share(0, size, End(0, threads), others))
        if change is not None:
            change(model, 0)
        yield model, tokenizer
    except BaseException:
        threads.barrier.abort()
        raise
    finally:
        for queue in told:
            queue.put(None)
        for each in ranks:
            each.join()
    if failures:
        raise failures[0]
