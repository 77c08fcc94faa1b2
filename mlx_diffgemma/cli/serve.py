"""`serve`: the server as a command."""

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from errno import EADDRINUSE
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .front import Front, allow_connections
from .options import with_options
from .served import Served
from .terminal import fail, put, say

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from ..server.access import Access
    from ..server.thread import MlxThread

app = typer.Typer()


@dataclass(frozen=True)
class Reach:
    """Where the server listens, and whom it answers."""

    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8080
    api_key: Annotated[
        str | None,
        typer.Option(envvar="MLX_DIFFGEMMA_API_KEY", help="Key that clients have to send."),
    ] = None
    cors: Annotated[
        list[str] | None, typer.Option(help="Origin whose pages may ask. Can be given again.")
    ] = None
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="Further name that the server answers to; * is any. Can be given again."),
    ] = None

    def __post_init__(self) -> None:
        if self.api_key is not None and not self.api_key.strip():
            fail("--api-key is empty", code=2)

    @property
    def loopback(self) -> bool:
        """Whether only this machine can ask."""
        return self.host in ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Bounds:
    """How much the server takes on."""

    max_batch: Annotated[int, typer.Option(min=1, help="Requests answered side by side.")] = 4
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that may wait.")] = 64
    timeout: Annotated[float, typer.Option(min=1, help="Seconds a request may take.")] = 600
    cache_gb: Annotated[
        float, typer.Option(min=0, help="Memory for what was read for earlier requests.")
    ] = 1
    max_body_mb: Annotated[
        float, typer.Option(min=0.001, help="Largest request, without its pictures.")
    ] = 4
    max_pictures_mb: Annotated[
        float, typer.Option(min=0, help="Pictures of a request, as they are sent.")
    ] = 24


@app.command()
@with_options
def serve(
    *,
    load: Served,
    reach: Reach,
    bounds: Bounds,
    front: Front,
    print_launchd: Annotated[
        bool,
        typer.Option("--print-launchd", help="Print a launch agent of macOS that serves so."),
    ] = False,
) -> None:
    """Serve OpenAI's, Anthropic's and Ollama's APIs, a page, and routes to fill and choose."""
    if front.workers is not None:
        _stand_before(front, load, reach, bounds, print_launchd)
        return
    try:
        from ..server.app import make_app
    except ImportError as error:
        fail(f"{error.name} is missing: pip install 'mlx-diffgemma[server]'")
    if print_launchd:
        _print_agent()
        return
    _check_port(reach.host, reach.port)
    thread = _thread(load, bounds)
    thread.start()
    served = make_app(thread, _access(reach, bounds))
    try:
        _run(served, reach)
    finally:
        thread.stop()


def _thread(load: Served, bounds: Bounds) -> "MlxThread":
    """The thread that answers for one model, which it loads at once, or for several."""
    from ..checkpoint.files import aliases_of, name_of
    from ..server.thread import MlxThread
    from ..server.worker import Resident, Source, Worker

    def worker(source: Source, name: str, aliases: Sequence[str]) -> Worker:
        return Worker(
            source,
            name=name,
            aliases=aliases,
            max_batch=bounds.max_batch,
            max_queue=bounds.max_queue,
            timeout=bounds.timeout,
        )

    cache_bytes = int(bounds.cache_gb * 1e9)
    if not load.models:
        load.introduce()
        one = worker(Resident(load), name_of(load.model), aliases_of(load.model))
        return MlxThread([one], cache_bytes=cache_bytes)
    memory = load.memory()
    several = [worker(source, name, also) for name, also, source in load.late(memory)]
    say(f"Models: {', '.join(each.name for each in several)}; each is loaded when it is asked for.")
    return MlxThread(several, cache_bytes=cache_bytes, memory=memory, keep_alive=load.seconds)


def _stand_before(
    front: Front, load: Served, reach: Reach, bounds: Bounds, print_launchd: bool
) -> None:
    """Be one address before other servers."""
    addresses = front.addresses(reach.host, reach.port)
    _refuse_what_workers_do(load, bounds)
    try:
        from ..server.balancer import make_front
    except ImportError as error:
        fail(f"{error.name} is missing: pip install 'mlx-diffgemma[server]'")
    if print_launchd:
        _print_agent()
        return
    _check_port(reach.host, reach.port)
    allow_connections()
    served = make_front(addresses, _access(reach, bounds), tell=say, seconds=bounds.timeout)
    _run(served, reach)


def _refuse_what_workers_do(load: Served, bounds: Bounds) -> None:
    """Refuse options of a model, which belong to the workers that have one."""
    given = {**vars(load), **vars(bounds)}
    # A variable of the environment is there for other commands, too.
    plain = {**vars(type(load)(model=os.environ.get("MLX_DIFFGEMMA_MODEL"))), **vars(Bounds())}
    for name, value in given.items():
        if value != plain[name] and name not in ("timeout", "max_body_mb", "max_pictures_mb"):
            told = name.replace("_", "-")
            fail(f"--{told} belongs to the workers: --workers loads no model", code=2)


def _access(reach: Reach, bounds: Bounds) -> "Access":
    """Who may ask, and how much."""
    from ..server.access import Access

    return Access(
        api_key=reach.api_key,
        cors=reach.cors or (),
        loopback=reach.loopback,
        allowed_hosts=reach.allowed_host or (),
        most_bytes=int(bounds.max_body_mb * 1e6),
        picture_bytes=int(bounds.max_pictures_mb * 1e6),
    )


def _run(served: "ASGIApp", reach: Reach) -> None:
    """Serve an application until this is asked to stop."""
    import uvicorn

    from ..server.connections import Connection

    if not reach.loopback and reach.api_key is None:
        say("Anybody who reaches this machine can ask; --api-key changes that.")
    uvicorn.run(
        served,
        host=reach.host,
        port=reach.port,
        log_config=_logging(),
        timeout_graceful_shutdown=10,
        http=Connection,
        ws="none",
    )


def _print_agent() -> None:
    """Print an agent with the arguments of this command, and how to load it."""
    from .launchd import HOW_TO_LOAD, launch_agent

    given = [each for each in sys.argv[1:] if each != "--print-launchd"]
    put(launch_agent(given, os.environ), end="")
    say(HOW_TO_LOAD)


def _check_port(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on before a model is loaded for it."""
    import socket

    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as probe:
                # As the server does: what was closed a moment ago counts as free.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
    except OSError as error:
        way = "; --port 0 takes a free one" if error.errno == EADDRINUSE else ""
        fail(f"the server cannot listen on {host}, port {port}: {error.strerror}{way}")


def _is_told(access: logging.LogRecord) -> bool:
    """Say whether an access is logged: not that a front, or a monitor, has looked each second."""
    return not (isinstance(access.args, tuple) and access.args[2:3] == ("/health",))


def _logging() -> dict[str, Any]:
    """The configuration of uvicorn's log, with accesses on stderr too."""
    from copy import deepcopy

    import uvicorn

    log = deepcopy(uvicorn.config.LOGGING_CONFIG)
    log["handlers"]["access"]["stream"] = "ext://sys.stderr"
    log["filters"] = {"told": {"()": lambda: _is_told}}
    log["handlers"]["access"]["filters"] = ["told"]
    return log
