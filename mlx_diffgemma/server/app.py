"""Puts the HTTP server together over the models: middleware, errors, and a router for each API.

Needs the extra `server`. Another API is one more file, and one more line in `make_app`.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from fastapi import APIRouter, FastAPI
from fastapi import Request as Http
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response

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
from .access import Access
from .invalid import mistake
from .metrics import metrics_of
from .page import add_page
from .pictures import sees
from .refused import Refused, beyond_context, refusal, tell_errors
from .service import Models
from .thread import MlxThread


def make_app(thread: MlxThread, access: Access | None = None) -> FastAPI:
    """Make the application, which stops the thread at its end.

    Args:
        thread: answers for the models; started by whoever makes the application.
        access: who may ask; None is as `Access` has it.
    """
    access = access or Access()
    if not any(sees(each.model) for each in thread.workers):
        access = replace(access, picture_bytes=0)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(thread.stop)

    # Their pages would have the browser fetch scripts from elsewhere.
    app = FastAPI(title="mlx-diffgemma", lifespan=lifespan, docs_url=None, redoc_url=None)
    access.guard(app)
    _handle_errors(app)
    models = Models(thread.workers)
    app.include_router(openai_routes.router(models))
    app.include_router(responses_routes.router(models))
    app.include_router(anthropic_routes.router(models))
    app.include_router(ollama_routes.router(models))
    app.include_router(infill_routes.router(models))
    app.include_router(native.router(models))
    app.include_router(_state(thread))
    add_page(app)
    return app


def _handle_errors(app: FastAPI) -> None:
    """Tell whatever goes wrong in the form of the route's clients."""
    tell_errors(app)

    def answer(http: Http, error: Refused) -> Response:
        return refusal(error, http.url.path)

    @app.exception_handler(Error)
    async def expected(http: Http, error: Error) -> Response:
        if isinstance(error, ContextError):
            return answer(http, beyond_context(error, http.url.path))
        return answer(http, Refused(400, str(error)))

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Http, error: RequestValidationError) -> Response:
        said, field = mistake(error.errors(), error.body)
        return answer(http, Refused(400, said, param=field))


def _state(thread: MlxThread) -> APIRouter:
    """Make the routes that say how the server is."""
    routes, workers = APIRouter(), thread.workers

    @routes.get("/health")
    async def health() -> Response:
        state = {
            "status": "ok" if thread.alive else "stopping",
            "waiting": sum(each.waiting for each in workers),
            "running": sum(each.running for each in workers),
            "max_batch": sum(each.max_batch for each in workers),
            "max_queue": sum(each.max_queue for each in workers),
        }
        return JSONResponse(state, 200 if thread.alive else 503)

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> str:
        return metrics_of(workers)

    return routes
