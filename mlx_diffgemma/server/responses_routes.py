"""Answers OpenAI's Responses, which remember what was said before; within bounds."""

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import APIRouter
from fastapi import Request as Http
from fastapi.responses import JSONResponse, Response

from ..tasks.generate import Request
from ..text.tokenizer import Message
from .refused import RESPONSES, Refused, streamed
from .responses import check, messages_of, response_request
from .responses_answers import ResponseReply
from .responses_body import ResponsesBody
from .responses_memory import Memory
from .service import Models
from .stream import Lines, begun, gathered


def router(models: Models) -> APIRouter:
    """Make the routes of OpenAI's Responses."""
    routes, memory = APIRouter(), Memory()

    @routes.post("/v1/responses", responses=streamed())
    async def respond(http: Http, body: ResponsesBody) -> Response:
        return await _answered(models, memory, http, body)

    @routes.get("/v1/responses/{identity}", responses=RESPONSES)
    async def retrieve(identity: str) -> dict[str, Any]:
        found = memory.find(identity)
        if found is None:
            raise _unknown(identity)
        return found.response

    @routes.delete("/v1/responses/{identity}", responses=RESPONSES)
    async def forget(identity: str) -> dict[str, Any]:
        if not memory.forget(identity):
            raise _unknown(identity)
        return {"id": identity, "object": "response", "deleted": True}

    return routes


def _unknown(identity: str) -> Refused:
    return Refused(404, f"there is no response {identity!r} here, or no longer")


async def _answered(models: Models, memory: Memory, http: Http, body: ResponsesBody) -> Response:
    check(body)
    before, other = _before(memory, body)
    service = models.answering(body.model or other)
    if other not in (None, service.name):
        told = f"the response before was written by {other}, which is another model"
        raise Refused(400, f"previous_response_id: {told}", param="previous_response_id")
    said: list[Message] = [*before]

    def make() -> Request:
        said.extend(messages_of(body, before))
        return response_request(body, said)

    work, patience = await service.chat(http, make, slow=body.slow)
    reply = ResponseReply(body, service.name, service.worker.tokenizer)
    stream, headers = service.stream([work], patience), service.headers(body)

    def keep() -> None:
        if body.store is not False:
            memory.keep([*said, reply.message()], reply.whole())

    if body.stream:
        lines = _lines(await begun(http, stream), reply, keep)
        return Lines(lines, stream, headers, end="", failed=reply.failed)
    for _, event in await gathered(http, stream):
        list(reply.take(event))
    keep()
    return JSONResponse(reply.whole(), headers=headers)


def _before(memory: Memory, body: ResponsesBody) -> tuple[Sequence[Message], str | None]:
    """What was said up to the response that this one goes on with, and the model that wrote it.

    Raises:
        Refused: it is not kept.
    """
    if body.previous_response_id is None:
        return [], None
    found = memory.find(body.previous_response_id)
    if found is None:
        told = f"previous_response_id: there is no {body.previous_response_id!r} here, or no longer"
        raise Refused(400, told, "previous_response_not_found", "previous_response_id")
    return found.messages, found.response["model"]


async def _lines(
    events: AsyncIterator[tuple[int, object]], reply: ResponseReply, keep: Callable[[], None]
) -> AsyncIterator[str]:
    """Write the events of a response; it is kept before its end is told."""
    for line in reply.begin():
        yield line
    async for _, event in events:
        for line in reply.take(event):
            yield line
    last = [*reply.end()]
    keep()
    for line in last:
        yield line
