"""A command under `mlx.launch`: which ranks there are, and that rank 0 alone speaks."""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..distributed.launch import LaunchError, Place, place
from ..errors import Error
from .terminal import fail

if TYPE_CHECKING:
    import mlx.core as mx

    from ..distributed.link import Link

# Commands whose work several ranks divide, and those that they do together with --shard.
APART = ("generate", "eval")
TOGETHER = ("generate", "fill", "edit", "choose", "score", "bench")


# Seconds in which a lost rank is noticed, if it closes its connection.
NOTICING = 2.0


def enter() -> Place:
    """Find out which rank this is; all but rank 0 are silent from now on.

    Raises:
        LaunchError: what has started this is not `mlx.launch`.
    """
    here = place()
    if not here.leads:
        nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the end
        sys.stdout = sys.stderr = nowhere
    return here


def check_shared(command: str | None) -> None:
    """Refuse a command that each rank would do by itself, all of it.

    Raises:
        SystemExit: it is one.
    """
    if command in APART or place().size == 1:
        return
    if command not in TOGETHER:
        known = ", ".join(dict.fromkeys((*APART, *TOGETHER)))
        fail(f"{command} is for one process; under mlx.launch run one of {known}", code=2)
    if "--shard" not in sys.argv:
        fail(f"under mlx.launch, {command} goes with --shard", code=2)


def tell_defect() -> None:
    """Print the traceback of a defect where this rank is silent, and Python would not.

    A collective fails when a rank is lost; whoever notices that ends this process meanwhile.
    """
    if place().size > 1:
        time.sleep(NOTICING)
    if not place().leads:
        traceback.print_exc(file=sys.__stderr__)


@contextmanager
def ending() -> Iterator[threading.Event]:
    """An event that SIGTERM sets while this is open: what is under way is to be ended well."""
    wanted = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda signum, frame: wanted.set())
    try:
        yield wanted
    finally:
        signal.signal(signal.SIGTERM, before)


def group() -> "mx.distributed.Group":
    """All ranks, which MLX has connected.

    Raises:
        LaunchError: they cannot be.
    """
    import mlx.core as mx

    try:
        return mx.distributed.init(strict=True)
    except (RuntimeError, ValueError) as error:
        raise LaunchError(f"mlx.distributed cannot begin: {error}") from None


@contextmanager
def apart() -> "Iterator[Link | None]":
    """Connected with the other ranks, each of which does a part by itself; None where it is alone.

    Rank 0 goes on without those that are lost. Another one ends with rank 0, which it tells what
    has made it fail.

    Raises:
        LaunchError: they cannot be connected.
    """
    here = place()
    if here.size == 1:
        yield None
        return
    from ..distributed.link import end, linked

    def lost(rank: int) -> None:
        if not here.leads:
            end(f"rank {here.rank} ends, as rank 0 is lost")

    with linked(here, group(), lost) as link:
        try:
            yield link
        except Error as error:
            if not here.leads:
                link.send(b"!" + str(error).encode())
            raise
