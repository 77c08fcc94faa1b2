"""Checks and translates Anthropic's requests. Knows nothing of HTTP and nothing of threads."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from ..diffusion.guards import OFF, Guards
from ..tasks.generate import Request
from ..text.tokenizer import Message
from .body import Body, Budget, NonNegative, NotBlank, Positive, Steps
from .forced import forced_call
from .openai import stops
from .pictures import Sent
from .refused import Refused

ONLY = "only text, image, tool_use, tool_result, thinking and documents of plain text are supported"

# What stands between two blocks of text: programs send each as a paragraph of its own.
BETWEEN = "\n\n"


class Source(Body):
    """Where a picture or a document is: in base64, at an address, or as text."""

    type: str
    media_type: str | None = None
    data: str | None = None
    url: str | None = None


class Block(Body):
    type: str
    text: str | None = None
    source: Source | None = None
    id: NotBlank | None = None
    name: NotBlank | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: "str | list[Block] | None" = None
    is_error: bool | None = None
    thinking: str | None = None
    signature: str | None = None  # of a thought; nothing is signed here
    cache_control: dict[str, Any] | None = None  # what was read is kept anyway

    @property
    def has_pictures(self) -> bool:
        """Say whether it is a picture, or the result of a tool with one."""
        inner = self.content if isinstance(self.content, list) else ()
        return self.type == "image" or any(each.type == "image" for each in inner)


class TextBlock(Body):
    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = None


class ChatMessage(Body):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]

    @property
    def blocks(self) -> list[Block]:
        """Give the content as blocks."""
        if isinstance(self.content, str):
            return [Block(type="text", text=self.content)]
        return self.content


class Tool(Body):
    name: NotBlank
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None


class ThinkingConfig(Body):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Positive | None = None


class OutputFormat(Body):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    format: OutputFormat | None = None


class CountBody(Body):
    """Holds what is read of a request, whose tokens can be counted."""

    model: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    system: str | list[TextBlock] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """Give the schema of a guaranteed document."""
        form = None if self.output_config is None else self.output_config.format
        return None if form is None else form.schema_

    @property
    def slow(self) -> bool:
        """Say whether a few bytes may be long work: a schema, or pictures to decode."""
        blocks = (block for message in self.messages for block in message.blocks)
        return self.schema_of_answer is not None or any(each.has_pictures for each in blocks)


class MessagesBody(CountBody):
    max_tokens: Budget = None
    stop_sequences: Annotated[list[NotBlank], Field(max_length=16)] | None = None
    stream: bool | None = None
    metadata: dict[str, Any] | None = None  # says who asks, which changes nothing
    seed: NonNegative | None = None
    steps: Steps | None = None

    def unused(self) -> set[str]:
        """Name what means nothing beside a schema, whose document begins at once and is not cut."""
        if self.schema_of_answer is None:
            return set()
        told = {"stop_sequences": self.stop_sequences, "thinking": self.thinking}
        return {name for name, value in told.items() if value}


def begun_by(body: CountBody) -> str:
    """Give what an answer goes on with: the text of a last message that is the assistant's."""
    last = body.messages[-1]
    if last.role != "assistant" or any(each.type == "tool_use" for each in last.blocks):
        return ""
    return _joined([each.text or "" for each in last.blocks if each.type == "text"])


def message_request(body: CountBody, thinks: bool) -> Request:
    """Translate a request, without reading its pictures; the model `thinks`, where it knows how to.

    Raises:
        Refused: a combination or a content that is not supported.
    """
    tools = [_declaration(tool, f"tools[{i}]") for i, tool in enumerate(body.tools or ())]
    opening, choice, schema = begun_by(body), body.tool_choice, body.schema_of_answer
    if choice is not None and choice.type == "none":
        tools = []
    elif choice is not None and choice.type in ("any", "tool"):
        if opening:
            raise Refused(400, "tool_choice does not go with an answer that is begun already")
        opening = forced_call(tools, str(choice.name) if choice.type == "tool" else None)
    if schema is not None and opening:
        told = "output_config.format goes with neither a begun answer nor a forced tool call"
        raise Refused(400, told, param="output_config.format")
    guards, thinking = OFF, False
    if schema is None:
        config = body.thinking or ThinkingConfig(type="disabled")
        guards = Guards(thinking_budget=config.budget_tokens)
        thinking = config.type == "enabled" or (config.type == "adaptive" and thinks)
    return Request(
        messages_of(body),
        enable_thinking=thinking,
        schema=schema,
        guards=guards,
        tools=tools,
        opening=opening,
    )


