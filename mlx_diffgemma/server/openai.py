"""Checks and translates OpenAI's requests. Knows nothing of HTTP and nothing of threads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from ..diffusion.guards import OFF, Guards
from ..model.diffusion_gemma import DiffusionGemma
from ..tasks.engine import reseeded
from ..tasks.fill import FillRequest
from ..tasks.generate import Answer, Request
from ..tasks.modes import Mode
from ..tasks.request import MOST_TOP, Prepared, encode_text
from ..tasks.speculation import Acceptance
from ..text.template import Hole
from ..text.tokenizer import no_check
from ..text.vocabulary import Vocabulary
from .body import (
    MOST_NAME_CHARACTERS,
    UNLIMITED,
    Body,
    Budget,
    Many,
    NonNegative,
    NotBlank,
    Positive,
    Steps,
)
from .forced import forced_call
from .json_body import JsonError, read_json
from .pictures import ImageUrl, Sent, has_picture
from .refused import Refused, shortened

# Characters of a stop string: each beginning of it is looked for in what an answer adds.
MOST_STOP = 1000

ONLY = "only text content and image_url are supported, no audio or files"

# The hole between a prompt and a suffix.
MIDDLE = "middle"


class Sampling(Body):
    """Holds what the answering routes have in common."""

    model: str | None = None
    max_tokens: Budget = None
    seed: NonNegative | None = None
    steps: Steps | None = None
    stop: str | Annotated[Many[str], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    stream_drafts: bool | None = None
    opening: str | None = None
    mode: Mode | None = None
    verify: bool | None = None
    temperature: float | None = None
    acceptance: Acceptance | None = None

    @property
    def drawn(self) -> float | None:
        """The temperature, where the encoder writes; a canvas has a schedule of its own."""
        return self.temperature if self.mode in ("causal", "speculative") else None

    def unused(self) -> set[str]:
        """Name a temperature that means nothing here, but the one that never means anything."""
        idle = self.drawn is None and self.temperature not in (None, 1)
        return {"temperature"} if idle else set()


class FunctionCall(Body):
    name: NotBlank
    arguments: str | dict[str, Any] = "{}"


class MessageToolCall(Body):
    id: str | None = None
    type: str | None = None
    function: FunctionCall


class ContentPart(Body):
    type: str
    text: str | None = None
    image_url: str | ImageUrl | None = None


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Many[ContentPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: Many[MessageToolCall] | None = None
    reasoning_content: str | None = None


class FunctionDeclaration(Body):
    name: NotBlank
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ToolDeclaration(Body):
    type: Literal["function"]
    function: FunctionDeclaration


class JsonSchema(Body):
    name: str | None = None
    description: str | None = None
    strict: bool | None = None  # it always is
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatBody(Sampling):
    messages: Annotated[Many[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Budget = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    tools: Many[ToolDeclaration] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None
    enable_thinking: bool | None = None
    thinking_budget: Positive | None = None

    @property
    def has_pictures(self) -> bool:
        """Say whether there are pictures to decode, which a few bytes may make long work of."""
        contents = [message.content for message in self.messages]
        parts = (part for each in contents if isinstance(each, list) for part in each)
        return any(part.image_url is not None for part in parts)

    def unused(self) -> set[str]:
        """Name what means nothing beside a schema, whose document begins at once and is not cut."""
        found = super().unused()
        if _schema(self) is None:
            return found
        told = {
            "stop": self.stop,
            "enable_thinking": self.enable_thinking,
            "reasoning_effort": self.reasoning_effort,
            "thinking_budget": self.thinking_budget,
        }
        return found | {name for name, value in told.items() if value}


# Ids of a text, which are read as they are.
Ids = Annotated[list[NonNegative], Field(min_length=1, fail_fast=True)]


class CompletionBody(Sampling):
    prompt: (
        NotBlank
        | Annotated[list[NotBlank], Field(min_length=1, max_length=256, fail_fast=True)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=256, fail_fast=True)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    suffix: str | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(ge=1, le=16)] | None = None

    def unused(self) -> set[str]:
        """Name what means nothing to scores, and those where an answer is denoised."""
        if asks_scores(self):
            told = {
                "seed": self.seed,
                "steps": self.steps,
                "stop": self.stop,
                "mode": self.mode,
                "verify": self.verify,
                "temperature": self.drawn,
                "acceptance": self.acceptance,
            }
        else:
            told = {"logprobs": self.logprobs}
        return super().unused() | {name for name, value in told.items() if value is not None}


def messages_of(body: ChatBody) -> list[dict[str, Any]]:
    """Write the chat down as templates want it; each picture is a `Sent` that nobody has read yet.

    Raises:
        Refused: content that is neither text nor a picture, or tool arguments that are no JSON
            object.
    """
    found: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for i, message in enumerate(body.messages):
        content = _content(message.content, f"messages[{i}].content")
        role = "system" if message.role == "developer" else message.role
        made: dict[str, Any] = {"role": role, "content": content}
        if message.reasoning_content:
            made["reasoning"] = message.reasoning_content
        if message.tool_calls:
            made["tool_calls"] = calls = []
            for place, call in enumerate(message.tool_calls):
                arguments = call.function.arguments
                if isinstance(arguments, str):
                    arguments = arguments_of(call.function.name, arguments)
                identity = call.id or f"call_{len(found)}_{place}"
                names[identity] = call.function.name
                function = {"name": call.function.name, "arguments": arguments}
                calls.append({"id": identity, "type": "function", "function": function})
        if role == "tool":
            made["tool_call_id"] = message.tool_call_id
            made["name"] = message.name or names.get(message.tool_call_id or "", "tool")
        found.append(made)
    return found


def _content(given: str | list[ContentPart] | None, place: str) -> str | list[dict[str, Any]]:
    """A content as text, or as parts where there is a picture among them.

    Raises:
        Refused: a part is something else.
    """
    if not isinstance(given, list):
        return given or ""
    parts: list[dict[str, Any]] = []
    for i, part in enumerate(given):
        if part.type == "text" and part.text is not None:
            parts.append({"type": "text", "text": part.text})
        elif part.type == "image_url" and part.image_url is not None:
            sent = Sent.of(part.image_url, f"{place}[{i}].image_url")
            parts.append({"type": "image", "image": sent})
        else:
            raise Refused(400, ONLY, param=f"{place}[{i}]")
    if has_picture(parts):
        return parts
    return "".join(part["text"] for part in parts)


def arguments_of(name: str, text: str) -> dict[str, Any]:
    """Read the text of a tool call's arguments, checked as a body is; nothing is none.

    Raises:
        Refused: it is no JSON object.
    """
    told = f"the arguments of {shortened(name, MOST_NAME_CHARACTERS)} are no JSON object"
    try:
        found = read_json(text or "{}")
    except JsonError as error:
        raise Refused(400, f"{told}: {error}") from None
    if not isinstance(found, dict):
        raise Refused(400, told)
    return found


def _schema(body: ChatBody) -> dict[str, Any] | None:
    """Find the schema of a guaranteed document.

    Raises:
        Refused: there has to be one and is none.
    """
    form = body.response_format
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"type": "object"}
    if form.json_schema is None or form.json_schema.schema_ is None:
        raise Refused(400, "response_format json_schema needs json_schema.schema")
    return form.json_schema.schema_


def chat_request(body: ChatBody) -> Request:
    """Translate a chat, without its seed, and without reading its pictures.

    Raises:
        Refused: a combination that is not supported.
    """
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or []]
    opening = body.opening or ""
    if body.tool_choice == "none":
        tools = []
    elif body.tool_choice not in (None, "auto"):
        opening = _forced(body.tool_choice, tools)
    if body.top_logprobs and not body.logprobs:
        raise Refused(400, "top_logprobs goes with logprobs", param="top_logprobs")
    schema = _schema(body)
    if schema is not None and opening:
        raise Refused(400, "response_format goes with neither an opening nor a forced tool call")
    thinking = body.enable_thinking
    if thinking is None:
        thinking = body.reasoning_effort not in (None, "none", "minimal")
    return Request(
        messages_of(body),
        max_tokens=body.max_completion_tokens or body.max_tokens or UNLIMITED,
        steps=body.steps,
        enable_thinking=thinking and schema is None,
        schema=schema,
        guards=OFF if schema is not None else Guards(thinking_budget=body.thinking_budget),
        tools=tools,
        stop=() if schema is not None else stops(body.stop),
        opening=opening,
        mode=body.mode or "denoise",
        verify=body.verify or False,
        temperature=body.drawn,
        acceptance=body.acceptance,
        top=body.top_logprobs or 0,
    )


def _forced(choice: str | dict[str, Any], tools: Sequence[dict[str, Any]]) -> str:
    """Write the beginning of a call that has to be made; errors as in `forced_call`."""
    if not isinstance(choice, dict):
        return forced_call(tools)
    function = choice.get("function")
    return forced_call(tools, str(function.get("name") if isinstance(function, dict) else None))


def several(work: Prepared[object], count: int, seed: int | None) -> list[Answer]:
    """Repeat an answer with other seeds; it is encoded once."""
    assert isinstance(work, Answer)
    seeds = [None if seed is None else seed + i for i in range(count)]
    return [reseeded(work, each) for each in seeds]


def stops(given: str | Sequence[str] | None, name: str = "stop") -> tuple[str, ...]:
    """Give stop strings as a tuple; `name` is the field's.

    Raises:
        Refused: one is too long.
    """
    found = (given,) if isinstance(given, str) else tuple(given or ())
    if any(len(each) > MOST_STOP for each in found):
        raise Refused(400, f"{name}: a string may have {MOST_STOP} characters", param=name)
    return found


@dataclass(frozen=True)
class Continuation:
    """Asks the model to go on with a text, without a chat around it, as `request` says.

    Ids are taken as they are; text stands behind the token that begins texts.
    """

    text: str | list[int]
    request: Request

    def prepare(
        self,
        model: DiffusionGemma,
        vocabulary: Vocabulary,
        check: Callable[[], None] = no_check,
    ) -> Answer:
        """Encode the text, see `request.Task`.

        Raises:
            ContextError: the text does not fit.
            Error: as `Request.prepare`.
        """
        tokenizer, ids = vocabulary.tokenizer, self.text
        if isinstance(ids, str):
            ids = encode_text(tokenizer, ids, model.context, check)
            bos = tokenizer.token_id("<bos>")
            ids = ids if bos is None else [bos, *ids]
        return replace(self.request, prompt=ids).prepare(model, vocabulary, check)


def prompts_of(body: CompletionBody) -> list[str | list[int]]:
    """List the prompts, text or ids, each of which gets answers of its own."""
    if isinstance(body.prompt, str):
        return [body.prompt]
    prompts = [each for each in body.prompt if not isinstance(each, int)]
    return [*prompts] or [[each for each in body.prompt if isinstance(each, int)]]


def asks_scores(body: CompletionBody) -> bool:
    """Say whether only the prompt is to be scored, see `openai_scores.py`."""
    alone = bool(body.echo) and body.logprobs is not None and not body.suffix
    return body.max_tokens == 0 or (body.max_tokens == 1 and alone)


def best_of(body: CompletionBody) -> int:
    """Count the answers that are written for each prompt; the best of them are kept.

    Raises:
        Refused: they are wanted as a stream, which cannot wait for the best.
    """
    count = max(body.best_of or 1, body.n or 1)
    if body.stream and count > (body.n or 1):
        raise Refused(400, "best_of does not go with stream")
    return count


def continuations(body: CompletionBody) -> list[Continuation]:
    """Translate a completion, prompt by prompt, without its seed.

    Raises:
        Refused: a stop string is too long.
    """
    request = Request(
        "",
        max_tokens=body.max_tokens,
        steps=body.steps,
        guards=Guards(),
        stop=stops(body.stop),
        opening=body.opening or "",
        likelihood=best_of(body) > (body.n or 1),
        mode=body.mode or "denoise",
        verify=body.verify or False,
        temperature=body.drawn,
        acceptance=body.acceptance,
    )
    return [Continuation(prompt, request) for prompt in prompts_of(body)]


def infill(body: CompletionBody) -> FillRequest:
    """Translate a completion with a suffix: what stands between is the hole `MIDDLE`.

    Raises:
        Refused: more than one prompt or answer, a prompt of ids, or an opening.
    """
    prompt, *others = prompts_of(body)
    if others or (body.n or 1) > 1 or (body.best_of or 1) > 1 or body.opening:
        raise Refused(400, "a suffix goes with one prompt and one answer, without an opening")
    if not isinstance(prompt, str):
        raise Refused(400, "a suffix goes with a prompt of text, not of token ids")
    if body.verify or body.acceptance or body.mode not in (None, "denoise"):
        raise Refused(400, "a suffix goes with neither mode nor verify nor acceptance")
    hole = Hole(MIDDLE, most=body.max_tokens, line="\n" in stops(body.stop))
    parts: list[str | Hole] = [prompt, hole, body.suffix or ""]
    return FillRequest(parts, steps=body.steps, seed=body.seed, quick=True)


def wants_usage(body: Sampling) -> bool:
    """Say whether a stream ends with how many tokens there were."""
    return bool((body.stream_options or {}).get("include_usage"))
