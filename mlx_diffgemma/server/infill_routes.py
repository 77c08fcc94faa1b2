"""Answers the routes of editors: `/infill` as llama.cpp does, `/v1/fim/completions` as Mistral."""

from typing import Any

from fastapi import APIRouter
from fastapi import Request as Http
from fastapi.responses import JSONResponse, Response

from .body import Body
from .events import sse
from .infill import Between, FimBody, FimReply, InfillBody, InfillReply, fim_of, infill_of
from .leaving import unless_gone
from .refused import streamed
from .service import Models, Service


def router(models: Models) -> APIRouter:
    """Make the routes of editors."""
    routes = APIRouter()

    @routes.post("/infill", responses=streamed())
    async def infill(http: Http, body: InfillBody) -> Response:
        service = models.answering(body.model)
        found, reply = infill_of(body), InfillReply(service.name, body.response_fields)
        await _write(service, http, found)
        if not body.stream:
            return JSONResponse(reply.whole(found, found.text), headers=service.headers(body))
        parts = [reply.part(found), reply.whole(found, "")]
        return _streamed(service, body, parts, "")

    @routes.post("/v1/fim/completions", responses=streamed())
    async def complete(http: Http, body: FimBody) -> Response:
        service = models.answering(body.model)
        found, reply = fim_of(body), FimReply(service.name)
        await _write(service, http, found)
        if not body.stream:
            return JSONResponse(reply.whole(found), headers=service.headers(body))
        return _streamed(service, body, [reply.part(found), reply.end(found)], "data: [DONE]\n\n")

    return routes


async def _write(service: Service, http: Http, found: Between) -> None:
    """Have the text written, if there is anything to write."""
    worker = service.worker
    task, tokenizer = found.task(worker.model.context), worker.tokenizer
    if task is None:
        return
    work, patience = await service.prepare(http, task)
    stream = service.stream([work], patience)

    async def take() -> None:
        async for _, event in stream:
            found.take(event, tokenizer)

    await unless_gone(http, take(), stream.close)


def _streamed(service: Service, body: Body, parts: list[dict[str, Any]], end: str) -> Response:
    """Send the parts of a finished answer as server-sent events: no part of a text between two
    others is done before all of it is."""
    headers = {"Cache-Control": "no-store", **service.headers(body)}
    content = "".join(map(sse, parts)) + end
    return Response(content, headers=headers, media_type="text/event-stream")