def _declaration(tool: Tool, place: str) -> dict[str, Any]:
    """A tool as templates want it.

    Raises:
        Refused: it is one of those that run at Anthropic.
    """
    if tool.type not in (None, "custom"):
        told = f"{place}: only tools with an input_schema are supported, not {tool.type}"
        raise Refused(400, told, param=place)
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema or {"type": "object", "properties": {}},
    }
    known = {name: value for name, value in function.items() if value is not None}
    return {"type": "function", "function": known}


def messages_of(body: CountBody) -> list[Message]:
    """Write the chat down as templates want it; each picture is a `Sent` that nobody has read yet.

    Raises:
        Refused: a block that is not supported, or the result of a call that nobody has made.
    """
    found: list[Message] = []
    if isinstance(body.system, str):
        found.append({"role": "system", "content": body.system})
    elif body.system:
        text = _joined([each.text for each in body.system])
        found.append({"role": "system", "content": text})
    names: dict[str, str] = {}  # of the tools, by the ids of calls
    messages = body.messages[:-1] if begun_by(body) else body.messages
    for i, message in enumerate(messages):
        place = f"messages[{i}].content"
        if message.role == "assistant":
            found.append(_said(message.blocks, place, names))
        else:
            found += _asked(message, place, names)
    return found


def _joined(texts: Sequence[str]) -> str:
    return BETWEEN.join(each for each in texts if each)


def _said(blocks: Sequence[Block], place: str, names: dict[str, str]) -> Message:
    """What the assistant has said, thought and called; `names` learns the calls."""
    texts, thoughts, calls = list[str](), list[str](), list[dict[str, Any]]()
    for i, block in enumerate(blocks):
        match block.type:
            case "text" if block.text is not None:
                texts.append(block.text)
            case "thinking" if block.thinking is not None:
                thoughts.append(block.thinking)
            case "redacted_thinking":
                pass
            case "tool_use" if block.id and block.name and block.input is not None:
                names[block.id] = block.name
                function = {"name": block.name, "arguments": block.input}
                calls.append({"id": block.id, "type": "function", "function": function})
            case "tool_use":
                raise _missing(f"{place}[{i}]", "a tool_use needs id, name and input")
            case _:
                raise _missing(f"{place}[{i}]", ONLY)
    made: Message = {"role": "assistant", "content": _joined(texts)}
    if thoughts:
        made["reasoning"] = _joined(thoughts)
    if calls:
        made["tool_calls"] = calls
    return made


def _missing(place: str, told: str) -> Refused:
    return Refused(400, f"{place}: {told}", param=place)


def _asked(message: ChatMessage, place: str, names: dict[str, str]) -> list[Message]:
    """The results of tools, each a message of its own, and behind them what the user says.

    Pictures of results stand there, too: templates write none into a result.
    """
    results, parts = list[Message](), list[dict[str, Any]]()
    for i, block in enumerate(message.blocks):
        at = f"{place}[{i}]"
        if block.type != "tool_result":
            parts.append(_part(block, at))
            continue
        name = names.get(block.tool_use_id or "")
        if name is None:
            raise _missing(f"{at}.tool_use_id", "no call before it has this id")
        given = block.content or ""
        if not isinstance(given, str):
            shown = [_part(each, f"{at}.content[{j}]") for j, each in enumerate(given)]
            parts += [each for each in shown if each["type"] == "image"]
            given = _joined([each["text"] for each in shown if each["type"] == "text"])
        content = f"error: {given}" if block.is_error else given
        result = {"role": "tool", "tool_call_id": block.tool_use_id, "name": name}
        results.append({**result, "content": content})
    content_of: Any = parts
    if all(each["type"] == "text" for each in parts):
        content_of = _joined([each["text"] for each in parts])
    said = [{"role": message.role, "content": content_of}] if parts or not results else []
    return [*results, *said]


def _part(block: Block, place: str) -> dict[str, Any]:
    """A part of a content: text or a picture.

    Raises:
        Refused: it is something else.
    """
    source = block.source
    if block.type == "text" and block.text is not None:
        return {"type": "text", "text": block.text}
    if block.type == "document" and source and source.type == "text" and source.data is not None:
        return {"type": "text", "text": source.data}
    if block.type == "image" and source:
        if source.type == "base64" and source.data is not None:
            url = f"data:{source.media_type or 'image/png'};base64,{source.data}"
            return {"type": "image", "image": Sent(url, None, f"{place}.source.data")}
        if source.type == "url" and source.url is not None:
            return {"type": "image", "image": Sent(source.url, None, f"{place}.source.url")}
    raise _missing(place, ONLY)


def settings_of(body: MessagesBody) -> dict[str, Any]:
    """Give how it is answered, as fields of `Request`.

    Raises:
        Refused: a stop sequence is too long.
    """
    given = None if body.schema_of_answer is not None else body.stop_sequences
    return {
        "max_tokens": body.max_tokens,
        "steps": body.steps,
        "seed": body.seed,
        "stop": stops(given, "stop_sequences"),
    }
