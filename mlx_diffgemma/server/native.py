"""Answers our own routes: to fill, edit and choose, which OpenAI's API has no words for."""

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi import Request as Http
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from ..images.picture import Picture
from ..tasks.choose import Choice, ChooseRequest
from ..tasks.edit import STRENGTH, EditRequest, EditResult
from ..tasks.fill import FillRequest, FillResult
from ..tasks.generate import Request
from ..tasks.request import Done, Draft, Prepared, Prompt, Task
from ..tasks.starts import Pieces
from ..text.tokenizer import Tokenizer
from ..text.turns import BadToolCall, Text
from .body import Body, Many, NonNegative, NotBlank, Steps
from .events import sse
from .pictures import ImageUrl, Sent, seen
from .refused import RESPONSES, Refused, stopping
from .service import Models, Service
from .stream import Lines, begun, draft_event, gathered
from .worker import Patience

# Gives an event as JSON for the client, once it is the result; empty before.
Facts = Callable[[object], dict[str, Any]]


# Makes a task of the pictures that came with it.
Asking = Callable[[Sequence[Picture]], Task[object]]


class Piece(Body):
    text: NotBlank
    pinned: bool = False


class FillBody(Body):
    model: str | None = None
    template: NotBlank | None = None
    canvas: Annotated[Many[Piece], Field(min_length=1)] | None = None
    prompt: str | None = None
    images: Many[str | ImageUrl] | None = None
    steps: Steps | None = None
    seed: NonNegative | None = None
    verify: bool | None = None
    stream_drafts: bool | None = None


class EditBody(Body):
    model: str | None = None
    text: NotBlank
    instruction: NotBlank
    lines: Annotated[Many[int], Field(min_length=2, max_length=2)] | None = None
    strength: Annotated[float, Field(gt=0, le=1)] = STRENGTH
    steps: Steps | None = None
    seed: NonNegative | None = None
    verify: bool | None = None
    stream_drafts: bool | None = None


class ChooseBody(Body):
    model: str | None = None
    prompt: NotBlank
    images: Many[str | ImageUrl] | None = None
    labels: Annotated[dict[str, Many[str]], Field(max_length=64)] | Many[str]
    template: str | None = None
    isolated: bool = False
    seed: NonNegative = 0
    draws: Annotated[int, Field(ge=1, le=64)] = 1


def router(models: Models) -> APIRouter:
    """Make the routes of fills, edits and choices."""
    routes = APIRouter()

    @routes.post("/v1/fill", responses=RESPONSES)
    async def fill(http: Http, body: FillBody) -> Response:
        if (body.template is None) == (body.canvas is None):
            raise Refused(400, "there must be either a template or a canvas")
        service = models.answering(body.model)

        def task(pictures: Sequence[Picture]) -> Task[object]:
            if body.template is None:
                length = service.worker.model.config.canvas_length
                return canvas_request(body, length, pictures)
            return FillRequest(
                body.template,
                body.prompt,
                body.steps,
                body.seed,
                verify=body.verify or False,
                images=pictures,
            )

        sent = _sent(body.images)
        return await _answered(service, http, body, task, FillFacts(), sent, body.stream_drafts)

    @routes.post("/v1/choose", responses=RESPONSES)
    async def choosing(http: Http, body: ChooseBody) -> Response:
        slots = body.labels if isinstance(body.labels, dict) else {"label": body.labels}

        def task(pictures: Sequence[Picture]) -> Task[object]:
            prompt = _behind(pictures, body.prompt)
            return ChooseRequest(prompt, slots, body.template, body.isolated, body.seed, body.draws)

        service = models.answering(body.model)
        return await _answered(service, http, body, task, choose_facts, _sent(body.images))

    @routes.post("/v1/edit", responses=RESPONSES)
    async def editing(http: Http, body: EditBody) -> Response:
        lines = None if body.lines is None else (body.lines[0], body.lines[1])
        task = EditRequest(
            body.text,
            body.instruction,
            lines,
            body.strength,
            body.steps,
            body.seed,
            verify=body.verify or False,
        )
        service = models.answering(body.model)
        return await _answered(
            service, http, body, lambda _: task, edit_facts, drafts=body.stream_drafts
        )

    return routes


