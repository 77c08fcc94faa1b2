"""Checks and translates requests of OpenAI's Responses. Knows nothing of HTTP and of threads."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from ..diffusion.guards import OFF, Guards
from ..tasks.generate import Request
from ..tasks.request import MOST_TOP
from ..text.tokenizer import Message
from .body import Body, Budget, NonNegative, NotBlank, Steps
from .forced import forced_call
from .openai import arguments_of
from .pictures import Detail, Sent
from .refused import Refused

ONLY = "only text and input_image are supported, no files"

ITEMS = "only messages, reasoning, function_call and function_call_output are supported"

# What asks for log-probabilities.
LOGPROBS = "message.output_text.logprobs"

_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


class Part(Body):
    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: str | None = None
    detail: Detail | None = None
    annotations: list[Any] | None = None  # this and the next come back from answers
    logprobs: list[Any] | None = None


class Item(Body):
    """What was said, thought, called, or given by a tool."""

    type: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[Part] | None = None
    summary: list[Part] | None = None
    id: str | None = None
    status: str | None = None
    call_id: str | None = None
    name: NotBlank | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None
    encrypted_content: str | None = None

    @property
    def has_pictures(self) -> bool:
        """Say whether a part is a picture."""
        given = self.output if isinstance(self.output, list) else self.content
        return isinstance(given, list) and any(part.image_url is not None for part in given)


class Tool(Body):
    type: str
    name: NotBlank | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Format(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None  # it always is


class TextConfig(Body):
    format: Format | None = None


class Reasoning(Body):
    effort: str | None = None


class ResponsesBody(Body):
    model: str | None = None
    input: str | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    max_output_tokens: Budget = None
    text: TextConfig | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    metadata: dict[str, str] | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    background: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    seed: NonNegative | None = None
    steps: Steps | None = None

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """Give the schema of a guaranteed document.

        Raises:
            Refused: there has to be one and is none.
        """
        form = None if self.text is None else self.text.format
        if form is None or form.type == "text":
            return None
        if form.type == "json_object":
            return {"type": "object"}
        if form.schema_ is None:
            raise Refused(400, "text.format json_schema needs a schema", param="text.format.schema")
        return form.schema_

    @property
    def thinks(self) -> bool:
        """Say whether thoughts are asked for."""
        effort = None if self.reasoning is None else self.reasoning.effort
        return effort not in (None, "none", "minimal")

    @property
    def weighs(self) -> bool:
        """Say whether log-probabilities are asked for."""
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    @property
    def slow(self) -> bool:
        """Say whether a few bytes may be long work: a schema, or pictures to decode."""
        items = self.input if isinstance(self.input, list) else ()
        return self.schema_of_answer is not None or any(each.has_pictures for each in items)

    def unused(self) -> set[str]:
        """Name what means nothing here."""
        found = set()
        if self.schema_of_answer is not None and self.thinks:
            found.add("reasoning")
        if self.truncation == "auto":  # what does not fit is refused
            found.add("truncation")
        return found


def check(body: ResponsesBody) -> None:
    """Refuse what would be another answer if it were left out.

    Raises:
        Refused: it is asked for.
    """
    if body.background:
        raise Refused(
            400, "background: answers are not written in the background", param="background"
        )
    for name in ("conversation", "prompt"):
        if getattr(body, name) is not None:
            raise Refused(400, f"{name}: nothing is stored here by such a name", param=name)


def response_request(body: ResponsesBody, messages: Sequence[Message]) -> Request:
    """Translate a request, whose `messages` are those of all that was said before, too.

    Raises:
        Refused: a combination that is not supported.
    """
    tools = [_declaration(tool, f"tools[{i}]") for i, tool in enumerate(body.tools or ())]
    choice, schema, opening = body.tool_choice, body.schema_of_answer, ""
    if choice == "none":
        tools = []
    elif choice == "required":
        opening = forced_call(tools)
    elif isinstance(choice, dict):
        if choice.get("type") != "function":
            told = "tool_choice: a type other than function is not supported"
            raise Refused(400, told, param="tool_choice")
        opening = forced_call(tools, str(choice.get("name")))
    if schema is not None and opening:
        raise Refused(400, "text.format does not go with a forced tool call", param="text.format")
    system = [{"role": "system", "content": body.instructions}] if body.instructions else []
    return Request(
        [*system, *messages],
        max_tokens=body.max_output_tokens,
        steps=body.steps,
        seed=body.seed,
        enable_thinking=body.thinks and schema is None,
        schema=schema,
        guards=OFF if schema is not None else Guards(),
        tools=tools,
        opening=opening,
        top=body.top_logprobs or 0,
    )


def _declaration(tool: Tool, place: str) -> dict[str, Any]:
    """A tool as templates want it.

    Raises:
        Refused: it is one of those that run at OpenAI.
    """
    if tool.type != "function":
        raise Refused(400, f"{place}: only functions are supported, not {tool.type}", param=place)
    if tool.name is None:
        raise Refused(400, f"{place}.name: it is missing", param=f"{place}.name")
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters or {"type": "object", "properties": {}},
    }
    known = {name: value for name, value in function.items() if value is not None}
    return {"type": "function", "function": known}


def messages_of(body: ResponsesBody, before: Sequence[Message]) -> list[Message]:
    """Write down as templates want it what is said behind the messages `before`.

    What the assistant thinks, says and calls in a row is one message. Each picture is a `Sent`
    that nobody has read yet.

    Raises:
        Refused: an item or a part is not supported, or the result of a call that nobody has made.
    """
    if isinstance(body.input, str):
        return [{"role": "user", "content": body.input}]
    names = {
        call["id"]: call["function"]["name"] for m in before for call in m.get("tool_calls", ())
    }
    found: list[Message | _Turn] = []
    turn: _Turn | None = None  # the assistant's, while it goes on
    given: list[dict[str, Any]] = []  # pictures of results: templates write none into a result
    for i, item in enumerate(body.input):
        kind, place = item.type or "message", f"input[{i}]"
        if kind == "function_call_output":
            result, pictures = _result(item, place, names)
            found.append(result)
            given += pictures
            turn = None
            continue
        if given:
            found.append({"role": "user", "content": given})
            given = []
        if kind == "message" and item.role != "assistant":
            found.append(_asked(item, place))
            turn = None
            continue
        if turn is None:
            turn = _Turn()
            found.append(turn)
        turn.say(item, place, names)
    if given:
        found.append({"role": "user", "content": given})
    return [each.message() if isinstance(each, _Turn) else each for each in found]


def _asked(item: Item, place: str) -> Message:
    """What a user or the system says."""
    if item.role is None:
        raise Refused(400, f"{place}.role: it is missing", param=f"{place}.role")
    role = "system" if item.role == "developer" else item.role
    parts = _parts(item.content, f"{place}.content")
    if any(part["type"] == "image" for part in parts):
        return {"role": role, "content": parts}
    return {"role": role, "content": "".join(part["text"] for part in parts)}


def _parts(given: str | list[Part] | None, place: str) -> list[dict[str, Any]]:
    """A content as parts, of text and of pictures.

    Raises:
        Refused: a part is something else.
    """
    if not isinstance(given, list):
        return [{"type": "text", "text": given or ""}]
    found: list[dict[str, Any]] = []
    for i, part in enumerate(given):
        at = f"{place}[{i}]"
        if part.type in _TEXTS and part.text is not None:
            found.append({"type": "text", "text": part.text})
        elif part.type == "refusal" and part.refusal is not None:
            found.append({"type": "text", "text": part.refusal})
        elif part.type == "input_image" and part.image_url is not None:
            sent = Sent(part.image_url, part.detail, f"{at}.image_url")
            found.append({"type": "image", "image": sent})
        else:
            raise Refused(400, f"{at}: {ONLY}", param=at)
    return found


def _text(given: str | list[Part] | None, place: str) -> str:
    parts = _parts(given, place)
    if any(part["type"] == "image" for part in parts):
        raise Refused(400, f"{place}: it has pictures, which nobody but users and tools shows")
    return "".join(part["text"] for part in parts)


class _Turn:
    """What the assistant thinks, says and calls in a row."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._calls: list[dict[str, Any]] = []

    def say(self, item: Item, place: str, names: dict[str, str]) -> None:
        """Take what the assistant says, thinks or calls; `names` learns the calls.

        Raises:
            Refused: it is something else, or a call is not whole.
        """
        match item.type or "message":
            case "message":
                self._texts.append(_text(item.content, f"{place}.content"))
            case "reasoning":
                thought = _text(item.content, f"{place}.content") if item.content else ""
                self._thoughts.append(thought or _text(item.summary or "", f"{place}.summary"))
            case "function_call":
                if not item.call_id or item.name is None:
                    told = f"{place}: a function_call needs call_id and name"
                    raise Refused(400, told, param=place)
                names[item.call_id] = item.name
                arguments = arguments_of(item.name, item.arguments or "")
                function = {"name": item.name, "arguments": arguments}
                self._calls.append({"id": item.call_id, "type": "function", "function": function})
            case _:
                raise Refused(400, f"{place}: {ITEMS}", param=place)

    def message(self) -> Message:
        """Give the turn as templates want it."""
        found: Message = {"role": "assistant", "content": "".join(self._texts)}
        if any(self._thoughts):
            found["reasoning"] = "".join(self._thoughts)
        if self._calls:
            found["tool_calls"] = self._calls
        return found


def _result(item: Item, place: str, names: dict[str, str]) -> tuple[Message, list[dict[str, Any]]]:
    """The result of a call, and the pictures in it."""
    name = names.get(item.call_id or "")
    if name is None:
        at = f"{place}.call_id"
        raise Refused(400, f"{at}: no call before it has this id", param=at)
    parts = _parts(item.output, f"{place}.output")
    text = "".join(part["text"] for part in parts if part["type"] == "text")
    message: Message = {"role": "tool", "tool_call_id": item.call_id, "name": name, "content": text}
    return message, [part for part in parts if part["type"] == "image"]
