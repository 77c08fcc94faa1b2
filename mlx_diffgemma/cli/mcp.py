"""`mcp`: tools for agents, on stdin and stdout."""

import os
import signal
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Load, with_options
from .terminal import fail, say

if TYPE_CHECKING:
    from ..model.diffusion_gemma import DiffusionGemma
    from ..text.tokenizer import Tokenizer

app = typer.Typer()


@app.command()
@with_options
def mcp(
    *,
    load: Load,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds a call may take.")] = 600,
    cache_gb: Annotated[
        float, typer.Option(min=0, help="Memory for what was read for earlier calls.")
    ] = 1,
) -> None:
    """Offer fill, edit, choose and extract as tools to an agent that starts this, by MCP."""
    try:
        from ..server.mcp import serve
    except ImportError as error:
        fail(f"{error.name} is missing: pip install 'mlx-diffgemma[mcp]'")
    import asyncio

    from .. import __version__
    from ..errors import Error
    from ..server.thread import MlxThread
    from ..server.worker import Resident, Worker

    if sys.stdin.isatty():
        say("An agent starts this command and asks it on stdin; Ctrl-D ends it.")
    load.introduce()
    failures: list[Error] = []

    def loaded() -> "tuple[DiffusionGemma, Tokenizer]":
        try:
            return load()
        except Error as error:  # calls are told too; this is for the agent's log
            say(f"error: {error}")
            failures.append(error)
            raise

    worker = Worker(Resident(loaded), max_batch=4, max_queue=64, timeout=timeout)
    thread = MlxThread([worker], cache_bytes=int(cache_gb * 1e9))
    # Ctrl-C ends it at once: a thread that reads stdin cannot be interrupted, and nothing is lost.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        asyncio.run(serve(thread, __version__))
    except* BrokenPipeError:  # the agent was killed while an answer was on its way
        say("the agent has gone")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to write
    finally:
        signal.signal(signal.SIGINT, before)
    if failures:
        raise SystemExit(1)
