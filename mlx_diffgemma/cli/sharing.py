"""--shard: all ranks have a part of one model; rank 0 is asked, and the others help it."""

import atexit
import json
import os
import platform
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..distributed.launch import LaunchError, place
from ..errors import Error

if TYPE_CHECKING:
    from ..distributed.link import Link
    from ..distributed.share import Share
    from ..model.diffusion_gemma import DiffusionGemma
    from ..text.tokenizer import Tokenizer

# Set to 1 for all, Macs of different chips may share a model.
MIXED = "MLX_DIFFGEMMA_MIXED"

# Set to 1 for all, ranks compare hidden states and chosen experts: slow, to find out what differs.
CHECK = "MLX_DIFFGEMMA_CHECK"

# Seconds in which the others end by themselves, once rank 0 has.
LAST = 2.0

# Seconds after which another rank says what it alone has found.
ALONE = 5.0

_FAILED = b"!"

Loader = Callable[["Share"], "tuple[DiffusionGemma, Tokenizer]"]


@cache
def lead() -> "tuple[Share, Link]":
    """In rank 0, its share and its link to the others, which end when it does.

    Raises:
        LaunchError: they cannot be connected.
    """
    from ..distributed.link import end

    def lost(rank: int) -> None:
        end(f"rank {rank} is lost, and with it a part of the model")

    share, link = _joined(lost)
    atexit.register(link.close)
    return share, link


def share_model(load: Loader, facts: dict[str, Any]) -> "tuple[DiffusionGemma, Tokenizer]":
    """In rank 0, load its part of a model, once all ranks are found to be equal in these facts.

    Raises:
        LaunchError: they are not, or cannot be connected.
        Error: as `load`.
    """
    share, link = lead()
    others = range(1, share.size)

    def tell(message: bytes) -> None:
        for rank in others:
            link.send(message, rank)

    for _ in others:
        found = link.received()
        if found is None or found[1] is None:
            raise LaunchError("a rank has left")
        rank, told = found[0], found[1]
        if told.startswith(_FAILED):
            raise LaunchError(f"rank {rank}: {told[len(_FAILED) :].decode()}")
        _check_equal(facts, rank, json.loads(told))
    tell(b"")
    return load(replace(share, tell=tell))


def help_out(load: Loader, facts: Callable[[], dict[str, Any]]) -> NoReturn:
    """In another rank than 0, load its part of the model and do what rank 0 says, to its end."""
    from ..distributed.link import end
    from ..tasks.batch import stream_batch
    from ..tasks.request import stream
    from ..tasks.together import follow

    here = place()

    def lost(rank: int) -> None:
        end(f"rank {here.rank} ends, as rank 0 is lost")

    def left(rank: int) -> None:
        threading.Timer(LAST, os._exit, [0]).start()  # in the midst of a collective, perhaps

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides
    share, link = _joined(lost, left)
    try:
        link.send(json.dumps(facts()).encode())
        if _next(link) is None:  # it has said why
            raise SystemExit(1)
        model, tokenizer = load(share)
        run: dict[str, Callable[[Any], Any]] = {
            "stream": lambda task: stream(model, tokenizer, task),
            "batch": lambda work: stream_batch(model, tokenizer, work[0], max_batch=work[1]),
        }
        while (message := _next(link)) is not None:
            follow(message, run)
    except Error as error:
        link.send(_FAILED + str(error).encode())
        time.sleep(ALONE)  # rank 0 has mostly found the same, and says so
        end(f"rank {here.rank}: {error}")
    raise SystemExit(0)


def _joined(
    lost: Callable[[int], None], left: Callable[[int], None] = lambda rank: None
) -> "tuple[Share, Link]":
    """This rank's share, and its link to the others."""
    from ..distributed.link import all_ranks, connect
    from ..distributed.share import Ranks, Share

    here, group = place(), all_ranks()
    share = Share(here.rank, here.size, Ranks(group), check=os.environ.get(CHECK) == "1")
    return share, connect(here, group, lost, left)


def _next(link: "Link") -> bytes | None:
    """What rank 0 says next; None once it has left."""
    found = link.received()
    return None if found is None else found[1]


def facts_of(directory: Path, **settings: Any) -> dict[str, Any]:
    """What must be the same on all Macs: versions, chip, checkpoint, settings.

    Of a checkpoint it reads the config and the headers of weights.
    """
    import mlx.core as mx

    from .. import __version__
    from ..checkpoint.files import read_headers

    headers = read_headers(directory)
    tensors = sorted((t.name, t.dtype, t.shape) for t in headers.tensors.values())
    told = json.dumps([headers.config, tensors], sort_keys=True)
    chip = mx.device_info().get("device_name") or platform.machine()
    return {
        CHECK: os.environ.get(CHECK) == "1",
        "checkpoint": sha256(told.encode()).hexdigest()[:16],
        "version of mlx-diffgemma": __version__,
        "version of MLX": version("mlx"),
        "chip": str(chip),
        **settings,
    }


def _check_equal(mine: dict[str, Any], rank: int, other: dict[str, Any]) -> None:
    """Refuse a rank that would compute something else.

    Raises:
        LaunchError: naming what differs.
    """
    for name, own in mine.items():
        theirs = other.get(name)
        if own == theirs or (name == "chip" and os.environ.get(MIXED) == "1"):
            continue
        more = ""
        if name == "chip":
            more = (
                ": chips round differently, and then halves of different experts are added; "
                f"mlx.launch --env {MIXED}=1 lets them all the same"
            )
        raise LaunchError(f"the {name} of rank 0 is {own}, that of rank {rank} {theirs}{more}")
