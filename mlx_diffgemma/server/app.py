"""The HTTP server: OpenAI's routes and our own, over one `Worker`. Needs the extra `server`."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
from fastapi import FastAPI
from fastapi import Request as Http
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import (
    FileResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from ..diffusion.guards import Guards
from ..diffusion.prompt_cache import ContextError, Reading
from ..errors import Error
from ..tasks.choose import ChooseRequest
from ..tasks.edit import EditRequest, EditResult
from ..tasks.fill import FillRequest, FillResult
from ..tasks.generate import Answer, Request
from ..tasks.request import Done, Draft, Prepared
from ..tasks.starts import Pieces
from ..text.template import Hole
from ..text.turns import StopStrings
from .access import Gate, Limits, refusal
from .openai import (
    Body,
    ChatBody,
    Choice,
    ChooseBody,
    CompletionBody,
    EditBody,
    FillBody,
    Refused,
    Sampling,
    chat_request,
    error_body,
    ignored,
    several,
    stops,
    usage_of,
)
from .preparing import QUICK_BYTES, Places
from .worker import Busy, Patience, Stopped, Ticket, Timeout, Worker

PAGE = Path(__file__).parent.parent / "data" / "page.html"

# Seconds that a refused client is asked to wait.
RETRY_AFTER = 2

Result = TypeVar("Result")


class Stream:
    """Events of several pieces of work, on their way from the worker's thread to a handler."""

    def __init__(self, worker: Worker, works: Sequence[Prepared[object]], patience: Patience):
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[list[Any]] = asyncio.Queue()
        self._drafts: dict[int, list[Any]] = {}  # those that nobody has taken from the queue yet
        self._tickets: list[Ticket] = []
        self._open = len(works)
        try:
            for i, work in enumerate(works):
                self._tickets.append(worker.submit(work, self._listener(i), patience))
        except Busy:
            self.close()
            raise Refused(429, "the server is busy, try again soon", "queue_full") from None

    def _listener(self, index: int) -> Callable[[object], None]:
        def listen(event: object) -> None:
            with suppress(RuntimeError):  # the loop has gone
                self._loop.call_soon_threadsafe(self._put, index, event)

        return listen

    def _put(self, index: int, event: object) -> None:
        """Queue an event. Whoever reads slowly misses drafts: thousands of them would pile up."""
        waiting = self._drafts.pop(index, None)
        if isinstance(event, Draft):
            if waiting is None:
                self._events.put_nowait(waiting := [index, event])
            waiting[1] = event
            self._drafts[index] = waiting
        else:
            self._events.put_nowait([index, event])

    def close(self) -> None:
        """Nobody waits any more."""
        for ticket in self._tickets:
            self._worker.cancel(ticket)

    async def __aiter__(self) -> AsyncIterator[tuple[int, object]]:
        while self._open:
            item = await self._events.get()
            index, event = item
            if self._drafts.get(index) is item:
                del self._drafts[index]
            if event is None:
                self._open -= 1
            elif isinstance(event, Timeout):
                raise Refused(504, str(event), "timeout")
            elif isinstance(event, Stopped):
                raise Refused(503, str(event), "stopping")
            elif isinstance(event, ContextError):
                raise Refused(400, str(event), "context_length_exceeded")
            elif isinstance(event, Error):
                raise Refused(400, str(event))
            elif isinstance(event, Exception):
                raise Refused(500, "a defect of the server")
            else:
                yield index, event


async def unless_gone(
    http: Http,
    work: Coroutine[Any, Any, Result],
    close: Callable[[], None],
    seconds: float | None = None,
) -> Result:
    """What the work gives. `close` is called where it fails, its time is over, or nobody waits.

    Raises:
        TimeoutError: after `seconds`; the work is cancelled.
    """

    async def gone() -> None:
        while not await http.is_disconnected():
            await asyncio.sleep(0.1)

    task, watch = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        first = asyncio.FIRST_COMPLETED
        done, _ = await asyncio.wait({task, watch}, timeout=seconds, return_when=first)
        if not done:
            raise TimeoutError
        if not task.done():
            raise Refused(499, "the client has gone")
        return task.result()
    except asyncio.CancelledError:  # the time that a shutdown grants is over
        close()
        raise Refused(503, "the server is shutting down", "stopping") from None
    except BaseException:
        close()
        raise
    finally:
        for each in (task, watch):
            each.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await each


