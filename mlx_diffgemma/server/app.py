"""Puts the HTTP server together over one `Worker`: middleware, errors, and a router for each API.

Needs the extra `server`. Another API is one more file, and one more line in `make_app`.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict

import mlx.core as mx
from fastapi import APIRouter, FastAPI
from fastapi import Request as Http
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from ..diffusion.prompt_cache import ContextError
from ..errors import Error
from . import (
    anthropic_routes,
    infill_routes,
    native,
    ollama_routes,
    openai_routes,
    responses_routes,
)
from .access import Gate, Limits
from .invalid import mistake
from .page import add_page
from .pictures import sees
from .refused import Refused, refusal
from .service import Service
from .worker import Worker


def make_app(
    worker: Worker,
    *,
    name: str,
    aliases: Sequence[str] = (),
    api_key: str | None = None,
    cors: Sequence[str] = (),
    loopback: bool = True,
    allowed_hosts: Sequence[str] = (),
    most_bytes: int = 4 << 20,
    picture_bytes: int = 24 << 20,
) -> FastAPI:
    """Make the application, which stops the worker at its end.

    Args:
        worker: started by whoever makes the application.
        name: the model's, as `/v1/models` lists it.
        aliases: further names by which it is found there.
        api_key: what clients have to send, if anything.
        cors: origins whose pages may ask.
        loopback: only this machine can reach the server, so it answers only to `localhost` and
            the like; otherwise also to addresses and to this machine's own name.
        allowed_hosts: further names that it answers to; `*` is any.
        most_bytes: of a request's body, its pictures not counted.
        picture_bytes: of the pictures of a body, where the model sees any.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(worker.stop)

    # Their pages would have the browser fetch scripts from elsewhere.
    app = FastAPI(title="mlx-diffgemma", lifespan=lifespan, docs_url=None, redoc_url=None)
    # The last one added is met first.
    room = picture_bytes if sees(worker.model) else 0
    app.add_middleware(Limits, most_bytes=most_bytes, picture_bytes=room, api_key=api_key)
    if cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(cors), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(Gate, loopback=loopback, allowed_hosts=allowed_hosts, origins=cors)
    _handle_errors(app)
    service = Service(worker, name, aliases)
    app.include_router(openai_routes.router(service))
    app.include_router(responses_routes.router(service))
    app.include_router(anthropic_routes.router(service))
    app.include_router(ollama_routes.router(service))
    app.include_router(infill_routes.router(service))
    app.include_router(native.router(service))
    app.include_router(_state(worker))
    add_page(app)
    return app


def _handle_errors(app: FastAPI) -> None:
    """Tell whatever goes wrong in the form of the route's clients."""

    def answer(http: Http, error: Refused) -> Response:
        return refusal(error, http.url.path)

    @app.exception_handler(Refused)
    async def refused(http: Http, error: Refused) -> Response:
        return answer(http, error)

    @app.exception_handler(Error)
    async def expected(http: Http, error: Error) -> Response:
        code = "context_length_exceeded" if isinstance(error, ContextError) else None
        return answer(http, Refused(400, str(error), code))

    @app.exception_handler(HTTPException)
    async def http_error(http: Http, error: HTTPException) -> Response:
        response = answer(http, Refused(error.status_code, str(error.detail)))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Http, error: RequestValidationError) -> Response:
        said, field = mistake(error.errors(), error.body)
        return answer(http, Refused(400, said, param=field))

    @app.exception_handler(Exception)
    async def defect(http: Http, error: Exception) -> Response:
        # The connection ends with it: say so, or the client's next request is lost.
        response = answer(http, Refused(500, "a defect of the server"))
        response.headers["Connection"] = "close"
        return response


def _state(worker: Worker) -> APIRouter:
    """Make the routes that say how the server is."""
    routes = APIRouter()

    @routes.get("/health")
    async def health() -> Response:
        state = {"status": "ok" if worker.alive else "stopping"}
        return JSONResponse(state, 200 if worker.alive else 503)

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> str:
        gauges = {
            "requests_waiting": worker.waiting,
            "requests_running": worker.running,
            "memory_active_bytes": mx.get_active_memory(),
            "memory_peak_bytes": mx.get_peak_memory(),
        }
        lines = []
        counters = {f"{key}_total": value for key, value in asdict(worker.counters).items()}
        for kind, values in (("counter", counters), ("gauge", gauges)):
            for key, value in values.items():
                lines += [f"# TYPE diffgemma_{key} {kind}", f"diffgemma_{key} {value}"]
        return "\n".join(lines) + "\n"

    return routes
