"""Puts one address before several servers together: their checks, and a proxy for a model.

It loads no model and imports no MLX, so it starts at once.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict

import httpx
from starlette.applications import Starlette
from starlette.requests import Request as Http
from starlette.responses import JSONResponse, PlainTextResponse, Response

from .access import Access
from .backends import Backend, Backends
from .lookout import LOOK_SECONDS, Lookout
from .page import add_page
from .proxy import Proxy
from .refused import tell_errors

# Routes that workers answer; what is none of them never gets there.
ROUTES = {
    "/v1/chat/completions": ("POST",),
    "/v1/completions": ("POST",),
    "/v1/responses": ("POST",),
    "/v1/responses/{identity}": ("GET", "DELETE"),
    "/v1/messages": ("POST",),
    "/v1/messages/count_tokens": ("POST",),
    "/api/chat": ("POST",),
    "/api/generate": ("POST",),
    "/api/show": ("POST",),
    "/api/tags": ("GET",),
    "/api/ps": ("GET",),
    "/api/version": ("GET",),
    "/infill": ("POST",),
    "/v1/fim/completions": ("POST",),
    "/v1/fill": ("POST",),
    "/v1/edit": ("POST",),
    "/v1/choose": ("POST",),
    "/v1/models": ("GET",),
    "/v1/models/{name:path}": ("GET",),
    "/openapi.json": ("GET",),
}

# Seconds that the start waits for workers; whoever asks before one answers is told so.
START_SECONDS = 0.5


def make_front(
    addresses: Sequence[str],
    access: Access,
    *,
    tell: Callable[[str], None],
    seconds: float = 600,
) -> Starlette:
    """Make the application that stands before workers.

    Args:
        addresses: `host:port` of each worker, and all that is ever connected to.
        access: who may ask; workers are sent its key.
        tell: takes sentences for whoever runs this.
        seconds: that a request may take.
    """
    backends = Backends(addresses, tell)
    # A worker answers to this name, whatever it is called here.
    headers = {"Host": "localhost", "Accept-Encoding": "identity", "Connection": "close"}
    if access.api_key is not None:
        headers["Authorization"] = f"Bearer {access.api_key}"
    client = httpx.AsyncClient(
        headers=headers,
        timeout=httpx.Timeout(None, connect=LOOK_SECONDS),
        # Each request has a connection of its own: of one that was open before and is closed now,
        # nobody can say whether the request has begun.
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        trust_env=False,  # no proxy stands between Macs
    )
    lookout, proxy = Lookout(backends, client), Proxy(backends, client, seconds)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        watch = asyncio.create_task(lookout.watch())
        await lookout.first(START_SECONDS)
        yield
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch
        await client.aclose()

    app = Starlette(lifespan=lifespan)
    access.guard(app)
    tell_errors(app)
    for path, methods in ROUTES.items():
        app.add_route(path, proxy.__call__, methods=[*methods])
    _add_state(app, backends, proxy)
    add_page(app)
    return app


def _add_state(app: Starlette, backends: Backends, proxy: Proxy) -> None:
    """Add the routes that say how this and the workers are."""

    async def health(http: Http) -> Response:
        # Without addresses: nobody needs a key to ask.
        states = ["ok" if each.out is None else "left out" for each in backends.all]
        there = bool(backends.there)
        state = {"status": "ok" if there else "no worker answers", "workers": states}
        return JSONResponse(state, 200 if there else 503)

    async def metrics(http: Http) -> Response:
        lines = []
        for name, count in asdict(proxy.counters).items():
            key = f"diffgemma_front_{name}_total"
            lines += [f"# TYPE {key} counter", f"{key} {count}"]
        gauges: dict[str, Callable[[Backend], int]] = {
            "healthy": lambda each: int(each.out is None),
            "under_way": lambda each: each.under_way,
            "places": lambda each: each.places,
        }
        for name, value in gauges.items():
            key = f"diffgemma_worker_{name}"
            lines.append(f"# TYPE {key} gauge")
            lines += [f'{key}{{worker="{each.address}"}} {value(each)}' for each in backends.all]
        return PlainTextResponse("\n".join(lines) + "\n")

    app.add_route("/health", health)
    app.add_route("/metrics", metrics)
