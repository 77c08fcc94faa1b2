"""Requests that several ranks answer together: rank 0 says which, the others do what it does.

Each rank has a part of the model, and a pass needs all of them. So all run the same request, step
by step; what goes into a step is rank 0's (`Share.agreed`), and only rank 0 has a listener. What
the others do for it is `following.py`'s.
"""

from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, finalize

import mlx.core as mx

from ..arguments import SettingError
from ..diffusion.prompt_cache import PromptCache
from ..distributed.others import Others, packed
from ..distributed.share import Share
from ..errors import Error
from ..model.diffusion_gemma import DiffusionGemma

Item = TypeVar("Item")

# What is told of a prompt cache: its number, and what it must have read by then.
Numbered = tuple[int, tuple[int, ...]]


def together(
    model: DiffusionGemma,
    kind: str,
    work: object,
    items: Generator[Item, None, None],
    prompt_cache: PromptCache | None = None,
) -> Generator[Item, None, None]:
    """Items of work that all ranks do, from rank 0, which has the others begin it.

    Once nobody listens to rank 0 any more, all stop; then, too, their prompt caches have read the
    same. Ranks are one program of one user: they may unpickle what rank 0 says.

    Raises:
        LaunchError: the work cannot be told to others, or ranks no longer do the same.
        SettingError: another answer is not complete yet; when the first item is asked for.
    """
    share = model.part.share
    if share.size == 1:
        return items
    if share.rank or share.others is None:
        return _in_step(share, items)
    return _led(share, share.others, (kind, packed(work)), items, prompt_cache)


def _led(
    share: Share,
    others: Others,
    announced: tuple[str, bytes],
    items: Generator[Item, None, None],
    prompt_cache: PromptCache | None,
) -> Generator[Item, None, None]:
    if others.busy:
        raise SettingError("ranks give one answer at a time, and another is not complete yet")
    kind, work = announced
    known = None
    if prompt_cache is not None:
        known = prompt_cache.number(others), prompt_cache.standing
    others.busy = True
    try:
        others.tell(kind, (work, known))
        yield from _in_step(share, others.all_of(items), others)
    finally:
        items.close()
        others.busy = False


def _in_step(
    share: Share, items: Generator[Item, None, None], others: Others | None = None
) -> Generator[Item, None, None]:
    with closing(items):
        for item in items:
            if share.rank:
                if not _goes_on(share, True):
                    return
                continue
            try:
                yield item
            except BaseException:
                _say(share, others, False)
                raise
            _say(share, others, True)


def _say(share: Share, others: Others | None, wanted: bool) -> None:
    if others is None:
        _goes_on(share, wanted)
        return
    with others.in_step():
        _goes_on(share, wanted)


def _goes_on(share: Share, wanted: bool) -> bool:
    (told,) = share.agreed([mx.array([wanted])])
    return bool(told.item())


class Elsewhere(Error):
    """Another rank has found a mistake that rank 0 has not."""


# Numbers of what all ranks have prepared.
_numbers: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


def prepare_on_all(
    model: DiffusionGemma,
    task: object,
    prepare: Callable[[], Item],
    check: Callable[[], None],
) -> Item:
    """What `prepare` makes of a task, once all ranks have made the same of it; in any thread.

    So nobody waits in a step for a rank that compiles a schema. `check` may raise meanwhile.

    Raises:
        LaunchError: the task cannot be told to others, or ranks no longer do the same.
        Elsewhere: another rank cannot prepare it.
        Error: as `prepare`.
    """
    others = model.part.share.others
    if others is None:
        return prepare()
    number = others.number()
    others.ask("prepare", packed(task), number)
    try:
        prepared = prepare()
        problems = others.answers(number, check)
        if told := next(filter(None, problems), None):
            raise Elsewhere(f"another rank cannot answer this: {told}")
    except BaseException:
        others.forget(number)
        raise
    _number(others, prepared, number)
    return prepared


def _number(others: Others, prepared: object, number: int) -> None:
    _numbers[prepared] = number
    finalize(prepared, others.drop, number).atexit = False


def copied_on_all(model: DiffusionGemma, prepared: object, copy: Item, seed: int | None) -> Item:
    """A copy of what all have prepared, with another seed, once all have it.

    Raises:
        LaunchError: ranks no longer do the same.
    """
    others = model.part.share.others
    if others is not None:
        number = others.number()
        others.tell("copy", (number, number_of(prepared), seed))
        _number(others, copy, number)
    return copy


def number_of(prepared: object) -> int:
    """What rank 0 calls what all have prepared."""
    return _numbers[prepared]