async def gathered(http: Http, stream: Stream) -> list[tuple[int, object]]:
    """All events, but of the drafts only the last of each canvas."""

    async def collect() -> list[tuple[int, object]]:
        # Drafts are for those who watch; only the last of a canvas tells how sure the model was.
        found: list[tuple[int, object]] = []
        last: dict[int, Draft] = {}
        async for index, event in stream:
            if isinstance(event, Draft):
                last[index] = event
                continue
            if index in last:
                found.append((index, last.pop(index)))
            found.append((index, event))
        return found

    return await unless_gone(http, collect(), stream.close)


async def begun(http: Http, stream: Stream) -> AsyncIterator[tuple[int, object]]:
    """The events, once there is one: an error before it still has a status of its own."""
    events = stream.__aiter__()

    async def first() -> tuple[int, object]:
        return await anext(events)

    item = await unless_gone(http, first(), stream.close)

    async def every() -> AsyncIterator[tuple[int, object]]:
        yield item
        async for each in events:
            yield each

    return every()


class Lines(StreamingResponse):
    """Server-sent events and their end; an error is one more of them."""

    def __init__(self, lines: AsyncIterator[str], stream: Stream, headers: dict[str, str]):
        async def every() -> AsyncIterator[str]:
            try:
                async for line in lines:
                    yield line
                yield "data: [DONE]\n\n"
            except Refused as error:
                yield sse(error_body(error.status, error.message, error.code))

        headers = {"Cache-Control": "no-store", **headers}
        super().__init__(every(), media_type="text/event-stream", headers=headers)
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # not in the generator: a client may be gone before its first line is asked for
            self._stream.close()


def draft_event(index: int, draft: Draft) -> str:
    """A step as a server-sent event of its own type."""
    facts = {
        "index": index,
        "canvas": draft.canvas,
        "step": draft.step,
        "steps": draft.steps,
        "text": draft.text,
        "accepted": sum(draft.accepted),
        "length": len(draft.accepted),
    }
    return f"event: draft\ndata: {json.dumps(facts, ensure_ascii=False)}\n\n"


