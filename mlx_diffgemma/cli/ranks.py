"""A command under `mlx.launch`: which ranks there are, and that rank 0 alone speaks."""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from typing import TYPE_CHECKING

from ..distributed.launch import Place, place
from ..errors import Error
from .terminal import fail

if TYPE_CHECKING:
    from ..distributed.link import Link

# Commands whose work several ranks divide, and those that they do together with --shard.
APART = ("generate", "eval", "lora")
TOGETHER = ("generate", "chat", "fill", "edit", "choose", "score", "serve", "bench")


# Seconds in which rank 0 will have found a mistake, and characters that another rank says of it.
PATIENCE, MOST_SAID = 20.0, 2000

# Seconds in which a lost rank is noticed, if it closes its connection.
NOTICING = 2.0


def enter() -> Place:
    """Find out which rank this is; all but rank 0 are silent from now on.

    Raises:
        LaunchError: what has started this is not `mlx.launch`.
    """
    here = place()
    if not here.leads:
        sys.stdout, sys.stderr = StringIO(), StringIO()
    return here


def linger(code: object) -> None:
    """In a silent rank that has failed, give rank 0 time to say why: it mostly has found the same.

    The launcher ends all with the first that fails. What only this rank has found, it says then.
    """
    if not code or not isinstance(sys.stderr, StringIO) or place().leads:
        return
    time.sleep(PATIENCE)
    if sys.__stderr__ is not None:
        said = sys.stderr.getvalue()[-MOST_SAID:]
        print(
            *(f"rank {place().rank}: {line}" for line in said.splitlines()),
            sep="\n",
            file=sys.__stderr__,
            flush=True,
        )


def check_shared(command: str | None) -> None:
    """Refuse a command that each rank would do by itself, all of it.

    Raises:
        SystemExit: it is one.
    """
    if command in APART or place().size == 1:
        return
    way = "; serve --workers HOST:PORT,... needs no launcher" if command == "serve" else ""
    if command not in TOGETHER:
        known = ", ".join(dict.fromkeys((*APART, *TOGETHER)))
        fail(f"{command} is for one process; under mlx.launch run one of {known}{way}", code=2)
    if "--shard" not in sys.argv:
        fail(f"under mlx.launch, {command} goes with --shard{way}", code=2)


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
    from ..distributed.link import all_ranks, connect, end

    def lost(rank: int) -> None:
        if not here.leads:
            end(f"rank {here.rank} ends, as rank 0 is lost")

    def left(rank: int) -> None:
        if not here.leads:
            os._exit(0)  # what is not told by now is not wanted

    if not here.leads:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides
    link = connect(here, all_ranks(), lost, left)
    try:
        yield link
    except Error as error:
        if not here.leads:
            link.send(b"!" + str(error).encode())
        raise
    finally:
        link.close()
