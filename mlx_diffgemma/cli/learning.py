"""`lora` under `mlx.launch`: rank 0 is asked and keeps the run, the others learn along."""

import atexit
import json
import pickle
import signal
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

from .. import __version__
from ..distributed.launch import LaunchError, place
from ..errors import Error
from .options import LoadFaithful, size
from .sharing import check_others, end_alone, facts_of, joined, joined_to_help, teller
from .terminal import fail

if TYPE_CHECKING:
    from ..checkpoint.adapter import AdapterConfig
    from ..distributed.link import Link
    from ..distributed.share import Share
    from ..training.exchange import Together
    from ..training.ranks import Work
    from ..training.settings import Settings
    from .lora_config import Asked


def enter_training() -> None:
    """Meet the other ranks; in another than 0, do what that says, and end.

    Raises:
        SystemExit: it is another.
    """
    if place().size == 1:
        return
    if place().leads:
        _lead()
    else:
        _learn_along()


def check_asked(asked: "Asked", *, plan: bool) -> None:
    """Refuse what one rank would do while the others have nothing to do.

    Raises:
        SettingError: it is asked for.
    """
    from ..training.ranks import check_ranks

    size = place().size
    if size > 1 and (plan or not asked.train):
        given = "--plan" if plan else "--test"
        fail(f"{given} is for one process; under mlx.launch, lora goes with --train", code=2)
    if asked.train:
        check_ranks(asked.settings, size)


@cache
def _lead() -> "tuple[Share, Link]":
    """In rank 0, its share of each batch and its link to the others, which end when it does."""
    from ..distributed.link import end

    def lost(rank: int) -> None:
        end(
            f"rank {rank} is lost, and with it a part of each batch; what was saved before stays, "
            "and --resume goes on from it"
        )

    share, link = joined(lost)
    atexit.register(link.close)
    return share, link


def share_work(load: LoadFaithful, work: "Work") -> "Together":
    """In rank 0, give all others their work; alone, nothing is done.

    Raises:
        LaunchError: another rank has other files or versions, or cannot do it.
    """
    from ..training.exchange import BY_ITSELF, Together

    if place().size == 1:
        return BY_ITSELF
    share, link = _lead()
    tell = teller(share, link)
    tell(_packed(load, work))
    check_others(share, link, _facts(load))
    return Together(share, tell)


def _learn_along() -> NoReturn:
    """In another rank than 0, load the model that it names and learn along, to its end."""
    from ..training.ranks import learn_along

    for number in (signal.SIGINT, signal.SIGTERM):  # rank 0 decides, and saves before it ends
        signal.signal(number, signal.SIG_IGN)
    share, link = joined_to_help()

    def hear() -> bytes | None:
        found = link.received()
        return None if found is None else found[1]

    try:
        if (message := hear()) is None:  # it has said why
            raise SystemExit(0)
        load, work = _unpacked(message)
        check_fit(load, work.settings, work.adapter, work.tokens)
        link.send(json.dumps(_facts(load)).encode())
        if hear() is None:
            raise SystemExit(0)
        model, _ = load()
        learn_along(model, work, share, hear)
    except Error as error:
        end_alone(link, error)
    raise SystemExit(0)


def _packed(load: LoadFaithful, work: "Work") -> bytes:
    """What the others are to do. Ranks are one program of one user: they may unpickle it."""
    return __version__.encode() + b"\n" + pickle.dumps((load, work))


def _unpacked(message: bytes) -> "tuple[LoadFaithful, Work]":
    """The same, where another version would not understand it.

    Raises:
        LaunchError: rank 0 has another.
    """
    version, _, content = message.partition(b"\n")
    if version.decode() != __version__:
        raise LaunchError(
            f"the version of mlx-diffgemma of rank 0 is {version.decode()}, and {__version__} here"
        )
    found: tuple[LoadFaithful, Work] = pickle.loads(content)
    return found


def check_fit(
    load: LoadFaithful, settings: "Settings", adapter: "AdapterConfig", tokens: int
) -> None:
    """Refuse what this rank's part of each batch needs more memory for than there is.

    Raises:
        TooLarge: it does.
        SettingError: the model has no such layers or maps.
    """
    from ..checkpoint.files import DEFAULT
    from ..checkpoint.fit import free_memory
    from ..checkpoint.hub import headers_of
    from ..checkpoint.load import computed_in
    from ..training.plan import fitting

    mine = replace(settings, batch_size=-(-settings.batch_size // place().size))
    memory = size(load.max_memory)
    fitting(
        headers_of(load.model or DEFAULT, revision=load.revision),
        mine,
        adapter,
        tokens=tokens,
        memory=free_memory() if memory is None else memory,
        dtype=computed_in(load.dtype),
    )


def _facts(load: LoadFaithful) -> dict[str, Any]:
    """What all ranks must agree on. Chips may differ: each example is learnt from on one alone, and
    gradients are the same sums on all."""
    from ..checkpoint.load import directory_of

    facts = facts_of(directory_of(load.model, load.revision), dtype=load.dtype)
    return {name: fact for name, fact in facts.items() if name != "chip"}
