"""Answers Anthropic's routes: messages, and the count of their tokens."""

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from fastapi import Request as Http
from fastapi.responses import JSONResponse, Response

from .anthropic import begun_by, message_request, settings_of
from .anthropic_answers import PING, MessageReply, failed_event
from .anthropic_body import CountBody, MessagesBody
from .refused import RESPONSES, streamed
from .service import Models, Service
from .stream import Lines, begun, gathered

# Seconds of a stream in which nothing but drafts has come, after which it says that it goes on.
PING_SECONDS = 5


def router(models: Models) -> APIRouter:
    """Make the routes of Anthropic's API."""
    routes = APIRouter()

    @routes.post("/v1/messages", responses=streamed())
    async def messages(http: Http, body: MessagesBody) -> Response:
        return await _answered(models.answering(body.model), http, body)

    @routes.post("/v1/messages/count_tokens", responses=RESPONSES)
    async def count(http: Http, body: CountBody) -> dict[str, Any]:
        service = models.answering(body.model)
        thinks = service.worker.tokenizer.knows_thinking
        work, _ = await service.chat(http, lambda: message_request(body, thinks), slow=body.slow)
        return {"input_tokens": len(work.prompt)}

    return routes


async def _answered(service: Service, http: Http, body: MessagesBody) -> Response:
    thinks = service.worker.tokenizer.knows_thinking
    work, patience = await service.chat(
        http, lambda: replace(message_request(body, thinks), **settings_of(body)), slow=body.slow
    )
    reply = MessageReply(service.name, len(work.prompt), begun_by(body))
    stream, headers = service.stream([work], patience), service.headers(body)
    if body.stream:
        lines = _lines(await begun(http, stream), reply)
        return Lines(lines, stream, headers, end="", failed=failed_event)
    for _, event in await gathered(http, stream):
        list(reply.take(event))
    return JSONResponse(reply.whole(), headers=headers)


async def _lines(
    events: AsyncIterator[tuple[int, object]], reply: MessageReply
) -> AsyncIterator[str]:
    """Write the events of an answer, and pings where it takes long."""
    for line in reply.begin():
        yield line
    last = time.monotonic()
    async for _, event in events:
        for line in reply.take(event):
            last = time.monotonic()
            yield line
        if time.monotonic() - last > PING_SECONDS:
            last = time.monotonic()
            yield PING
    for line in reply.end():
        yield line
