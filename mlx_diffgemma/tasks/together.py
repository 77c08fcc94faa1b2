"""Requests that several ranks answer together: rank 0 says which, the others do what it does.

Each rank has a part of the model, and a pass needs all of them. So all run the same request, step
by step; what goes into a step is rank 0's (`Share.agreed`), and only rank 0 has a listener.
"""

import pickle
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing
from typing import Any, TypeVar

import mlx.core as mx

from ..distributed.share import Share
from ..model.diffusion_gemma import DiffusionGemma

Item = TypeVar("Item")


def together(
    model: DiffusionGemma, kind: str, work: object, items: Generator[Item, None, None]
) -> Generator[Item, None, None]:
    """Items of work that all ranks do, from rank 0, which has the others begin it.

    Once nobody listens to rank 0 any more, all stop. Ranks are one program of one user: they may
    unpickle what rank 0 says.
    """
    share = model.part.share
    if share.size == 1:
        return items
    return _in_step(share, pickle.dumps((kind, work)), items)


def _in_step(
    share: Share, announced: bytes, items: Generator[Item, None, None]
) -> Generator[Item, None, None]:
    if share.tell is not None:
        share.tell(announced)
    with closing(items):
        for item in items:
            if share.rank:
                if not _goes_on(share, True):
                    return
                continue
            try:
                yield item
            except BaseException:
                _goes_on(share, False)
                raise
            _goes_on(share, True)


def _goes_on(share: Share, wanted: bool) -> bool:
    (told,) = share.agreed([mx.array([wanted])])
    return bool(told.item())


def follow(message: bytes, run: Mapping[str, Callable[[Any], Iterable[object]]]) -> None:
    """Do what rank 0 has announced, by its kind, with nobody who listens."""
    kind, work = pickle.loads(message)
    for _ in run[kind](work):
        raise AssertionError("only rank 0 has items")