async def _answered(
    service: Service,
    http: Http,
    body: Body,
    task: Asking,
    facts: Facts,
    sent: Sequence[Sent] = (),
    drafts: bool | None = False,
) -> Response:
    """Answer with the result of a task, with `drafts` as the end of a stream of them."""

    def make(patience: Patience) -> Prepared[object]:
        pictures = seen(sent, service.worker.model, patience.check)
        return service.worker.prepare(task(pictures), patience)

    work, patience = await service.make(http, make, slow=bool(sent))
    stream, headers = service.stream([work], patience), service.headers(body)
    if drafts:
        lines = _lines(await begun(http, stream), facts, service.worker.tokenizer)
        return Lines(lines, stream, headers)
    for _, event in await gathered(http, stream):
        if found := facts(event):
            return JSONResponse(found, headers=headers)
    raise stopping()


async def _lines(
    events: AsyncIterator[tuple[int, object]], facts: Facts, tokenizer: Tokenizer
) -> AsyncIterator[str]:
    """Write drafts and the result as server-sent events."""
    async for _, event in events:
        if isinstance(event, Draft):
            yield draft_event(0, event, tokenizer)
        if found := facts(event):
            yield sse(found)


def _sent(images: Sequence[str | ImageUrl] | None) -> list[Sent]:
    return [Sent.of(each, f"images[{i}]") for i, each in enumerate(images or ())]


def _behind(pictures: Sequence[Picture], text: str) -> Prompt:
    """A question behind pictures, or alone."""
    if not pictures:
        return text
    parts = [{"type": "image", "image": each} for each in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def canvas_request(body: FillBody, length: int, pictures: Sequence[Picture] = ()) -> Request:
    """Ask for a canvas of so many tokens, some of whose pieces are pinned."""
    pieces = tuple((piece.text, piece.pinned) for piece in body.canvas or ())
    shown = "".join(text if pinned else "..." for text, pinned in pieces)
    return Request(
        _behind(pictures, body.prompt or f"Fill: {shown}"),
        max_tokens=length,
        steps=body.steps,
        seed=body.seed,
        start=Pieces(pieces),
        verify=body.verify or False,
    )


class FillFacts:
    """Gives a filled template as JSON, or a filled canvas, whose text comes piece by piece."""

    def __init__(self) -> None:
        self._text = ""

    def __call__(self, event: object) -> dict[str, Any]:
        match event:
            case FillResult():
                return {
                    "text": event.text,
                    "values": event.values,
                    "denoising_steps": event.steps,
                    "positions_decoded": event.positions_decoded,
                    **encoded_facts(event.encoder_passes, event.positions_encoded),
                    "notes": list(event.notes),
                }
            case Text() | BadToolCall():  # the client sees what the model wrote
                self._text += event.text
            case Done():
                return {
                    "text": self._text,
                    "values": {},
                    "denoising_steps": event.denoising_steps,
                    "positions_decoded": event.positions_decoded,
                    **encoded_facts(event.encoder_passes, event.positions_encoded),
                    "notes": [],
                }
        return {}


def choose_facts(event: object) -> dict[str, Any]:
    """Give probabilities as JSON."""
    return event.facts() if isinstance(event, Choice) else {}


def edit_facts(event: object) -> dict[str, Any]:
    """Give an edited text as JSON."""
    if not isinstance(event, EditResult):
        return {}
    return {
        "text": event.text,
        "denoising_steps": event.steps,
        "positions_decoded": event.positions_decoded,
        **encoded_facts(event.encoder_passes, event.positions_encoded),
        "notes": list(event.notes),
    }


def encoded_facts(passes: int, positions: int) -> dict[str, int]:
    """Give what the encoder has verified as JSON, if it has."""
    return {"encoder_passes": passes, "positions_encoded": positions} if passes else {}
