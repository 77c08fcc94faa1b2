"""OpenAI's requests and answers, checked and translated. Nothing of HTTP and nothing of threads."""

import json
import math
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from ..diffusion.guards import OFF, Guards
from ..tasks.edit import STRENGTH
from ..tasks.generate import Answer, Request
from ..tasks.request import Done, Draft
from ..text.turns import BadToolCall, Text, Thought, ToolCall
from .json_body import JsonError, read_json

NonNegative = Annotated[int, Field(ge=0, lt=1 << 63)]

Positive = Annotated[int, Field(ge=1, le=1 << 20)]

Steps = Annotated[int, Field(ge=1, le=1000)]

NotBlank = Annotated[str, StringConstraints(min_length=1)]

# Characters of a stop string: each beginning of it is looked for in what an answer adds.
MOST_STOP = 1000


class Body(BaseModel):
    """What is not named here is reported as ignored, never dropped in silence."""

    model_config = ConfigDict(extra="allow", strict=True)


class Sampling(Body):
    """What the answering routes have in common."""

    model: str | None = None
    max_tokens: Positive | None = None
    seed: NonNegative | None = None
    steps: Steps | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    stream_drafts: bool | None = None
    opening: str | None = None


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


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[MessageToolCall] | None = None
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
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    tools: list[ToolDeclaration] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None
    enable_thinking: bool | None = None
    thinking_budget: Positive | None = None


class CompletionBody(Sampling):
    prompt: NotBlank | Annotated[list[NotBlank], Field(min_length=1, max_length=256)]
    suffix: str | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=16)] | None = None


class Piece(Body):
    text: NotBlank
    pinned: bool = False


class FillBody(Body):
    template: NotBlank | None = None
    canvas: Annotated[list[Piece], Field(min_length=1)] | None = None
    prompt: str | None = None
    steps: Steps | None = None
    seed: NonNegative | None = None
    stream_drafts: bool | None = None


class EditBody(Body):
    text: NotBlank
    instruction: NotBlank
    lines: Annotated[list[int], Field(min_length=2, max_length=2)] | None = None
    strength: Annotated[float, Field(gt=0, le=1)] = STRENGTH
    steps: Steps | None = None
    seed: NonNegative | None = None
    stream_drafts: bool | None = None


class ChooseBody(Body):
    prompt: NotBlank
    labels: Annotated[dict[str, list[str]], Field(max_length=64)] | list[str]
    template: str | None = None
    isolated: bool = False
    seed: NonNegative = 0
    draws: Annotated[int, Field(ge=1, le=64)] = 1


# Values that say nothing: clients send them without meaning anything by it.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "temperature": (1,),
    "top_p": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "user": ("",),
    "parallel_tool_calls": (True,),
    "strict": (False,),
}

# Names that are reported at most, and characters of each: they travel in a header.
MOST_NAMES = 50

MOST_NAME_CHARACTERS = 60

# Characters of an error's message, which may quote what was sent.
MOST_MESSAGE = 1000


class Refused(Exception):
    """An answer with an error status, in OpenAI's form."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


def error_body(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """What clients of OpenAI expect of an error."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    message = shortened(message, MOST_MESSAGE)
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def ignored(body: Body) -> list[str]:
    """Parameters that were sent and mean nothing here, those of parts of the body with a dot.

    They fit into a header: printable ASCII, and not too long.
    """
    names = sorted(_ignored(body))[:MOST_NAMES]
    return [shortened(ascii(name)[1:-1], MOST_NAME_CHARACTERS) for name in names]


def shortened(text: str, most: int) -> str:
    """Text of at most so many characters; what is cut says so."""
    return text if len(text) <= most else text[: most - 3] + "..."


def _ignored(body: Body) -> set[str]:
    found = {
        name
        for name, value in (body.model_extra or {}).items()
        if value is not None and value not in _NEUTRAL.get(name, ())
    }
    for name in type(body).model_fields:
        value = getattr(body, name)
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, Body):
                found |= {f"{name}.{inner}" for inner in _ignored(part)}
    if isinstance(body, ChatBody) and _schema(body) is not None:
        # A guaranteed document begins at once and is not cut.
        told = {"stop": body.stop, "enable_thinking": body.enable_thinking}
        told["reasoning_effort"] = body.reasoning_effort
        found |= {name for name, value in told.items() if value}
    return found


def messages_of(body: ChatBody) -> list[dict[str, Any]]:
    """The chat as templates want it.

    Raises:
        Refused: content that is not text, or tool arguments that are no JSON object.
    """
    found: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for message in body.messages:
        content = message.content
        if isinstance(content, list):
            if any(part.type != "text" or part.text is None for part in content):
                raise Refused(400, "only text content is supported, no images, audio or files")
            content = "".join(part.text or "" for part in content)
        role = "system" if message.role == "developer" else message.role
        made: dict[str, Any] = {"role": role, "content": content or ""}
        if message.reasoning_content:
            made["reasoning"] = message.reasoning_content
        if message.tool_calls:
            made["tool_calls"] = calls = []
            for i, call in enumerate(message.tool_calls):
                arguments = call.function.arguments
                if isinstance(arguments, str):
                    arguments = _arguments(call.function.name, arguments or "{}")
                if not isinstance(arguments, dict):
                    raise Refused(400, f"the arguments of {call.function.name} are no JSON object")
                identity = call.id or f"call_{len(found)}_{i}"
                names[identity] = call.function.name
                function = {"name": call.function.name, "arguments": arguments}
                calls.append({"id": identity, "type": "function", "function": function})
        if role == "tool":
            made["tool_call_id"] = message.tool_call_id
            made["name"] = message.name or names.get(message.tool_call_id or "", "tool")
        found.append(made)
    return found


