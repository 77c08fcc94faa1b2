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
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from ..distributed.launch import LaunchError, place
from ..errors import Error

if TYPE_CHECKING:
    from ..distributed.link import Link
    from ..distributed.others import Others
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

# What a message begins with that tells why its sender ends.
FAILED = b"!"

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

    share, link = joined(lost)
    atexit.register(link.close)
    _leave_when_ended(link)
    return share, link


def _leave_when_ended(link: "Link") -> None:
    """Take leave when SIGTERM comes, too: it ends a process without more, and the others would
    take rank 0 for lost."""

    def leave(number: int, frame: FrameType | None) -> None:
        taking = threading.Thread(target=link.close)  # this thread may be amid a message
        taking.start()
        taking.join(LAST)
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    signal.signal(signal.SIGTERM, leave)


def share_model(load: Loader, facts: dict[str, Any]) -> "tuple[DiffusionGemma, Tokenizer]":
    """In rank 0, load its part of a model, once all ranks are found to be equal in these facts.

    Raises:
        LaunchError: they are not, or cannot be connected.
        Error: as `load`.
    """
    from ..distributed.link import end
    from ..distributed.others import Others

    share, link = lead()
    tell = teller(share, link)
    check_others(share, link, facts)
    others = Others(tell, share.size, end)
    threading.Thread(target=_listen, args=(link, others), daemon=True).start()
    return load(replace(share, others=others))


def teller(share: "Share", link: "Link") -> Callable[[bytes], None]:
    """What sends a message of rank 0 to all others."""

    def tell(message: bytes) -> None:
        for rank in range(1, share.size):
            link.send(message, rank)

    return tell


def check_others(share: "Share", link: "Link", facts: dict[str, Any]) -> None:
    """Hear of each other rank what it is, and have them go on once all are equal in these facts.

    Raises:
        LaunchError: they are not, or one has left or failed.
    """
    for _ in range(1, share.size):
        found = link.received()
        if found is None or found[1] is None:
            raise LaunchError("a rank has left")
        rank, said = found[0], found[1]
        if said.startswith(FAILED):
            raise LaunchError(f"rank {rank}: {said[len(FAILED) :].decode()}")
        check_equal(facts, rank, json.loads(said))
    teller(share, link)(b"")


def _listen(link: "Link", others: "Others") -> None:
    """Take what the others answer; what one says before it ends by itself is not that."""
    while (found := link.received()) is not None:
        if found[1] is not None and not found[1].startswith(FAILED):
            others.heard(found[1])


def help_out(load: Loader, facts: Callable[[], dict[str, Any]]) -> NoReturn:
    """In another rank than 0, load its part of the model and do what rank 0 says, to its end."""
    from ..tasks.following import Follower

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides
    share, link = joined_to_help()
    try:
        link.send(json.dumps(facts()).encode())
        found = link.received()
        if found is None or found[1] is None:  # it has said why
            raise SystemExit(1)
        Follower(*load(share), link.send).run(link.received)
    except Error as error:
        end_alone(link, error)
    raise SystemExit(0)


def joined_to_help() -> "tuple[Share, Link]":
    """The share of another rank than 0 and its link, with which this process ends when rank 0 is
    lost or has left."""
    from ..distributed.link import end

    def lost(rank: int) -> None:
        end(f"rank {place().rank} ends, as rank 0 is lost")

    def left(rank: int) -> None:
        threading.Timer(LAST, os._exit, [0]).start()  # in the midst of a collective, perhaps

    return joined(lost, left)


def end_alone(link: "Link", error: Error) -> None:
    """Tell rank 0 why this one fails, and end."""
    from ..distributed.link import end

    link.send(FAILED + str(error).encode())
    time.sleep(ALONE)  # rank 0 has mostly found the same, and says so
    end(f"rank {place().rank}: {error}")


def joined(
    lost: Callable[[int], None], left: Callable[[int], None] = lambda rank: None
) -> "tuple[Share, Link]":
    """This rank's share, and its link to the others."""
    from ..distributed.link import all_ranks, connect
    from ..distributed.share import Ranks, Share

    here, group = place(), all_ranks()
    share = Share(here.rank, here.size, Ranks(group), check=os.environ.get(CHECK) == "1")
    return share, connect(here, group, lost, left)


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


def check_equal(mine: dict[str, Any], rank: int, other: dict[str, Any]) -> None:
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