def sse(value: object) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def make_app(
    worker: Worker,
    *,
    name: str,
    api_key: str | None = None,
    cors: Sequence[str] = (),
    loopback: bool = True,
    allowed_hosts: Sequence[str] = (),
    most_bytes: int = 4 << 20,
) -> FastAPI:
    """The application; the worker runs from its start to its end.

    Args:
        worker: not yet started.
        name: the model's, as `/v1/models` lists it.
        api_key: what clients have to send, if anything.
        cors: origins whose pages may ask.
        loopback: only this machine can reach the server, so it answers only to `localhost` and
            the like; otherwise also to addresses and to this machine's own name.
        allowed_hosts: further names that it answers to; `*` is any.
        most_bytes: of a request's body.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(worker.stop)

    app = FastAPI(title="mlx-diffgemma", lifespan=lifespan)
    # The last one added is met first.
    app.add_middleware(Limits, most_bytes=most_bytes, api_key=api_key)
    if cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(cors), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(Gate, loopback=loopback, allowed_hosts=allowed_hosts, origins=cors)
    responses: dict[int | str, dict[str, Any]] = {
        code: {"description": text}
        for code, text in (
            (400, "refused"),
            (401, "no key"),
            (403, "another host, or a page of another origin"),
            (408, "the body came too slowly"),
            (413, "too large"),
            (415, "not JSON"),
            (429, "busy"),
            (503, "stopping"),
            (504, "too slow"),
        )
    }
    started = int(time.time())

    @app.exception_handler(Refused)
    async def refused(http: Http, error: Refused) -> Response:
        return refusal(error, {"Retry-After": str(RETRY_AFTER)} if error.status == 429 else None)

    @app.exception_handler(Error)
    async def expected(http: Http, error: Error) -> Response:
        code = "context_length_exceeded" if isinstance(error, ContextError) else None
        return JSONResponse(error_body(400, str(error), code), 400)

    @app.exception_handler(HTTPException)
    async def http_error(http: Http, error: HTTPException) -> Response:
        body = error_body(error.status_code, str(error.detail))
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Http, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return JSONResponse(error_body(400, f"{where}: {first['msg']}".lstrip(": ")), 400)

    @app.exception_handler(Exception)
    async def defect(http: Http, error: Exception) -> Response:
        # The connection ends with it: say so, or the client's next request is lost.
        return JSONResponse(error_body(500, "a defect of the server"), 500, {"Connection": "close"})

    def answer_headers(body: Body) -> dict[str, str]:
        names = ",".join(ignored(body))
        return {"X-Ignored-Parameters": names} if names else {}

    places = Places()

    async def prepared(
        http: Http, make: Callable[[Patience], Result], *, slow: bool = False
    ) -> tuple[Result, Patience]:
        """What is made in a thread of its own: others go on, in this loop and in the worker.

        And what is left of the time that the request may take. What is `slow` for few bytes, such
        as a schema, waits for others of its kind only.
        """
        patience = worker.patience()
        length = http.headers.get("content-length", "")
        quick = not slow and length.isdecimal() and int(length) <= QUICK_BYTES

        def close() -> None:
            patience.gone = True

        work = places.prepare(partial(make, patience), quick=quick)
        try:
            return await unless_gone(http, work, close, patience.left), patience
        except (TimeoutError, Timeout):
            raise Refused(504, str(patience.timeout), "timeout") from None

    async def streamed(
        http: Http,
        body: Sampling,
        stream: Stream,
        choices: list[Choice],
        per_prompt: int,
        chunk: Callable[..., dict[str, Any]],
    ) -> Response:
        """The answers as server-sent events; `chunk` makes what a delta is told in."""
        events = await begun(http, stream)

        async def lines() -> AsyncIterator[str]:
            for i in range(len(choices)):
                if head := chunk(i, None, None):
                    yield sse(head)
            async for index, event in events:
                delta = choices[index].take(event)
                if isinstance(event, Draft) and body.stream_drafts:
                    yield draft_event(index, event)
                elif isinstance(event, Done):
                    yield sse(chunk(index, {}, choices[index].reason))
                elif delta:
                    yield sse(chunk(index, delta, None))
            if wants_usage(body):
                usage = usage_of(choices, per_prompt)
                yield sse({**chunk(0, {}, None), "choices": [], "usage": usage})

        return Lines(lines(), stream, answer_headers(body))

    @app.post("/v1/chat/completions", responses=responses)
    async def chat(http: Http, body: ChatBody) -> Response:
        def encoded(patience: Patience) -> Answer:
            return chat_request(body).prepare(worker.model, worker.vocabulary, patience.check)

        one, patience = await prepared(http, encoded, slow=body.response_format is not None)
        requests = several(one, body.n or 1, body.seed)
        identity, created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        common = {"id": identity, "created": created, "model": name}
        pieces = worker.tokenizer.pieces if body.logprobs else None
        choices = [Choice(pieces) for _ in requests]
        stream = Stream(worker, requests, patience)
        if body.stream:

            def chunk(
                index: int, delta: dict[str, Any] | None, reason: str | None
            ) -> dict[str, Any]:
                shown = {"role": "assistant", "content": ""} if delta is None else delta
                choice = {"index": index, "delta": shown, "finish_reason": reason}
                if body.logprobs and "content" in shown and delta is not None:
                    choice["logprobs"] = {"content": choices[index].logprobs}
                    choices[index].logprobs = []
                if reason is not None:
                    choice["diffusion"] = choices[index].facts
                return {**common, "object": "chat.completion.chunk", "choices": [choice]}

            return await streamed(http, body, stream, choices, len(choices), chunk)
        for index, event in await gathered(http, stream):
            choices[index].take(event)
        answers = []
        for i, choice in enumerate(choices):
            message: dict[str, Any] = {"role": "assistant", "content": choice.text}
            if choice.thought:
                message["reasoning_content"] = choice.thought
            if choice.calls:
                message["tool_calls"] = choice.calls
                message["content"] = choice.text or None
            answers.append(
                {
                    "index": i,
                    "message": message,
                    "finish_reason": choice.reason,
                    "logprobs": {"content": choice.logprobs} if body.logprobs else None,
                    "diffusion": choice.facts,
                }
            )
        answer = {**common, "object": "chat.completion", "choices": answers}
        answer["usage"] = usage_of(choices, len(choices))
        return JSONResponse(answer, headers=answer_headers(body))

    @app.post("/v1/completions", responses=responses)
    async def complete(http: Http, body: CompletionBody) -> Response:
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        identity, created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        common = {"id": identity, "created": created, "model": name, "object": "text_completion"}
        if body.suffix:
            return await infill(http, body, prompts, common)
        best_of = max(body.best_of or 1, body.n or 1)
        if body.stream and best_of > (body.n or 1):
            raise Refused(400, "best_of does not go with stream")
        bos = worker.tokenizer.token_id("<bos>")
        template = Request(
            "",
            max_tokens=body.max_tokens,
            steps=body.steps,
            guards=Guards(),
            stop=stops(body.stop),
            opening=body.opening or "",
        )

        def encoded(patience: Patience) -> list[Answer]:
            texts = [worker.encoded(prompt, patience) for prompt in prompts]
            ids = [each if bos is None else [bos, *each] for each in texts]
            asked = [replace(template, prompt=each) for each in ids]
            given = worker.model, worker.vocabulary, patience.check
            return [each.prepare(*given) for each in asked]

        each_once, patience = await prepared(http, encoded)
        requests = [one for each in each_once for one in several(each, best_of, body.seed)]
        choices = [Choice() for _ in requests]
        stream = Stream(worker, requests, patience)
        if body.stream:

            def chunk(
                index: int, delta: dict[str, Any] | None, reason: str | None
            ) -> dict[str, Any]:
                if delta is None and not body.echo:
                    return {}
                text = prompts[index // best_of] if delta is None else delta.get("content", "")
                choice = {"index": index, "text": text, "finish_reason": reason, "logprobs": None}
                return {**common, "choices": [choice]}

            return await streamed(http, body, stream, choices, best_of, chunk)
        for index, event in await gathered(http, stream):
            choices[index].take(event)
        answers: list[dict[str, Any]] = []
        for i, prompt in enumerate(prompts):
            tried = choices[i * best_of : (i + 1) * best_of]
            kept = (
                tried if best_of == (body.n or 1) else sorted(tried, key=lambda c: c.mean_entropy)
            )
            for choice in kept[: body.n or 1]:
                text = (prompt if body.echo else "") + choice.text
                answers.append(
                    {
                        "index": len(answers),
                        "text": text,
                        "finish_reason": choice.reason,
                        "logprobs": None,
                        "diffusion": choice.facts,
                    }
                )
        answer = {**common, "choices": answers, "usage": usage_of(choices, best_of)}
        return JSONResponse(answer, headers=answer_headers(body))

    async def infill(
        http: Http, body: CompletionBody, prompts: list[str], common: dict[str, Any]
    ) -> Response:
        """What stands between a prompt and a suffix."""
        suffix = body.suffix or ""
        if len(prompts) > 1 or (body.n or 1) > 1 or (body.best_of or 1) > 1 or body.opening:
            raise Refused(400, "a suffix goes with one prompt and one answer, without an opening")
        parts: list[str | Hole] = [prompts[0], Hole("middle", most=body.max_tokens), suffix]
        until = stops(body.stop)

        asked = FillRequest(parts, steps=body.steps, seed=body.seed)

        def made(patience: Patience) -> tuple[Prepared[object], int]:
            form = worker.prepare(asked, patience)
            return form, len(worker.tokenizer.encode(prompts[0] + suffix))

        (form, read), patience = await prepared(http, made)
        stream = Stream(worker, [form], patience)

        def answer_of(result: FillResult) -> tuple[dict[str, Any], dict[str, int]]:
            stop_strings = StopStrings(until)
            text = stop_strings.feed(str(result.values["middle"]))
            text += "" if stop_strings.hit else stop_strings.rest()
            written = len(worker.tokenizer.encode(text))
            usage = {"prompt_tokens": read, "completion_tokens": written}
            shown = prompts[0] + text if body.echo else text
            choice = {"index": 0, "text": shown, "finish_reason": "stop", "logprobs": None}
            return choice, {**usage, "total_tokens": read + written}

        if not body.stream:
            choice, usage = answer_of(await filled(http, stream))
            answer = {**common, "choices": [choice], "usage": usage}
            return JSONResponse(answer, headers=answer_headers(body))
        events = await begun(http, stream)

        async def lines() -> AsyncIterator[str]:
            async for _, event in events:
                if isinstance(event, Draft) and body.stream_drafts:
                    yield draft_event(0, event)
                elif isinstance(event, FillResult):
                    choice, usage = answer_of(event)
                    yield sse({**common, "choices": [choice]})
                    if wants_usage(body):
                        yield sse({**common, "choices": [], "usage": usage})

        return Lines(lines(), stream, answer_headers(body))

    async def filled(http: Http, stream: Stream) -> FillResult:
        for _, event in await gathered(http, stream):
            if isinstance(event, FillResult):
                return event
        raise Refused(503, "the server is shutting down", "stopping")

    def fill_task(body: FillBody) -> FillRequest | Request:
        """A template, or a canvas some of whose pieces are pinned."""
        if body.template is not None:
            return FillRequest(body.template, body.prompt, body.steps, body.seed)
        pieces = tuple((piece.text, piece.pinned) for piece in body.canvas or ())
        shown = "".join(text if pinned else "..." for text, pinned in pieces)
        return Request(
            body.prompt or f"Fill: {shown}",
            max_tokens=worker.model.config.canvas_length,
            steps=body.steps,
            seed=body.seed,
            start=Pieces(pieces),
        )

    @app.post("/v1/fill", responses=responses)
    async def fill(http: Http, body: FillBody) -> Response:
        if (body.template is None) == (body.canvas is None):
            raise Refused(400, "there must be either a template or a canvas")

        task = fill_task(body)
        work, patience = await prepared(http, lambda patience: worker.prepare(task, patience))
        stream = Stream(worker, [work], patience)
        choice = Choice()
        if not body.stream_drafts:
            for _, event in await gathered(http, stream):
                if facts := fill_facts(event, choice):
                    return JSONResponse(facts, headers=answer_headers(body))
            raise Refused(503, "the server is shutting down", "stopping")
        events = await begun(http, stream)

        async def lines() -> AsyncIterator[str]:
            async for _, event in events:
                if isinstance(event, Draft):
                    yield draft_event(0, event)
                if facts := fill_facts(event, choice):
                    yield sse(facts)

        return Lines(lines(), stream, answer_headers(body))

    @app.post("/v1/choose", responses=responses)
    async def choosing(http: Http, body: ChooseBody) -> Response:
        slots = body.labels if isinstance(body.labels, dict) else {"label": body.labels}

        task = ChooseRequest(
            body.prompt, slots, body.template, body.isolated, body.seed, body.draws
        )
        work, patience = await prepared(http, lambda patience: worker.prepare(task, patience))
        for _, event in await gathered(http, Stream(worker, [work], patience)):
            if not isinstance(event, Reading):
                return JSONResponse({"probabilities": event}, headers=answer_headers(body))
        raise Refused(503, "the server is shutting down", "stopping")

    @app.post("/v1/edit", responses=responses)
    async def editing(http: Http, body: EditBody) -> Response:
        task = EditRequest(
            body.text, body.instruction, span(body.lines), body.strength, body.steps, body.seed
        )
        work, patience = await prepared(http, lambda patience: worker.prepare(task, patience))
        stream = Stream(worker, [work], patience)
        if not body.stream_drafts:
            for _, event in await gathered(http, stream):
                if isinstance(event, EditResult):
                    return JSONResponse(edit_facts(event), headers=answer_headers(body))
            raise Refused(503, "the server is shutting down", "stopping")
        events = await begun(http, stream)

        async def lines() -> AsyncIterator[str]:
            async for _, event in events:
                if isinstance(event, Draft):
                    yield draft_event(0, event)
                elif isinstance(event, EditResult):
                    yield sse(edit_facts(event))

        return Lines(lines(), stream, answer_headers(body))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        facts = {"context_length": worker.model_facts["context"]}
        facts["canvas_length"] = worker.model_facts["canvas"]
        model = {"id": name, "object": "model", "created": started, "owned_by": "local", **facts}
        return {"object": "list", "data": [model]}

    @app.get("/health")
    async def health() -> Response:
        state = {"status": "ok" if worker.alive else "stopping"}
        return JSONResponse(state, 200 if worker.alive else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
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

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        # Nobody else's page may lay itself over this one and have its buttons pressed.
        headers = {"Content-Security-Policy": "frame-ancestors 'none'"}
        return FileResponse(PAGE, media_type="text/html", headers=headers)

    return app


def wants_usage(body: Sampling) -> bool:
    """Whether a stream ends with how many tokens there were."""
    return bool((body.stream_options or {}).get("include_usage"))


def fill_facts(event: object, choice: Choice) -> dict[str, Any]:
    """A filled template or canvas as JSON, once it is there; `choice` collects a canvas's text."""
    if isinstance(event, FillResult):
        return {
            "text": event.text,
            "values": event.values,
            "denoising_steps": event.steps,
            "notes": list(event.notes),
        }
    choice.take(event)
    if choice.done is None:
        return {}
    steps = choice.done.denoising_steps
    return {"text": choice.text, "values": {}, "denoising_steps": steps, "notes": []}


def edit_facts(result: EditResult) -> dict[str, Any]:
    """An edited text as JSON."""
    return {"text": result.text, "denoising_steps": result.steps, "notes": list(result.notes)}


def span(lines: list[int] | None) -> tuple[int, int] | None:
    """First and last line."""
    return None if lines is None else (lines[0], lines[1])