def _arguments(name: str, text: str) -> Any:
    """What the text of a tool call's arguments says, checked as a body is.

    Raises:
        Refused: it is not JSON.
    """
    try:
        return read_json(text)
    except JsonError as error:
        name = shortened(name, MOST_NAME_CHARACTERS)
        raise Refused(400, f"the arguments of {name} are no JSON object: {error}") from None


def _schema(body: ChatBody) -> dict[str, Any] | None:
    """The schema of a guaranteed document.

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
    """The request of a chat, without its seed.

    Raises:
        Refused: a combination that is not supported.
    """
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or []]
    opening = body.opening or ""
    if body.tool_choice == "none":
        tools = []
    elif body.tool_choice not in (None, "auto"):
        opening = "<|tool_call>call:" + _named_tool(body.tool_choice, tools)
    schema = _schema(body)
    if schema is not None and opening:
        raise Refused(400, "response_format goes with neither an opening nor a forced tool call")
    thinking = body.enable_thinking
    if thinking is None:
        thinking = body.reasoning_effort not in (None, "none", "minimal")
    return Request(
        messages_of(body),
        max_tokens=body.max_completion_tokens or body.max_tokens,
        steps=body.steps,
        enable_thinking=thinking and schema is None,
        schema=schema,
        guards=OFF if schema is not None else Guards(thinking_budget=body.thinking_budget),
        tools=tools,
        stop=() if schema is not None else stops(body.stop),
        opening=opening,
    )


def _named_tool(choice: str | dict[str, Any], tools: Sequence[dict[str, Any]]) -> str:
    """How a call begins that has to be made.

    Raises:
        Refused: there is no such tool.
    """
    names = [tool["function"]["name"] for tool in tools]
    if not names:
        raise Refused(400, "tool_choice asks for a call, and there are no tools")
    if choice == "required":
        return names[0] + "{" if len(names) == 1 else ""
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if name not in names:
        raise Refused(400, f"tool_choice asks for {name}, which is not among the tools")
    return f"{name}{{"


def several(answer: Answer, count: int, seed: int | None) -> list[Answer]:
    """The same answer with other seeds."""
    seeds = [None if seed is None else seed + i for i in range(count)]
    return [replace(answer, seed=each) for each in seeds]


def stops(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop strings as a tuple.

    Raises:
        Refused: one is too long.
    """
    found = (given,) if isinstance(given, str) else tuple(given or ())
    if any(len(each) > MOST_STOP for each in found):
        raise Refused(400, f"stop: a string may have {MOST_STOP} characters")
    return found


class Choice:
    """One of the answers, put together from its events.

    `pieces` gives the text of tokens, and asks for their log-probabilities; None does not.
    """

    def __init__(self, pieces: Callable[[Sequence[int]], list[str]] | None = None) -> None:
        self._pieces = pieces
        self.text = self.thought = ""
        self.calls: list[dict[str, Any]] = []
        self.done: Done | None = None
        self.mean_entropy = 0.0
        self.logprobs: list[dict[str, Any]] = []
        self._draft: Draft | None = None

    def take(self, event: object) -> dict[str, Any]:
        """What the event adds, as a chat's delta; empty if nothing."""
        match event:
            case Text():
                self.text += event.text
                self._weigh(event.text)
                return {"content": event.text}
            case Thought():
                self.thought += event.text
                return {"reasoning_content": event.text}
            case ToolCall():
                call = {
                    "id": f"call_{uuid.uuid4().hex[:12]}",
                    "type": "function",
                    "function": {
                        "name": event.name,
                        "arguments": json.dumps(event.arguments, ensure_ascii=False),
                    },
                }
                self.calls.append(call)
                return {"tool_calls": [{"index": len(self.calls) - 1, **call}]}
            case BadToolCall():  # the client sees what the model wrote
                self.text += event.text
                return {"content": event.text}
            case Draft():
                self.mean_entropy = sum(event.entropies) / len(event.entropies)
                self._draft = event
            case Done():
                self.done = event
        return {}

    def _weigh(self, text: str) -> None:
        """Log-probabilities of the tokens that make up a text, from the step it was taken from."""
        if self._pieces is None or self._draft is None:
            return
        draft, self._draft = self._draft, None
        shown = [i for i in range(draft.end) if draft.visible[i]]
        pieces = self._pieces([draft.tokens[i] for i in shown])
        length = 0
        for i, piece in zip(shown, pieces, strict=True):
            if length >= len(text):  # a budget or a stop string has cut the rest
                break
            length += len(piece)
            logprob = math.log(max(draft.probabilities[i], 1e-30))
            facts = {"token": piece, "logprob": logprob, "bytes": list(piece.encode())}
            self.logprobs.append({**facts, "top_logprobs": []})

    @property
    def reason(self) -> str:
        """In OpenAI's words."""
        assert self.done is not None
        if self.calls:
            return "tool_calls"
        return {"stop": "stop", "length": "length"}.get(self.done.finish_reason, "stop")

    @property
    def facts(self) -> dict[str, Any]:
        """What OpenAI has no words for."""
        assert self.done is not None
        return {
            "finish": self.done.finish_reason,
            "denoising_steps": self.done.denoising_steps,
            "canvases": self.done.canvases,
            "mean_entropy": self.mean_entropy,
        }


def usage_of(choices: Sequence[Choice], per_prompt: int) -> dict[str, Any]:
    """Tokens of all answers; each prompt counts once, with the first of its answers."""
    done = [choice.done for choice in choices if choice.done is not None]
    prompt = sum(each.prompt_tokens for each in done[::per_prompt])
    written = sum(each.generated_tokens for each in done)
    cached = sum(each.cached_tokens for each in done[::per_prompt])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
