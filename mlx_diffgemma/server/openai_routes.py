"""Answers OpenAI's routes: chats, completions with and without a suffix, the models' names."""

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from fastapi import Request as Http
from fastapi.responses import JSONResponse, Response

from ..tasks.fill import FillResult
from ..tasks.request import Done, Draft, Prepared
from ..tasks.score import ScoreResult
from ..text.tokenizer import Tokenizer
from .events import sse
from .infill import unmarked
from .openai import (
    ChatBody,
    CompletionBody,
    Sampling,
    asks_scores,
    best_of,
    chat_request,
    continuations,
    infill,
    prompts_of,
    several,
    wants_usage,
)
from .openai_answers import ChatReply, CompletionReply, InfillReply, Reply, usage_of
from .openai_scores import ScoreReply, score_requests
from .refused import RESPONSES, stopping, streamed
from .service import Models, Service
from .stream import Lines, Stream, begun, draft_event, gathered
from .worker import Patience


def router(models: Models) -> APIRouter:
    """Make the routes of OpenAI's API."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions", responses=streamed())
    async def chat(http: Http, body: ChatBody) -> Response:
        return await _chat(models.answering(body.model), http, body)

    @routes.post("/v1/completions", responses=streamed())
    async def complete(http: Http, body: CompletionBody) -> Response:
        service = models.answering(body.model)
        if asks_scores(body):
            return await _score(service, http, body)
        body = unmarked(body)
        answer = _infill if body.suffix else _complete
        return await answer(service, http, body)

    @routes.get("/v1/models")
    async def listed() -> dict[str, Any]:
        found = [each.facts for each in models.services]
        # Anthropic's client asks here, too, and wants to know of further pages.
        pages = {"has_more": False, "first_id": found[0]["id"], "last_id": found[-1]["id"]}
        return {"object": "list", "data": found, **pages}

    @routes.get("/v1/models/{name:path}", responses=RESPONSES)
    async def model(name: str) -> dict[str, Any]:
        return models.find(name).facts

    return routes


async def _chat(service: Service, http: Http, body: ChatBody) -> Response:
    slow = body.response_format is not None or body.has_pictures
    one, patience = await service.chat(http, lambda: chat_request(body), slow=slow)
    works = several(one, body.n or 1, body.seed)
    reply = ChatReply(body, service.name, len(works), service.worker.tokenizer)
    return await _answered(service, http, body, service.stream(works, patience), reply)


async def _complete(service: Service, http: Http, body: CompletionBody) -> Response:
    count, tasks = best_of(body), continuations(body)

    def make(patience: Patience) -> list[Prepared[object]]:
        return [service.worker.prepare(task, patience) for task in tasks]

    each_once, patience = await service.make(http, make)
    works = [work for each in each_once for work in several(each, count, body.seed)]
    reply = CompletionReply(body, service.name, service.worker.tokenizer)
    return await _answered(service, http, body, service.stream(works, patience), reply)


async def _score(service: Service, http: Http, body: CompletionBody) -> Response:
    """Answer with how likely the prompts are."""
    tasks = score_requests(body)

    def make(patience: Patience) -> list[Prepared[object]]:
        return [service.worker.prepare(task, patience) for task in tasks]

    works, patience = await service.make(http, make)
    reply = ScoreReply(body, service.name, service.worker.tokenizer)
    events = await gathered(http, service.stream(works, patience))
    found = {index: event for index, event in events if isinstance(event, ScoreResult)}
    if len(found) < len(works):
        raise stopping()
    results = [found[index] for index in range(len(works))]
    # In a thread: of a whole context, thousands of tokens are named.
    whole, _ = await service.make(http, lambda _: JSONResponse(reply.whole(results)).body)
    return Response(whole, headers=service.headers(body), media_type="application/json")


async def _answered(
    service: Service, http: Http, body: Sampling, stream: Stream, reply: Reply
) -> Response:
    """Answer with the choices of a reply, as they come or at the end."""
    headers = service.headers(body)
    if body.stream:
        lines = _lines(body, await begun(http, stream), reply, service.worker.tokenizer)
        return Lines(lines, stream, headers)
    for index, event in await gathered(http, stream):
        reply.choices[index].take(event)
    return JSONResponse(reply.whole(), headers=headers)


async def _lines(
    body: Sampling, events: AsyncIterator[tuple[int, object]], reply: Reply, tokenizer: Tokenizer
) -> AsyncIterator[str]:
    """Write the events of a reply as server-sent events."""
    for i in range(len(reply.choices)):
        if head := reply.chunk(i, None, None):
            yield sse(head)
    async for index, event in events:
        choice = reply.choices[index]
        delta = choice.take(event)
        if isinstance(event, Draft) and body.stream_drafts:
            yield draft_event(index, event, tokenizer)
        elif isinstance(event, Done):
            yield sse(reply.chunk(index, {}, choice.reason))
        elif delta:
            yield sse(reply.chunk(index, delta, None))
    if wants_usage(body):
        usage = usage_of(reply.choices, reply.per_prompt)
        yield sse({**reply.chunk(0, {}, None), "choices": [], "usage": usage})


async def _infill(service: Service, http: Http, body: CompletionBody) -> Response:
    """Answer with what stands between a prompt and a suffix."""
    tokenizer = service.worker.tokenizer
    task = infill(body)

    def make(patience: Patience) -> tuple[Prepared[object], InfillReply]:
        work = service.worker.prepare(task, patience)
        return work, InfillReply(body, service.name, tokenizer, str(prompts_of(body)[0]))

    (work, reply), patience = await service.make(http, make)
    stream, headers = service.stream([work], patience), service.headers(body)
    if body.stream:
        lines = _infilled(body, await begun(http, stream), reply, tokenizer)
        return Lines(lines, stream, headers)
    for _, event in await gathered(http, stream):
        if isinstance(event, FillResult):
            return JSONResponse(reply.whole(event), headers=headers)
    raise stopping()


async def _infilled(
    body: CompletionBody,
    events: AsyncIterator[tuple[int, object]],
    reply: InfillReply,
    tokenizer: Tokenizer,
) -> AsyncIterator[str]:
    """Write the events of an infilling as server-sent events."""
    async for _, event in events:
        if isinstance(event, Draft) and body.stream_drafts:
            yield draft_event(0, event, tokenizer)
        elif isinstance(event, FillResult):
            whole = reply.whole(event)
            usage = whole.pop("usage")
            yield sse(whole)
            if wants_usage(body):
                yield sse({**whole, "choices": [], "usage": usage})
