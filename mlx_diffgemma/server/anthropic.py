"""Checks and translates Anthropic's requests. Knows nothing of HTTP and nothing of threads."""

from collections.abc import Sequence
from typing import Any

from ..diffusion.guards import OFF, Guards
from ..tasks.generate import Request
from ..text.tokenizer import Message
from .anthropic_body import Block, ChatMessage, CountBody, Given, MessagesBody, ThinkingConfig
from .anthropic_tools import MOVES, offered, told_of
from .body import UNLIMITED
from .forced import forced_call
from .openai import stops
from .pictures import Sent
from .refused import Refused

ONLY = (
    "only text, image, tool_use, tool_result, tool_reference, thinking and documents of plain text "
    "are supported"
)

# What stands between two blocks of text: programs send each as a paragraph of its own.
BETWEEN = "\n\n"


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
    tools = offered(body)
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


def _part(block: Given, place: str) -> dict[str, Any]:
    """A part of a content: text or a picture.

    Raises:
        Refused: it is something else.
    """
    source = block.source
    if block.type == "text" and block.text is not None:
        return {"type": "text", "text": block.text}
    if block.type in MOVES:
        return {"type": "text", "text": told_of(block)}
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
        "max_tokens": body.max_tokens or UNLIMITED,
        "steps": body.steps,
        "seed": body.seed,
        "stop": stops(given, "stop_sequences"),
    }
