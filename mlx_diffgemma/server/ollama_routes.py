"""Answers Ollama's routes: chats, completions, and what the model is."""

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from fastapi import Request as Http
from fastapi.responses import JSONResponse, Response

from ..tasks.fill import FillResult
from ..tasks.request import Done, Prepared
from .body import Body
from .ollama import (
    Asking,
    ChatBody,
    GenerateBody,
    ShowBody,
    chat_request,
    continuation,
    generate_request,
    infilling,
)
from .ollama_answers import SPOKEN, OllamaReply, failed_line, line, listed, shown
from .openai import infill
from .openai_answers import InfillReply
from .refused import RESPONSES, Refused, stopping, streamed
from .service import Models, Service
from .stream import Lines, Stream, begun, gathered
from .worker import Patience

NDJSON = "application/x-ndjson"


def router(models: Models) -> APIRouter:
    """Make the routes of Ollama's API."""
    routes = APIRouter()

    @routes.post("/api/chat", responses=streamed(NDJSON))
    async def chat(http: Http, body: ChatBody) -> Response:
        service = models.answering(_named(body.model))
        reply = _reply(service, body, chat=True)
        if body.is_empty:
            return await _nothing(service, http, body, reply)
        work, patience = await service.chat(http, lambda: chat_request(body), slow=body.slow)
        return await _answered(service, http, body, reply, work, patience)

    @routes.post("/api/generate", responses=streamed(NDJSON))
    async def generate(http: Http, body: GenerateBody) -> Response:
        service = models.answering(_named(body.model))
        reply = _reply(service, body, chat=False)
        work: Prepared[object]
        if body.is_empty:
            return await _nothing(service, http, body, reply)
        if body.suffix:
            return await _infill(service, http, body, reply)
        if body.raw:
            work, patience = await service.prepare(http, continuation(body))
        else:
            work, patience = await service.chat(
                http, lambda: generate_request(body), slow=body.slow
            )
        return await _answered(service, http, body, reply, work, patience)

    @routes.get("/api/tags")
    async def tags() -> dict[str, Any]:
        return {"models": [listed(each.facts) for each in models.services]}

    @routes.get("/api/ps")
    async def running() -> dict[str, Any]:
        loaded = [each.facts for each in models.services if each.worker.loaded]
        length = "context_length"
        return {"models": [{**listed(facts), length: facts[length]} for facts in loaded]}

    @routes.post("/api/show", responses=RESPONSES)
    async def show(body: ShowBody) -> dict[str, Any]:
        name = _named(body.model or body.name)
        if not name:
            raise Refused(400, "model: it is missing", param="model")
        return shown(models.find(name).facts)

    @routes.get("/api/version")
    async def version() -> dict[str, Any]:
        return {"version": SPOKEN}

    return routes


def _named(name: str | None) -> str | None:
    """Give the name of a model without the tag that clients add to it."""
    return None if name is None else name.removesuffix(":latest")


def _reply(service: Service, body: Asking, *, chat: bool) -> OllamaReply:
    pieces = service.worker.tokenizer.pieces if body.logprobs else None
    return OllamaReply(service.name, chat=chat, pieces=pieces)


async def _nothing(service: Service, http: Http, body: Asking, reply: OllamaReply) -> Response:
    """Answer one who only wants the model to be there, which it then is; or to go."""
    answer = reply.nothing(body.keep_alive)
    if answer["done_reason"] == "load":
        await service.warm(http)
    return _one(service, body, answer)


def _one(service: Service, body: Body, answer: dict[str, Any]) -> Response:
    """Answer in one part, which is a stream of one line as well."""
    headers = service.headers(body)
    if isinstance(body, Asking) and body.stream is not False:
        return Response(line(answer), headers=headers, media_type=NDJSON)
    return JSONResponse(answer, headers=headers)


async def _answered(
    service: Service,
    http: Http,
    body: Asking,
    reply: OllamaReply,
    work: Prepared[object],
    patience: Patience,
) -> Response:
    stream = service.stream([work], patience)
    if body.stream is not False:
        lines = _lines(await begun(http, stream), reply)
        return _ndjson(lines, stream, service.headers(body))
    parts = [reply.take(event) for _, event in await gathered(http, stream)]
    return JSONResponse(reply.whole(parts), headers=service.headers(body))


def _ndjson(lines: AsyncIterator[str], stream: Stream, headers: dict[str, str]) -> Lines:
    return Lines(lines, stream, headers, end="", failed=failed_line, media_type=NDJSON)


async def _lines(
    events: AsyncIterator[tuple[int, object]], reply: OllamaReply
) -> AsyncIterator[str]:
    """Write the events of an answer as lines."""
    async for _, event in events:
        if part := reply.take(event):
            yield line(part)
        if isinstance(event, Done):
            yield line(reply.end())


async def _infill(service: Service, http: Http, body: GenerateBody, reply: OllamaReply) -> Response:
    """Answer with what stands between a prompt and a suffix, at once."""
    asked = infilling(body)
    task, tokenizer = infill(asked), service.worker.tokenizer

    def make(patience: Patience) -> tuple[Prepared[object], InfillReply]:
        work = service.worker.prepare(task, patience)
        return work, InfillReply(asked, service.name, tokenizer, body.prompt or "")

    (work, found), patience = await service.make(http, make)
    for _, event in await gathered(http, service.stream([work], patience)):
        if isinstance(event, FillResult):
            whole = found.whole(event)
            usage, text = whole["usage"], whole["choices"][0]["text"]
            read, written = usage["prompt_tokens"], usage["completion_tokens"]
            return _one(service, body, reply.infilled(text, read, written))
    raise stopping()
