"""Checks and translates Ollama's requests. Knows nothing of HTTP and nothing of threads."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ..diffusion.guards import OFF, Guards
from ..tasks.generate import Request
from ..tasks.request import MOST_TOP
from ..text.tokenizer import Message
from .body import UNLIMITED, Body, Many, NonNegative, NotBlank, Positive, Steps
from .openai import CompletionBody, Continuation, ToolDeclaration, stops
from .pictures import Sent
from .refused import Refused


def _none_below(least: int) -> BeforeValidator:
    """Take a number that is smaller for none: -1 and -2 say that nothing is set."""
    return BeforeValidator(lambda given: None if type(given) is int and given < least else given)


class Options(Body):
    num_predict: Annotated[Positive | None, _none_below(0)] = None
    seed: Annotated[NonNegative | None, _none_below(0)] = None
    stop: str | Annotated[Many[str], Field(max_length=16)] | None = None
    steps: Steps | None = None


class Asking(Body):
    """Holds what chats and completions have in common."""

    model: str | None = None
    stream: bool | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    think: bool | Literal["low", "medium", "high"] | None = None
    options: Options | None = None
    keep_alive: float | str | None = None  # the model stays as long as the server
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None

    @property
    def is_empty(self) -> bool:
        """Say whether nothing is asked, but that the model is there, or may go."""
        return False

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """Give the schema of a guaranteed document."""
        if isinstance(self.format, dict):
            return self.format
        return {"type": "object"} if self.format == "json" else None

    @property
    def slow(self) -> bool:
        """Say whether a few bytes may be long work: a schema, or pictures to decode."""
        return self.schema_of_answer is not None

    def unused(self) -> set[str]:
        """Name what means nothing beside a schema, whose document begins at once and is not cut."""
        if self.schema_of_answer is None:
            return set()
        stop = None if self.options is None else self.options.stop
        told = {"options.stop": stop, "think": self.think}
        return {name for name, value in told.items() if value}


class Function(Body):
    name: NotBlank
    arguments: dict[str, Any] = Field(default_factory=dict)


class Call(Body):
    id: str | None = None
    function: Function


class ChatMessage(Body):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: Many[str] | None = None
    tool_calls: Many[Call] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class ChatBody(Asking):
    messages: Many[ChatMessage] | None = None
    tools: Many[ToolDeclaration] | None = None

    @property
    def is_empty(self) -> bool:
        return not self.messages

    @property
    def slow(self) -> bool:
        return super().slow or any(each.images for each in self.messages or ())


class GenerateBody(Asking):
    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    images: Many[str] | None = None
    raw: bool | None = None

    @property
    def is_empty(self) -> bool:
        return not (self.prompt or self.suffix or self.images)

    @property
    def slow(self) -> bool:
        return super().slow or bool(self.images)


class ShowBody(Body):
    model: str | None = None
    name: str | None = None
    verbose: bool | None = None


def chat_request(body: ChatBody) -> Request:
    """Translate a chat, without reading its pictures.

    Raises:
        Refused: a combination that is not supported.
    """
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    return _request(body, _messages(body), tools)


def generate_request(body: GenerateBody) -> Request:
    """Translate a completion that is a question, without reading its pictures; errors as above."""
    parts = [_picture(each, f"images[{i}]") for i, each in enumerate(body.images or ())]
    text = body.prompt or ""
    content = [*parts, {"type": "text", "text": text}] if parts else text
    system = [{"role": "system", "content": body.system}] if body.system else []
    return _request(body, [*system, {"role": "user", "content": content}], [])


def continuation(body: GenerateBody) -> Continuation:
    """Translate a completion that is `raw`: the text is gone on with, without a chat around it.

    Raises:
        Refused: it has pictures or is said to be more than a text.
    """
    if body.images or body.system or body.think or body.schema_of_answer is not None:
        raise Refused(400, "raw goes with neither images, system, think nor format")
    return Continuation(body.prompt or "", _request(body, [], []))


def infilling(body: GenerateBody) -> CompletionBody:
    """Translate a completion with a suffix into OpenAI's words.

    Raises:
        Refused: nothing stands before it, or it is said to be more than two texts.
    """
    if body.images or body.system or body.think or body.schema_of_answer is not None:
        raise Refused(400, "a suffix goes with neither images, system, think nor format")
    if not body.prompt:
        raise Refused(400, "a suffix goes with a prompt", param="prompt")
    options = body.options or Options()
    return CompletionBody(
        prompt=body.prompt,
        suffix=body.suffix,
        max_tokens=options.num_predict,
        seed=options.seed,
        steps=options.steps,
        stop=options.stop,
    )


def _request(body: Asking, messages: list[Message], tools: list[dict[str, Any]]) -> Request:
    schema, options = body.schema_of_answer, body.options or Options()
    if body.top_logprobs and not body.logprobs:
        raise Refused(400, "top_logprobs goes with logprobs", param="top_logprobs")
    return Request(
        messages,
        max_tokens=options.num_predict or UNLIMITED,
        steps=options.steps,
        seed=options.seed,
        stop=stops(None if schema is not None else options.stop, "options.stop"),
        enable_thinking=bool(body.think) and schema is None,
        schema=schema,
        guards=OFF if schema is not None else Guards(),
        tools=tools,
        top=body.top_logprobs or 0,
    )


def _picture(data: str, place: str) -> dict[str, Any]:
    url = data if data[:5].lower() == "data:" else f"data:image/png;base64,{data}"
    return {"type": "image", "image": Sent(url, None, place)}


def _messages(body: ChatBody) -> list[Message]:
    """Write the chat down as templates want it; nobody has read its pictures yet."""
    found: list[Message] = []
    for i, message in enumerate(body.messages or ()):
        text, place = message.content or "", f"messages[{i}].images"
        parts = [_picture(each, f"{place}[{j}]") for j, each in enumerate(message.images or ())]
        content = [*parts, {"type": "text", "text": text}] if parts else text
        made: Message = {"role": message.role, "content": content}
        if message.thinking:
            made["reasoning"] = message.thinking
        if message.tool_calls:
            made["tool_calls"] = [
                {
                    "id": call.id or f"call_{i}_{j}",
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": call.function.arguments},
                }
                for j, call in enumerate(message.tool_calls)
            ]
        if message.role == "tool":
            made["name"] = message.tool_name or "tool"
            made["tool_call_id"] = message.tool_call_id
        found.append(made)
    return found
